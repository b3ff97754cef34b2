"""What a solver does to one block of columns: each is rounded, and its error goes to the columns still to come.

The loops are those of the papers, here in torch; on a CPU they run in the C++ library of `ptq_kernels` where there is
one, many times as fast: each column is too little work for half a dozen operations of torch. Matrices are
transposed and in the order of the visits: ``[B, R]``, B columns of the block, R rows of the weight.
"""

from typing import NamedTuple

import torch
from ptq_kernels.cpu import columns as library
from torch import Tensor

from ptq.grid import Grid

# Columns whose errors are pushed on one by one; from there to the end of a block they go as a matrix product.
STRIP = 16


def columns_library() -> str | None:
    """Which library runs the loops on a CPU; None: torch does."""
    return library.name()


class Steps(NamedTuple):
    """A grid as the columns meet it."""

    scales: Tensor  # [G, R]
    zeros: Tensor  # [G, R]
    group: Tensor  # int32 [K], of each column in the order of the visits
    top: int


def steps_of(grid: Grid, order_K: Tensor, dtype: torch.dtype) -> Steps:
    """For columns that are visited in that order."""
    scales, zeros = (each.t().contiguous().to(dtype) for each in (grid.scales, grid.zeros))
    return Steps(scales, zeros, (order_K // grid.group_size).int().cpu(), grid.top)


def solve_block(W_BR: Tensor, U_BB: Tensor, steps: Steps, start: int, codes_BR: Tensor) -> Tensor:
    """GPTQ on the block that begins with column ``start``.

    Equation 2 of the paper with rows of U for those of the inverse Hessian, as its step 3 has it: a column's error is
    ``(w - q) / U_jj``, and column i after it loses ``U_ji`` times that.

    Args:
        W_BR: compensated for all columns before; becomes the values of the codes.
        U_BB: the block of the factor along its diagonal.
        steps: of the whole weight.
        start: of the block.
        codes_BR: ``uint8``, written.

    Returns:
        ``[B, R]``, the errors: what each column lost, divided by its diagonal element of U.
    """
    errors = torch.empty_like(W_BR)
    block = _columns(U_BB, steps, start, codes_BR)
    if library.serves(block, W_BR, errors):
        library.solve(block, W_BR, errors)
        return errors
    diagonal, groups = U_BB.diagonal().tolist(), block.group.tolist()
    for first in range(0, len(W_BR), STRIP):
        last = min(first + STRIP, len(W_BR))
        for j in range(first, last):
            w, s, z = W_BR[j], steps.scales[groups[j]], steps.zeros[groups[j]]
            code = torch.round(w / s).add_(z).clamp_(0, steps.top)
            codes_BR[j] = code
            value = code.sub_(z).mul_(s)
            torch.sub(w, value, out=errors[j]).div_(diagonal[j])
            W_BR[j] = value
            W_BR[j + 1 : last].addr_(U_BB[j, j + 1 : last], errors[j], alpha=-1)
        W_BR[last:].addmm_(U_BB[first:last, last:].t(), errors[first:last], alpha=-1)
    return errors


def descend_block(Q_BR: Tensor, M_BR: Tensor, H_BB: Tensor, steps: Steps, start: int, codes_BR: Tensor) -> Tensor:
    """One round of coordinate descent on the block that begins with column ``start``.

    Args:
        Q_BR: the values of the codes; becomes those of better ones.
        M_BR: ``(D Hd)^T``; stays as it is.
        H_BB: the block of the damped Hessian along its diagonal.
        steps: of the whole weight.
        start: of the block.
        codes_BR: ``uint8``, written.

    Returns:
        ``[B, R]``, how far each value moved.
    """
    moved = torch.empty_like(Q_BR)
    block = _columns(H_BB, steps, start, codes_BR)
    if library.serves(block, Q_BR, M_BR, moved):
        library.descend(block, Q_BR, M_BR, moved)
        return moved
    diagonal, groups, local = H_BB.diagonal().tolist(), block.group.tolist(), M_BR.clone()
    for first in range(0, len(Q_BR), STRIP):
        last = min(first + STRIP, len(Q_BR))
        for j in range(first, last):
            q, s, z = Q_BR[j], steps.scales[groups[j]], steps.zeros[groups[j]]
            best = torch.add(q, local[j], alpha=1 / diagonal[j])
            code = best.div_(s).round_().add_(z).clamp_(0, steps.top)
            codes_BR[j] = code
            torch.sub(code.sub_(z).mul_(s), q, out=moved[j])
            local[j + 1 : last].addr_(H_BB[j, j + 1 : last], moved[j], alpha=-1)
        local[last:].addmm_(H_BB[first:last, last:].t(), moved[first:last], alpha=-1)
    Q_BR += moved
    return moved


def _columns(factors: Tensor, steps: Steps, start: int, codes: Tensor) -> library.Columns:
    group = steps.group[start : start + len(codes)]
    return library.Columns(factors, steps.scales, steps.zeros, group, codes, steps.top)
