"""The specification: what every implementation must compute, in plain torch and float32."""

import torch
from torch import Tensor

from ptq_kernels import bitstream, layouts
from ptq_kernels.layouts import PackedWeight

# Rows of the weight dequantized at a time by the backward pass: 2**22 float32 values are 16 MiB.
_BACKWARD_VALUES = 2**22


def dequantize(weight: PackedWeight) -> Tensor:
    """The dense float32 ``[N, K]`` weight: the exact integer ``code - zero`` times the scale, rounded once."""
    weight = layouts.convert(weight, "canonical")
    codes = bitstream.unpack(weight.qweight, weight.bits, weight.in_features)
    grouped = codes.view(codes.shape[0], -1, weight.group_size).float()
    zeros = 2 ** (weight.bits - 1) if weight.zeros is None else weight.zeros.float().unsqueeze(-1)
    return ((grouped - zeros) * weight.scales.float().unsqueeze(-1)).view(codes.shape)


def matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``x [M, K] @ weight.T + bias`` in float32, rounded once to ``x.dtype``; ``[M, N]``."""
    y = x.float() @ dequantize(weight).T
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
