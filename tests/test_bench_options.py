"""The benchmarks' command lines: a name that fits nothing is refused, and scripts start by their path and with -m."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.foreign import __main__ as foreign
from benchmarks.quality import __main__ as quality

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("bench", "pattern", "arguments", "said"), [
    (foreign, "nonsense", [], "must fit one of 85 cells, as 'GPTQModel | 4-bit g128 sym v1'; 'nonsense' fits none"),
    (foreign, "nonsense", ["--write"], "'nonsense' fits none"),
    (quality, "nonsense", ["--quick"], "as 'tiny-llama | 4-bit g128 sym | ptq RTN | seed 0'; 'nonsense' fits none"),
    (quality, "nonsense", [], "'nonsense' fits none"),
    (foreign, "(", [], "argument --only: must be a regular expression, '(' is none: missing ), unterminated"),
    (quality, "(", ["--quick"], "argument --only: must be a regular expression, '(' is none: missing ), unterminated"),
])  # fmt: skip
def test_a_pattern_that_fits_nothing_is_refused(bench, pattern, arguments, said, monkeypatch, capsys):
    """Before anything is run or written."""
    monkeypatch.setattr(sys, "argv", ["bench", "--only", pattern, *arguments])
    monkeypatch.setattr(foreign, "_store", None)
    monkeypatch.setattr(quality, "_parent", None)
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_cells_that_fit_are_written_and_read(monkeypatch):
    made, stored = [], []
    monkeypatch.setattr(foreign.torch, "set_num_threads", lambda _: None)  # those of the tests after this one
    monkeypatch.setattr(foreign, "_write", lambda cell, place: made.append(place.name))
    monkeypatch.setattr(foreign, "compare_theirs", lambda place: {"read": place.parent.name})
    monkeypatch.setattr(foreign, "compare_ours", lambda parent, ours, tool, settings, place: {"by": tool})
    monkeypatch.setattr(foreign, "_store", lambda kind, key, entry: stored.append((kind, key, entry)))
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "3-bit g128 asym v2", "--write"])
    foreign.main()
    assert (made, stored) == (["GPTQModel-3-bit-g128-asym-v2"], [])
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "3-bit g128 asym v2|^gptq 4-bit sym read by vLLM"])
    foreign.main()
    assert [row[:2] for row in stored] == [
        ("theirs", "GPTQModel | 3-bit g128 asym v2"),
        ("ours", "gptq 4-bit sym read by vLLM"),
    ]
    assert stored[0][2]["read"] == "GPTQModel-3-bit-g128-asym-v2"
    assert stored[1][2]["by"] == "vLLM"


def test_rows_that_fit_are_made(monkeypatch):
    tasks = []
    monkeypatch.setattr(quality, "write_ids", lambda *_: "ids")
    monkeypatch.setattr(quality, "_compare", lambda parent, missing, *_: tasks.extend(task.key for task in missing))
    monkeypatch.setattr(quality.Store, "add", None)
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "[|] ptq (RTN|AWQ) [|]", "--again"])
    options = quality._options()
    quality._parent(options.parent[0], quality.Store(), options)
    cells = [f"tiny-llama | {cell.name} | ptq" for cell in quality.CELLS]
    assert tasks == [f"{cell} {rest}" for cell in cells for rest in ("RTN | seed 0", "AWQ | seed 0", "AWQ | seed 1")]


def start(*command):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")  # of which the scripts know nothing
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["big", "growth", "ranks"])
def test_a_script_starts_by_its_path_and_as_a_module(name):
    by_path, as_module = start(f"benchmarks/{name}.py", "--help"), start("-m", f"benchmarks.{name}", "--help")
    assert (by_path.returncode, as_module.returncode) == (0, 0), by_path.stderr + as_module.stderr
    assert by_path.stdout == as_module.stdout
    assert by_path.stdout.startswith(f"usage: {name}.py")


def test_a_large_model_and_an_output_are_required():
    run = start("benchmarks/big.py")
    assert run.returncode == 2
    assert "the following arguments are required: model, output" in run.stderr
