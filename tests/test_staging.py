"""Staged directories and atomic files. Oracle: what is on the disk after success, failure, interruption, full disk."""

import errno
import json
import math
import os
from contextlib import suppress
from pathlib import Path

import pytest

from ptq.errors import ConfigError, FormatError, PtqError
from ptq.formats.checkpoint import atomic_write_text, read_json, staged_directory
from ptq.formats.staging import full_disk_as_error, json_text, output_path, remove_checkpoint
from ptq.journal_directory import RunDirectory, run_directory


def contents(directory):
    """Every file below a directory and its text, hidden siblings of a staged write included."""
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


OLD = '{"model_type": "old"}'


def checkpoint(path, text=OLD):
    path.mkdir(parents=True)
    (path / "config.json").write_text(text)


def test_success_renames_the_whole_directory(tmp_path):
    with staged_directory(tmp_path / "deep" / "out", overwrite=False) as staged:
        assert staged == tmp_path / "deep" / ".out.partial"
        (staged / "sub").mkdir()
        (staged / "sub" / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert contents(tmp_path) == {"deep/out/sub/a": "1"}
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "out"]


def write_then(error, final, overwrite=True):
    with staged_directory(final, overwrite) as staged:
        (staged / "config.json").write_text("new")
        raise error


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), PtqError("x")])
@pytest.mark.parametrize("existing", [False, True])
def test_any_exception_leaves_the_final_name_as_it_was(tmp_path, error, existing):
    if existing:
        checkpoint(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(type(error)):
        write_then(error, tmp_path / "out")
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == int(existing)


def test_two_that_write_one_directory(tmp_path):
    """The second is refused and takes nothing away from the first."""
    with staged_directory(tmp_path / "out", overwrite=False) as staged:
        (staged / "a").write_text("1")
        with pytest.raises(ConfigError, match=r"another one is writing .*/out: wait for it or choose another --out"):
            write_then(ValueError(), tmp_path / "out")
        (staged / "b").write_text("2")
    assert contents(tmp_path) == {"out/a": "1", "out/b": "2"}


@pytest.mark.parametrize("write", [
    pytest.param(lambda final: staged_directory(final, True), id="staged"),
    pytest.param(lambda final: run_directory(final, overwrite=True, fresh=True), id="run"),
])  # fmt: skip
def test_another_one_that_is_between_its_two_renames(write, tmp_path, monkeypatch):
    """It would take the old output, put aside, for that of a run that was killed, and give it the name back."""
    final, rename, refused = tmp_path / "out", Path.rename, []
    checkpoint(final)

    def put_aside(path, target):
        rename(path, target)
        if Path(target).name == ".out.old":
            with pytest.raises(ConfigError, match=r"another one is writing .*/out: wait for it"), write(final):
                pass
            refused.append(path)

    with write(final) as place:
        monkeypatch.setattr(Path, "rename", put_aside)
        if isinstance(place, RunDirectory):
            checkpoint(place.checkpoint, "new")
            place.publish(overwrite=True)
        else:
            (place / "config.json").write_text("new")
    assert refused == [final]
    assert contents(tmp_path) == {"out/config.json": "new"}


def test_overwrite_replaces_and_removes_the_old(tmp_path):
    checkpoint(tmp_path / "out")
    (tmp_path / "out" / "stale.safetensors").write_text("old")
    with staged_directory(tmp_path / "out", overwrite=True) as staged:
        (staged / "config.json").write_text("new")
        assert (tmp_path / "out" / "config.json").read_text() == OLD
    assert contents(tmp_path) == {"out/config.json": "new"}


def test_a_failed_rename_restores_the_old(tmp_path, monkeypatch):
    checkpoint(tmp_path / "out")
    rename = Path.rename

    def refuse_partial(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_partial)
    with (
        pytest.raises(OSError, match="input/output error"),
        staged_directory(tmp_path / "out", overwrite=True) as staged,
    ):
        (staged / "config.json").write_text("new")
    assert contents(tmp_path) == {"out/config.json": OLD}


def test_leftovers_of_a_crash_are_cleaned_up(tmp_path):
    checkpoint(tmp_path / ".out.partial", "half")
    (tmp_path / ".out.partial" / "rubbish").write_text("x")
    checkpoint(tmp_path / ".out.old")
    checkpoint(tmp_path / "out")
    with staged_directory(tmp_path / "out", overwrite=True) as staged:
        assert not any(staged.iterdir())
        (staged / "config.json").write_text("new")
    assert contents(tmp_path) == {"out/config.json": "new"}


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    checkpoint(tmp_path / ".out.old")
    with (
        pytest.raises(ConfigError, match="exists; choose another"),
        staged_directory(tmp_path / "out", overwrite=False),
    ):
        pass
    assert contents(tmp_path) == {"out/config.json": OLD}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_no_run_put_aside_is_left_alone(tmp_path, overwrite):
    """A directory of somebody's own that has the name an output takes while it is replaced."""
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "precious").write_text("x")
    if overwrite:
        checkpoint(tmp_path / "out")
    before = contents(tmp_path)
    with (
        pytest.raises(ConfigError, match=r"\.out\.old must be free .* found files but no config.json of a model: move"),
        staged_directory(tmp_path / "out", overwrite=overwrite),
    ):
        pass
    assert contents(tmp_path) == before


