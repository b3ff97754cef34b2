"""Compiles the C++ libraries of ptq_kernels.cpu: ``python -m ptq_kernels.build``, or setup.py while installing.

One source, one library for each instruction set, so that neither linker nor loader can mix wide and narrow copies of an
inline function. The libraries have a plain C interface and link neither torch nor Python nor OpenMP: they outlive
upgrades of all three. This file needs the standard library only, as setup.py runs where torch is not installed.
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "cpu" / "library.cpp"
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512cd")
FLAGS = {
    "amx": (*_AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
    "avx512vnni": (*_AVX512, "-mavx512vnni"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "neon": (),  # part of every 64-bit Arm processor
}
# Not -ffast-math: NaN and rounding matter. The warnings come from the compiler's own headers (gcc 12).
_COMMON = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-Wno-uninitialized", "-Wno-maybe-uninitialized")


def on_arm() -> bool:
    """Whether this is a 64-bit Arm machine; Linux calls them aarch64, macOS arm64."""
    return platform.machine() in ("aarch64", "arm64")


def of_this_machine() -> tuple[str, ...]:
    """The instruction sets that its processors may have."""
    if sys.platform in ("linux", "darwin") and on_arm():
        return ("neon",)
    if sys.platform == "linux" and platform.machine() == "x86_64":
        return tuple(name for name in FLAGS if name != "neon")
    return ()


def refuse() -> str | None:
    """Why this machine has no use for the libraries; None: it may."""
    if of_this_machine():
        return None
    known = "Linux on x86_64 and aarch64 and for macOS on arm64"
    return f"they are for {known}, this is {sys.platform} on {platform.machine()}"


def file_name(name: str) -> str:
    """The library of the instruction set `name`."""
    return f"_qmm_{name}.so"


def compile_library(name: str, directory: Path) -> None:
    """Compile the library of one instruction set into `directory`, with ``$CXX`` or ``c++``.

    Raises RuntimeError with the compiler's own words where that fails.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    target = directory / file_name(name)
    directory.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}")  # replaced at once: another process may hold the old one
    command = [*compiler, *_COMMON, *FLAGS[name], str(SOURCE), "-o", str(partial)]
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"a C++ compiler is required, {compiler[0]} cannot run ({error}); set CXX") from None
    if run.returncode != 0:
        partial.unlink(missing_ok=True)
        raise RuntimeError(
            f"{compiler[0]} could not compile {SOURCE.name} for {name} (exit {run.returncode}); use gcc 12, "
            f"clang 16 or newer:\n{run.stderr.strip()[-2000:]}"
        )
    partial.replace(target)


def compile_all(directory: Path) -> dict[str, str | None]:
    """Compile every library of this machine that the compiler can; for each instruction set why not, or None."""
    failures: dict[str, str | None] = {}
    for name in of_this_machine():
        try:
            compile_library(name, directory)
            failures[name] = None
        except RuntimeError as error:
            failures[name] = str(error)
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile beside the sources and say what there is; 1 if there is nothing."""
    about = "Compiles the CPU libraries beside their sources, with $CXX or c++: one for each instruction set."
    argparse.ArgumentParser(prog="python -m ptq_kernels.build", description=about).parse_args(arguments)
    if reason := refuse():
        print(f"ptq_kernels: no CPU libraries: {reason}")
        return 1
    failures = compile_all(SOURCE.parent)
    for name, reason in failures.items():
        print(f"{file_name(name)}: {reason or 'built'}")
    return int(all(failures.values()))


if __name__ == "__main__":
    sys.exit(main())
