"""The quantization grid: which values a group of weights may take. Shared by every solver; RTN is this and no more.

A grid is a scale and a zero point for each row and each group of columns:
``value = scale * (code - zero)``, ``code`` in ``0 .. 2**bits - 1``.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ptq.errors import ConfigError, NumericsError
from ptq.formats.codec import QuantizedWeight, Scheme

# Every bf16 value in this range is also an exact fp16 value, so a checkpoint reads the same in both dtypes.
SMALLEST_SCALE = 2.0**-17
LARGEST_SCALE = 65504.0


class Grid(NamedTuple):
    """Scales and zeros of an ``[N, K]`` weight with ``G = K // group_size`` groups a row."""

    scales: Tensor  # float [N, G], rounded to the export dtype, never zero
    zeros: Tensor  # float [N, G], whole numbers
    bits: int
    group_size: int
    symmetric: bool

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2**self.bits) - 1


def round_scales(scales: Tensor, scale_dtype: torch.dtype, smallest: float = SMALLEST_SCALE) -> Tensor:
    """Scales as the checkpoint will hold them, so that the solver sees (and compensates) their rounding.

    bfloat16 models get bfloat16 values; all others float16 values. The magnitude is clamped to
    ``smallest .. 65504`` with the sign kept, because readers and packers divide by a scale.
    """
    target = torch.bfloat16 if scale_dtype == torch.bfloat16 else torch.float16
    clamped = scales.abs().clamp(smallest, LARGEST_SCALE)
    rounded = torch.copysign(clamped, scales).to(target).to(scales.dtype)
    # the bf16 value next to 65504 lies above it
    return torch.where(rounded.abs() > LARGEST_SCALE, torch.copysign(scales.new_tensor(65280.0), scales), rounded)


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """``[N, K]`` seen as ``[N, G, group_size]``."""
    return weight.reshape(weight.shape[0], weight.shape[1] // group_size, group_size)


def resolve_group_size(scheme: Scheme, in_features: int, name: str = "weight") -> int:
    """Columns a group; raises ConfigError where the group size does not divide the weight."""
    columns = scheme.columns(in_features)
    if in_features % columns:
        fitting = [g for g in (128, 64, 32, 16) if in_features % g == 0]
        remedy = f"use {' or '.join(map(str, fitting))}, or -1" if fitting else "use -1 (one group a row)"
        raise ConfigError(
            f"group_size must divide the input features of every quantized Linear; {name} has {in_features}, which "
            f"{columns} does not divide: {remedy}, or exclude the module"
        )
    return columns


def min_max_grid(
    weight: Tensor, scheme: Scheme, *, scale_dtype: torch.dtype = torch.float16, smallest: float = SMALLEST_SCALE
) -> Grid:
    """The grid that spans each group's range.

    Symmetric: ``s = 2 max|w| / (2**bits - 1)``, ``z = 2**(bits-1)``. Asymmetric: the range is widened to hold 0,
    ``s = (hi - lo) / (2**bits - 1)``, ``z = round(-lo / s)``.

    Args:
        weight: float ``[N, K]``.
        scheme: bits, group size and symmetry.
        scale_dtype: dtype the checkpoint will keep scales in (see `round_scales`).
        smallest: least scale.

    Raises:
        ConfigError: the group size does not divide K.
        NumericsError: the weight holds NaN or infinity.
    """
    group_size = resolve_group_size(scheme, weight.shape[1])
    check_finite(weight, "weight")
    groups = grouped(weight, group_size)
    top = 2**scheme.bits - 1
    if scheme.symmetric:
        scales = round_scales(2 * groups.abs().amax(-1) / top, scale_dtype, smallest)
        return Grid(scales, torch.full_like(scales, 2 ** (scheme.bits - 1)), scheme.bits, group_size, True)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = round_scales((high - low) / top, scale_dtype, smallest)
    zeros = torch.round(-low / scales).clamp(0, top)
    return Grid(scales, zeros, scheme.bits, group_size, False)


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise NumericsError where ``tensor`` holds NaN or infinity."""
    # Both ends show NaN and infinity, and unlike isfinite they take no memory beside a large tensor.
    if tensor.numel() and not all(math.isfinite(float(end)) for end in torch.aminmax(tensor)):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NumericsError(
            f"{what} must be finite; {bad} of {tensor.numel()} values are NaN or infinite: check the checkpoint, or "
            "run in bfloat16 or float32 where float16 overflows"
        )


def nearest_codes(weight: Tensor, grid: Grid) -> Tensor:
    """Nearest code of each weight: ``uint8 [N, K]``; ties go to the even code (true division, round half to even)."""
    groups = grouped(weight, grid.group_size)
    codes = torch.round(groups / grid.scales.unsqueeze(-1)) + grid.zeros.unsqueeze(-1)
    return codes.clamp_(0, grid.top).reshape(weight.shape).to(torch.uint8)


def values(codes: Tensor, grid: Grid) -> Tensor:
    """Dense ``[N, K]`` weight of the codes, in the dtype of the scales."""
    groups = grouped(codes, grid.group_size).to(grid.scales.dtype)
    return ((groups - grid.zeros.unsqueeze(-1)) * grid.scales.unsqueeze(-1)).reshape(codes.shape)


def pack_result(codes: Tensor, grid: Grid) -> QuantizedWeight:
    """Codes and their grid as the canonical result."""
    zeros = grid.zeros.to(torch.uint8)
    return QuantizedWeight(codes, grid.scales.float(), zeros, grid.bits, grid.group_size, grid.symmetric)