def test_a_link_in_the_place_of_what_is_put_aside(tmp_path):
    """Where it leads nothing is removed."""
    checkpoint(tmp_path / "precious")
    checkpoint(tmp_path / "out")
    (tmp_path / ".out.old").symlink_to(tmp_path / "precious")
    before = contents(tmp_path)
    with (
        pytest.raises(ConfigError, match="found a link or a file: move it elsewhere"),
        staged_directory(tmp_path / "out", overwrite=True),
    ):
        pass
    remove_checkpoint(tmp_path / ".out.old")
    assert contents(tmp_path) == before


def test_a_checkpoint_that_was_half_removed_is_known(tmp_path, monkeypatch):
    """Oracle: of a removal cut short after any number of files what is left is empty or has config.json."""
    names, real = ("a.safetensors", "config.json", "tokenizer.json"), Path.unlink
    for after in range(len(names) + 1):
        folder = tmp_path / str(after)
        checkpoint(folder)
        for name in names:
            if name != "config.json":
                (folder / name).write_text("x")
        done = []

        def unlink(path, done=done, after=after):
            if len(done) == after:
                raise KeyboardInterrupt
            done.append(path.name)
            real(path)

        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Path, "unlink", unlink)
            remove_checkpoint(folder)
        left = [path.name for path in folder.iterdir()] if folder.exists() else []
        assert len(left) == len(names) - after
        assert not left or "config.json" in left


def test_json_has_no_infinity(tmp_path):
    """Oracle: a reader that refuses what is not JSON."""
    text = json_text({"a": [math.inf, 1.5, {"b": math.nan}], "c": -math.inf, "d": (True, None, 2)})
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert strict == {"a": [None, 1.5, {"b": None}], "c": None, "d": [True, None, 2]}


