"""Writing a GGUF file tensor by tensor: it is whole under its name, or not there."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq.errors import ConfigError, FormatError
from ptq.formats.staging import full_disk_as_error, sync_directory
from ptq.gguf.blocks import row_bytes
from ptq.gguf.layout import Target
from ptq.gguf.words import Value

PLAIN = {"F32": torch.float32, "F16": torch.float16}


class GgufFile:
    """An open file that takes its tensors in the order it was announced."""

    def __init__(self, writer: Any, targets: Sequence[Target]) -> None:
        self._writer, self._left = writer, list(reversed(targets))

    def add(self, target: Target, data: Tensor) -> None:
        """Write the next tensor: float32 or float16 of the target's shape, or the bytes of its blocks.

        Raises:
            FormatError: it is not the next one, or not of its size.
        """
        due = self._left.pop()
        if due != target or data.numel() * data.element_size() != size_of(target):
            raise FormatError(
                f"{due.name} of {size_of(due)} bytes must be written next; found {target.name} of "
                f"{data.numel() * data.element_size()}"
            )
        self._writer.write_tensor_data(data.contiguous().cpu().numpy())


def size_of(target: Target) -> int:
    """Bytes of a tensor in the file, without padding."""
    if target.kind in PLAIN:
        return torch.Size(target.shape).numel() * PLAIN[target.kind].itemsize
    return target.shape[0] * row_bytes(target.kind, target.shape[1])


@contextmanager
def gguf_file(
    path: Path, architecture: str, keys: Mapping[str, Value], targets: Sequence[Target], *, overwrite: bool
) -> Iterator[GgufFile]:
    """A GGUF file to write into: written beside ``path``, synced and renamed once the body has succeeded.

    Raises:
        ConfigError: ``path`` exists and ``overwrite`` is false, or cannot be created.
        PtqError: the disk is full.
    """
    import gguf

    refuse_existing(path, overwrite)
    _make_directory(path)
    partial = path.with_name(f".{path.name}.partial")
    writer = gguf.GGUFWriter(None, architecture)
    for key, value in keys.items():
        _add(writer, key, value)
    for target in targets:
        _announce(writer, target)
    try:
        with full_disk_as_error(path, sum(size_of(t) for t in targets)):
            _write_front(writer, partial)
            yield GgufFile(writer, targets)
            writer.flush()
            writer.close()
            _sync(partial)
            partial.replace(path)
            sync_directory(path.parent)
    finally:
        with suppress(OSError):  # of a full disk again, by what it still has to write
            writer.close()
        partial.unlink(missing_ok=True)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise ConfigError where ``path`` is taken."""
    if path.is_dir() or (os.path.lexists(path) and not overwrite):
        what = "is a directory" if path.is_dir() else "exists; pass --overwrite"
        raise ConfigError(f"output {path} {what}, or choose another --out")


def _make_directory(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"output {path} cannot be created: {error.strerror}; choose another --out") from error


def _write_front(writer: Any, partial: Path) -> None:
    writer.write_header_to_file(partial)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _add(writer: Any, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _announce(writer: Any, target: Target) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType[target.kind]
    dtype, shape = PLAIN.get(target.kind, torch.uint8), target.shape
    if target.kind not in PLAIN:
        shape = (shape[0], row_bytes(target.kind, shape[1]))
    writer.add_tensor_info(target.name, shape, torch.empty(0, dtype=dtype).numpy().dtype, size_of(target), kind)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
