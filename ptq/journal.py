"""What a run has finished, on disk: a run that was cut short goes on from here and ends with the same bytes.

``run.json`` says what the run depends on. ``blocks/0007.safetensors`` holds the finished tensors of block 7 and
``hidden/0008-quantized`` what block 8 reads (``-float``: what it reads in the float model); ``blocks/0007.json``, which
is renamed into place last of all, is the commit: report rows and the checksum of every tensor and batch before it. Each
such record is sealed by a checksum of its own and names the record before it.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ptq import hidden as hidden_files
from ptq.distributed import ALONE, Ranks
from ptq.errors import FormatError
from ptq.formats.assembly import Part, Piece, assemble, damage, read_tensor, write_part
from ptq.formats.sealed import seal, unseal
from ptq.formats.staging import sync_directory
from ptq.hidden import Batch, HiddenFile, described
from ptq.journal_directory import MEASURED, RUN, require_as_begun

# A commit of hidden states that would take longer than both is put off to a later block.
SHARE = 0.04  # of the time since the last one
SECONDS = 0.05
KEPT = 2  # commits whose hidden states stay: if the last is damaged, the one before serves

Row = dict[str, Any]
Streams = dict[str, list[Tensor]]  # "quantized" and "float" -> one tensor [B, T, C] a batch


class Record(NamedTuple):
    """One finished unit of a run: a block, or what is not in the blocks."""

    rows: dict[str, Row]  # of the report
    pieces: dict[str, Piece]
    hidden: dict[str, list[Batch]] | None  # what the next unit reads; None: was put off
    seconds: float
    replaces: bool = False  # its tensors stand in for those of that name before it


class Journal:
    """The finished units of a run, from the first on, without a gap.

    Of several processes the first one keeps it; the others add the hidden states of their own sequences, in files of
    their own, and call the same methods at the same time.
    """

    def __init__(
        self, directory: Path, signature: Mapping[str, str], units: int, *, mapped: bool, ranks: Ranks = ALONE
    ) -> None:
        """Open the journal of a run directory, or begin one.

        Args:
            directory: of the run.
            signature: what the run depends on.
            units: how many there will be.
            mapped: hidden states stay in their files while the run uses them.
            ranks: processes that share the run.

        Raises:
            ConfigError: the journal is of a run that differs; the message names the differences.
            FormatError: a file is damaged and the run cannot go on without it; the message names it.
        """
        self._directory, self._units, self._mapped, self._ranks = directory, units, mapped, ranks
        self.records: list[Record] = []
        self.notes: list[str] = []  # what was found damaged and will be computed again
        self._seals: list[str] = []  # of run.json and of every record that is on disk
        self._commits: list[int] = []  # units whose hidden states are on disk
        self._cost, self._since = 0.0, time.perf_counter()
        self.seconds = 0.0  # that all commits took
        if ranks.first:
            for folder in (self._blocks, self._hidden, self.checkpoint):
                folder.mkdir(exist_ok=True)
            self._begin(signature)
            self._recover()
        self.records = ranks.told(self.records)

    @property
    def checkpoint(self) -> Path:
        """Directory of the shards."""
        return self._directory / "checkpoint"

    @property
    def outputs(self) -> Path:
        """Directory of what was measured before the first block and is needed for every one."""
        return (self._directory / MEASURED).parent

    @property
    def rows(self) -> dict[str, Row]:
        """Report rows of all finished units."""
        return {name: row for record in self.records for name, row in record.rows.items()}

    @property
    def _blocks(self) -> Path:
        return self._directory / "blocks"

    @property
    def _hidden(self) -> Path:
        return self._directory / "hidden"

    def keeper(self, unit: int, stream: str) -> Callable[[Tensor], Tensor]:
        """Takes a unit's hidden states batch by batch and gives back what to work with: itself, or a map of a file."""
        return HiddenFile(self._hidden_path(unit, self._own(stream))).keep if self._mapped else _itself

    def restore(self) -> Streams:
        """What the next unit reads, where an earlier process left off."""
        unit, hidden = len(self.records), self.records[-1].hidden or {}
        mine = {stream: self._own(stream) for stream in (name.partition(".")[0] for name in hidden)}
        found = {s: hidden_files.opened(self._hidden_path(unit, own), hidden[own]) for s, own in mine.items()}
        return found if self._mapped else {stream: [t.clone() for t in tensors] for stream, tensors in found.items()}

    def names(self) -> set[str]:
        """Of all tensors of the finished units."""
        return {name for record in self.records for name in record.pieces}

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of finished units, those of the names that are there."""
        units = {name: unit for unit, record in enumerate(self.records) for name in record.pieces}
        return {name: read_tensor(self._part_path(units[name]), name) for name in names if name in units}

    def add(
        self,
        rows: dict[str, Row],
        tensors: Mapping[str, Tensor],
        streams: Streams,
        seconds: float,
        *,
        replaces: bool = False,
    ) -> None:
        """Record a finished unit and what the next one reads.

        Its tensors are on disk afterwards. It is committed with those before it, unless that costs too much now.
        ``replaces``: its rows and tensors stand in for earlier ones of the same names.

        Raises:
            FormatError: a tensor that safetensors cannot hold.
            PtqError: the disk is full.
        """
        unit = len(self.records)
        pieces = dict(write_part(self._part_path(unit), tensors).pieces) if self._ranks.first else {}
        self.records.append(Record(rows, pieces, None, seconds, replaces))
        allowed = max(SECONDS, SHARE * (time.perf_counter() - self._since))
        # Without hidden states a commit costs nothing, and what comes next may take long.
        if self._ranks.told(self._cost <= allowed or not streams):
            self._commit(unit, streams)
        elif self._ranks.first:
            self._prune_hidden(unit + 1)
        self._ranks.meet()  # nobody may be at a later unit, whose files would not be kept

    def drop_last(self) -> None:
        """Forget the last unit, which no other depends on."""
        self._forget_from(len(self.records) - 1)

    def assemble(self, limit: float) -> None:
        """Put the shards of the checkpoint together from the finished units. Raises as `assembly.assemble`."""
        assemble(self._parts(), self.checkpoint, limit)

    def _commit(self, unit: int, streams: Streams) -> None:
        started = time.perf_counter()
        hidden: dict[str, list[Batch]] = {}
        for stream, tensors in streams.items():
            path = self._hidden_path(unit + 1, self._own(stream))
            if not self._mapped:
                file = HiddenFile(path)
                for tensor in tensors:
                    file.append(tensor)
            hidden[self._own(stream)] = described(tensors)
            hidden_files.force(path)
        hidden = {name: batches for each in self._ranks.gather(hidden) for name, batches in each.items()}
        if not self._ranks.first:
            return
        sync_directory(self._hidden)
        sync_directory(self._blocks)
        self.records[unit] = self.records[unit]._replace(hidden=hidden)
        for index in range(len(self._seals) - 1, unit + 1):
            self._write(index)
        self._commits = [*self._commits, unit + 1][-KEPT:]
        self._prune_hidden()
        self._since = time.perf_counter()
        self._cost = self._since - started
        self.seconds += self._cost

    def _write(self, unit: int) -> None:
        record = self.records[unit]
        content = {"unit": unit, "after": self._seals[-1], **record._asdict()}
        self._seals.append(seal(self._record_path(unit), content))

    def _begin(self, signature: Mapping[str, str]) -> None:
        path = self._directory / RUN
        if path.exists():
            self._seals.append(require_as_begun(self._directory, signature))
        elif self._last_record() >= 0:
            raise FormatError(f"{path} is missing, but the run has finished blocks; start over with --fresh")
        else:
            self._seals.append(seal(path, dict(signature)))
            sync_directory(self._directory.parent)

    def _recover(self) -> None:
        """Find out where to go on: the furthest unit before which everything is there and undamaged."""
        problem = self._read_records()
        found = len(self.records)
        if found < self._units or problem is not None:  # else `assemble` finds what is damaged
            bad = next((i for i in range(found) if damage(*self._part(i))), found)
            problem = damage(*self._part(bad)) if bad < found else problem
            unit = bad
            while unit > 0 and (lost := self._lost_hidden(unit)) is not None:
                problem = problem or lost
                unit -= 1
            # One block is soon computed again; more of them are given up only when asked.
            if unit == 0 and problem is not None and self._last_record() > 0:
                raise FormatError(f"{problem}; the run cannot go on without it: start over with --fresh")
            if problem is not None:
                self.notes.append(f"{problem}; the run goes on from block {unit + 1}, before the damage")
            self._forget_from(unit)
        units = range(1, len(self.records) + 1)
        self._commits = [unit for unit in units if any(self._hidden.glob(f"{unit:04d}-*"))][-KEPT:]
        self._prune_hidden()
        for folder in (self._blocks, self.checkpoint):
            for path in folder.glob(".*.tmp"):
                path.unlink()

    def _read_records(self) -> str | None:
        """Read records until one is missing or damaged, and say so if it was not to be expected."""
        for unit in range(self._last_record() + 1):
            path = self._record_path(unit)
            if not path.exists():
                return f"{path} is missing"
            try:
                content, checksum = unseal(path)
            except FormatError as error:
                return str(error)
            if content["unit"] != unit or content["after"] != self._seals[-1]:
                return f"{path} is not the record that followed in this run"
            self.records.append(_record(content))
            self._seals.append(checksum)
        return None

    def _lost_hidden(self, unit: int) -> str | None:
        """Why the run cannot go on with ``unit``; None where it can."""
        hidden = self.records[unit - 1].hidden
        if hidden is None:
            return f"{self._record_path(unit - 1)} has no hidden states"
        found = (hidden_files.damage(self._hidden_path(unit, stream), batches) for stream, batches in hidden.items())
        return next((problem for problem in found if problem is not None), None)

    def _forget_from(self, unit: int) -> None:
        """Drop the records from ``unit`` on, last first, so that a crash in between leaves no gap."""
        for index in range(self._last_record(), unit - 1, -1):
            self._record_path(index).unlink(missing_ok=True)
        del self.records[unit:], self._seals[unit + 1 :]
        kept = {self._part_path(index).name for index in range(unit)} | {
            self._record_path(index).name for index in range(unit)
        }
        for path in self._blocks.iterdir():
            if path.name not in kept:
                path.unlink()

    def _prune_hidden(self, *current: int) -> None:
        kept = {f"{unit:04d}" for unit in (*self._commits, *current)}
        for path in self._hidden.iterdir():
            if path.name.partition("-")[0] not in kept:
                path.unlink()

    def _last_record(self) -> int:
        """Number of the last record on disk, -1 without any."""
        return max((int(path.stem) for path in self._blocks.glob("[0-9]*.json") if path.stem.isdecimal()), default=-1)

    def _part(self, unit: int) -> Part:
        return Part(self._part_path(unit), self.records[unit].pieces)

    def _parts(self) -> list[Part]:
        """Of the checkpoint: what was replaced is left out."""
        replaced: set[str] = set()
        parts = []
        for unit in reversed(range(len(self.records))):
            record = self.records[unit]
            pieces = {name: piece for name, piece in record.pieces.items() if name not in replaced}
            parts.append(Part(self._part_path(unit), pieces))
            if record.replaces:
                replaced |= record.pieces.keys()
        return parts[::-1]

    def _part_path(self, unit: int) -> Path:
        return self._blocks / f"{unit:04d}.safetensors"

    def _record_path(self, unit: int) -> Path:
        return self._blocks / f"{unit:04d}.json"

    def _own(self, stream: str) -> str:
        """Name of this process's part of the hidden states."""
        return stream if self._ranks.first else f"{stream}.{self._ranks.rank}"

    def _hidden_path(self, unit: int, stream: str) -> Path:
        return self._hidden / f"{unit:04d}-{stream}"


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _record(content: Mapping[str, Any]) -> Record:
    hidden = content["hidden"]
    return Record(
        content["rows"],
        {name: Piece(dtype, tuple(shape), checksum) for name, (dtype, shape, checksum) in content["pieces"].items()},
        None if hidden is None else {
            stream: [Batch(dtype, tuple(shape), checksum) for dtype, shape, checksum in batches]
            for stream, batches in hidden.items()
        },
        content["seconds"],
        content["replaces"],
    )  # fmt: skip
