"""Files that are either whole or not there: staged directories, atomic text files, JSON, and what a full disk says."""

import errno
import fcntl
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from ptq.errors import ConfigError, FormatError, PtqError

OUTPUT = "`output`"  # the key of a configuration that names a run's directory
CHAT_TEMPLATES = "additional_chat_templates"  # the one folder that a checkpoint has, of a tokenizer of transformers
_IGNORED = (CHAT_TEMPLATES, ".cache")  # of folders in a checkpoint; the hub's client keeps the second in its downloads


@contextmanager
def staged_directory(final: Path, overwrite: bool) -> Iterator[Path]:
    """A directory beside ``final`` to write into, renamed to ``final`` once the body has succeeded.

    After any exception, KeyboardInterrupt included, the partial directory is gone and ``final`` is as it was. What a
    crashed run left behind is cleaned up first. For verbs whose directory is named by ``--out``.

    Raises:
        ConfigError: ``final`` exists and ``overwrite`` is false, or it is not a checkpoint directory, or no directory
            can be created there, or another process is writing it.
        PtqError: the disk is full.
    """
    final = output_path(final, "--out")
    partial, aside = final.with_name(f".{final.name}.partial"), final.with_name(f".{final.name}.old")
    with full_disk_as_error(final, None):
        if partial.exists():
            with _alone_in(partial, final):  # first: another process may be between its two renames
                shutil.rmtree(partial, ignore_errors=True)
        restore(final, aside)
        require_writable(final, overwrite, "--out")
        create_directory(partial, final, "--out")
        with _alone_in(partial, final):
            try:
                yield partial
                sync_tree(partial)
                require_writable(final, overwrite, "--out")  # as it was when this began
                publish(partial, final, aside)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise


@contextmanager
def _alone_in(partial: Path, final: Path) -> Iterator[None]:
    """Hold a lock on a directory, where its file system has locks for directories. Raises ConfigError if it is held."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"a directory is written by one process at a time; another one is writing {final}: wait for it or "
                    "choose another --out"
                ) from error
        yield
    finally:
        os.close(descriptor)


def resolved(path: Path, option: str = OUTPUT) -> Path:
    """A path without links. Raises ConfigError for a loop of links, an unknown ``~user``, and the root."""
    try:
        final = path.expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{option} must be a path that can be followed, found: {error}; choose another") from error
    if not final.name:
        raise ConfigError(f"{option} must be a directory with a name, found {final}; choose another")
    return final


def output_path(path: Path, option: str = OUTPUT) -> Path:
    """Where a directory is to be written, without links; nothing is created.

    Raises:
        ConfigError: no directory can be there: a file stands there or in the way, or what is there takes no files.
    """
    final = resolved(path, option)
    try:
        existing = next(parent for parent in final.parents if parent.exists())
        longest = os.pathconf(existing, "PC_NAME_MAX")
        for name in (*final.relative_to(existing).parts, f".{final.name}.partial"):  # the longest of those beside it
            if len(os.fsencode(name)) > longest:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with TemporaryFile(dir=existing):  # the only way to learn it of /proc; it has no name where that is possible
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _not_created(final, error, option) from error
    _require_directory(final, option)
    return final


def _require_directory(final: Path, option: str) -> None:
    """Raises ConfigError for a file."""
    if final.exists() and not final.is_dir():
        raise ConfigError(f"output must be a directory, found the file {final}; choose another {option}")


def _not_created(final: Path, error: OSError, option: str) -> ConfigError:
    return ConfigError(f"output {final} cannot be created: {error.strerror}; choose another {option}")


def restore(final: Path, aside: Path) -> None:
    """Give a directory its name back where a run was killed between the two renames of `publish`.

    Raises ConfigError where something that no run put there has the name that is needed.
    """
    if not os.path.lexists(aside):
        return
    found = "a link or a file" if aside.is_symlink() or not aside.is_dir() else _besides_checkpoint(aside)
    if found:
        raise ConfigError(
            f"{aside} must be free for what stood in {final.name} before, or hold it; found {found}: move it "
            "elsewhere, or delete it if it is what an earlier version left of a checkpoint"
        )
    if not final.exists():
        aside.rename(final)


def require_writable(final: Path, overwrite: bool, option: str = OUTPUT) -> None:
    """Raises ConfigError where ``final``, which ``option`` names, must not be replaced."""
    _require_directory(final, option)
    if not final.exists():
        return
    _require_movable(final, option)
    if not any(final.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"output directory {final} exists; choose another {option} or pass --overwrite")
    found = _besides_checkpoint(final)
    if found:
        raise ConfigError(
            f"only a checkpoint directory is overwritten, {final} has {found}; choose another {option} or empty it "
            "yourself"
        )
    if not os.access(final, os.W_OK | os.X_OK):
        raise ConfigError(
            f"an output that is overwritten must be one whose files this user may remove; {final} is write-protected: "
            f"choose another {option}, or change its permissions"
        )


def _require_movable(final: Path, option: str) -> None:
    """Raises ConfigError for a directory that cannot give its name to another, also where it is empty."""
    if os.path.ismount(final):
        raise ConfigError(
            f"output must be a directory that can be renamed once another is whole; {final} is a mount point: choose a "
            f"directory below it for {option}"
        )
    if _is_kept_by_others(final):
        raise ConfigError(
            f"an output that is replaced must be one that this user may rename; {final} belongs to another one: "
            f"choose another {option}, or remove it as its owner"
        )


def _is_kept_by_others(final: Path) -> bool:
    """Whether it lies in a directory in which everybody writes and removes what is theirs alone (the sticky bit)."""
    parent = final.parent.stat()
    return bool(parent.st_mode & stat.S_ISVTX) and os.geteuid() not in (0, parent.st_uid, final.stat().st_uid)


def _besides_checkpoint(directory: Path) -> str | None:
    """What in a directory no checkpoint has; None of a checkpoint and of an empty directory."""
    try:
        entries = sorted(directory.iterdir())
    except FileNotFoundError:  # another run has just removed it
        return None
    if not entries:
        return None
    try:
        known = {"model_type", "architectures"} & {*read_json(directory / "config.json")}
    except (FormatError, OSError):
        known = set()
    if not known:
        return "files but no config.json of a model"
    folders = [path.name for path in entries if path.is_dir() and path.name not in _IGNORED]
    return f"the folder {folders[0]}" if folders else None


def remove_checkpoint(directory: Path) -> None:
    """Remove a checkpoint, config.json at last: were it cut short, the rest would be known for what it is.

    What is no checkpoint is left alone.
    """
    with suppress(OSError):
        if directory.is_symlink() or _besides_checkpoint(directory):
            return
        for entry in sorted(directory.iterdir(), key=lambda path: path.name == "config.json"):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()
        directory.rmdir()


def create_directory(partial: Path, final: Path, option: str = OUTPUT) -> None:
    """Make a directory for ``final``'s content. Raises ConfigError where that cannot be."""
    try:
        partial.mkdir(parents=True)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise _not_created(final, error, option) from error


