"""GPTQ on the grid of a block format.

Scales, minimums and their small factors are fixed first (`ptq.gguf.rounding`), so the codes make up for the rounding of
all of them. A minimum needs nothing new of the solver: a code of ``step * q - offset`` for the weight w is a code of
``step * q`` for ``w + offset``, at the same error.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ptq.gguf.blocks import KINDS, Blocks, levels, stack_rows, values
from ptq.gguf.rounding import round_blocks
from ptq.gptq.descent import descend
from ptq.gptq.solver import Factor, gptq_solve
from ptq.grid import Grid, grouped
from ptq.loss import quadratic_loss

# Weights solved at once: rows are independent, and an output head has very many.
CHUNK_WEIGHTS = 1 << 26


class SolvedBlocks(NamedTuple):
    """Blocks of one weight, their loss ``trace(D H D^T)``, and that of plain rounding on the same kind."""

    blocks: Blocks
    loss: float
    rounding: float


def solve_blocks(
    kind: str,
    W_NK: Tensor,
    H_KK: Tensor,
    factor: Factor,
    *,
    sweeps: int = 1,
    block_size: int = 128,
    name: str = "weight",
) -> SolvedBlocks:
    """Codes of a weight in a block format, chosen with the Hessian.

    Args:
        kind: key of `ptq.gguf.blocks.KINDS`.
        W_NK: weight, in the dtype of the Hessian.
        H_KK: Hessian, undamped.
        factor: of the Hessian.
        sweeps: rounds of coordinate descent after GPTQ.
        block_size: columns between two updates of the rest; speed only.
        name: what errors call the weight.

    Returns:
        Never worse than plain rounding: where that loses less (few tokens), its blocks are returned.

    Raises:
        FormatError: blocks do not fill a row.
        NumericsError: the weight holds NaN or infinity, or is larger than the kind's scales reach.
    """
    even = torch.ones(W_NK.shape[1], dtype=W_NK.dtype, device=W_NK.device)
    importance = H_KK.diagonal() + factor.lam
    rows = max(1, CHUNK_WEIGHTS // W_NK.shape[1])
    parts = []
    for chunk in torch.split(W_NK, rows):
        plain = round_blocks(kind, chunk, even, name)
        start = round_blocks(kind, chunk, importance, name)
        solved = start._replace(codes=_codes(chunk, start, H_KK, factor, sweeps, block_size))
        losses = [quadratic_loss(chunk - values(each).to(chunk.dtype), H_KK) for each in (solved, plain)]
        parts.append(SolvedBlocks(solved if losses[0] <= losses[1] else plain, min(losses), losses[1]))
    blocks = stack_rows([part.blocks for part in parts])
    return SolvedBlocks(blocks, sum(p.loss for p in parts), sum(p.rounding for p in parts))


def _codes(W: Tensor, start: Blocks, H: Tensor, factor: Factor, sweeps: int, block_size: int) -> Tensor:
    shape, found = KINDS[start.kind], levels(start)
    step = found.step.to(W.dtype)
    grid = Grid(step, torch.full_like(step, found.zero), shape.bits, shape.group, not shape.minimum)
    target = W
    if found.offset is not None:
        target = (grouped(W, shape.group) + found.offset.to(W.dtype).unsqueeze(-1)).reshape(W.shape)
    codes = gptq_solve(target, factor, grid, block_size=block_size).codes
    return descend(target, codes, H, factor, grid, sweeps=sweeps, block_size=block_size).codes if sweeps else codes
