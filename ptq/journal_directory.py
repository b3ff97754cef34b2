"""The directory a run works in: beside its output, locked, kept after a crash, gone once the checkpoint is whole."""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ptq.errors import ConfigError, FormatError, NumericsError, UnsupportedModelError
from ptq.formats.sealed import unseal
from ptq.formats.staging import (
    atomic_write_text,
    create_directory,
    full_disk_as_error,
    output_path,
    publish,
    remove_checkpoint,
    require_writable,
    restore,
    sync_tree,
)

RUN = "run.json"  # what the run depends on
MEASURED = "outputs/record.json"  # is there once what precedes the first block has been measured
LOCK = "lock"
PUBLISHED = "published"
SHOWN = 5  # differences named in a message
DIGITS = 12  # of a checksum, in a message
SETTING = {"calibration text": " (calibration.dataset)"}  # where a person finds what has another name here
# Parts of a signature that are computed from others, with what those begin with.
FOLLOWS = {
    "calibration text": ("configuration.calibration.", "model.", "version."),
    "quantized modules": ("configuration.", "model.", "version.", "calibration text"),
}


class RunDirectory(NamedTuple):
    """``.name.run`` beside the output ``name``: the journal, and the checkpoint while it is being put together."""

    path: Path
    final: Path

    @property
    def checkpoint(self) -> Path:
        """What becomes the output."""
        return self.path / "checkpoint"

    @property
    def published(self) -> bool:
        """Whether the checkpoint has its final name and only its evaluation is to be done."""
        return (self.path / PUBLISHED).exists() and self.final.exists() and not self.checkpoint.exists()

    @property
    def over(self) -> bool:
        """Whether no run is to be continued here."""
        return self.published or not (self.path / RUN).exists()

    def publish(self, overwrite: bool) -> None:
        """Give the checkpoint its final name; what had that name before is removed only afterwards.

        Raises:
            ConfigError: something that must not be replaced has come to stand there while the run went on.
        """
        sync_tree(self.checkpoint)
        require_writable(self.final, overwrite)
        atomic_write_text(self.path / PUBLISHED, "")
        publish(self.checkpoint, self.final, _aside(self.final))

    def began_as(self, signature: Mapping[str, str]) -> bool:
        """Whether the run here was begun with all of ``signature``."""
        before = signature_in(self.path)[0] if (self.path / RUN).exists() else {}
        return signature.items() <= before.items()

    def restart(self, overwrite: bool) -> None:
        """Begin another run here. Raises ConfigError where its output must not be replaced."""
        require_writable(self.final, overwrite)
        self.clear()

    def finish(self) -> None:
        """Leave nothing but the output."""
        remove_checkpoint(_aside(self.final))
        (self.path / RUN).unlink(missing_ok=True)  # first, so that no half of a finished run looks unfinished
        shutil.rmtree(self.path, ignore_errors=True)

    def clear(self) -> None:
        """Forget everything; the lock is kept."""
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()


def place_of(final: Path) -> RunDirectory:
    """Where the run of an output works, whether there is one or not."""
    return RunDirectory(final.with_name(f".{final.name}.run"), final)


def signature_in(directory: Path) -> tuple[dict[str, Any], str]:
    """What the run in a directory depends on, and its checksum. Raises FormatError when that is damaged."""
    try:
        return unseal(directory / RUN)
    except FormatError as error:
        raise FormatError(f"{error}; start over with --fresh") from error


def require_as_begun(directory: Path, now: Mapping[str, str]) -> str:
    """The checksum of what the run in a directory depends on.

    Raises:
        ConfigError: that differs from ``now``; the message names the differences.
        FormatError: it is damaged.
    """
    before, checksum = signature_in(directory)
    differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if not differing:
        return checksum
    # What may follow from a change that is named is not named beside it.
    changed = [key for key in differing if not any(other.startswith(FOLLOWS.get(key, ())) for other in differing)]
    shown = [
        f"{key} was {_short(before.get(key))} and is {_short(now.get(key))}{SETTING.get(key, '')}"
        for key in changed[:SHOWN]
    ]
    more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    if "calibration text" in set(differing) - set(changed):
        more += "; the calibration text is another, too, which may follow from that"
    raise ConfigError(
        f"the unfinished run in {directory} can go on only as it began: {'; '.join(shown)}{more}. Undo the change, "
        "or start over with --fresh"
    )


