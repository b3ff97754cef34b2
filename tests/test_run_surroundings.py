"""What changes around a run while it goes on: its output, its model, disk and memory, other processes.

Oracle: what stands on the disk afterwards, and that the same command ends what can be ended.
"""

import errno
import json
import os
import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from crashes import checksums, small_parent, small_run
from test_resume import interrupted, stop, unfinished
from tiny_models import run

from ptq import cli_ending, hidden, predict_time, walk
from ptq.config import EvaluationConfig
from ptq.errors import ConfigError, FormatError, PtqError
from ptq.formats.staging import full_disk_as_error, output_path, publish, require_writable, staged_directory
from ptq.journal_directory import place_of
from ptq.journal_signature import require_same
from ptq.yaml_tree import override


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return small_parent(tmp_path_factory.mktemp("surroundings") / "parent")


def during_the_solve(monkeypatch, action):
    """Do something once, before the last block is quantized."""
    real, calls = walk.quantize_block, []

    def quantize_block(*arguments):
        calls.append(1)
        if len(calls) == 3:
            action()
        return real(*arguments)

    monkeypatch.setattr(walk, "quantize_block", quantize_block)


def put_checkpoint(path):
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "mine").write_text("x")


OUTPUTS = {
    "a checkpoint": (put_checkpoint, False, "exists; choose another `output` or pass --overwrite"),
    "a directory": (lambda path: (path / "mine").mkdir(parents=True), True, "has files but no config.json of a model"),
    "a file": (lambda path: path.write_text("x"), True, "must be a directory, found the file"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_what_has_come_to_stand_under_the_outputs_name_stays(case, parent, tmp_path, monkeypatch):
    make, overwrite, said = OUTPUTS[case]
    config = small_run(parent, tmp_path / "out")
    during_the_solve(monkeypatch, lambda: make(tmp_path / "out"))
    with pytest.raises(ConfigError, match=said):
        run(config, overwrite=overwrite)
    assert (tmp_path / "out").is_file() or (tmp_path / "out" / "mine").exists()
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(walk, "quantize_block", None)
    run(config)  # no block is solved again
    assert (tmp_path / "out" / "config.json").exists()


def test_a_staged_directory_looks_again_before_it_is_renamed(tmp_path):
    with pytest.raises(ConfigError, match="exists; choose another"), staged_directory(tmp_path / "out", False):
        put_checkpoint(tmp_path / "out")
    assert (tmp_path / "out" / "mine").exists()


def test_a_mount_point_is_refused_at_the_beginning(parent, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(ConfigError, match=r"out is a mount point: choose a directory below it for `output`"):
        run(small_run(parent, tmp_path / "out"))
    with pytest.raises(ConfigError, match="below it for --out"), staged_directory(tmp_path / "out", overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert output_path(tmp_path / "out") == tmp_path / "out"  # for what is written into it, as a comparison


@pytest.mark.parametrize("hindrance", ["permissions", "sticky bit"])
def test_an_output_that_cannot_be_removed_is_refused_at_the_beginning(hindrance, tmp_path, monkeypatch):
    put_checkpoint(tmp_path / "out")
    if hindrance == "permissions":
        monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path / "out")
    else:
        tmp_path.chmod(0o1777)
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    said = {"permissions": "files this user may remove; .*out is write-protected: choose another",
            "sticky bit": "this user may rename; .*out belongs to another one: choose another"}[hindrance]  # fmt: skip
    with pytest.raises(ConfigError, match=said):
        require_writable(tmp_path / "out", overwrite=True)
    if hindrance == "sticky bit":
        (tmp_path / "empty").mkdir()
        with pytest.raises(ConfigError, match=r"empty belongs to another one"):
            require_writable(tmp_path / "empty", overwrite=False)
        for uid in (0, os.stat(tmp_path).st_uid):  # root, and the owner of either directory
            monkeypatch.setattr(os, "geteuid", lambda uid=uid: uid)
            require_writable(tmp_path / "out", overwrite=True)


def test_an_interruption_between_the_two_renames_gives_the_name_back(tmp_path, monkeypatch):
    put_checkpoint(tmp_path / "out")
    (tmp_path / "new").mkdir()
    rename = Path.rename

    def interrupted(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "new", tmp_path / "out", tmp_path / ".out.old")
    assert (tmp_path / "out" / "mine").exists()


def interrupted_evaluation(config, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ptq.pipeline.evaluate_run", interrupt)
        interrupted(config)


TRANSIENT = {
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), PtqError, "no space left to write"),
    "memory": (MemoryError("8 GiB"), MemoryError, "8 GiB"),
    "torch's memory": (RuntimeError("can't allocate memory: 9 bytes"), RuntimeError, "can't allocate memory"),
    "open files": (OSError(errno.EMFILE, "Too many open files"), OSError, "Too many open files"),
    "a missing shard": (FormatError("model.safetensors is missing"), FormatError, "is missing"),
}


@pytest.mark.parametrize("case", TRANSIENT)
def test_an_evaluation_that_fails_is_made_up_for_by_the_same_command(case, parent, tmp_path, monkeypatch):
    error, kind, said = TRANSIENT[case]
    text = EvaluationConfig(files=(str(tiny_models.TEXT),), tokens=64, window=32, stride=32)
    config = replace(small_run(parent, tmp_path / "out"), evaluation=text)

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("ptq.pipeline.evaluate_run", fail)
        with pytest.raises(kind, match=said) as raised:
            run(config)
    note = "out is complete; where its evaluation is missing, the same command evaluates it"
    assert [re.sub(r".*/", "", each) for each in raised.value.__notes__] == [note]
    before = checksums(tmp_path / "out")
    monkeypatch.setattr(walk, "quantize_block", None)
    assert run(config).document["evaluation"]["tokens"] > 0
    assert checksums(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_advice_of_the_command_line_is_about_the_evaluation(capsys):
    class Options:
        debug = False

    error = MemoryError("8 GiB")
    error.add_note("the checkpoint is complete")

    def action(_):
        raise error

    parser = type("Parser", (), {"parse_args": lambda *_: type("O", (Options,), {"action": staticmethod(action)})()})()
    assert cli_ending.run(parser, []) == 1
    assert capsys.readouterr().err == "ptq: out of memory (8 GiB): free some; the checkpoint is complete\n"


def test_an_output_that_was_deleted_before_its_evaluation_is_made_again(parent, tmp_path, monkeypatch):
    text = EvaluationConfig(files=(str(tiny_models.TEXT),), tokens=64, window=32, stride=32)
    config = replace(small_run(parent, tmp_path / "out"), evaluation=text)
    interrupted_evaluation(config, monkeypatch)
    before = checksums(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "taken away")
    run(config)
    assert checksums(tmp_path / "out") == before


@pytest.mark.parametrize("damaged", ["{}", "[]", '{"configuration": {}}'])
def test_a_report_that_is_none_while_the_evaluation_is_to_be_made(damaged, parent, tmp_path, monkeypatch):
    text = EvaluationConfig(files=(str(tiny_models.TEXT),), tokens=64, window=32, stride=32)
    config = replace(small_run(parent, tmp_path / "out"), evaluation=text)
    interrupted_evaluation(config, monkeypatch)
    (tmp_path / "out" / "report.json").write_text(damaged)
    said = r"report.json.*( must (be the report of the run|hold a JSON object)|configuration.model is required)"
    with pytest.raises(FormatError, match=said):
        run(config)
    assert unfinished(config).exists()
    run(config, overwrite=True, fresh=True)


@pytest.mark.parametrize("when", ["solve", "evaluation"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_a_model_that_changes_under_a_run(file, when, tmp_path, monkeypatch):
    """A mix of two models must not be published, and figures must not be about another parent."""
    parent = small_parent(tmp_path / "parent")
    config = small_run(parent, tmp_path / "out")
    kept = (parent / file).read_bytes()

    def change(*_):
        data = bytearray(kept)
        data[-3 if file == "model.safetensors" else -1] ^= 3 if file == "model.safetensors" else 42  # still JSON
        (parent / file).write_bytes(data)
        return {"tokens": 1}

    if when == "solve":
        during_the_solve(monkeypatch, change)
    else:
        monkeypatch.setattr("ptq.pipeline.evaluate_run", change)
        text = EvaluationConfig(files=(str(tiny_models.TEXT),), tokens=64, window=32, stride=32)
        config = replace(config, evaluation=text)
    advice = "Start over with --fresh" if when == "solve" else "made before that and is complete: evaluate it with ptq"
    with pytest.raises(FormatError, match=rf"must stay as it is .*changed since it began: {file}\. .*{advice}"):
        run(config)
    assert (tmp_path / "out").exists() == (when == "evaluation")
    if when == "evaluation":
        assert "evaluation" not in json.loads((tmp_path / "out" / "report.json").read_text())
    else:
        with pytest.raises(ConfigError, match=f"can go on only as it began: .*model.{file} was"):
            run(config)


@pytest.mark.parametrize("name", ["log.txt", "added_tokens.json", "LICENSE.txt"])
def test_a_file_that_comes_into_the_models_directory_is_nothing_to_a_run(name, tmp_path, monkeypatch):
    """As its own log, or what another program fetches."""
    parent = small_parent(tmp_path / "parent")
    during_the_solve(monkeypatch, lambda: (parent / name).write_text("{}"))
    run(small_run(parent, tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").exists()


class Together:
    """What two processes say to each other."""

    def __init__(self, other):
        self.other = other

    def gather(self, mine):
        return [{k: v for k, v in self.other.items() if k != "machine.threads"}, mine]


def test_processes_must_agree():
    signature = {"configuration.bits": "4", "machine.threads": "2", "model.model.safetensors": "7 bytes"}
    require_same(Together({**signature, "machine.threads": "1"}), signature)
    for name in ("configuration.bits", "model.model.safetensors"):
        with pytest.raises(ConfigError, match=f"{name} is another in the first and .* in process 1: start them alike"):
            require_same(Together({**signature, name: "another"}), signature)
        with pytest.raises(ConfigError, match=f"{name} is .* in the first and None in process 1"):
            require_same(Together(signature), {key: text for key, text in signature.items() if key != name})


def test_more_batches_on_disk_than_files_may_be_open(tmp_path):
    """Shells allow a thousand, the system many more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        hidden._allow_maps.cache_clear()
        file = hidden.HiddenFile(tmp_path / "hidden")
        kept = [file.keep(torch.full((3,), float(i))) for i in range(300)]
        assert [float(tensor.sum()) for tensor in kept] == [3.0 * i for i in range(300)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        hidden._allow_maps.cache_clear()


def test_a_sandbox_that_lets_no_limit_be_raised_is_no_hindrance(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    hidden._allow_maps.cache_clear()
    assert float(hidden.HiddenFile(tmp_path / "hidden").keep(torch.ones(3)).sum()) == 3
    hidden._allow_maps.cache_clear()


def test_more_batches_on_disk_than_the_system_allows(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("numpy.memmap", fail)
    with pytest.raises(PtqError, match=r"an open file; \d+ are allowed: set a larger calibration.batch_size"):
        hidden.HiddenFile(tmp_path / "hidden").keep(torch.zeros(3))


def test_a_disk_that_takes_little_at_once_is_timed_with_little(tmp_path, monkeypatch):
    real, sizes = predict_time._written_a_second, []

    def limited(directory, size):
        sizes.append(size)
        if size > 1 << 16:
            raise OSError(errno.EFBIG, "File too large")
        return real(directory, size)

    monkeypatch.setattr(predict_time, "_written_a_second", limited)
    assert predict_time.measure_rates(torch.device("cpu"), tmp_path).disk > 0
    assert sizes == [8 << 20, 4096]


def test_a_record_that_no_run_wrote_is_none(parent, tmp_path):
    config = small_run(parent, tmp_path / "out")
    (stop(config, 1) / "blocks" / "12x.json").write_text("{}")
    run(config)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_that_cannot_be_opened(parent, tmp_path):
    config = small_run(parent, tmp_path / "out")
    (place_of(tmp_path / "out").path / "lock").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=r"must be able to write .*lock, found: Is a directory; if it is another user"
    ):
        run(config)


def test_a_run_directory_of_another_user(parent, tmp_path, monkeypatch):
    place_of(tmp_path / "out").path.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != ".out.run")
    with pytest.raises(ConfigError, match=r"must be able to write .*\.out\.run, found: Permission denied"):
        run(small_run(parent, tmp_path / "out"))


def test_a_full_disk_says_so_with_any_path(tmp_path):
    with pytest.raises(PtqError, match="no space left"), full_disk_as_error(tmp_path / "deep" / "x", 5):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")


@pytest.mark.parametrize(
    ("written", "meant"),
    [("run #3", "run #3"), (" a b ", "a b"), ("'run' # x", "run"), ('"a#b"', "a#b"), ("a#b", "a#b"), ("~/x", "~/x")],
)
def test_a_text_that_is_assigned_is_what_is_written(written, meant):
    """Where it is not quoted: a number sign belongs to a path."""
    tree = {}
    override(tree, f"output={written}")
    assert tree == {"output": meant}
