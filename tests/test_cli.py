"""The command line as a person types it: what is printed, which exit code, what is left on disk."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import ptq
from ptq import cli, plan, walk
from ptq.config import load_config
from ptq.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
EXCERPT = ROOT / "tests" / "excerpt.txt"
MODEL = ROOT / "examples" / "tiny-llama"
TEXT = ROOT / "examples" / "text"
SMALL = [f"calibration.dataset.files=[{EXCERPT}]", "calibration.samples=2", "calibration.sequence_length=32",
         "evaluation.tokens=128", "evaluation.window=32", "evaluation.stride=32"]  # fmt: skip


def quantize(output: Path, *extra: str, verb: str = "quantize", settings: list[str] = SMALL) -> int:
    changes = [f"--set={item}" for item in [f"output={output}", *settings]]
    arguments = ["--config", "demo.yaml", *changes, *extra]
    if verb == "quantize":
        return cli.main(["quantize", *arguments])
    return cli.main_of_method(verb, arguments)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cli") / "made"
    assert quantize(output, verb="gptq") == 0
    return output


def test_the_run_ends_with_a_table_and_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert quantize(output, verb="gptq") == 0
    printed = capsys.readouterr().out
    for word in ("perplexity", "kl", "top1", "parent", "round-to-nearest", "result", "56 modules quantized",
                 "4.250 bits a weight", str(output), "report.json"):  # fmt: skip
        assert word in printed
    report = json.loads((output / "report.json").read_text())
    assert set(report) == {"versions", "hardware", "configuration", "parent", "calibration", "memory", "size",
                           "modules", "kept_in_float", "extra_tensors", "kernels", "evaluation", "seconds",
                           "peak_bytes", "prediction", "journal"}  # fmt: skip
    assert len(report["modules"]) == 56
    assert report["calibration"]["tokens"] == 64
    assert report["configuration"]["calibration"]["samples"] == 2
    row = report["modules"]["model.layers.0.mlp.down_proj"]
    assert row["tokens"] == 64
    assert 0 < row["relative_loss"] < row["relative_rounding_loss"]
    assert report["kept_in_float"] == ["lm_head"]
    assert {"solve", "evaluate", "total"} <= set(report["seconds"])
    assert {*report["peak_bytes"], "total"} == set(report["seconds"])
    assert min(report["peak_bytes"].values()) > 0
    assert report["memory"]["peak_of_solve"] == report["peak_bytes"]["solve"] > report["memory"]["before_solve"] > 0


def test_dry_run_prints_the_plan_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.CheckpointReader, "tensor", None)  # not one weight may be read
    assert quantize(tmp_path / "out", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "16 x 128 x 256: 4 bits, 2 groups of 128 a row, symmetric" in printed
    assert "16.8 MB -> 7.5 MB of tensors (the files' headers come on top), 4.250 bits" in printed
    assert [line.split()[0] for line in printed.splitlines()[-4:]] == ["memory", "evaluation", "disk", "time"]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_refuses_what_the_run_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output that exists, unless it may be replaced, and text that is too short; not `ptq plan`.

    No weight is read for it, by a dry run or the run.
    """
    monkeypatch.setattr(plan.CheckpointReader, "tensor", None)
    (tmp_path / "short.txt").write_text("Call me")
    for more in (["--dry-run"], []):
        assert quantize(tmp_path / "out", *more, f"--set=evaluation.files=[{tmp_path}/short.txt]") == 1
        assert "short.txt: a window of 32 tokens is required, found" in capsys.readouterr().err
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "config.json").write_text('{"model_type": "llama"}')
    assert quantize(taken, "--dry-run") == 2
    assert "exists; choose another `output` or pass --overwrite" in capsys.readouterr().err
    assert quantize(taken, "--dry-run", "--overwrite") == 0
    assert quantize(tmp_path / "out", "--dry-run", settings=["calibration.samples=100000"]) == 1
    assert "calibration needs" in capsys.readouterr().err
    assert cli.main(["plan", "--config", "demo.yaml", f"--set=output={taken}", "--set=bits={budget: 3.5}"]) == 0
    assert "is spent before the solve, by a pass over all blocks" in capsys.readouterr().out
    file = tmp_path / "file"
    file.write_text("x")
    for output, message in ((file, "found the file"), (file / "x", "Not a directory"), ("z" * 300, "name too long"),
                            ("/proc/x", "/proc/x cannot be created: No such file")):  # fmt: skip
        assert quantize(Path(output), "--dry-run") == 2
        assert message in capsys.readouterr().err
        assert cli.main(["plan", "--config", "demo.yaml", f"--set=output={output}"]) == 2
        assert message in capsys.readouterr().err