def _short(text: str | None) -> str:
    """A value of a signature for a message: what a person compares of a checksum is its beginning."""
    return "absent" if text is None else re.sub(rf"\b([0-9a-f]{{{DIGITS}}})[0-9a-f]{{20,}}\b", r"\1...", text)


def sweep_up(output: Path) -> None:
    """Remove what is left beside an output that is whole and needs nothing more. Raises ConfigError if it is in use."""
    place = place_of(output_path(output))
    if place.path.is_dir() and place.over:
        with _locked(place):
            if place.over:  # still: nobody has begun another run in between
                place.finish()


@contextmanager
def run_directory(output: Path, *, overwrite: bool, fresh: bool) -> Iterator[RunDirectory]:
    """The run directory of an output, as an earlier run left it unless ``fresh``; removed after success.

    After an exception it is kept if blocks have been committed, so that the same run can go on; not if the numbers or
    the model are at fault, because the same run would end the same way. A KeyboardInterrupt says what is left.

    Raises:
        ConfigError: the output exists and ``overwrite`` is false, or it is not a checkpoint directory, or no directory
            can be created there, or another run is writing it.
        PtqError: the disk is full.
    """
    final = output_path(output)
    place = place_of(final)
    if place.path.is_dir() and not os.access(place.path, os.R_OK | os.W_OK | os.X_OK):
        raise _not_ours(place.path, os.strerror(errno.EACCES))
    with full_disk_as_error(final, None):
        if not place.published:
            require_writable(final, overwrite)  # before a directory is made for what is refused
        with _locked(place):
            try:
                restore(final, _aside(final))  # alone: another run may be between its two renames
                if (place.path / PUBLISHED).exists() and not final.exists() and not place.checkpoint.exists():
                    place.clear()  # of an output that was deleted since
                if not place.published:
                    require_writable(final, overwrite)
                if fresh:
                    place.clear()
                yield place
            except BaseException as error:
                left = what_is_left(place)
                if not _worth_keeping(place, error):
                    shutil.rmtree(place.path, ignore_errors=True)
                if isinstance(error, KeyboardInterrupt):
                    raise KeyboardInterrupt(f"{left}{', without --fresh' if fresh else ''}") from error
                raise
            place.finish()


def _worth_keeping(place: RunDirectory, error: BaseException) -> bool:
    # An evaluation that failed for want of disk, memory, text or files may go well the next time.
    at_fault = isinstance(error, NumericsError | UnsupportedModelError)
    return (place.published or _committed(place) or _measured(place)) and not at_fault


def _committed(place: RunDirectory) -> bool:
    return any(place.path.glob("blocks/*.json"))


def _measured(place: RunDirectory) -> bool:
    return (place.path / MEASURED).exists()


def what_is_left(place: RunDirectory) -> str:
    """What a run that is interrupted leaves, and how it goes on."""
    if place.published:
        whole = f"the checkpoint in {place.final} is complete"
        return f"{whole}; where its evaluation is missing, the same command evaluates it"
    nothing = f"nothing was written to {place.final}"
    if _committed(place):
        return f"{nothing}; the run is continued by the same command, from the last finished block"
    if _measured(place):
        return f"{nothing}; the run is continued by the same command, with the gradients that were measured"
    return f"{nothing}, no block was finished; the run is begun again by the same command"


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


@contextmanager
def _locked(place: RunDirectory) -> Iterator[None]:
    """Hold the directory alone. The lock ends with the process, however that ends."""
    while True:
        if not place.path.is_dir():
            create_directory(place.path, place.final)
        with suppress(FileNotFoundError):  # the run that held it has just removed it
            descriptor = _lock_of(place)
            if _taken(descriptor, place):
                break
            os.close(descriptor)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock_of(place: RunDirectory) -> int:
    try:
        return os.open(place.path / LOCK, os.O_RDWR | os.O_CREAT)
    except (PermissionError, IsADirectoryError) as error:
        raise _not_ours(place.path / LOCK, str(error.strerror)) from error


def _not_ours(path: Path, found: str) -> ConfigError:
    return ConfigError(
        f"a run must be able to write {path}, found: {found}; if it is another user's run, let that one end it, or "
        "choose another `output`; otherwise remove the directory"
    )


def _taken(descriptor: int, place: RunDirectory) -> bool:
    """Whether the lock is ours; not so where its file was removed before it was locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigError(
            f"an output is written by one run at a time; another one is writing {place.final}: wait for it or choose "
            "another `output`"
        ) from error
    return os.path.samestat(os.fstat(descriptor), os.stat(place.path / LOCK))
