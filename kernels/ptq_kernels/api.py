"""The public functions: they validate, then call the operator of torch_op.py or convert between layouts."""

from typing import NamedTuple

import torch
from torch import Tensor

from ptq_kernels import checks, direct, dispatch, layouts, order, reference, torch_op, transforms
from ptq_kernels.layouts import PackedWeight


class Prepared(NamedTuple):
    """A weight in the layout that `impl` runs fastest on its device."""

    qweight: Tensor
    scales: Tensor  # [N, G], as given
    zeros: Tensor | None  # uint8 [N, G], as given
    layout: str
    impl: str
    perm: Tensor | None = None  # int32 [K], where g_idx was given


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
    perm: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``y = x @ (scales * (codes - zeros)).T + bias`` with float32 accumulation.

    x: bfloat16, float16 or float32 ``[..., K]``; no rows give an empty result. qweight: int32
    ``[N, ceil(K * bits / 32)]`` (see bitstream.py), or what `prepare` returned, with its ``layout``. scales: bfloat16,
    float16 or float32 ``[N, K // group_size]``, of either sign. zeros: uint8, the shape of scales; None means
    ``2**(bits-1)``. bias: ``[N]``. bits: 2, 3, 4 or 8. group_size divides K and is never -1. perm: int32 or int64
    ``[K]``, a permutation (not checked here): the weight then multiplies ``x[..., perm]``. Returns ``[..., N]`` in
    ``x.dtype``; a float16 sum beyond 65504 is infinite, as IEEE 754 rounds it and as cuBLAS returns it. Differentiable
    with respect to x and bias, to any order, also by the transforms of torch.func and in forward mode.

    activation: "int8" rounds every row of x to 8 bits with a scale of its own (`reference.quantize_rows`) and sums
    integers, which is faster with AVX512-VNNI or AMX. It costs a relative error of about 1 % for normally distributed
    rows, more where a few values are far larger than the rest. Gradients take the rounding for the identity.

    Raises ValueError or TypeError for arguments that do not fit, scales that require a gradient (which they would not
    get) where one is recorded among them, RuntimeError where an explicit ``impl`` or the
    activation cannot run.
    """
    scheme = (bits, group_size, layout, impl, activation)
    if (short := direct.product(x, qweight, scales, zeros, bias, perm, scheme)) is not None:
        return short
    checks.check_rows(x)
    weight = PackedWeight(qweight, scales, zeros, bits, group_size, x.shape[-1], layout, perm)
    dispatch.check_name(impl)
    checks.check_activation(activation)
    checks.check_columns(x, scales, group_size)
    checks.check_weight(weight)
    checks.check_input(x, weight, bias)
    if torch.compiler.is_compiling() and (short := direct.traced(x, weight, bias, scheme)) is not None:
        return short
    arguments = (x, qweight, scales, zeros, bias, bits, group_size, layout, impl, perm, activation)
    if transforms.wanted():
        return transforms.matmul(*arguments)
    result: Tensor = torch_op.matmul(*arguments)
    direct.remember(x, weight, bias, scheme)
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
    perm: Tensor | None = None,
) -> Tensor:
    """The dense ``[N, in_features]`` weight: formed in float32 and rounded once to ``dtype``.

    Its columns are those of x, with perm too. Arguments and errors as for `matmul`.
    """
    weight = PackedWeight(qweight, scales, zeros, bits, group_size, in_features, layout, perm)
    checks.check_weight(weight)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point one, got {dtype}; unpack gives the codes")
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
    g_idx: Tensor | None = None,
    activation: str | None = None,
) -> Prepared:
    """Convert a canonical weight into the layout that the chosen implementation runs fastest on its device.

    g_idx: int32 or int64 ``[K]``, the group of each column, of a weight whose groups are not contiguous (act-order):
    the columns are sorted by group, and the result has the ``perm`` that `matmul` needs. Each group must have
    ``group_size`` columns.

    The result replaces the canonical tensors (`canonical` inverts it exactly), so only one copy need be held. It must
    not be stored: how a layout places the codes may depend on the processor. Errors as for `matmul`, those of an
    `activation` that the prepared weight cannot serve included, and those of `group_order`.
    """
    checks.check_activation(activation)
    weight = PackedWeight(qweight, scales, zeros, bits, group_size, in_features)
    checks.check_weight(weight)
    if g_idx is not None:
        perm = order.group_order(g_idx.to(qweight.device), group_size, in_features)
        weight = weight._replace(qweight=order.reordered(qweight, perm, bits), perm=perm)
    name = dispatch.choose(impl, qweight.device)
    best = layouts.convert(weight, dispatch.fastest_layout(name, weight))
    dispatch.refuse_activation(impl, best, activation)
    return Prepared(best.qweight, scales, zeros, best.layout, name, best.perm)


def warmup(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
    layout: str = "canonical",
    has_bias: bool = False,
    impl: str = "auto",
    perm: Tensor | None = None,
) -> None:
    """Make ready what products of rows of ``dtype`` with such a weight need, whatever the number of rows.

    On a GPU this reads the table of configurations, compiles kernels (seconds, unless they are in Triton's cache on
    disk) and makes the workspaces, so that a CUDA graph can be captured afterwards. Graphs that were captured on one
    stream, as those of ``torch.cuda.graph`` without a stream of their own are, share its workspace: replayed at the
    same time they give wrong results, and later replays may, too. Another weight of the same shape, scheme and dtypes
    needs no warm-up of its own. Implementations that need none do nothing. Errors as for `matmul`.
    """
    weight = PackedWeight(qweight, scales, zeros, bits, group_size, in_features, layout, perm)
    checks.check_weight(weight)
    dispatch.warmup(impl, weight, dtype, has_bias)


def canonical(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    layout: str,
    perm: Tensor | None = None,
) -> Tensor:
    """The canonical qweight of a prepared weight, bit for bit; scales and zeros are the same in every layout.

    With perm the columns are put back in the order of x's, as they were before `prepare`. Errors as for `matmul`.
    """
    weight = PackedWeight(qweight, scales, zeros, bits, group_size, in_features, layout, perm)
    checks.check_weight(weight)
    words = layouts.convert(weight, "canonical").qweight
    return words if perm is None else order.reordered(words, order.inverse(perm), bits)
