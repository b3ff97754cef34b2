"""Builds the C++ libraries of ptq_kernels.cpu where a compiler is there; pyproject.toml has everything else."""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

_HERE = Path(__file__).resolve().parent
_PACKAGE = "ptq_kernels.cpu"


def _load_build():
    """ptq_kernels/build.py without its package, which imports torch."""
    spec = importlib.util.spec_from_file_location("build_libraries", _HERE / "kernels/ptq_kernels/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_build = _load_build()


class BuildLibraries(build_ext):
    """Plain libraries instead of extension modules; one that does not compile is left out."""

    def build_extension(self, ext):
        """Compile one library; products are correct without it, only slower, so a failure is one line."""
        directory = Path(self.get_ext_fullpath(ext.name)).parent
        try:
            _build.compile_library(ext.name.removeprefix(f"{_PACKAGE}._qmm_"), directory)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            print(f"ptq_kernels: {self.get_ext_filename(ext.name)} left out, CPU products will be slower: {reason}")

    def get_ext_filename(self, fullname):
        """Without Python's version in it: the library does not depend on that."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def get_outputs(self):
        """Only what was built."""
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self):
        """Editable installs: beside the sources, where the libraries were built."""
        command = self.get_finalized_command("build_py")
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            if built.exists():
                self.copy_file(str(built), command.get_package_dir(_PACKAGE))


extensions = []
if _build.refuse() is None:
    sources = [str(_build.SOURCE.relative_to(_HERE))]
    extensions = [Extension(f"{_PACKAGE}._qmm_{name}", sources) for name in _build.of_this_machine()]

setup(ext_modules=extensions, cmdclass={"build_ext": BuildLibraries})
