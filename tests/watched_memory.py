"""What compute-sanitizer's memcheck does on a GPU, in Triton's interpreter: no load or store leaves the arguments.

The interpreter reads whatever lies at an address, so an element too far is a number like any other there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime import interpreter


class _Watched:
    """Stands for the interpreter's own loads and stores."""

    def __init__(self, real: Any, ranges: list[tuple[int, int]]) -> None:
        self._real, self._ranges = real, ranges

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def _check(self, what: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        used = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.uint64, copy=False)
        if not used.size:
            return
        first, end = int(used.min()), int(used.max()) + size
        if any(start <= first and end <= stop for start, stop in self._ranges):
            return  # all in one tensor, as nearly always
        inside = np.zeros(used.shape, dtype=bool)
        for start, stop in self._ranges:
            inside |= (used >= start) & (used + np.uint64(size) <= stop)
        if not inside.all():
            beyond = min(int(p) - stop for p in used[~inside] for _, stop in self._ranges if p >= stop - size)
            raise AssertionError(
                f"{(~inside).sum()} elements of a {what} are outside of every tensor, {beyond} bytes on"
            )

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> np.ndarray:
        self._check("load", pointers, mask, np.dtype(dtype).itemsize)
        return self._real.load(pointers, mask, other, dtype)

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        self._check("store", pointers, mask, value.dtype.itemsize)
        self._real.store(pointers, value, mask)


@contextmanager
def watched() -> Iterator[None]:
    """Inside, an interpreted kernel that leaves its tensors ends with an AssertionError."""
    ranges: list[tuple[int, int]] = []
    call = interpreter.GridExecutor.__call__

    def launch(self: Any, *arguments: Any, **options: Any) -> None:
        tensors = [t for t in (*arguments, *options.values()) if isinstance(t, torch.Tensor)]
        ranges[:] = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
        call(self, *arguments, **options)

    with (
        patch.object(interpreter, "_interpreter", _Watched(interpreter._interpreter, ranges)),
        patch.object(interpreter.GridExecutor, "__call__", launch),
    ):
        yield
