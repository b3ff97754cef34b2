"""The paths of a command line: ``~`` as a shell has it, and files to be written, looked at before anything is done."""

import argparse
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TextIO

from ptq.config_paths import expanded
from ptq.errors import ConfigError, FormatError

_READ = ("checkpoint", "checkpoints", "parent", "adapter", "text", "include", "config", "variants")
_WRITTEN = ("json", "html")


def expand_places(options: argparse.Namespace) -> None:
    """Replace ``~`` in every path of the options, also where a shell leaves it, as in ``--out=~/x``.

    Raises:
        ConfigError: ``~name`` of nobody; a file to be written whose directory is not there or takes no files, or that
            is a directory itself, or what the command reads; an empty path.
    """
    for name in (*_READ, *_WRITTEN, "out"):
        value = getattr(options, name, None)
        if value == "" or (isinstance(value, list) and "" in value):  # which would mean the working directory
            said = "a file" if name in _WRITTEN else "a path or a name"
            raise ConfigError(f"{name} must be {said}, found nothing: write one, or leave the option out")
        if isinstance(value, list):
            setattr(options, name, [expanded(each) for each in value])
        elif value is not None:
            setattr(options, name, expanded(value))
    given = {name: getattr(options, name, None) or [] for name in _READ}
    read = {name: [Path(each) for each in ([value] if isinstance(value, str) else value)]
            for name, value in given.items()}  # fmt: skip
    for name in _WRITTEN:
        if (value := getattr(options, name, None)) is not None:
            _require_file(f"--{name}", Path(value))
            _require_unread(f"--{name}", Path(value), read)


def write_result(path: Path, text: str) -> None:
    """Write what ``--json`` or ``--html`` asks for: into a device or a pipe itself, through a link, a file whole."""
    from ptq.formats.staging import atomic_write_text, full_disk_as_error

    if stream := _standard_stream(path):
        stream.write(text)
        stream.flush()
    elif path.exists() and not path.is_file():
        with full_disk_as_error(path, None):
            path.write_text(text, encoding="utf-8")
    else:
        atomic_write_text(path.resolve(), text)


def _standard_stream(path: Path) -> TextIO | None:
    """The stream that a path as ``/dev/stdout`` is; its file, where it has one, has more in it than this text."""
    for stream in (sys.stdout, sys.stderr):
        # no such path; a stream that is closed, or none of the system's
        with suppress(OSError, ValueError, AttributeError):
            if os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                return stream
    return None


def _require_file(option: str, path: Path) -> None:
    if _standard_stream(path):
        return
    try:
        folder = (path.resolve() if path.is_symlink() else path).parent
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{option} must be a path that can be followed, found: {error}; choose another") from error
    if not folder.is_dir():
        raise ConfigError(f"{option} must name a file in a directory that exists; {folder} does not: create it")
    if not path.name or path.is_dir():
        raise ConfigError(f"{option} must name a file, {path} is a directory: name a file in it")
    if path.is_fifo() or path.is_char_device():
        return
    if path.exists() and not path.is_file():
        raise ConfigError(f"{option} must name a file, a pipe or a terminal, {path} is none of these: choose another")
    try:
        with TemporaryFile(dir=folder):  # the only way to learn it of some directories
            pass
    except OSError as error:
        raise ConfigError(
            f"{option} must name a file that can be written; {folder} takes none ({error.strerror}): choose another"
        ) from error


def _require_unread(option: str, path: Path, read: dict[str, list[Path]]) -> None:
    """Raises ConfigError for a file that the command reads, or one of a directory it reads but an earlier result."""
    if not path.is_file() or _standard_stream(path):
        return
    ours = _is_result(path)
    for name, places in read.items():
        for place in places:
            # The harness looks for task files in all folders below; a checkpoint's files lie in it itself.
            inside: Iterable[Path] = place.rglob("*") if name == "include" else place.glob("*")
            if place.is_file() and place.samefile(path):
                raise ConfigError(f"{option} must name another file than {name}, found {path} for both: choose another")
            if not ours and any(each.is_file() and each.samefile(path) for each in inside):
                raise ConfigError(
                    f"{option} must name a file that is nobody else's; {path} is one of those in {place}, which the "
                    "command reads: choose another"
                )


def _is_result(path: Path) -> bool:
    """Whether it looks like what such an option wrote before: a page of ours, or figures."""
    from ptq.formats.staging import read_json
    from ptq.page import BEGINNING

    with suppress(OSError), path.open("rb") as file:
        if file.read(len(BEGINNING)) == BEGINNING.encode():
            return True
    with suppress(FormatError, OSError):
        document = read_json(path)
        return any(isinstance(document.get(key), dict) for key in ("models", "tasks"))
    return False
