"""The public functions: they validate, then call the operator of torch_op.py or convert between layouts."""

from typing import NamedTuple

import torch
from torch import Tensor

from ptq_kernels import checks, dispatch, layouts, reference, torch_op
from ptq_kernels.layouts import PackedWeight


class Prepared(NamedTuple):
    """A weight in the layout that `impl` runs fastest on its device."""

    qweight: Tensor
    scales: Tensor  # [N, G], as given
    zeros: Tensor | None  # uint8 [N, G], as given
    layout: str
    impl: str


def matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    layout: str = "canonical",
    impl: str = "auto",
) -> Tensor:
    """``y = x @ (scales * (codes - zeros)).T + bias`` with float32 accumulation.

    x: bfloat16, float16 or float32 ``[..., K]``; no rows give an empty result. qweight: int32
    ``[N, ceil(K * bits / 32)]`` (see bitstream.py), or what `prepare` returned, with its ``layout``. scales: bfloat16,
    float16 or float32 ``[N, K // group_size]``, of either sign. zeros: uint8, the shape of scales; None means
    ``2**(bits-1)``. bias: ``[N]``. bits: 2, 3, 4 or 8. group_size divides K and is never -1. Returns ``[..., N]`` in
    ``x.dtype``. Differentiable with respect to x and bias.

    Raises ValueError or TypeError for arguments that do not fit, RuntimeError where an explicit ``impl`` cannot run.
    """
    if x.dim() == 0:
        raise ValueError("x must have shape [..., K], got a scalar; pass at least one row of K values")
    weight = PackedWeight(qweight, scales, zeros, bits, group_size, x.shape[-1], layout)
    dispatch.check_name(impl)
    checks.check_weight(weight)
    checks.check_input(x, weight, bias)
    result: Tensor = torch_op.matmul(x, qweight, scales, zeros, bias, bits, group_size, layout, impl)
    return result


def dequantize(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "canonical",
) -> Tensor:
    """The dense ``[N, in_features]`` weight: formed in float32 and rounded once to ``dtype``.

    Arguments and errors as for `matmul`.
    """
    weight = PackedWeight(qweight, scales, zeros, bits, group_size, in_features, layout)
    checks.check_weight(weight)
    return reference.dequantize(weight).to(dtype)


def prepare(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    impl: str = "auto",
) -> Prepared:
    """Convert a canonical weight into the layout that the chosen implementation runs fastest on its device.

    The result replaces the canonical tensors (`canonical` inverts it exactly), so only one copy need be held. It must
    not be stored: how a layout places the codes may depend on the processor. Errors as for `matmul`.
    """
    weight = PackedWeight(qweight, scales, zeros, bits, group_size, in_features)
    checks.check_weight(weight)
    name = dispatch.choose(impl, qweight.device)
    best = layouts.convert(weight, dispatch.fastest_layout(name, weight))
    return Prepared(best.qweight, scales, zeros, best.layout, name)


def canonical(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    layout: str,
) -> Tensor:
    """The canonical qweight of a prepared weight, bit for bit; scales and zeros are the same in every layout.

    Errors as for `matmul`.
    """
    weight = PackedWeight(qweight, scales, zeros, bits, group_size, in_features, layout)
    checks.check_weight(weight)
    return layouts.convert(weight, "canonical").qweight
