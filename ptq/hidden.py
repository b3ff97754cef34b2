"""Hidden states on disk: a file holds all calibration batches at one place of the model, and is read as a map."""

import errno
import math
import os
import resource
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from ptq.errors import PtqError
from ptq.formats.checkpoint import DTYPE_NAMES
from ptq.formats.checks import DTYPES
from ptq.formats.digest import digest, raw
from ptq.formats.staging import full_disk_as_error

ALIGNMENT = 64  # bytes; of every batch in a file
MAPS = 1 << 16  # as many as Linux lets a process have by default


class Batch(NamedTuple):
    """Hidden states of one batch in a file: name of their dtype, shape, checksum."""

    dtype: str
    shape: tuple[int, ...]
    checksum: str

    @property
    def nbytes(self) -> int:
        """Its size, without the padding after it."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class HiddenFile:
    """A file of hidden states that grows batch by batch.

    What was kept comes back as a private map of the file: it takes memory only while it is read, a change made to it
    in place stays in memory, and it outlives the file's name.
    """

    def __init__(self, path: Path) -> None:
        """Start an empty file. Raises OSError where it cannot be made."""
        self.path = path
        self._end = 0
        path.write_bytes(b"")

    def keep(self, tensor: Tensor) -> Tensor:
        """Append a batch and return it as a map. Raises PtqError when the disk is full."""
        self.append(tensor)
        size = tensor.numel() * tensor.dtype.itemsize
        return _mapped(self.path, self._end - _padded(size), tensor.dtype, tuple(tensor.shape))

    def append(self, tensor: Tensor) -> None:
        """Append a batch. Raises PtqError when the disk is full."""
        data = raw(tensor)
        with full_disk_as_error(self.path, len(data)), open(self.path, "ab") as file:
            file.write(data)
            file.write(bytes(_padded(len(data)) - len(data)))
        self._end += _padded(len(data))


def described(tensors: Iterable[Tensor]) -> list[Batch]:
    """What a file of these tensors holds."""
    return [Batch(DTYPE_NAMES[t.dtype], tuple(t.shape), digest(raw(t))) for t in tensors]


def force(path: Path) -> None:
    """Wait until a file is on the disk. Raises PtqError when the disk is full."""
    with full_disk_as_error(path, None), open(path, "rb") as file:
        os.fsync(file.fileno())


def opened(path: Path, batches: Sequence[Batch]) -> list[Tensor]:
    """The batches of a file as maps."""
    tensors, start = [], 0
    for batch in batches:
        tensors.append(_mapped(path, start, DTYPES[batch.dtype], batch.shape))
        start += _padded(batch.nbytes)
    return tensors


def damage(path: Path, batches: Sequence[Batch]) -> str | None:
    """What is wrong with a file that should hold ``batches``; None where every byte is as it was written."""
    if not path.is_file():
        return f"{path} is missing"
    expected = sum(_padded(batch.nbytes) for batch in batches)
    if path.stat().st_size != expected:
        return f"{path} is damaged: it must have {expected} bytes, found {path.stat().st_size}"
    if described(opened(path, batches)) != list(batches):
        return f"{path} is damaged: its bytes are not those that were written"
    return None


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@lru_cache
def _allow_maps() -> None:
    """Python keeps a file open for every map, and shells allow a thousand where the system allows many more."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAPS if most == resource.RLIM_INFINITY else min(most, MAPS)
    with suppress(ValueError, OSError):  # of a sandbox: a thousand may do
        if now != resource.RLIM_INFINITY and now < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _mapped(path: Path, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    _allow_maps()
    try:
        data = numpy.memmap(path, numpy.uint8, "c", start, (size,))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise PtqError(
            f"each batch of hidden states on disk is an open file; {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} are "
            "allowed: set a larger calibration.batch_size, or raise the limit (ulimit -Hn)"
        ) from error
    return torch.from_numpy(data).view(dtype).view(shape)
