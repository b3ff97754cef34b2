"""Columns in another order than the input's: weights whose groups are not contiguous (GPTQ's act-order, ``g_idx``).

Groups are contiguous in every layout. A weight with scattered groups is sorted once, when it is loaded, and keeps
``perm`` int32 ``[K]``: its column j multiplies column ``perm[j]`` of x. The product then gathers x, a few kilobytes,
and never the weight.
"""

import torch
from torch import Tensor

from ptq_kernels import bitstream


def group_order(g_idx: Tensor, group_size: int, in_features: int) -> Tensor:
    """``perm``, int32 ``[K]``: the columns sorted by their group, each group's in ascending order.

    g_idx: int32 or int64 ``[K]``, the group of each column, from 0 to ``K / group_size - 1``. group_size divides
    in_features.

    Raises TypeError for another dtype, ValueError unless every group has exactly ``group_size`` columns: scales and
    zeros are stored for groups of one size.
    """
    if g_idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"g_idx must be torch.int32 or torch.int64, got {g_idx.dtype}; give the group of each column")
    if g_idx.shape != (in_features,):
        raise ValueError(
            f"g_idx must have shape [{in_features}], a group for each column of the weight, got {list(g_idx.shape)}; "
            "check that it belongs to this weight"
        )
    groups = in_features // group_size
    least, most = int(g_idx.min()), int(g_idx.max())
    if least < 0 or most >= groups:
        raise ValueError(
            f"g_idx must hold groups from 0 to {groups - 1}, as scales do, got {least} to {most}; check group_size = "
            f"{group_size} and that g_idx belongs to this weight"
        )
    counts = torch.bincount(g_idx, minlength=groups)
    if wrong := (counts != group_size).nonzero().flatten().tolist():
        raise ValueError(
            f"g_idx must put {group_size} columns in each of {groups} groups, group {wrong[0]} has "
            f"{int(counts[wrong[0]])} ({len(wrong)} groups differ); groups of unequal size are not supported: "
            "dequantize this weight and keep it in float, or quantize it again with groups of one size"
        )
    return torch.argsort(g_idx, stable=True).int()


def inverse(perm: Tensor) -> Tensor:
    """The permutation that undoes ``perm``, int32 ``[K]``."""
    back = torch.zeros_like(perm)  # what is no permutation must not show memory that was never written
    back[perm.long()] = torch.arange(len(perm), dtype=perm.dtype, device=perm.device)
    return back


def reordered(qweight: Tensor, perm: Tensor, bits: int) -> Tensor:
    """A canonical qweight with its columns in the order of ``perm``."""
    codes = bitstream.unpack(qweight, bits, len(perm))
    return bitstream.pack(codes.index_select(1, perm), bits)
