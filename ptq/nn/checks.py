"""What a packed layer cannot hold: found where it is made or loaded, never in a forward pass."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ptq.errors import FormatError
from ptq.formats.codec import WIDTHS, QuantizedWeight, Scheme

_DTYPES = {"qweight": (torch.int32,), "zeros": (torch.uint8,), "perm": (torch.int32, torch.int64, torch.int16)}


def check_quantized(quantized: QuantizedWeight) -> None:
    """Raise FormatError where the tensors do not fit bits, group size and each other, or hold what none can mean."""
    codes, scales, zeros, bits, size, symmetric = quantized
    if bits not in WIDTHS:
        raise FormatError(f"bits must be one of {WIDTHS}, found {bits}; quantize the weight with one of these")
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise FormatError(f"codes must be uint8 of shape [N, K], found {codes.dtype} {list(codes.shape)}; unpack them")
    rows, columns = codes.shape
    group = Scheme(bits, size, symmetric).columns(columns)
    if group < 1 or columns % group:
        raise FormatError(f"group_size must divide the {columns} columns of the codes, found {group}; use K // G")
    if scales.shape != (rows, columns // group):
        raise FormatError(
            f"scales must have shape [{rows}, {columns // group}], one for each row and group of {group} columns, "
            f"found {list(scales.shape)}; correct group_size, or give the scales of these codes"
        )
    if zeros.dtype != torch.uint8 or zeros.shape != scales.shape:
        raise FormatError(
            f"zeros must be torch.uint8 and have the shape of scales, {list(scales.shape)}, found {zeros.dtype} "
            f"{list(zeros.shape)}; of a symmetric weight all of them are {2 ** (bits - 1)}"
        )
    check_finite_scales(scales, "scales")
    if symmetric and bool((zeros != 2 ** (bits - 1)).any()):
        raise FormatError(
            f"zeros of a symmetric weight of {bits} bits must all be {2 ** (bits - 1)}, found others; make it "
            "with symmetric=False"
        )
    if zeros.numel() and (largest := int(zeros.max())) >= 2**bits:
        raise FormatError(
            f"zeros of {bits} bits must be below {2**bits}, as codes are, found {largest}; check bits, and that the "
            "zeros are unpacked"
        )


def check_finite_scales(scales: Tensor, name: str) -> None:
    """Raise FormatError for a scale that is NaN or infinite."""
    if count := int((~torch.isfinite(scales.float())).sum()):
        raise FormatError(
            f"{name} must be finite, {count} of {scales.numel()} are NaN or infinite; check the weights or the file "
            "that they come from"
        )


def check_state(state: Mapping[str, Any], prefix: str, scales_dtype: torch.dtype) -> None:
    """Raise FormatError for tensors of a state dict that a layer with scales of that dtype would misread."""
    for leaf, dtypes in _DTYPES.items():
        found = state.get(prefix + leaf)
        if isinstance(found, Tensor) and found.dtype not in dtypes:
            raise FormatError(
                f"{prefix}{leaf} must be {dtypes[0]}, found {found.dtype}: codes do not survive a conversion: convert "
                "the other tensors of a state dict only, or the module with .to(dtype)"
            )
    scales, perm = (state.get(prefix + leaf) for leaf in ("scales", "perm"))
    if isinstance(scales, Tensor) and not scales.is_meta:
        check_finite_scales(scales, f"{prefix}scales")
        if count := inexact(scales, scales_dtype):
            raise FormatError(
                f"{prefix}scales must be exact in {scales_dtype}, {count} of {scales.numel()} values of the "
                f"{scales.dtype} tensor are not; create the layer with scales_dtype={scales.dtype}"
            )
    if isinstance(perm, Tensor) and not perm.is_meta and not hasattr(perm, "full_tensor"):  # a DTensor has a part
        columns = perm.flatten().sort().values
        if not torch.equal(columns, torch.arange(len(columns), dtype=perm.dtype, device=perm.device)):
            raise FormatError(
                f"{prefix}perm must hold every column from 0 to {len(columns) - 1} once, found others; load the state "
                "dict of a layer of the same weight"
            )


def inexact(scales: Tensor, dtype: torch.dtype) -> int:
    """How many scales a dtype does not hold."""
    return int((scales.to(dtype).float() != scales.float()).sum())
