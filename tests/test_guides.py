"""The pages for a task (docs/quantize.md, adapters.md, tasks.md, bits.md) do what they say.

Oracle: commands end with 0, Python runs as it stands, and the files that the text names are there. Each page starts
from what the pages before it left.
"""

import re
import shlex
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from ptq import cli
from ptq.config import load_config
from ptq.plan import make_plan
from ptq.plan_size import estimate_size

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"```(bash|python)\n(.+?)```", re.DOTALL)


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like the repository's root and may be written to."""
    directory = tmp_path_factory.mktemp("guides")
    (directory / "examples").symlink_to(ROOT / "examples")
    return directory


def follow(text: str) -> int:
    """Run every command and every piece of Python of a page, in order; how many there were."""
    names: dict[str, object] = {}
    count = 0
    for language, block in BLOCK.findall(text):
        if language == "python":
            exec(compile(block, "page", "exec"), names)
            count += 1
            continue
        for command in block.splitlines():
            program, *arguments = shlex.split(command)
            assert program == "ptq"
            assert cli.main(arguments) == 0, command
            count += 1
    return count


PAGES = {
    "quantize.md": (
        9,
        [
            "first/report.html",
            "first/model.safetensors",
            "rounded/config.json",
            "own-data/report.json",
            "in-memory/config.json",
        ],
    ),
    "adapters.md": (4, ["adapter/adapter_model.safetensors", "merged/model.safetensors"]),
    "tasks.md": (1, ["tasks.json"]),
    "bits.md": (2, []),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs_as_it_stands(name, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
    count, written = PAGES[name]
    if name != "quantize.md" and not (place / "out/first").exists():
        follow(page("quantize.md"))
    assert follow(page(name)) == count
    for path in written:
        assert (place / "out" / path).is_file()


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#:]+)\)", page(name)):
        assert (ROOT / "docs" / target).exists(), target


def test_the_task_shown_is_the_one_in_the_file():
    shown = re.findall(r"```yaml\n(.+?)```", page("tasks.md"), re.DOTALL)
    assert len(shown) == 1
    assert shown[0] in (ROOT / "examples/tasks/capitals.yaml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def table():
    spec = util.spec_from_file_location("size_table", ROOT / "scripts/size_table.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Of the models' own pages: parameters in their safetensors files.
PUBLISHED = {
    "Qwen3-0.6B": 596_049_920,
    "Llama-3.2-1B": 1_235_814_400,
    "Qwen3-4B": 4_022_468_096,
    "Llama-3-8B": 8_030_261_248,
    "Qwen3-32B": 32_762_123_264,
    "Mixtral-8x7B": 46_702_792_704,
    "Llama-3-70B": 70_553_706_496,
}


def test_the_tables_of_sizes_are_those_of_the_script(table):
    found = {name: table.sizes(settings) for name, settings in table.MODELS.items()}
    assert {name: each.parameters for name, each in found.items()} == PUBLISHED
    assert table.size_table(found) in page("bits.md")
    assert table.fit_table(found) in page("bits.md")


def test_the_script_of_the_tables_has_help():
    run = subprocess.run([sys.executable, ROOT / "scripts/size_table.py", "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert run.stdout.startswith("usage: scripts/size_table")
    assert 'size_table.py "$@"' in (ROOT / "scripts/size_table").read_text(encoding="utf-8")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_script_counts_as_a_plan_does(table, bits, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    plan = make_plan(load_config("demo.yaml", [f"bits={bits}", f"output={tmp_path / 'out'}"]))
    settings = {**plan.hf_config.to_dict(), "model_type": "llama"}
    assert table.sizes(settings).checkpoint[bits] == estimate_size(plan).after
