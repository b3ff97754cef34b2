"""Checkpoint directories: safetensors shards with an index, written one tensor at a time and read lazily.

A safetensors file is an 8-byte little-endian header length, a JSON header (name, dtype, shape, byte range) and the
bytes, without gaps. Pickled weights are never read: loading a pickle can run code.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ptq.errors import FormatError
from ptq.formats.checks import DTYPES
from ptq.formats.codec import TensorSpec
from ptq.formats.staging import atomic_write_text, full_disk_as_error, read_json, staged_directory, sync_directory

__all__ = ["CheckpointReader", "ShardWriter", "atomic_write_text", "read_json", "staged_directory"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
COPY_BYTES = 16 * 1024**2
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """One tensor of a safetensors file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Writes tensors into safetensors shards.

    Bytes go to disk as they are added, so memory holds one tensor at a time. The header precedes the data in a
    shard and is known last, so the open shard is spooled and copied once. The same input gives the same bytes.
    """

    def __init__(self, directory: Path, max_shard_bytes: float = 5e9) -> None:
        """Write into an existing ``directory``; a tensor larger than ``max_shard_bytes`` has a shard to itself."""
        self._directory = Path(directory)
        self._limit = max_shard_bytes
        self._spools: dict[int, BinaryIO] = {}  # by element size: widest first in the file keeps all of them aligned
        self._open_shard: dict[str, Entry] = {}
        self._shards: list[tuple[Path, list[str]]] = []
        self._names: set[str] = set()
        self._shard_bytes = 0  # of tensors in the open shard
        self._closed_bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Append tensors. Raises FormatError for a repeated name or a dtype safetensors lacks, PtqError if full."""
        for name, tensor in tensors.items():
            if name in self._names:
                raise FormatError(f"tensor {name} was written already; each name may be added once")
            if tensor.dtype not in DTYPE_NAMES:
                raise FormatError(f"tensor {name}: dtype must be one of {', '.join(DTYPES)}, found {tensor.dtype}")
            entry = Entry("", tensor.dtype, tuple(tensor.shape))
            if self._open_shard and self._shard_bytes + entry.nbytes > self._limit:
                self._close_shard()
            self._names.add(name)
            self._open_shard[name] = entry
            self._shard_bytes += entry.nbytes
            self._spool(tensor, entry)

    def finish(self) -> dict[str, Any]:
        """Close the last shard, give all their final names and write the index.

        Returns:
            The index: ``metadata.total_size`` in bytes and ``weight_map`` from tensor to file. One shard is called
            ``model.safetensors`` and needs no index file.

        Raises:
            FormatError: nothing was added.
            PtqError: the disk is full.
        """
        if not self._names:
            raise FormatError(f"a checkpoint must hold at least one tensor, none was added for {self._directory}")
        if self._open_shard:
            self._close_shard()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._shards, start=1):
            final = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self._directory / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._closed_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        if count > 1:
            atomic_write_text(self._directory / INDEX, json.dumps(index, indent=2) + "\n")
        sync_directory(self._directory)
        return index

    def _spool(self, tensor: Tensor, entry: Entry) -> None:
        size = entry.dtype.itemsize
        path = self._directory / f".spool-{size}"
        with full_disk_as_error(path, entry.nbytes):
            if size not in self._spools:
                self._spools[size] = open(path, "w+b")  # noqa: SIM115 - closed with the shard
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._spools[size].write(flat.numpy().data)
            self._spools[size].flush()

    def _close_shard(self) -> None:
        path = self._directory / f".shard-{len(self._shards) + 1:05d}"
        entries = sorted(self._open_shard.items(), key=lambda item: -item[1].dtype.itemsize)
        head = header_bytes(entries)
        with full_disk_as_error(path, len(head) + self._shard_bytes), open(path, "wb") as out:
            out.write(head)
            for _, spool in sorted(self._spools.items(), reverse=True):
                spool.seek(0)
                shutil.copyfileobj(spool, out, COPY_BYTES)
            out.flush()
            os.fsync(out.fileno())
        for size, spool in self._spools.items():
            spool.close()
            (self._directory / f".spool-{size}").unlink()
        self._shards.append((path, [name for name, _ in entries]))
        self._closed_bytes += self._shard_bytes
        self._spools, self._open_shard, self._shard_bytes = {}, {}, 0


