"""The specification: what every implementation must compute, in plain torch and float32."""

import torch
from torch import Tensor

from ptq_kernels import bitstream, layouts, order
from ptq_kernels.layouts import PackedWeight

# Rows of the weight dequantized at a time by the backward pass: 2**22 float32 values are 16 MiB.
_BACKWARD_VALUES = 2**22


def dequantize(weight: PackedWeight) -> Tensor:
    """The dense float32 ``[N, K]`` weight: the exact integer ``code - zero`` times the scale, rounded once.

    Its columns are in the order of x's, also where those of the packed weight are not.
    """
    weight = layouts.convert(weight, "canonical")
    codes = bitstream.unpack(weight.qweight, weight.bits, weight.in_features)
    grouped = codes.view(codes.shape[0], -1, weight.group_size).float()
    zeros = 2 ** (weight.bits - 1) if weight.zeros is None else weight.zeros.float().unsqueeze(-1)
    dense = ((grouped - zeros) * weight.scales.float().unsqueeze(-1)).view(codes.shape)
    return dense if weight.perm is None else dense.index_select(1, order.inverse(weight.perm))


def matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``x [M, K] @ weight.T + bias`` in float32, rounded once to ``x.dtype``; ``[M, N]``."""
    y = x.float() @ dequantize(weight).T
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """What activation "int8" makes of ``x [M, K]``: integers of -127 to 127 and scales ``[M, 1]``, both float32.

    The scale of a row is its largest magnitude over 127, rounding is to nearest, ties to even. A row with a value that
    is not finite has scale NaN; one without a magnitude of about 2**-121 counts as zero.
    """
    most = x.float().abs().amax(-1, keepdim=True)
    inverse = torch.full_like(most, 127) / most  # 127 / most would be a rounded reciprocal times 127
    scales = torch.where(inverse.isfinite() | ~most.isfinite(), most / 127, 0.0)
    scales = torch.where(most.isfinite(), scales, torch.nan)
    return torch.where(inverse.isfinite(), (x.float() * inverse).round(), 0.0), scales


def matmul_int8(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """As `matmul`, with x rounded to 8 bits a row; summed in float32."""
    values, scales = quantize_rows(x)
    y = values @ dequantize(weight).T * scales
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype)


def grad_input(grad: Tensor, weight: PackedWeight) -> Tensor:
    """``grad [M, N] @ weight``, ``[M, K]`` in ``grad.dtype``: the derivative of `matmul` with respect to x.

    The weight is dequantized a few rows at a time, so training beside a frozen quantized layer never holds it dense.
    """
    weight = layouts.convert(weight, "canonical")
    rows = max(1, _BACKWARD_VALUES // weight.in_features)
    total = torch.zeros(grad.shape[0], weight.in_features, dtype=torch.float32, device=grad.device)
    for start in range(0, weight.out_features, rows):
        part = slice(start, start + rows)
        zeros = None if weight.zeros is None else weight.zeros[part]
        chunk = weight._replace(qweight=weight.qweight[part], scales=weight.scales[part], zeros=zeros)
        total.addmm_(grad[:, part].float(), dequantize(chunk))
    return total.to(grad.dtype)
