"""Codes that fit a block format go into it as they are: which result fits which kind, and the blocks of it."""

import torch
from torch import Tensor

from ptq.errors import FormatError
from ptq.formats.codec import QuantizedWeight, Scheme
from ptq.gguf.blocks import KINDS, Blocks


def fits(kind: str, scheme: Scheme, in_features: int) -> bool:
    """Whether every result of a scheme can be carried into a kind without changing a code.

    One scale must cover whole blocks. Kinds without a minimum need ``code - zero`` in their range, so they also hold
    fewer bits than their own (a 3-bit symmetric result in Q4_0); kinds with one need codes in theirs.
    """
    shape = KINDS[kind]
    columns = scheme.columns(in_features)
    if in_features % shape.columns or columns % shape.columns:
        return False
    if shape.minimum:
        return scheme.bits <= shape.bits
    return scheme.bits + (0 if scheme.symmetric else 1) <= shape.bits


def carry(kind: str, quantized: QuantizedWeight, name: str) -> tuple[Blocks, float]:
    """A result in a block format, and how far a value is off at most, as a share of its step.

    That is 0 except for Q4_1 and Q5_1, whose minimum ``-zero * scale`` is rounded to float16.

    Raises:
        FormatError: a scale that float16 does not hold exactly, or a minimum beyond its largest number.
    """
    shape = KINDS[kind]
    n, k = quantized.codes.shape
    repeat = quantized.group_size // shape.columns
    scales, zeros = (x.repeat_interleave(repeat, 1) for x in (quantized.scales.float(), quantized.zeros.float()))
    d = scales.half()
    if not torch.equal(d.float(), scales):
        worst = scales.flatten()[(d.float() - scales).abs().argmax()]
        raise FormatError(
            f"{name}: GGUF blocks hold float16 scales, which {float(worst)!r} is not: export the float model it was "
            "made from"
        )
    if not shape.minimum:
        middle = 2 ** (shape.bits - 1)
        shift = middle - quantized.zeros.to(torch.int16).repeat_interleave(quantized.group_size, 1)
        codes = (quantized.codes.to(torch.int16) + shift).to(torch.uint8)
        factors = torch.ones(n, k // shape.group, dtype=torch.int16) if shape.columns == 256 else None
        return Blocks(kind, codes, d, None, factors, None), 0.0
    if shape.columns == 256:
        per_group = shape.columns // shape.group
        mins = zeros.to(torch.int16).repeat_interleave(per_group, 1)
        return Blocks(kind, quantized.codes, d, d, torch.ones_like(mins), mins), 0.0
    exact = -zeros * scales
    m = exact.half()
    if not bool(torch.isfinite(m).all()):
        raise FormatError(
            f"{name}: {kind} blocks hold float16 minimums, which end at 65504; found {float(exact.abs().max()):.6g}: "
            "export the float model it was made from as another type"
        )
    return Blocks(kind, quantized.codes, d, m, None, None), _off(m, exact, scales)


def _off(m: Tensor, exact: Tensor, scales: Tensor) -> float:
    return float(((m.float() - exact) / scales).abs().max())