def header_bytes(entries: Iterable[tuple[str, Entry]]) -> bytes:
    """Length and header of a shard that holds ``entries`` in this order; padded so that the data starts aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, entry in entries:
        offsets = [start, start + entry.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        start = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read(file: Any, name: str) -> Tensor:
    """One tensor of an open safetensors file.

    The library makes another error of a KeyboardInterrupt that comes while it runs: what goes well at a second attempt
    was no error, but that.
    """
    try:
        tensor: Tensor = file.get_tensor(name)
    except ValueError as error:
        file.get_tensor(name)
        raise KeyboardInterrupt from error
    return tensor


class CheckpointReader:
    """The tensors of a directory with ``model.safetensors`` or shards and their index.

    Opening reads headers only and checks them against index and file sizes; a file is mapped into memory when its
    first tensor is read, and stays mapped.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open a checkpoint.

        Raises:
            FormatError: no such directory, no safetensors in it, a shard absent, damaged or at odds with the index.
        """
        self.directory = Path(directory)
        self._handles: dict[str, Any] = {}
        self._entries: dict[str, Entry] = {}
        weight_map = self._find_files() or {}
        for file in self._sizes:
            for name, entry in read_header(self.directory / file).items():
                if name in self._entries and name not in weight_map:
                    raise FormatError(
                        f"a tensor must be stored once, or the index say where; {name} is in "
                        f"{self._entries[name].file} and in {file} of {self.directory}: add it to {INDEX}"
                    )
                if name not in self._entries or weight_map[name] == file:
                    self._entries[name] = entry
        for name, file in weight_map.items():
            if name not in self._entries or self._entries[name].file != file:
                raise FormatError(f"{INDEX} says that {name} is in {file}, which does not hold it; fetch both again")

    def names(self) -> tuple[str, ...]:
        """Every tensor, file by file in the order of the headers."""
        return tuple(self._entries)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor, from the header. Raises FormatError for an unknown name."""
        entry = self._entry(name)
        return entry.dtype, entry.shape

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU. Raises FormatError for an unknown name, with the nearest known one."""
        file = self._entry(name).file
        if file not in self._handles:
            from safetensors import safe_open

            self._handles[file] = safe_open(self.directory / file, framework="pt", device="cpu")
        return read(self._handles[file], name)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those of ``names`` that the checkpoint has; a codec's `decode` says which of them it misses."""
        return {name: self.tensor(name) for name in names if name in self._entries}

    def files(self) -> dict[str, int]:
        """File name to size in bytes, for every shard."""
        return dict(self._sizes)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            near = get_close_matches(name, self._entries, n=1, cutoff=0.0)
            hint = f"; the nearest name is {near[0]}" if near else ""
            raise FormatError(f"tensor {name} is not among the {len(self._entries)} of {self.directory}{hint}")
        return self._entries[name]

    def _find_files(self) -> dict[str, str] | None:
        """Record the shards and their sizes; the index's map from tensor to file where there is an index."""
        if not self.directory.is_dir():
            raise FormatError(f"a checkpoint must be a directory; there is none at {self.directory}")
        weight_map = None
        if (self.directory / SINGLE).is_file():
            files = [SINGLE]
        elif (self.directory / INDEX).is_file():
            weight_map = read_json(self.directory / INDEX).get("weight_map")
            named = list(weight_map.values()) if isinstance(weight_map, dict) else []
            unnamed = [file for file in named if not (isinstance(file, str) and file)]
            if unnamed or not named:
                found = repr(unnamed[0]) if unnamed else "none"
                raise FormatError(f"{self.directory / INDEX} must have a weight_map from tensor to file, found {found}")
            files = sorted(set(named))
        else:
            files = [path.name for path in self.directory.glob("*.safetensors")]
            if len(files) != 1:
                raise FormatError(_nothing_to_read(self.directory, len(files)))
        absent = [file for file in files if Path(file).name != file or not (self.directory / file).is_file()]
        if absent and weight_map is None:
            raise FormatError(
                f"{self.directory / files[0]} must be a file; it is a directory, a pipe or a link to nothing: fetch it "
                "again"
            )
        if nested := [file for file in absent if (self.directory / file).is_file()]:
            raise FormatError(
                f"shards must lie in {self.directory} itself; {INDEX} names {nested[0]}: move it, and name it so there"
            )
        if absent:
            raise FormatError(
                f"{INDEX} names {len(files)} shards, {len(absent)} of them are not in {self.directory}: "
                f"{', '.join(absent[:3])}; fetch the rest of the checkpoint"
            )
        self._sizes = {file: (self.directory / file).stat().st_size for file in files}
        return weight_map


