"""The loops of solvers over the columns of a weight, in the C++ library (see columns.h)."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ptq_kernels.cpu import library


class Columns(NamedTuple):
    """B columns of a transposed weight with R rows, and the grid they are rounded to."""

    factors: Tensor  # float32 [B, B], rows may lie further apart: what an error of a column does to the later ones
    scales: Tensor  # float32 [G, R]
    zeros: Tensor  # float32 [G, R]
    group: Tensor  # int32 [B], of each column
    codes: Tensor  # uint8 [B, R], written
    top: int  # the largest code


def serves(columns: Columns, *matrices: Tensor) -> bool:
    """Whether a C++ library can be used and takes these tensors: on the CPU, float32, contiguous."""
    floats = (columns.scales, columns.zeros, *matrices)
    fits = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in floats)
    factors = columns.factors
    fits = fits and factors.device.type == "cpu" and factors.dtype == torch.float32 and factors.stride(1) == 1
    return fits and library.best() is not None


def name() -> str | None:
    """The instruction set of the library that serves them; None without one."""
    found = library.best()
    return None if found is None else found.name


def solve(columns: Columns, weight: Tensor, errors: Tensor) -> None:
    """GPTQ within the block: ``weight [B, R]`` becomes the values of the codes, ``errors [B, R]`` what they miss.

    Each error is divided by its column's diagonal factor and taken from the later columns, times their factors.
    """
    library.present().solve_columns(ctypes.byref(_structure(columns, weight)), *_addresses(weight, errors))


def descend(columns: Columns, values: Tensor, slopes: Tensor, moved: Tensor) -> None:
    """One round of coordinate descent within the block: ``values [B, R]`` of the codes become those of better ones.

    ``slopes [B, R]`` are ``(D H)^T`` and stay as they are; ``moved [B, R]`` is written: how far each value went.
    """
    library.present().descend_columns(ctypes.byref(_structure(columns, values)), *_addresses(values, slopes, moved))


def _structure(columns: Columns, matrix: Tensor) -> library.Columns:
    """For the library, which checks nothing."""
    count, rows = matrix.shape
    groups = len(columns.scales)
    assert columns.factors.shape == (count, count)
    assert columns.scales.shape == columns.zeros.shape == (groups, rows)
    assert columns.codes.shape == (count, rows)
    assert columns.codes.dtype == torch.uint8
    assert columns.codes.is_contiguous()
    assert columns.group.shape == (count,)
    assert columns.group.dtype == torch.int32
    assert 0 <= int(columns.group.min()) <= int(columns.group.max()) < groups
    pointers = _addresses(columns.factors, columns.scales, columns.zeros, columns.group, columns.codes)
    return library.Columns(count, rows, columns.factors.stride(0), *pointers, float(columns.top))


def _addresses(*tensors: Tensor) -> Sequence[int]:
    return [tensor.data_ptr() for tensor in tensors]
