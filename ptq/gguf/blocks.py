"""GGUF block formats: weights in blocks of 32 or 256, packed with their scales; pure functions on tensors.

A *kind* is a block format (``Q4_K``). Legacy kinds keep one float16 scale ``d`` (and a minimum ``m``) for 32 weights,
K-quants one ``d`` (and ``dmin``) for 256 and small whole factors for every 16 or 32 of them:

======  ==================================  ======================================
kinds   value of code q                     stored for a block
======  ==================================  ======================================
Qb_0    ``d * (q - 2**(b-1))``              ``d``, codes (Q8_0: signed bytes)
Qb_1    ``d * q + m``                       ``d``, ``m``, codes
Q4/5_K  ``d * sc * q - dmin * mn``          ``d``, ``dmin``, 8 ``sc``, 8 ``mn``, codes
Q6_K    ``d * sc * (q - 32)``               codes, 16 signed ``sc``, ``d``
======  ==================================  ======================================
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ptq.errors import FormatError


class Kind(NamedTuple):
    """Shape of a block format."""

    bits: int
    columns: int  # weights of a block
    group: int  # weights that share a scale
    nbytes: int  # of a block
    minimum: bool  # asymmetric: a minimum is stored


KINDS = {
    "Q4_0": Kind(4, 32, 32, 18, False),
    "Q4_1": Kind(4, 32, 32, 20, True),
    "Q5_0": Kind(5, 32, 32, 22, False),
    "Q5_1": Kind(5, 32, 32, 24, True),
    "Q8_0": Kind(8, 32, 32, 34, False),
    "Q4_K": Kind(4, 256, 32, 144, True),
    "Q5_K": Kind(5, 256, 32, 176, True),
    "Q6_K": Kind(6, 256, 16, 210, False),
}


class Blocks(NamedTuple):
    """One ``[N, K]`` weight in a block format, unpacked. ``B`` blocks and ``G`` groups a row."""

    kind: str
    codes: Tensor  # uint8 [N, K], 0 .. 2**bits - 1, also for Q8_0
    scales: Tensor  # float16 [N, B]: d
    mins: Tensor | None  # float16 [N, B]: m of Qb_1, dmin of K-quants
    factors: Tensor | None  # int16 [N, G]: sc of K-quants
    min_factors: Tensor | None  # int16 [N, G]: mn of Q4_K and Q5_K


class Levels(NamedTuple):
    """What a group's codes stand for: ``step * (code - zero) - offset``, float32 ``[N, G]`` and a number."""

    step: Tensor
    zero: int
    offset: Tensor | None  # None where the kind has no minimum


def levels(blocks: Blocks) -> Levels:
    """Steps and offsets, exactly as a reader multiplies them out in float32."""
    kind = KINDS[blocks.kind]
    repeat = kind.columns // kind.group
    step = blocks.scales.float().repeat_interleave(repeat, 1)
    if blocks.factors is not None:
        step = step * blocks.factors
    if not kind.minimum:
        return Levels(step, 2 ** (kind.bits - 1), None)
    assert blocks.mins is not None
    if blocks.min_factors is None:
        return Levels(step, 0, -blocks.mins.float())
    return Levels(step, 0, blocks.mins.float().repeat_interleave(repeat, 1) * blocks.min_factors)


def values(blocks: Blocks) -> Tensor:
    """The dense float32 ``[N, K]`` weight that a reader sees."""
    n, k = blocks.codes.shape
    found = levels(blocks)
    dense = (blocks.codes.view(n, found.step.shape[1], -1).float() - found.zero) * found.step.unsqueeze(-1)
    if found.offset is not None:
        dense = dense - found.offset.unsqueeze(-1)
    return dense.view(n, k)


def stack_rows(parts: Sequence[Blocks]) -> Blocks:
    """Blocks of the same kind below each other."""
    mins, factors, min_factors = (
        None if field[0] is None else torch.cat([each for each in field if each is not None])
        for field in ([p.mins for p in parts], [p.factors for p in parts], [p.min_factors for p in parts])
    )
    codes, scales = torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts])
    return Blocks(parts[0].kind, codes, scales, mins, factors, min_factors)


def row_bytes(kind: str, in_features: int) -> int:
    """Bytes of one row. Raises FormatError where blocks do not fill it."""
    shape = KINDS[kind]
    if in_features % shape.columns:
        raise FormatError(
            f"{kind} needs rows of a multiple of {shape.columns} weights, found {in_features}: choose another kind"
        )
    return in_features // shape.columns * shape.nbytes


def encode(blocks: Blocks) -> Tensor:
    """The bytes of a weight, ``uint8 [N, row_bytes]``. Raises FormatError where blocks do not fill a row."""
    n, k = blocks.codes.shape
    size, shape = row_bytes(blocks.kind, k), KINDS[blocks.kind]
    codes = blocks.codes.view(n, -1, shape.columns)
    d = _bytes_of(blocks.scales)
    if blocks.kind == "Q6_K":
        assert blocks.factors is not None
        sub = blocks.factors.view(n, -1, 16).to(torch.int8).view(torch.uint8)
        parts = [*_pack_six(codes), sub, d]
    elif blocks.kind == "Q8_0":
        parts = [d, codes ^ 128]  # two's complement of code - 128
    else:
        parts = [d]
        if blocks.mins is not None:
            parts.append(_bytes_of(blocks.mins))
        if blocks.factors is not None and blocks.min_factors is not None:
            parts.append(_pack_factors(blocks.factors.view(n, -1, 8), blocks.min_factors.view(n, -1, 8)))
        if shape.bits == 5:
            parts.append(_pack_fifth(codes, shape.columns))
        parts.append(_pack_nibbles(codes & 15, shape.columns))
    return torch.cat(parts, -1).reshape(n, size)


