"""Which of the CPU paths serves a call."""

from collections.abc import Callable

import torch
from torch import Tensor

from ptq_kernels.cpu import aten_int4, chunked, library, strips
from ptq_kernels.layouts import PackedWeight, convert

# Up to so many rows torch's int4 operator wins. It unpacks the weight again for every few rows (4096 x 4096, one
# thread: 0.36 ms a row) where the chunked path unpacks it once (about 16 ms), so they meet near 45 rows.
ATEN_MOST_ROWS = 40


def matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``x [M, K] @ weight.T + bias``, ``[M, N]`` in ``x.dtype``, by the fastest path that reads the weight's layout."""
    if weight.layout == "strips":
        return strips.matmul(x, weight, bias, strips.any_library())
    return by_torch(x, weight, bias)


def by_torch(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """The same without any library of this package."""
    # The operator has a vector path for bfloat16 only, and float16 or float32 rows must not lose precision.
    if weight.layout == "aten_int4" and x.dtype == torch.bfloat16 and x.shape[0] <= ATEN_MOST_ROWS:
        y = aten_int4.matmul(x, weight)
        return y if bias is None else y.add_(bias)
    return chunked.matmul(x, weight, bias)


def by_library(name: str) -> Callable[[Tensor, PackedWeight, Tensor | None], Tensor]:
    """The product by the library of one instruction set; a weight in another layout is converted on every call."""

    def run(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        return strips.matmul(x, convert(weight, "strips"), bias, library.get(name))

    return run


def _library(name: str | None) -> library.Library | None:
    """That of one instruction set, None where it cannot be used; without a name the fastest."""
    if name is None:
        return library.best()
    return None if library.refuse(name) else library.get(name)


def int8_refusal(name: str | None) -> Callable[[PackedWeight], str | None]:
    """Why rows in 8 bits cannot be multiplied with a weight by the library of one instruction set, or the fastest."""
    return lambda weight: strips.refuse_int8(weight, _library(name))


def with_activation(name: str | None) -> Callable[[Tensor, PackedWeight, Tensor | None, str], Tensor]:
    """The product of rows rounded to an activation, by the library of one instruction set, or the fastest."""

    def run(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
        by = strips.any_library() if name is None else library.get(name)
        return strips.matmul(x, weight, bias, by, activation)

    return run


def describe(weight: PackedWeight) -> str:
    """What `matmul` does with such a weight, for the log and the report."""
    if weight.layout == "strips":
        return f"C++ library for {strips.any_library().name}"
    if weight.layout == "aten_int4":
        return f"aten int4 for up to {ATEN_MOST_ROWS} bfloat16 rows, chunked dequantize-matmul otherwise"
    return "chunked dequantize-matmul"
