"""Inputs and oracles of the format tests: a packer on Python integers and quantized weights of every kind."""

import torch
from torch import Tensor

from ptq.formats import QuantizedWeight


def packed_by_integers(codes: Tensor, bits: int) -> list[list[int]]:
    """Each row of codes as one big integer, code i at bit ``i * bits``, cut into unsigned 32-bit words."""
    words = -(-codes.shape[1] * bits // 32)
    rows = []
    for row in codes.tolist():
        value = sum(code << (bits * i) for i, code in enumerate(row))
        rows.append([value >> (32 * w) & 0xFFFFFFFF for w in range(words)])
    return rows


def unsigned(words: Tensor) -> list[list[int]]:
    """int32 words as unsigned Python integers."""
    return [[word & 0xFFFFFFFF for word in row] for row in words.tolist()]


def random_weight(
    n: int, k: int, bits: int, group_size: int, *, symmetric: bool, seed: int = 0, dtype: torch.dtype = torch.float16
) -> QuantizedWeight:
    """Random codes and zeros over their whole range; scales (negative ones too) exact in ``dtype`` and in bf16."""
    generator = torch.Generator().manual_seed(seed)
    group_size = k if group_size == -1 else group_size
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    scales = (0.01 + 0.1 * torch.rand(n, k // group_size, generator=generator)).bfloat16().to(dtype).float()
    scales *= 1 - 2 * torch.randint(0, 2, scales.shape, generator=generator)
    zeros = torch.randint(0, 1 << bits, scales.shape, generator=generator, dtype=torch.uint8)
    if symmetric:
        zeros.fill_(1 << (bits - 1))
    return QuantizedWeight(codes, scales, zeros, bits, group_size, symmetric)


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Equal in every value, dtype and setting."""
    pairs = list(zip(one[:3], other[:3], strict=True))
    return one[3:] == other[3:] and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
