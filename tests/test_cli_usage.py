"""What a command line or a configuration asks for wrongly. Oracle: one sentence, exit code 2, and no file written."""

import json
import os
import shutil
import socket
import threading
from pathlib import Path

import foreign_files
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import MODEL, SMALL, TEXT, quantize

from ptq import cli
from ptq.cli_ending import printable


@pytest.mark.parametrize(("verb", "arguments", "message"), [
    ("eval", ["--text", "a.txt", "--device", "nonsense"], "device must be auto, cpu, cuda or cuda:N; found 'nonsense'"),
    ("eval", ["--text", "a.txt", "--json", "no-such/x.json"], "in a directory that exists; no-such does not"),
    ("eval", ["--text", "a.txt", "--window", "64", "--stride", "65"], "--stride must be at most --window (64), found"),
    ("eval", ["--text", "a.txt", "--tokens", "511"], "--tokens must hold a window of 512 for each of 1 file"),
    ("compare", ["--text", "a.txt", "--parent", "x", "--window", "1"], "--window must be 2 or more, found 1"),
    ("eval", ["--text", "a.txt", "--json", "."], "--json must name a file, . is a directory: name a file in it"),
    ("inspect", ["--html", str(TEXT)], f"--html must name a file, {TEXT} is a directory: name a file in it"),
    ("inspect", ["--html", "/proc/x.html"], "--html must name a file that can be written; /proc takes none"),
    ("eval", ["--text", "~nobody-of-that-name/a.txt"], "must begin with a home directory that there is, found none"),
    ("export", ["--type", "F16", "--device", "cpu"], "--device needs --text FILE to solve on; found none"),
    ("export", ["--type", "F16", "--column", "story"], "--column needs --text FILE to solve on; found none"),
    ("export", ["--type", "Q4_0", "--config", "demo.yaml", "--samples", "3"], "found --config, which has its own"),
    ("export", ["--type", "Q4_0", "--text", "a.txt", "--samples", "0"], "--samples must be 1 or more, found 0"),
    ("export", ["--type", "Q4_0", "--text", "a.txt", "--length", "1"], "--length must be 2 or more, found 1"),
    ("eval", ["--text", "a.txt", "--batch-size", "0"], "--batch-size needs --tasks NAMES"),
    ("eval", ["--text", "a.txt", "--tasks", ","], "--tasks must name tasks, separated by commas; found ','"),
    ("eval", ["--text", ""], "text must be a path or a name, found nothing: write one, or leave the option out"),
    ("eval", ["--text", "a.txt", "--parent", ""], "parent must be a path or a name, found nothing"),
    ("eval", ["--text", "a.txt", "--tokens", str(2**63)], f"--tokens must be a number of 64 bits, found {2**63}"),
    ("push", ["--repo", "a/b", "--dry-run", "--revision", "a b"], "--revision must be a name that git takes for a"),
    ("push", ["--repo", "a/b", "--dry-run", "--revision", "../x"], "for a branch, found '../x'"),
    ("push", ["--repo", "a/b", "--dry-run", "--revision", "a.lock"], "for a branch, found 'a.lock'"),
    ("eval", ["--text", "a.txt", "--json="], "json must be a file, found nothing: write one, or leave the option out"),
    ("push", ["--repo", "a/b", "--dry-run", f"--out={MODEL}/sub"], "--out must not be inside the checkpoint, found"),
])  # fmt: skip
def test_options_that_cannot_be_followed(
    verb: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([verb, str(MODEL), *arguments]) == 2
    assert message in capsys.readouterr().err


USAGE = {
    "misspelt key": (["calibratoin.samples=2"], "did you mean calibration"),
    "wrong type": (["calibration.samples=many"], "calibration.samples"),
    "missing model": (["model=./no-such-model"], "no-such-model"),
    "group does not divide": (["group_size=96"], "96"),
    "format cannot hold it": (["format=awq", "bits=8"], "compressed-tensors"),
    "pattern matches nothing": (["exclude=[lm_head, mlp.down_projj]"], "down_proj or model.layers.7.mlp.down_proj?"),
    "everything excluded": (["exclude=[lm_head, model]"], "at least one Linear"),
    "head in and out": (["overrides={lm_head: {bits: 8}}"], "overrides of lm_head have no effect while `exclude` has"),
    "outside blocks": (["exclude=[]", "overrides={lm_head: {group_size: 100}}"], "lm_head"),
    "too long for the model": (["calibration.sequence_length=4096"], "context of 1024"),
    "window too long": (["evaluation.window=4096", "evaluation.tokens=9000"], "context of 1024"),
    "missing text": (["calibration.dataset={files: [no-such.txt]}"], "no-such.txt"),
    "no such device": (["device=cuda:7"], "CUDA devices"),
    "torch's numbers go round": (["device=cuda:256"], "device must be auto, cpu, cuda or cuda:N"),
    "no device's number": (
        ["device=cuda:007"],
        "device must be auto, cpu, cuda or cuda:N (as cuda:1), found 'cuda:007'",
    ),
    "beyond 64 bits": ([f"calibration.samples={2**63}"], "calibration.samples must be a number of 64 bits"),
    "override of what is excluded": (
        ["exclude=[lm_head, model.layers.0]", "overrides={model.layers.0: {bits: 8}}"],
        "overrides of 'model.layers.0' have no effect: `exclude` has every Linear",
    ),
    "revision of a directory": (["revision=v2"], "revision is of a model on the hub;"),
    "text that is a directory": ([f"calibration.dataset={{files: [{TEXT}]}}"], "must name regular files"),
    "text that is a device": (["calibration.dataset={files: [/dev/zero]}"], "/dev/zero is neither a file nor a dir"),
    "method mismatch": (["method=awq"], "needs method: gptq"),
    "output is the model": ([f"model={MODEL}", f"output={MODEL}"], "output"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors_are_a_sentence_and_exit_2(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, expected = USAGE[case]
    assert quantize(tmp_path / "out", verb="gptq", settings=[*SMALL, *changes]) == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of its own, for what would be lost."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


@pytest.mark.parametrize(("verb", "arguments", "message"), [
    ("inspect", ["--html", "model/model.safetensors"], "is one of those in model, which the command reads"),
    ("inspect", ["--html", "model/config.json"], "is one of those in model"),
    ("inspect", ["--html", "link.html"], "is one of those in model"),
    ("eval", ["--text", "a.txt", "--json", "model/tokenizer.json"], "is one of those in model"),
    ("eval", ["--text", "a.txt", "--json", "a.txt"], "--json must name another file than text, found a.txt for both"),
    ("eval", ["--tasks", "x", "--include", "tasks", "--json", "tasks/deep/x.yaml"], "is one of those in tasks"),
    ("inspect", ["--html", "socket"], "--html must name a file, a pipe or a terminal, socket is none of these"),
    ("inspect", ["--html", "loop"], "--html must be a path that can be followed, found"),
    ("inspect", ["--html", "lost/x.html"], "in a directory that exists;"),
])  # fmt: skip
def test_no_result_takes_the_place_of_what_is_read(
    verb: str, arguments: list[str], message: str, model: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Oracle: a sentence, exit code 2, and every file as it was."""
    monkeypatch.chdir(model.parent)
    Path("tasks/deep").mkdir(parents=True)
    for name in ("a.txt", "tasks/deep/x.yaml"):
        Path(name).write_text("task: x\n")
    Path("link.html").symlink_to("model/model.safetensors")
    Path("loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert cli.main([verb, "model", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_a_result_goes_where_its_path_leads(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A link stays and its target is written, a pipe and a device are written into, an earlier page is replaced."""
    folder, page = model.parent, "<!doctype html>"
    link, pipe, nothing, printed = (folder / name for name in ("link", "pipe", "nothing", "printed"))
    link.symlink_to("page")
    nothing.symlink_to(os.devnull)
    printed.symlink_to("/dev/stdout")
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    for place in (link, nothing, pipe, *[model / "page.html"] * 2, *[model / "page"] * 2):
        assert cli.main(["inspect", str(model), "--html", str(place)]) == 0
    reader.join(60)
    assert (folder / "page").read_text() == (model / "page.html").read_text() == got[0]
    assert got[0].startswith(page)
    assert link.is_symlink()
    assert nothing.is_symlink()
    assert pipe.is_fifo()
    capfd.readouterr()
    assert cli.main(["inspect", str(model), "--html", str(printed)]) == 0
    out = capfd.readouterr().out
    assert out.index("checkpoint  ") < out.index(page) < out.rindex("page        ")


def test_a_result_needs_no_stream(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a shell has closed it."""
    monkeypatch.setattr("sys.stdout", None)
    for _ in range(2):
        assert cli.main(["inspect", str(model), "--html", str(model.parent / "page.html")]) == 0


def test_figures_of_an_earlier_run_are_replaced(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also in the checkpoint's own directory."""
    figures = model / "figures.json"
    (model.parent / "a.txt").write_text("once upon a time there was a cat " * 200)
    text = ["--text", str(model.parent / "a.txt"), "--tokens", "64", "--window", "32", "--json", str(figures)]
    for _ in range(2):
        assert cli.main(["eval", str(model), *text]) == 0, capsys.readouterr().err


def test_what_files_say_moves_no_cursor(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the bytes that a terminal would take for orders are not printed; words of any language are."""
    orders = "\x1b[2J\x07\x9b\u202e\r\n\u2028\ud800"
    assert printable("می\u200cخواهم\tक\u200dष") == "می\u200cخواهم\tक\u200dष"
    index = {"weight_map": {"a": f"дом{orders}.safetensors"}}
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert cli.main(["inspect", str(model)]) == 1
    printed = capsys.readouterr().err
    assert printed.isprintable() is False  # for its last character alone
    assert printed[:-1].isprintable()
    assert r"дом\x1b[2J\x07\x9b\u202e  \ud800.safetensors; fetch" in printed


def test_names_in_a_checkpoint_move_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign_files.write(tmp_path, foreign_files.Kind("gptq"))
    shard = next(tmp_path.glob("*.safetensors"))
    save_file({**load_file(shard), "a\x1b[2J.weight": torch.ones(1)}, shard)
    cli.main(["lint", str(tmp_path)])
    assert r"a\x1b[2J.weight is extra" in capsys.readouterr().out
