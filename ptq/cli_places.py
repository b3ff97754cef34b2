"""The paths of a command line: ``~`` as a shell has it, and files to be written, looked at before anything is done."""

import argparse
from pathlib import Path
from tempfile import TemporaryFile

from ptq.config_paths import expanded
from ptq.errors import ConfigError

_READ = ("checkpoint", "checkpoints", "parent", "adapter", "text", "include", "config", "variants")
_WRITTEN = ("json", "html")


def expand_places(options: argparse.Namespace) -> None:
    """Replace ``~`` in every path of the options, also where a shell leaves it, as in ``--out=~/x``.

    Raises:
        ConfigError: ``~name`` of nobody; a file to be written whose directory is not there or takes no files, or that
            is a directory itself; an empty path.
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
    for name in _WRITTEN:
        if (value := getattr(options, name, None)) is not None:
            _require_file(f"--{name}", Path(value))


def _require_file(option: str, path: Path) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"{option} must name a file in a directory that exists; {folder} does not: create it")
    if not path.name or path.is_dir():
        raise ConfigError(f"{option} must name a file, {path} is a directory: name a file in it")
    try:
        with TemporaryFile(dir=folder):  # the only way to learn it of some directories
            pass
    except OSError as error:
        raise ConfigError(
            f"{option} must name a file that can be written; {folder} takes none ({error.strerror}): choose another"
        ) from error
