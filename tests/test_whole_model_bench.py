"""benchmarks/whole_model: models of the right shapes are written, timed and put in a table.

Oracles: transformers' own model of the configuration; gguf's own reader; figures worked out by hand.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ptq
from benchmarks.whole_model import __main__ as bench
from benchmarks.whole_model import processes
from benchmarks.whole_model.checkpoints import Packing, write_checkpoint
from benchmarks.whole_model.generate import measure
from benchmarks.whole_model.shapes import SHAPES
from benchmarks.whole_model.table import markdown, summarise
from ptq.nn.linear import QuantLinear

ROOT = Path(__file__).resolve().parent.parent
TINY = ["tiny", "tiny-qwen3"]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("packing", [None, Packing(128, head=False), Packing(32, head=True)], ids=str)
def test_a_checkpoint_loads_as_the_model_of_its_shape(tmp_path, name, packing):
    shape = SHAPES[name]
    write_checkpoint(shape, packing, tmp_path / "model")
    model = ptq.load(tmp_path / "model", device="cpu")
    packed = {path: m for path, m in model.named_modules() if isinstance(m, QuantLinear)}
    expected = 0 if packing is None else shape.layers * len(shape.linears()) + packing.head
    assert len(packed) == expected
    for index in range(shape.layers if packing is None else 0):
        for path, size in shape.linears().items():
            assert model.get_submodule(f"model.layers.{index}.{path}").weight.shape == size
    ids = torch.arange(5)[None]
    # Greedy with a fixed length: random weights have no end of text.
    assert model.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation="static").shape == (1, 8)


def test_a_checkpoint_that_exists_is_kept(tmp_path):
    (tmp_path / "model").mkdir()
    write_checkpoint(SHAPES["tiny"], None, tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())


@pytest.mark.parametrize("name", TINY)
def test_a_gguf_has_as_many_weights_as_the_checkpoint(tmp_path, name):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    script = ROOT / "benchmarks/whole_model/gguf_model.py"
    for _ in range(2):  # the second time it is kept
        subprocess.run([sys.executable, str(script), name, str(path)], check=True)
    tensors = gguf.GGUFReader(path).tensors
    write_checkpoint(SHAPES[name], None, tmp_path / "model")
    model = ptq.load(tmp_path / "model", device="cpu")
    assert sum(int(t.n_elements) for t in tensors) == sum(p.numel() for p in model.parameters())
    kinds = {len(t.shape): t.tensor_type.name for t in tensors}
    assert kinds == {1: "F32", 2: "Q4_0"}


def test_the_first_token_is_timed_apart_from_the_others():
    class Model:
        def generate(self, prompt, streamer, **settings):
            for _ in range(1 + settings["max_new_tokens"]):  # the prompt, then the tokens
                streamer.put(prompt)
            streamer.end()

    found = measure(Model(), torch.zeros(1, 4), {"max_new_tokens": 3})
    assert found.keys() == {"first_token", "token"}
    assert min(found.values()) > 0


def test_the_table_has_medians_spreads_and_ratios():
    def cell(row, *timings):
        runs = [{"first_token": first, "token": token} for first, token in timings]
        return {"row": row, "threads": 1, "rounds": [{"runs": runs, "warm_up": 2.0}, {"error": "died"}]}

    cells = {
        "a": cell("bf16", (4.0, 0.5)),
        "b": cell("4-bit g128", (1.0, 0.1), (2.0, 0.2), (4.0, 0.4)),
        "c": cell("llama.cpp Q4_0", (8.0, 0.25)),
        "d": {"row": "4-bit g128 compiled", "threads": 1, "rounds": [{"error": "died"}]},
    }
    text = markdown(summarise(cells), prompt=8)
    assert "| 4-bit g128 | 2.000 | 4.0 (2.0 to 8.0) 2.00x 4.00x | 5.0 (2.5 to 10.0) 2.50x 1.25x | 2.0 |" in text
    assert "| 4-bit g128 compiled | failed: died |" in text


def test_rows_without_a_peer_have_no_ratio_to_it():
    only = {"row": "bf16", "threads": 2, "rounds": [{"runs": [{"first_token": 1.0, "token": 0.5}], "warm_up": 0.0}]}
    assert "| bf16 | 1.000 | 8.0 (8.0 to 8.0) 1.00x - | 2.0 (2.0 to 2.0) 1.00x - |" in markdown(
        summarise({"": only}), 8
    )


def test_the_command_times_in_processes_and_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "WORK", tmp_path)
    file = tmp_path / "out" / "found.json"
    command = ["--shape", "tiny", "--only", "4-bit g128", "--threads", "1", "--rounds", "1", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["bench", *command, "--prompt", "8", "--new", "3", "--json", str(file)])
    bench.main()
    (cell,) = json.loads(file.read_text())["cells"].values()
    (found,) = cell["rounds"]
    assert len(found["runs"]) == 2
    assert any("4 bits" in kernel for kernel in found["kernels"])
    assert "| 4-bit g128 |" in capsys.readouterr().out


def test_a_process_that_fails_leaves_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "WORK", tmp_path)  # nothing was written there
    row = next(row for row in bench.ROWS if row.name == "bf16")
    found = processes.run(processes.Task("tiny", row, 1, 8, 3, 1), None)
    assert "there is no directory" in found["error"]