def _nothing_to_read(directory: Path, found: int) -> str:
    if found:
        return f"{directory} holds {found} safetensors files but no {INDEX}, which says what is where; fetch the index"
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth")):
        return (
            f"{directory} holds pickled weights only (pytorch_model.bin); a pickle can run code when it is loaded and "
            "is never read. Convert it where you trust it, with transformers: "
            "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new) writes safetensors"
        )
    return f"{directory} must hold {SINGLE} or {INDEX}; it holds no safetensors file"


def read_header(path: Path) -> dict[str, Entry]:
    """Tensors of one file. Raises FormatError unless the header fits the file to the byte."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise FormatError(f"{path} is truncated or no safetensors file: {size} bytes cannot hold its header")
        text = file.read(length)
    try:
        header = json.loads(text.decode())
        if not isinstance(header, dict):
            raise TypeError(f"it is no object but {type(header).__name__}")
        if not _is_metadata(metadata := header.pop("__metadata__", None)):
            raise ValueError(f"__metadata__ must map text to text, found {metadata!r:.80}")
        for name, value in header.items():
            name.encode()
            if not _is_description(value):
                raise ValueError(f"{name} needs a dtype, a shape and two data_offsets, found {value!r:.80}")
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"{path} is damaged: its header is not a safetensors header ({error})") from error
    ranges = {name: tuple(value["data_offsets"]) for name, value in header.items()}
    kinds = {name: (value["dtype"], tuple(value["shape"])) for name, value in header.items()}
    unknown = {dtype for dtype, _ in kinds.values()} - DTYPES.keys()
    if unknown:
        raise FormatError(f"{path}: dtypes must be among {', '.join(DTYPES)}, found {', '.join(sorted(unknown))}")
    entries = {name: Entry(path.name, DTYPES[dtype], shape) for name, (dtype, shape) in kinds.items()}
    end = 0
    for name, (start, stop) in sorted(ranges.items(), key=lambda item: item[1]):
        if start != end or stop - start != entries[name].nbytes:
            raise FormatError(
                f"{path} is damaged: {name} must take the {entries[name].nbytes} bytes from {end}, its header says "
                f"{start}..{stop}"
            )
        end = stop
    if 8 + length + end != size:
        raise FormatError(
            f"{path} is truncated or damaged: its header describes {8 + length + end} bytes, the file has {size}; "
            "fetch it again"
        )
    return entries


def _is_metadata(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(isinstance(each, str) for each in value.values()))


def _is_description(value: Any) -> bool:
    """Whether a header describes a tensor so: as strictly as the safetensors library, which reads it later."""
    if not isinstance(value, dict) or not isinstance(value.get("dtype"), str):
        return False
    sizes = [value.get("shape"), value.get("data_offsets")]
    whole = all(isinstance(each, list) and all(type(n) is int and n >= 0 for n in each) for each in sizes)
    return whole and len(value["data_offsets"]) == 2