def publish(partial: Path, final: Path, aside: Path) -> None:
    """Rename ``partial`` to ``final``; an older ``final`` is removed only after that, and restored if it fails."""
    remove_checkpoint(aside)
    replaces = final.exists()
    if replaces:
        final.rename(aside)
    try:
        partial.rename(final)
    except BaseException:
        if replaces and not final.exists():
            aside.rename(final)
        raise
    sync_directory(final.parent)
    remove_checkpoint(aside)


@contextmanager
def full_disk_as_error(path: Path, needed: int | None) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" within the body into a PtqError with ``needed`` and free bytes."""
    try:
        yield
    except OSError as error:
        cut_short = error.errno is None and " requested and " in str(error)  # as NumPy's tofile says it
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) and not cut_short:
            raise
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        wanted = "" if needed is None else f"{needed} bytes are needed and "
        full = PtqError(
            f"no space left to write {path}: {wanted}{free} bytes are free; free some space or write elsewhere"
        )
        for note in getattr(error, "__notes__", ()):
            full.add_note(note)
        raise full from error


def atomic_write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) so that ``path`` holds either its old or its new content. Raises PtqError if full."""
    temporary = path.with_name(f".{path.name}.tmp")
    data = text.encode()
    try:
        with full_disk_as_error(path, len(data)):
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def json_text(document: Any) -> str:
    """A document of plain values as JSON, which has no infinity and no NaN: null stands in their place."""
    return json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FormatError when it is missing, not JSON, or not an object."""
    if path.is_fifo():  # nothing may ever come
        raise FormatError(f"{path} must be a regular file, found a pipe: fetch or write it again")
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FormatError(f"{path} must exist: is {path.parent} a complete checkpoint directory?") from error
    except (ValueError, RecursionError) as error:  # the latter is of thousands of brackets
        raise FormatError(f"{path} must be JSON: {error}; the file is damaged, fetch or write it again") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} must hold a JSON object, found {type(content).__name__}: fetch or write it again")
    return content


def sync_tree(directory: Path) -> None:
    """Force every file and directory below ``directory`` to the disk."""
    for folder, _, files in os.walk(directory):
        for file in files:
            _sync(Path(folder, file))
        sync_directory(Path(folder))


def sync_directory(directory: Path) -> None:
    """Force the names in a directory to the disk."""
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
