"""The product for any width, layout, dtype and row count: dequantize a few rows of the weight, multiply, repeat."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ptq_kernels import bitstream
from ptq_kernels.cpu import aten_int4
from ptq_kernels.cpu.units import has_units
from ptq_kernels.layouts import PackedWeight

# Codes of one chunk. Its codes, float32 and bfloat16 copies (8 bytes a code) then stay in a 2 MB second-level cache:
# a 4096 x 4096 weight dequantized whole took 5 to 6 times as long as 64 rows at a time (one thread of a server CPU).
_CHUNK = 2**18
_LEAST_ROWS = 16  # below that the product of a chunk costs more than its dequantization


def matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``x [M, K] @ weight.T + bias``, ``[M, N]`` in ``x.dtype``.

    bfloat16 rows multiply the weight rounded once to bfloat16, as a dense bfloat16 layer does, where that is fast.
    Otherwise the product is one in float32; rounding to float16 would lose small scales.
    """
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 and has_units(x.dtype) else torch.float32
    rows, columns = x.to(dtype), None if bias is None else bias.to(dtype)
    y = torch.empty(x.shape[0], weight.out_features, dtype=dtype, device="cpu")
    for start, dense in _chunks(weight, dtype):
        part = slice(start, start + dense.shape[0])
        y[:, part] = functional.linear(rows, dense, None if columns is None else columns[part])
    return y.to(x.dtype)


def _chunks(weight: PackedWeight, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, dense ``[R, K]``) for all rows of the weight, in reused memory."""
    rows = min(max(_CHUNK // weight.in_features, _LEAST_ROWS), weight.out_features)
    values = rounded = torch.empty(0, device="cpu")
    for start, codes in _codes(weight, rows):
        if values.shape[0] < codes.shape[0]:
            values = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
            rounded = values if dtype == torch.float32 else torch.empty_like(values, dtype=dtype)
        part = slice(start, start + codes.shape[0])
        zeros = None if weight.zeros is None else weight.zeros[part]
        dense = values[: codes.shape[0]]
        _subtract_zeros(codes, zeros, weight, dense)
        dense.view(codes.shape[0], -1, weight.group_size).mul_(weight.scales[part].unsqueeze(-1))
        yield start, dense if dtype == torch.float32 else rounded[: codes.shape[0]].copy_(dense)


def _codes(weight: PackedWeight, rows: int) -> Iterator[tuple[int, Tensor]]:
    if weight.layout == "aten_int4":
        yield from aten_int4.read(weight, rows)
        return
    unpacker = bitstream.Unpacker(weight.bits, weight.in_features, rows, weight.qweight.device)
    for start in range(0, weight.out_features, rows):
        yield start, unpacker(weight.qweight[start : start + rows])


def _subtract_zeros(codes: Tensor, zeros: Tensor | None, weight: PackedWeight, out: Tensor) -> None:
    """``out = codes - zeros``, exactly; `codes` is used up."""
    grouped = (codes.shape[0], -1, weight.group_size)
    if weight.bits == 8 or (zeros is not None and int(zeros.max()) > 128):  # differences do not fit a byte
        out.copy_(codes)
        out.view(grouped).sub_(128 if zeros is None else zeros.unsqueeze(-1))
        return
    signed = codes.view(torch.int8)  # as bytes: four times less memory traffic than subtracting float32
    signed.view(grouped).sub_(2 ** (weight.bits - 1) if zeros is None else zeros.view(torch.int8).unsqueeze(-1))
    out.copy_(signed)
