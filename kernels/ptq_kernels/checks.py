"""Validation of what callers hand in. Every message says what was required, what was found and what to do."""

import torch
from torch import Tensor

from ptq_kernels import layouts
from ptq_kernels.bitstream import check_bits
from ptq_kernels.layouts import PackedWeight

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# What numbers of columns come as by mistake; torch.compile does not know how to ask for an integer of any kind.
NO_INTEGERS = (float, str, list, tuple, type(None))


def check_weight(weight: PackedWeight) -> None:
    """Raise ValueError or TypeError unless the tensors of `weight` fit its bits, group size, layout and each other."""
    bits, group, columns = weight.bits, weight.group_size, weight.in_features
    check_bits(bits)
    for name, number in (("group_size", group), ("in_features", columns)):
        if isinstance(number, NO_INTEGERS):
            raise TypeError(f"{name} must be an int, got {number!r}; count columns with whole numbers")
    if columns < 1:
        raise ValueError(f"in_features must be at least 1, got {columns}; leave a layer without inputs dense")
    if group < 1 or columns % group:
        raise ValueError(
            f"group_size must divide in_features = {columns}, got {group}; resolve -1 to in_features, "
            "or requantize with a divisor"
        )
    _check_scales(weight)
    dtype, shape = layouts.get(weight.layout).storage(weight)
    if weight.qweight.dtype != dtype:
        raise TypeError(
            f"qweight of layout {weight.layout!r} must be {dtype}, got {weight.qweight.dtype}; "
            "pack the codes with ptq_kernels.pack or name the layout they are in"
        )
    if weight.qweight.shape != shape:
        raise ValueError(
            f"qweight of a {bits}-bit weight with in_features = {columns} must have shape {list(shape)} in layout "
            f"{weight.layout!r}, got {list(weight.qweight.shape)}; check bits, K of x, and the rows of scales"
        )
    _check_perm(weight)
    for name, tensor in (("scales", weight.scales), ("zeros", weight.zeros), ("perm", weight.perm)):
        _check_device(name, tensor, weight.qweight)


def _check_perm(weight: PackedWeight) -> None:
    perm = weight.perm
    if perm is None:
        return
    if perm.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"perm must be torch.int32, torch.int64 or None, got {perm.dtype}; use what prepare returned")
    if perm.shape != (weight.in_features,):
        raise ValueError(
            f"perm must have shape [{weight.in_features}], a column of x for each column of the weight, got "
            f"{list(perm.shape)}; use what prepare returned for this weight"
        )


def _check_scales(weight: PackedWeight) -> None:
    scales, zeros, groups = weight.scales, weight.zeros, weight.in_features // weight.group_size
    if scales.dtype not in FLOATS:
        raise TypeError(f"scales must be one of {FLOATS}, got {scales.dtype}; convert them with .to(torch.float32)")
    if scales.dim() != 2 or scales.shape[1] != groups:
        raise ValueError(
            f"scales must have shape [N, {groups}] (in_features {weight.in_features} / group_size "
            f"{weight.group_size}), got {list(scales.shape)}; transpose them or correct group_size"
        )
    if not len(scales):
        raise ValueError("scales must have a row for each output, got none; leave a layer without outputs dense")
    if zeros is None:
        return
    if zeros.dtype != torch.uint8:
        raise TypeError(f"zeros must be torch.uint8 or None, got {zeros.dtype}; pass plain zero points, unpacked")
    if zeros.shape != scales.shape:
        raise ValueError(
            f"zeros must have the shape of scales, {list(scales.shape)}, got {list(zeros.shape)}; "
            "give one zero point a group, or None for a symmetric weight"
        )


def check_rows(x: Tensor) -> None:
    """Raise ValueError or TypeError unless x is a dense tensor with a dimension."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got a {type(x).__name__}; convert it with torch.as_tensor")
    if x.layout != torch.strided:
        raise ValueError(f"x must be dense, got one of layout {x.layout}; convert it with .to_dense()")
    if x.dim() == 0:
        raise ValueError("x must have shape [..., K], got a scalar; pass at least one row of K values")


def check_columns(x: Tensor, scales: Tensor, group_size: int) -> None:
    """Raise ValueError unless x has the columns of the weight; what is wrong with the weight `check_weight` says."""
    if scales.dim() != 2 or isinstance(group_size, NO_INTEGERS) or group_size < 1:
        return
    groups = scales.shape[1]
    if x.shape[-1] != groups * group_size:
        raise ValueError(
            f"x must have shape [..., {groups * group_size}], {groups} groups of {group_size} columns as scales "
            f"{list(scales.shape)} have them, got {list(x.shape)}; pass the input of this layer, correct group_size, "
            "or transpose scales that are not [N, groups]"
        )


def check_input(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    """Raise ValueError or TypeError unless `x` and `bias` fit a checked `weight`."""
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be one of {FLOATS}, got {x.dtype}; convert it with .to(torch.bfloat16)")
    _check_device("x", x, weight.qweight)
    if weight.scales.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "scales must not require a gradient, for a packed weight gives them none; pass scales.detach(), or train a "
            "dense weight"
        )
    if bias is None:
        return
    if bias.dtype not in FLOATS:
        raise TypeError(f"bias must be one of {FLOATS} or None, got {bias.dtype}; convert it with .to(x.dtype)")
    if bias.shape != (weight.out_features,):
        raise ValueError(
            f"bias must have shape [{weight.out_features}], one value for each row of qweight, got {list(bias.shape)}; "
            "pass the bias of this layer"
        )
    _check_device("bias", bias, weight.qweight)


def check_activation(activation: str | None) -> None:
    """Raise ValueError for an unknown way to round x."""
    if activation is not None and activation != "int8":
        raise ValueError(f"activation must be None or 'int8', got {activation!r}; None leaves x as it is")


def _check_device(name: str, tensor: Tensor | None, qweight: Tensor) -> None:
    if tensor is not None and tensor.device != qweight.device:
        raise ValueError(
            f"{name} must be on the device of qweight, {qweight.device}, got {tensor.device}; "
            f"move it with .to({str(qweight.device)!r})"
        )
