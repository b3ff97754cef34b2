"""Dense little-endian bit streams: the one packing that GPTQ and compressed-tensors share.

Code ``i`` of a row occupies the stream bits ``i * bits .. i * bits + bits - 1``; stream bit ``t`` is bit ``t % 32`` of
word ``t // 32``. Codes of 3, 5, 6 and 7 bits straddle words, and 32 codes always fill exactly ``bits`` words.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ptq.errors import FormatError

CODES_PER_BLOCK = 32  # this many codes end on a word border at every width
WORD_BITS = 32


def words_for(columns: int, bits: int) -> int:
    """Number of 32-bit words a row of ``columns`` codes fills."""
    return -(-columns * bits // WORD_BITS)


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of ``codes`` (uint8 ``[R, C]``) into int32 ``[R, ceil(C * bits / 32)]``; the tail is zero.

    Raises FormatError for a width outside 1..8, another dtype or rank, and a code that does not fit into ``bits``.
    """
    _require_width(bits)
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise FormatError(f"codes to pack must be uint8 [R, C], found {codes.dtype} {list(codes.shape)}")
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise FormatError(f"{bits}-bit codes must be 0..{(1 << bits) - 1}, found {int(codes.max())}")
    rows, columns = codes.shape
    if columns % CODES_PER_BLOCK:
        codes = pad(codes, (0, -columns % CODES_PER_BLOCK))
    per_period, period_bytes = _period(bits)
    grouped = codes.reshape(rows, codes.shape[1] // per_period, per_period)
    packed = torch.zeros(rows, grouped.shape[1], period_bytes, dtype=torch.uint8, device=codes.device)
    for code in range(per_period):
        first, shift = divmod(code * bits, 8)
        packed[..., first] |= grouped[..., code] << shift
        if shift + bits > 8:
            packed[..., first + 1] |= grouped[..., code] >> (8 - shift)
    words = packed.view(-1).view(torch.int32).view(rows, words_for(codes.shape[1], bits))
    return words[:, : words_for(columns, bits)].contiguous()


def unpack_stream(words: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack_stream`: int32 ``[R, ceil(columns * bits / 32)]`` to uint8 ``[R, columns]``.

    Raises FormatError for a width outside 1..8, another dtype or rank, and a word count that does not fit ``columns``.
    """
    _require_width(bits)
    if words.dtype != torch.int32 or words.ndim != 2:
        raise FormatError(f"packed words must be int32 [R, words], found {words.dtype} {list(words.shape)}")
    rows, found = words.shape
    if found != words_for(columns, bits):
        raise FormatError(
            f"{columns} codes of {bits} bits fill {words_for(columns, bits)} words a row, found {found} words"
        )
    if found % bits:
        words = pad(words, (0, -found % bits))
    per_period, period_bytes = _period(bits)
    padded = words.shape[1] * WORD_BITS // bits
    packed = words.contiguous().view(-1).view(torch.uint8).view(rows, padded // per_period, period_bytes)
    codes = torch.empty(rows, packed.shape[1], per_period, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for code in range(per_period):
        first, shift = divmod(code * bits, 8)
        value = packed[..., first] >> shift
        if shift + bits > 8:
            value |= packed[..., first + 1] << (8 - shift)
        codes[..., code] = value & mask
    return codes.view(rows, padded)[:, :columns].contiguous()


def _period(bits: int) -> tuple[int, int]:
    """Codes and bytes after which the pattern of byte borders repeats: (2, 1) for 4 bits, (8, 3) for 3 bits."""
    common = math.gcd(8, bits)
    return 8 // common, bits // common


def _require_width(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise FormatError(f"codes are 1 to 8 bits wide, found {bits} bits; a code is one byte in memory")
