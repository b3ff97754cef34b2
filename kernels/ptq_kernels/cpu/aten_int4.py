"""The int4 product that torch ships for CPUs, and the layout it reads: fast for a few bfloat16 rows.

``torch.ops.aten._weight_int4pack_mm_for_cpu`` wants two codes a byte in blocks of rows, column by column; how many rows
a block has and which two rows share a byte depends on the instruction set torch chose. That is found out at run time,
by packing known codes, and the layout is refused where it is not one of the two families understood here. It is never
stored.

qweight of layout "aten_int4": uint8 ``[N, K / 2 + 4 * groups]``, read as one flat buffer: first ``N * K / 2`` bytes of
codes, then bfloat16 ``[groups, N, 2]``, the scale and ``(8 - zero) * scale`` that the operator adds to
``scale * (code - 8)``. The operator knows four group sizes; any multiple of one of them is served by repeating scales.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ptq_kernels import bitstream, layouts
from ptq_kernels.layouts import Layout, PackedWeight

_GROUP_SIZES = (256, 128, 64, 32)
_WIDEST_BLOCK = 64  # of any instruction set
_ROW_MULTIPLE = 16  # the operator refuses other row counts
_CONVERTED_ROWS = 1024  # converted at a time, so that a large weight is never held with a byte for each code


class Placement(NamedTuple):
    """Where the codes of a block of rows go: column by column, in each column ``block / 2`` bytes of two rows each."""

    block: int  # rows
    paired: bool  # byte d of a column holds rows 2d and 2d + 1; otherwise rows d and d + block / 2


def _rows_by_nibble(codes: Tensor, order: Placement) -> Tensor:
    """View ``[blocks * block, K]`` as ``[blocks, nibble, block / 2, K]``."""
    half, columns = order.block // 2, codes.shape[-1]
    if order.paired:
        return codes.view(-1, half, 2, columns).transpose(1, 2)
    return codes.view(-1, 2, half, columns)


def _encode(codes: Tensor, order: Placement) -> Tensor:
    """The packed bytes, flat, of uint8 codes ``[blocks * block, K]``."""
    nibbles = _rows_by_nibble(codes, order)
    return (nibbles[:, 0] | nibbles[:, 1] << 4).transpose(1, 2).reshape(-1)


def _decode(packed: Tensor, codes: Tensor, order: Placement) -> None:
    """The inverse of `_encode`, into `codes`."""
    nibbles = _rows_by_nibble(codes, order)
    blocks, _, half, columns = nibbles.shape
    both = packed.view(blocks, columns, half).transpose(1, 2).contiguous()  # cheaper than two strided passes
    torch.bitwise_and(both, 15, out=nibbles[:, 0])
    torch.bitwise_right_shift(both, 4, out=nibbles[:, 1])


def _operator_bytes(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return packed.reshape(-1)


@cache
def placement(rows: int) -> Placement | None:
    """How torch places a weight of `rows` rows, at most 64, on this machine; None where that is not understood."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    row, column = torch.arange(rows, device="cpu").view(-1, 1), torch.arange(32, device="cpu")
    digits = (row % 16 + 0 * column, row // 16 + 0 * column, 0 * row + column % 16, 0 * row + column // 16)
    probes = [digit.to(torch.uint8) for digit in digits]  # together they tell every position from every other
    for block in range(rows, 0, -_ROW_MULTIPLE):
        for paired in (False, True):
            order = Placement(block, paired)
            if rows % block == 0 and all(torch.equal(_operator_bytes(p), _encode(p, order)) for p in probes):
                return order if _multiplies_as_expected(rows, order) else None
    return None


def _runs(rows: int) -> Iterator[tuple[int, int, Placement | None]]:
    """(first row, last row + 1, placement) of the run of whole blocks and of the shorter block that may follow."""
    usual = placement(_WIDEST_BLOCK)
    whole = rows - rows % (usual.block if usual else _WIDEST_BLOCK)
    if whole:
        yield 0, whole, usual
    if whole < rows:
        yield whole, rows, placement(rows - whole)


def _multiplies_as_expected(rows: int, order: Placement) -> bool:
    """Small integers and powers of two make the operator's product exact, so any disagreement is one of meaning."""
    device, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (rows, 64), dtype=torch.uint8, generator=generator, device=device)
    zeros = torch.randint(0, 16, (rows, 2), generator=generator, device=device).float()
    powers = torch.tensor([0.25, 0.5, 1.0, 2.0], dtype=torch.float32, device=device)
    scales = powers[torch.randint(4, (rows, 2), generator=generator, device=device)]
    x = torch.eye(64, dtype=torch.float32, device=device)[[0, 31, 45]]
    dense = (codes.view(rows, 2, 32) - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)
    packed = _encode(codes, order).view(rows, 32)
    y = _product(x.bfloat16(), packed, 32, _scales_and_offsets(scales, zeros))
    return torch.equal(y.float(), x @ dense.view(rows, 64).T)