def test_home_directories_where_a_shell_leaves_them(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in ``--json=~/x``. Oracle: what is read and written there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "made").symlink_to(checkpoint)
    (tmp_path / "a.txt").symlink_to(TEXT / "eval-novel.txt")
    text = ["--text=~/a.txt", "--tokens=64", "--window=32"]
    assert cli.main(["eval", "~/made", *text, "--json=~/figures.json"]) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["text"] == [str(tmp_path / "a.txt")]
    assert cli.main(["compare", "~/made", "--parent", str(MODEL), *text, "--out=~/compared"]) == 0
    assert (tmp_path / "compared" / "compare.json").is_file()
    with pytest.raises(ConfigError, match="~nobody-of-that-name/x must begin with a home directory that there is"):
        load_config("demo.yaml", ["model=~nobody-of-that-name/x"])


def test_the_column_that_holds_the_text(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the figures of the same text in the usual column."""
    words = (TEXT / "eval-novel.txt").read_text()[:2000]
    found = []
    for column in ("text", "story"):
        file = tmp_path / f"{column}.jsonl"
        file.write_text(json.dumps({column: words, "number": 1}) + "\n")
        text = ["--text", str(file), "--tokens=64", "--window=32", "--column", column]
        json_file = tmp_path / f"{column}.json"
        assert cli.main(["eval", str(checkpoint), *text, "--json", str(json_file)]) == 0
        assert cli.main(["compare", str(checkpoint), "--parent", str(MODEL), *text]) == 0
        assert json.loads(json_file.read_text())["text"] == [str(file)]
        found.append((json.loads(json_file.read_text())["models"], capsys.readouterr().out))
    assert found[0] == found[1]
    assert cli.main(["eval", str(checkpoint), "--text", str(file), "--tokens=64", "--window=32"]) == 1
    assert "the column 'text' is required, found story, number; name one of these as its" in capsys.readouterr().err


def test_eval_and_inspect(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--text", str(TEXT / "eval-novel.txt"), "--tokens", "256", "--window", "64"]
    figures = tmp_path / "figures.json"
    assert cli.main(["eval", str(checkpoint), "--parent", str(MODEL), *text, "--json", str(figures)]) == 0
    printed = capsys.readouterr().out
    assert "parent" in printed
    assert "window 64, stride 64" in printed
    models = json.loads(figures.read_text())["models"]
    assert models["parent"]["kl"] is None
    assert 0 < models["result"]["kl"] < 1
    assert cli.main(["eval", str(checkpoint), *text]) == 0
    assert "parent" not in capsys.readouterr().out
    assert cli.main(["inspect", str(checkpoint), "--modules"]) == 0
    printed = capsys.readouterr().out
    assert "56 Linears" in printed
    assert "model.layers.7.mlp.down_proj  256 x 768, 4 bits, groups of 128, symmetric" in printed
    assert cli.main(["inspect", str(MODEL)]) == 0
    assert "no: a float checkpoint" in capsys.readouterr().out


def test_load_and_generate(checkpoint: Path) -> None:
    model = ptq.load(checkpoint, device="cpu")
    tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] in range(4, 8)  # an end-of-text token may come early


def test_text_too_short_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("A few words.")
    settings = [*SMALL, f"calibration.dataset={{files: [{tmp_path / 'a.txt'}]}}"]
    assert quantize(tmp_path / "out", settings=settings) == 1
    assert "tokens" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_existing_output_is_refused_and_replaced_on_request(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (checkpoint / "model.safetensors").read_bytes()
    assert quantize(checkpoint, settings=[*SMALL, "bits=8"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (checkpoint / "model.safetensors").read_bytes() == before
    assert quantize(checkpoint, "--overwrite") == 0
    assert (checkpoint / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("begun", [0, 10**9], ids=["", "begun"])
@pytest.mark.parametrize("verb", ["plan", "quantize"])
def test_a_run_that_the_disk_has_no_room_for(
    verb: str, begun: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a made-up disk of 1 MB, and what an unfinished run has on it."""
    usage = type("Usage", (), {"free": 10**6})()
    monkeypatch.setattr("ptq.predict.shutil.disk_usage", lambda place: usage)
    if begun:
        (tmp_path / ".out.run").mkdir()
        with open(tmp_path / ".out.run" / "sparse", "wb") as file:
            file.truncate(begun)
    settings = [f"--set={item}" for item in [f"output={tmp_path / 'out'}", *SMALL]]
    dry = ["--dry-run"] if verb == "quantize" else []
    assert cli.main([verb, "--config", "demo.yaml", *settings, *dry]) == (0 if begun else 2)
    sentence = f"GB on the disk of {tmp_path / 'out'} at its peak, 0.00 GB are free: free some space, or choose another"
    assert (sentence in capsys.readouterr().err) is (begun == 0)


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(tmp_path / "out", "--debug", settings=["bits=5"]) == 2
    assert "Traceback" in capsys.readouterr().err


FAILURES = {
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
    "unreadable file": (PermissionError(errno.EACCES, "Permission denied"), "could not be read or written"),
    "interrupt": (KeyboardInterrupt(), "out, no block was finished; the run is begun again by the same command"),
    "memory": (MemoryError("8 GiB"), "out of memory"),
    "torch's memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory"),
    "oneDNN's memory": (RuntimeError("could not create a primitive"), "out of memory"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_are_a_sentence_an_exit_code_and_leave_nothing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error, expected = FAILURES[case]

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(walk, "quantize_block", fail)
    assert quantize(tmp_path / "out") == (130 if case == "interrupt" else 1)
    printed = capsys.readouterr().err
    assert expected in printed
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [[], ["--fresh"]], ids=["", "fresh"])
def test_control_c_while_the_result_is_evaluated(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the checkpoint is there and loads, and the same command adds its evaluation without solving."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as changed:
        changed.setattr("ptq.pipeline.evaluate_run", interrupt)
        assert quantize(tmp_path / "out", *options) == 130
    printed = capsys.readouterr().err
    assert f"interrupted: the checkpoint in {tmp_path / 'out'} is complete; where its evaluation is missing" in printed
    assert printed.endswith("the same command evaluates it, without --fresh\n" if options else "evaluates it\n")
    ptq.load(tmp_path / "out", device="cpu")
    monkeypatch.setattr(walk, "quantize_block", None)
    assert quantize(tmp_path / "out") == 0
    assert "evaluation" in json.loads((tmp_path / "out" / "report.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "inner"),
    [
        (["eval", str(MODEL), "--text", str(TEXT / "eval-novel.txt")], "ptq.evaluation.evaluate_checkpoint"),
        (["compare", str(MODEL), "--parent", str(MODEL), "--text", "x"], "ptq.compare.compare_checkpoints"),
        (["inspect", str(MODEL)], "ptq.inspection.inspect"),
        (["bench"], "ptq_kernels.bench_cpu.main"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_control_c_where_there_is_no_output(
    arguments: list[str], inner: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inner, interrupt)
    assert cli.main(arguments) == 130
    assert capsys.readouterr().err == "ptq: interrupted\n"


def test_control_c_while_a_module_in_c_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends in an ImportError then, as seen of scipy's, which transformers' loading of classes makes another one of.

    Any other ImportError is not hidden.
    """

    def fail(cause: BaseException | None, wrapped: bool = False) -> None:
        try:
            raise ImportError("initialization failed") from cause
        except ImportError as error:
            if wrapped:
                raise ModuleNotFoundError("Could not import module") from error
            raise

    for wrapped in (False, True):
        monkeypatch.setattr("ptq.inspection.inspect", lambda *_, w=wrapped, **__: fail(KeyboardInterrupt(), w))
        assert cli.main(["inspect", str(MODEL)]) == 130
    monkeypatch.setattr("ptq.inspection.inspect", lambda *_, **__: fail(ValueError(), True))
    with pytest.raises(ImportError, match="Could not import module"):
        cli.main(["inspect", str(MODEL)])


def test_an_unforeseen_error_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "quantize_block", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize(tmp_path / "out")


@pytest.mark.parametrize(("sent", "code", "said"), [
    (signal.SIGINT, 130, "interrupted"),
    (signal.SIGTERM, 143, "ended by SIGTERM"),
    (signal.SIGHUP, 129, "ended by SIGHUP (its terminal was closed)"),
])  # fmt: skip
def test_signals_to_a_real_process(sent: signal.Signals, code: int, said: str, tmp_path: Path) -> None:
    # the signal must reach it before the end
    long = [f"calibration.dataset.files=[{TEXT}/calibration.txt]", "calibration.samples=64",
            "calibration.sequence_length=512"]  # fmt: skip
    settings = [f"--set={item}" for item in [f"output={tmp_path / 'out'}", *SMALL, *long]]
    command = [sys.executable, "-m", "ptq.gptq", "--config", "demo.yaml", *settings]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths},
        preexec_fn=partial(signal.signal, sent, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    )  # fmt: skip
    assert process.stderr is not None
    deadline = time.monotonic() + 120
    for line in process.stderr:
        if line.startswith("block 1/") or time.monotonic() > deadline:
            break
    process.send_signal(sent)
    rest = process.stderr.read()
    assert process.wait(60) == code, rest
    assert f"ptq: {said}: nothing was written to {tmp_path / 'out'}" in rest
    assert "continued by the same command" in rest
    assert "Traceback" not in rest
    assert [path.name for path in tmp_path.iterdir()] == [".out.run"]
    assert any((tmp_path / ".out.run" / "blocks").glob("*.json"))


def test_fused_projections_give_the_same_tokens(checkpoint: Path) -> None:
    tokens = torch.arange(2, 34)[None]
    plain, fused = (ptq.load(checkpoint, device="cpu", fuse=fuse) for fuse in (False, True))
    with torch.no_grad():
        expected, found = plain(tokens).logits, fused(tokens).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("verb", [["--help"], ["quantize", "--help"], ["eval", "--help"], ["inspect", "--help"]])
def test_help(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(verb)
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(("verb", "said"), [
    ("quantize", ["calibration.samples=64; may be repeated"]),
    ("plan", ["calibration.samples=64; may be repeated"]),
    ("sweep", ["calibration.samples=64; may be repeated"]),
    ("eval", [".parquet; may be repeated", "(kl, perplexity, top1, agreement; "]),
    ("compare", [".parquet; may be repeated"]),
    ("export", ["on this text; may be repeated", "text, options and device from a configuration"]),
    ("bench", ["default: four of a Llama-3-8B, and 512x1536"]),
])  # fmt: skip
def test_help_says_what_is_taken(verb: str, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert [words for words in said if words not in printed] == []


def test_no_verb_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2


def test_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match="it offers PtqConfig, load"):
        ptq.no_such_thing  # noqa: B018