def decode(kind: str, data: Tensor) -> Blocks:
    """Exact inverse of `encode`: ``uint8 [N, row_bytes]`` to blocks. Raises FormatError for a cut row."""
    shape = KINDS[kind]
    n, size = data.shape
    if size % shape.nbytes:
        raise FormatError(f"a row of {kind} is a multiple of {shape.nbytes} bytes, found {size}: the tensor is cut")
    rows = data.view(n, -1, shape.nbytes)
    if kind == "Q6_K":
        low, high, sub, d = rows.split([128, 64, 16, 2], -1)
        factors = sub.contiguous().view(torch.int8).to(torch.int16).reshape(n, -1)
        return Blocks(kind, _unpack_six(low, high).reshape(n, -1), _half(d), None, factors, None)
    if kind == "Q8_0":
        d, codes = rows.split([2, 32], -1)
        return Blocks(kind, (codes ^ 128).reshape(n, -1), _half(d), None, None, None)
    mins = factors = min_factors = None
    d, rows = rows[..., :2], rows[..., 2:]
    if shape.minimum:
        mins, rows = _half(rows[..., :2]), rows[..., 2:]
    if shape.columns == 256:
        factors, min_factors = (each.reshape(n, -1) for each in _unpack_factors(rows[..., :12]))
        rows = rows[..., 12:]
    high, low = rows.split([shape.columns // 8 if shape.bits == 5 else 0, shape.columns // 2], -1)
    codes = _unpack_nibbles(low, shape.columns)
    if shape.bits == 5:
        codes = codes | _unpack_fifth(high, shape.columns) << 4
    return Blocks(kind, codes.reshape(n, -1), _half(d), mins, factors, min_factors)


def _bytes_of(halves: Tensor) -> Tensor:
    """float16 ``[N, B]`` as little-endian bytes ``[N, B, 2]``."""
    bits = halves.contiguous().view(torch.int16).to(torch.int32)
    return torch.stack([bits & 255, bits >> 8 & 255], -1).to(torch.uint8)


def _half(data: Tensor) -> Tensor:
    bits = data[..., 0].to(torch.int32) | data[..., 1].to(torch.int32) << 8
    return torch.where(bits > 32767, bits - 65536, bits).to(torch.int16).view(torch.float16)


def _pack_nibbles(codes: Tensor, columns: int) -> Tensor:
    """Low nibbles hold the first, high nibbles the second half of 32 codes (legacy) or of every 64 (K-quants)."""
    half = 16 if columns == 32 else 32
    pairs = codes.unflatten(-1, (-1, 2, half))
    packed: Tensor = pairs[..., 0, :] | pairs[..., 1, :] << 4
    return packed.flatten(-2)


def _unpack_nibbles(data: Tensor, columns: int) -> Tensor:
    half = 16 if columns == 32 else 32
    parts = data.unflatten(-1, (-1, half))
    return torch.stack([parts & 15, parts >> 4], -2).flatten(-3)


def _pack_fifth(codes: Tensor, columns: int) -> Tensor:
    """Bit 4 of the codes: of 8 neighbours in a byte (legacy), or of those 32 apart (K-quants)."""
    bits = codes >> 4
    grouped = bits.unflatten(-1, (-1, 8)) if columns == 32 else bits.unflatten(-1, (8, 32)).transpose(-1, -2)
    placed: Tensor = grouped << torch.arange(8, dtype=torch.uint8, device=codes.device)
    return placed.sum(-1, dtype=torch.uint8)


def _unpack_fifth(data: Tensor, columns: int) -> Tensor:
    bits = data.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=data.device) & 1
    return (bits if columns == 32 else bits.transpose(-1, -2)).flatten(-2)


def _pack_factors(sc: Tensor, mn: Tensor) -> Tensor:
    """Eight 6-bit scales and eight 6-bit minimums in 12 bytes."""
    first = sc[..., :4] | sc[..., 4:] >> 4 << 6
    second = mn[..., :4] | mn[..., 4:] >> 4 << 6
    third = (sc[..., 4:] & 15) | (mn[..., 4:] & 15) << 4
    return torch.cat([first, second, third], -1).to(torch.uint8)


def _unpack_factors(data: Tensor) -> tuple[Tensor, Tensor]:
    first, second, third = data.to(torch.int16).split(4, -1)
    sc = torch.cat([first & 63, third & 15 | first >> 6 << 4], -1)
    mn = torch.cat([second & 63, third >> 4 | second >> 6 << 4], -1)
    return sc, mn


def _pack_six(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Low nibbles and high bit pairs of 6-bit codes, each half of the block on its own."""
    q = codes.unflatten(-1, (2, 4, 32))
    low, high = q & 15, q >> 4
    nibbles = torch.cat([low[..., 0, :] | low[..., 2, :] << 4, low[..., 1, :] | low[..., 3, :] << 4], -1)
    pairs = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    return nibbles.flatten(-2), pairs.flatten(-2)


def _unpack_six(low: Tensor, high: Tensor) -> Tensor:
    nibbles, pairs = low.unflatten(-1, (2, 2, 32)), high.unflatten(-1, (2, 1, 32))
    lows = torch.cat([nibbles & 15, nibbles >> 4], -2)
    highs = pairs >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=high.device).view(4, 1) & 3
    codes: Tensor = lows | highs << 4
    return codes.flatten(-3)