def _scales_and_offsets(scales: Tensor, zeros: Tensor) -> Tensor:
    """bfloat16 ``[groups, N, 2]`` from ``[N, groups]``; the operator computes ``scale * (code - 8) + offset``."""
    scales = scales.float()
    return torch.stack([scales, (8 - zeros.float()) * scales], dim=-1).transpose(0, 1).contiguous().bfloat16()


def _product(x: Tensor, packed: Tensor, group_size: int, scales_and_offsets: Tensor) -> Tensor:
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales_and_offsets)
    return y


def _operator_group(group_size: int) -> int | None:
    return next((size for size in _GROUP_SIZES if group_size % size == 0), None)


def _refuse(weight: PackedWeight) -> str | None:
    if weight.bits != 4 or weight.qweight.device.type != "cpu":
        return f"it is for 4-bit weights on the CPU, this one has {weight.bits} bits on {weight.qweight.device}"
    if weight.out_features % _ROW_MULTIPLE:
        return f"the rows must be a multiple of {_ROW_MULTIPLE}, found {weight.out_features}"
    if _operator_group(weight.group_size) is None:
        return f"the group size must be a multiple of 32, found {weight.group_size}"
    if any(order is None for _, _, order in _runs(weight.out_features)):
        return "this build of torch places the codes in an unknown order"
    return None


def _storage(weight: PackedWeight) -> tuple[torch.dtype, tuple[int, ...]]:
    groups = weight.in_features // (_operator_group(weight.group_size) or weight.in_features)
    return torch.uint8, (weight.out_features, weight.in_features // 2 + 4 * groups)


def _blocks(rows: int, at_most: int) -> Iterator[tuple[int, int, Placement]]:
    """(first row, last row + 1, placement) of pieces of whole blocks, of at most `at_most` rows or one block."""
    for first, last, order in _runs(rows):
        if order is None:
            raise RuntimeError(
                f"layout 'aten_int4' needs a known order of {last - first} rows, this build of torch has none; "
                "use the canonical layout on this machine"
            )
        step = max(at_most // order.block, 1) * order.block
        for start in range(first, last, step):
            yield start, min(start + step, last), order


def _pack(weight: PackedWeight) -> Tensor:
    dtype, shape = _storage(weight)
    qweight = torch.empty(shape, dtype=dtype, device="cpu")
    flat, half = qweight.view(-1), weight.in_features // 2
    for start, stop, order in _blocks(weight.out_features, _CONVERTED_ROWS):
        codes = bitstream.unpack(weight.qweight[start:stop], 4, weight.in_features)
        flat[start * half : stop * half] = _encode(codes, order)
    repeat = weight.group_size // (_operator_group(weight.group_size) or 1)
    zeros = torch.full_like(weight.scales, 8) if weight.zeros is None else weight.zeros
    scales, zeros = (t.repeat_interleave(repeat, dim=1) for t in (weight.scales, zeros))
    flat[weight.out_features * half :] = _scales_and_offsets(scales, zeros).view(-1).view(torch.uint8)
    return qweight


def _unpack(weight: PackedWeight) -> Tensor:
    return torch.cat([bitstream.pack(codes, 4) for _, codes in read(weight, _CONVERTED_ROWS)])


def read(weight: PackedWeight, rows: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, codes uint8 ``[R, K]``) for all rows, `rows` or one block at a time, in reused memory."""
    flat, half = weight.qweight.view(-1), weight.in_features // 2
    buffer = torch.empty(max(rows, _WIDEST_BLOCK), weight.in_features, dtype=torch.uint8, device="cpu")
    for start, stop, order in _blocks(weight.out_features, rows):
        codes = buffer[: stop - start]
        _decode(flat[start * half : stop * half], codes, order)
        yield start, codes


def matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """``x`` bfloat16 ``[M, K]`` times the weight in layout "aten_int4", ``[M, N]``; scales count as bfloat16."""
    group = _operator_group(weight.group_size) or weight.in_features
    half, flat = weight.in_features // 2, weight.qweight.view(-1)
    split = weight.out_features * half
    scales_and_offsets = flat[split:].view(torch.bfloat16).view(-1, weight.out_features, 2)
    return _product(x, flat[:split].view(weight.out_features, half), group, scales_and_offsets)


layouts.register(Layout("aten_int4", _storage, _refuse, _pack, _unpack))
