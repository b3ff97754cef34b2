"""A checkpoint put together from parts: safetensors files written one after another, then streamed into shards.

Every tensor is known by dtype, shape and checksum from the moment it is written, so a part that is damaged later is
found before its bytes reach a shard. Shards hold the same bytes as `ShardWriter` would have written.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import safetensors
from torch import Tensor

from ptq.errors import FormatError
from ptq.formats.checkpoint import DTYPE_NAMES, INDEX, SINGLE, Entry, header_bytes, read, read_header
from ptq.formats.checks import DTYPES
from ptq.formats.digest import digest, raw
from ptq.formats.staging import atomic_write_text, full_disk_as_error, sync_directory


class Piece(NamedTuple):
    """One tensor of a part: safetensors' name of its dtype, shape, checksum of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    checksum: str

    def entry(self, file: str) -> Entry:
        """The same as an entry of a file's header."""
        return Entry(file, DTYPES[self.dtype], self.shape)


class Part(NamedTuple):
    """One file of tensors, in the order in which they were added."""

    path: Path
    pieces: Mapping[str, Piece]


def write_part(path: Path, tensors: Mapping[str, Tensor]) -> Part:
    """Write tensors into one safetensors file, whole or not at all, and force it to the disk.

    Raises:
        FormatError: a dtype safetensors lacks.
        PtqError: the disk is full.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise FormatError(f"tensor {name}: dtype must be one of {', '.join(DTYPES)}, found {tensor.dtype}")
    entries = _widest_first({name: Entry(path.name, t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    pieces: dict[str, Piece] = {}

    def data() -> Iterator[Any]:
        for name, entry in entries.items():
            values = raw(tensors[name])
            pieces[name] = Piece(DTYPE_NAMES[entry.dtype], entry.shape, digest(values))
            yield values

    _write(path, entries, data())
    return Part(path, {name: pieces[name] for name in tensors})


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a part. Raises FormatError where the part is gone."""
    if not path.is_file():
        raise FormatError(f"{path} is missing; the run cannot go on without it: start over with --fresh")
    with safetensors.safe_open(path, "pt") as file:
        return read(file, name)


def damage(path: Path, pieces: Mapping[str, Piece]) -> str | None:
    """What is wrong with a file that should hold ``pieces``; None where every byte is as it was written."""
    if not path.is_file():
        return f"{path} is missing"
    try:
        found = read_header(path)
    except FormatError as error:
        return str(error)
    if found != {name: piece.entry(path.name) for name, piece in pieces.items()}:
        return f"{path} is damaged: its header is not the one that was written"
    data = _data(path)
    bad = [name for name, piece in pieces.items() if digest(data[name]) != piece.checksum]
    return f"{path} is damaged: the bytes of {bad[0]} are not those that were written" if bad else None


def shards(parts: Sequence[Part], limit: float) -> dict[str, dict[str, Piece]]:
    """File name to content of every shard; one that would exceed ``limit`` bytes starts another.

    Raises:
        FormatError: a name occurs twice.
    """
    layout: list[dict[str, Piece]] = []
    names: set[str] = set()
    size = 0
    for part in parts:
        for name, piece in part.pieces.items():
            if name in names:
                raise FormatError(f"tensor {name} of {part.path} was written already; each name may be added once")
            names.add(name)
            nbytes = piece.entry("").nbytes
            if not layout or size + nbytes > limit:
                layout.append({})
                size = 0
            layout[-1][name] = piece
            size += nbytes
    if len(layout) == 1:
        return {SINGLE: layout[0]}
    return {f"model-{i:05d}-of-{len(layout):05d}.safetensors": shard for i, shard in enumerate(layout, start=1)}


def assemble(parts: Sequence[Part], directory: Path, limit: float) -> None:
    """Stream the parts into the shards of a checkpoint and write its index; a part is deleted once it is used up.

    Shards that exist are checked and kept, so a call that was cut short is simply made again.

    Raises:
        FormatError: the bytes of a part, or of a shard whose parts are gone, are not those that were written.
        PtqError: the disk is full.
    """
    source = {name: part.path for part in parts for name in part.pieces}
    left = {part.path: set(part.pieces) for part in parts}
    layout = shards(parts, limit)
    for file, shard in layout.items():
        target = directory / file
        problem = damage(target, shard)
        if problem is not None:
            gone = [source[name] for name in shard if not source[name].exists()]
            if gone:
                broken = problem if target.exists() else f"{gone[0]} is missing"
                raise FormatError(f"{broken}; the run cannot go on without it: start over with --fresh")
            _write_shard(target, shard, source)
            sync_directory(directory)
        for name in shard:
            left[source[name]].discard(name)
        for path in [path for path, names in left.items() if not names]:
            path.unlink(missing_ok=True)
            del left[path]
    if len(layout) > 1:
        total = sum(piece.entry("").nbytes for shard in layout.values() for piece in shard.values())
        weight_map = {name: file for file, shard in layout.items() for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        atomic_write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")


def _write_shard(path: Path, shard: Mapping[str, Piece], source: Mapping[str, Path]) -> None:
    entries = _widest_first({name: piece.entry(path.name) for name, piece in shard.items()})
    opened: dict[Path, Mapping[str, Any]] = {}

    def data() -> Iterator[Any]:
        for name in entries:
            part = source[name]
            if part not in opened:
                opened[part] = _data(part)
            values = opened[part][name]
            if digest(values) != shard[name].checksum:
                raise FormatError(
                    f"{part} is damaged: the bytes of {name} are not those that were written; the run cannot go on "
                    "without it: start over with --fresh"
                )
            yield values

    _write(path, entries, data())


def _write(path: Path, entries: Mapping[str, Entry], data: Iterator[Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    needed = sum(entry.nbytes for entry in entries.values())
    with full_disk_as_error(path, needed):
        with open(temporary, "wb") as file:
            file.write(header_bytes(entries.items()))
            for values in data:
                file.write(values)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def _widest_first(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """In this order every tensor is aligned to its elements."""
    return dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize))


def _data(path: Path) -> dict[str, Any]:
    """The bytes of every tensor of a file, mapped."""
    entries = read_header(path)
    if not any(entry.nbytes for entry in entries.values()):
        return dict.fromkeys(entries, b"")
    mapped = numpy.memmap(path, numpy.uint8, "r")
    start = len(mapped) - sum(entry.nbytes for entry in entries.values())
    data = {}
    for name, entry in entries.items():
        data[name] = mapped[start : start + entry.nbytes]
        start += entry.nbytes
    return data