def test_an_empty_directory_and_a_link_to_one_are_taken(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with staged_directory(tmp_path / "link", overwrite=False) as staged:
        (staged / "a").write_text("1")
    assert contents(tmp_path / "real") == {"a": "1"}


def enter(final, overwrite):
    with staged_directory(final, overwrite):
        pytest.fail("the body must not run")


def test_what_must_not_be_overwritten(tmp_path):
    checkpoint(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"output directory \S+out exists; choose another --out or pass --overw"):
        enter(tmp_path / "out", False)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"home has files but no config.json of a model; choose another --out or"):
        enter(tmp_path / "home", True)
    (tmp_path / "home" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"home has files but no config.json of a model; choose another --out or"):
        enter(tmp_path / "home", True)
    (tmp_path / "out" / "adapters").mkdir()
    with pytest.raises(
        ConfigError, match=r"overwritten, \S+out has the folder adapters; choose another --out or empty"
    ):
        enter(tmp_path / "out", True)
    with pytest.raises(ConfigError, match=r"must be a directory, found the file \S+thesis.tex; choose another --out"):
        enter(tmp_path / "home" / "thesis.tex", True)
    with pytest.raises(ConfigError, match=r"thesis.tex/out cannot be created: Not a directory; choose another --out"):
        enter(tmp_path / "home" / "thesis.tex" / "out", True)
    assert contents(tmp_path) == {"out/config.json": OLD, "home/thesis.tex": "x", "home/config.json": "{}"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "output must be a directory, found the file .*file; choose another `output`"),
        ("file/x", "file/x cannot be created: Not a directory; choose another `output`"),
        ("x" * 300, "cannot be created: File name too long"),
        ("x" * 250, "cannot be created: File name too long"),  # with the mark of what is unfinished
        ("x/" + "x" * 250, "cannot be created: File name too long"),
        ("x" * 300 + "/x", "cannot be created: File name too long"),
        ("/proc/x", "output /proc/x cannot be created: No such file or directory"),
        ("/", "`output` must be a directory with a name, found /; choose another"),
        ("~no-such-user/x", "`output` must be a path that can be followed, found: Could not determine home"),
    ],
    ids=lambda value: value[:20],
)
def test_where_no_directory_can_be(name, message, tmp_path):
    (tmp_path / "file").write_text("x")
    path = Path(name) if name.startswith("~") else tmp_path / name
    with pytest.raises(ConfigError, match=message):
        output_path(path)
    with pytest.raises(ConfigError, match=message.replace("`output`", "--out")):
        enter(path, True)
    assert contents(tmp_path) == {"file": "x"}


def test_where_a_directory_can_be_nothing_is_made(tmp_path, monkeypatch):
    assert output_path(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []

    def full(dir):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("ptq.formats.staging.TemporaryFile", full)
    with pytest.raises(OSError, match="full"):
        output_path(tmp_path / "a")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_sentence(tmp_path, number):
    with pytest.raises(PtqError, match=r"no space left to write \S+out: \d+ bytes are free; free some space"):
        write_then(OSError(number, "full"), tmp_path / "out")
    assert contents(tmp_path) == {}
    with (
        pytest.raises(PtqError, match=r"write \S+a/b: 7 bytes are needed and \d+ bytes are free"),
        full_disk_as_error(tmp_path / "a" / "b", 7),
    ):
        raise OSError(number, "full")


def test_what_numpy_says_of_a_full_disk_is_a_sentence(tmp_path):
    with (
        pytest.raises(PtqError, match=r"no space left to write \S+a: 8 bytes are needed"),
        full_disk_as_error(tmp_path / "a", 8),
    ):
        raise OSError("8 requested and 3 written")


def test_other_errors_of_the_disk_are_passed_on(tmp_path):
    with pytest.raises(OSError, match="broken") as caught:
        write_then(OSError(errno.EIO, "broken"), tmp_path / "out")
    assert caught.value.errno == errno.EIO


def test_atomic_text(tmp_path, monkeypatch):
    atomic_write_text(tmp_path / "a.json", "ä\n")
    assert (tmp_path / "a.json").read_bytes() == "ä\n".encode()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PtqError, match=r"write \S+a.json: 4 bytes are needed and \d+ bytes are free"):
        atomic_write_text(tmp_path / "a.json", "new\n")
    assert contents(tmp_path) == {"a.json": "ä\n"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "must exist: is .* a complete checkpoint directory"),
        ("{", "must be JSON: .* the file is damaged"),
        (b"\xff\xfe\x00", "must be JSON"),
        ("[" * 99999, "must be JSON: maximum recursion depth"),
        ("[1]", "must hold a JSON object, found list"),
    ],
)
def test_read_json_says_what_is_wrong(tmp_path, text, message):
    if text is not None:
        (tmp_path / "c.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FormatError, match=message):
        read_json(tmp_path / "c.json")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "c.json")
    with pytest.raises(FormatError, match="must be a regular file, found a pipe"):
        read_json(tmp_path / "c.json")


def test_read_json(tmp_path):
    (tmp_path / "c.json").write_text('{"a": [1]}')
    assert read_json(tmp_path / "c.json") == {"a": [1]}
