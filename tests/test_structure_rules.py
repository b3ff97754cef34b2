"""The rules of the house: who may import whom, how long things may be, and that ruff and mypy have nothing to say.

Oracle: the syntax trees of the sources against the table below, which docs/architecture.md explains.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Layer(NamedTuple):
    """Modules that may import lower layers, and each other: anywhere in the layer, or inside one package only."""

    modules: str
    mutual: bool


LAYERS = [
    Layer(  # words and arithmetic: torch and the standard library (and yaml in yaml_tree)
        "ptq.errors ptq.version ptq.schema ptq.yaml_tree ptq.half_products "
        "ptq.allocator ptq.config_paths ptq.routing ptq.distributed ptq.grid ptq.grid_search ptq.squares ptq.loss "
        "ptq.gate ptq.affixes ptq.page ptq.page_scale ptq.page_report "
        "ptq.formats.codec ptq.formats.bitpack ptq.formats.capability ptq.formats.checks ptq.formats.staging",
        mutual=True,
    ),
    Layer(  # solvers and codecs: tensors in, tensors out; and what a run is
        "ptq.config ptq.rtn ptq.gptq ptq.gptq.solver ptq.gptq.inverse ptq.gptq.columns "
        "ptq.gptq.candidates ptq.gptq.descent ptq.gptq.outputs ptq.awq.solver "
        "ptq.gguf.blocks ptq.gguf.rounding ptq.gguf.carry ptq.gguf.mix "
        "ptq.formats.gptq ptq.formats.awq ptq.formats.compressed_tensors ptq.formats.auto_round",
        mutual=False,
    ),
    Layer(
        "ptq.models ptq.models.* ptq.calibration ptq.calibration.* ptq.formats ptq.formats.* ptq.nn ptq.nn.* "
        "ptq.gguf ptq.gguf.*",
        mutual=False,
    ),
    Layer(  # one block
        "ptq.task ptq.hidden ptq.journal ptq.journal_directory ptq.refine ptq.refine.* "
        "ptq.gptq.block ptq.awq ptq.awq.fold ptq.awq.block ptq.block ptq.progress ptq.report "
        "ptq.budget ptq.gguf.block",
        mutual=True,
    ),
    Layer(  # a whole model
        "ptq.packed ptq.integration ptq.integration.* "
        "ptq.pipeline ptq.plan ptq.plan_size ptq.plain ptq.plain_runs ptq.passed_over ptq.runtime ptq.evaluate "
        "ptq.evaluation ptq.inspection ptq.walk ptq.end_to_end ptq.predict ptq.predict_memory ptq.predict_time "
        "ptq.journal_signature ptq.budget_measure ptq.float_stream ptq.output_moments "
        "ptq.readers ptq.tensor_parallel ptq.lint_values ptq.lint ptq.parent ptq.card ptq.push "
        "ptq.prepared ptq.compare ptq.compare_page ptq.sweep ptq.export ptq.export_packed ptq.export_solve "
        "ptq.adapters ptq.adapter_merge ptq.tasks",
        mutual=True,
    ),
    Layer(
        "ptq.cli ptq.cli_compare ptq.cli_ending ptq.cli_places ptq.cli_push ptq.cli_adapters ptq.cli_tasks "
        "ptq.cli_tune ptq ptq.__main__ ptq.*.__main__",
        mutual=True,
    ),
]
PURE = [  # tensors in, tensors out: no files, no progress bars, no models
    *("ptq.grid", "ptq.grid_search", "ptq.squares", "ptq.loss", "ptq.rtn", "ptq.gptq.solver"),
    *(
        "ptq.gptq.inverse",
        "ptq.gptq.columns",
        "ptq.gptq.candidates",
        "ptq.gptq.descent",
        "ptq.gptq.outputs",
        "ptq.awq.solver",
    ),
    *("ptq.formats.codec", "ptq.formats.bitpack", "ptq.formats.gptq", "ptq.formats.awq"),
    *("ptq.formats.compressed_tensors", "ptq.gguf.blocks", "ptq.gguf.rounding", "ptq.gguf.carry"),
    *("ptq.gguf.mix", "ptq.gguf.solver"),
]
IMPURE = {"transformers", "datasets", "accelerate", "yaml", "tqdm", "rich", "logging", "safetensors"}
LAZY = {"transformers", "datasets", "accelerate", "triton", "compressed_tensors", "huggingface_hub", "gguf"}


class Import(NamedTuple):
    module: str  # dotted name of what is imported
    line: int
    lazy: bool  # inside a function, or for type checking only


def sources() -> dict[str, Path]:
    """Every module of the repository by its dotted name."""
    found = {}
    for top in (ROOT / "ptq", ROOT / "kernels/ptq_kernels"):
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()
OURS = [name for name in SOURCES if name.split(".")[0] == "ptq"]
KERNELS = [name for name in SOURCES if name.split(".")[0] == "ptq_kernels"]


def walk(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        yield child, lazy
        yield from walk(child, lazy or deferred or typing_only)


def imports(name: str) -> list[Import]:
    found = []
    for node, lazy in walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: write the whole name, not a relative import"
            base = node.module or ""
            inner = [f"{base}.{alias.name}" for alias in node.names]
            found += [Import(one if one in SOURCES else base, node.lineno, lazy) for one in inner]
    return found


def package(name: str) -> str:
    return name if SOURCES[name].name == "__init__.py" else name.rpartition(".")[0]


def layer(name: str) -> int:
    # An exact name wins over a wildcard: ptq.formats.gptq lies below ptq.formats.*
    for wildcard in (False, True):
        for index, entry in reversed(list(enumerate(LAYERS))):
            for pattern in entry.modules.split():
                if ("*" in pattern) == wildcard and fnmatchcase(name, pattern):
                    return index
    pytest.fail(f"{name} has no layer: place it in LAYERS of {Path(__file__).name} and in docs/architecture.md")


@pytest.mark.parametrize("name", OURS)
def test_imports_point_downwards(name):
    mine = layer(name)
    for used in imports(name):
        if used.module.split(".")[0] != "ptq" or used.module == name:
            continue
        theirs = layer(used.module)
        same_package = package(name) == package(used.module) != "ptq"
        allowed = theirs < mine or (theirs == mine and (LAYERS[mine].mutual or same_package))
        assert allowed, f"{name}:{used.line} (layer {mine}) imports {used.module} (layer {theirs})"


def test_the_package_imports_itself_lazily():
    assert all(used.lazy or not used.module.startswith("ptq.") for used in imports("ptq"))


@pytest.mark.parametrize("name", list(SOURCES))
def test_heavy_packages_are_imported_where_they_are_used(name):
    """What triton/ and integration/quantizer.py are written in; they are imported lazily themselves."""
    allowed = {"triton"} if name.startswith("ptq_kernels.triton") else set()
    allowed |= {"transformers"} if name == "ptq.integration.quantizer" else set()
    for used in imports(name):
        top = used.module.split(".")[0]
        assert used.lazy or top not in LAZY - allowed, f"{name}:{used.line}: import {top} in the function that needs it"
        if not name.startswith("ptq_kernels.triton"):
            assert used.lazy or not used.module.startswith("ptq_kernels.triton"), f"{name}:{used.line}"
        assert used.lazy or used.module != "ptq.integration.quantizer", f"{name}:{used.line}"


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_need_torch_only(name):
    allowed = {"torch", "ptq_kernels", *sys.stdlib_module_names}
    allowed |= {"triton"} if name.startswith("ptq_kernels.triton") else set()
    assert {used.module.split(".")[0] for used in imports(name)} <= allowed


def test_few_modules_of_ptq_know_the_kernels():
    users = {name for name in OURS for used in imports(name) if used.module.split(".")[0] == "ptq_kernels"}
    allowed = {
        "ptq.nn.linear",
        "ptq.nn.kernels",
        "ptq.gptq.columns",
        "ptq.grid_search",
        "ptq.refine.steps",
        "ptq.half_products",
    }
    assert users <= allowed | {"ptq.cli", "ptq.cli_tune"}


def test_implementations_of_a_kernel_do_not_know_each_other():
    def family(name: str) -> str | None:
        part = [*name.split("."), ""][1]
        return part if part in {"reference", "triton", "cpu"} else None

    for name in KERNELS:
        for used in imports(name):
            other = family(used.module) if used.module.startswith("ptq_kernels") else None
            assert None in (family(name), other) or family(name) == other, f"{name}:{used.line}: {used.module}"


@pytest.mark.parametrize("name", [name for name in PURE if name in SOURCES])
def test_solvers_and_codecs_know_tensors_only(name):
    assert not {used.module.split(".")[0] for used in imports(name)} & IMPURE


@pytest.mark.parametrize("name", list(SOURCES))
def test_files_and_functions_are_short(name):
    text = SOURCES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, f"{SOURCES[name]}: split it by what it knows"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 80, f"{SOURCES[name]}:{node.lineno}: {node.name} has {length} lines; split it"


def test_other_sources_are_short():
    for suffix in ("py", "cpp", "h", "cu"):
        for path in (ROOT / "kernels").rglob(f"*.{suffix}"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


def test_no_drawer_for_odds_and_ends():
    assert not [path for top in ("ptq", "kernels", "tests") for path in (ROOT / top).rglob("util*.py")]


def test_kernels_is_a_directory_not_a_package():
    """transformers probes for a package called ``kernels`` and imports whatever is there."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "tests/kernels").exists()


def fresh(code: str) -> str:
    """What ``code`` prints in a new interpreter started in the repository's root."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_transformers_loads_beside_the_kernels_directory():
    assert fresh("from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)") == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["ptq", "ptq_kernels", "ptq.config", "ptq.cli", "ptq.calibration.data"])
def test_importing_is_light(name):
    heavy = ["transformers", "datasets", "accelerate", "triton", "compressed_tensors"]
    code = f"import sys; sys.path.insert(0, 'kernels'); import {name}; print([m for m in {heavy} if m in sys.modules])"
    assert fresh(code) == "[]"


@pytest.mark.parametrize("name", ["ptq", "ptq.cli"])
def test_importing_is_instant(name):
    assert fresh(f"import sys, {name}; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("tool", [["ruff", "check", "--quiet", "."], ["mypy"]], ids=["ruff", "mypy"])
def test_the_checkers_are_silent(tool):
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
