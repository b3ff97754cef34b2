"""Coordinate descent on codes: each one is the best there is, given all others.

GPTQ decides a column once and never comes back to it. With the grid held, the error ``trace(D Hd D^T)`` is a quadratic
function of each column's values, minimised by ``q_j + (D Hd)_j / Hd_jj``; rounding that to the grid can only lower it.
Pure functions; letters as in `ptq.gptq.solver`.
"""

import torch
from torch import Tensor

from ptq.gptq.solver import STRIP, Factor
from ptq.grid import Grid, values
from ptq.squares import times


def descend(
    W_NK: Tensor, codes: Tensor, H_KK: Tensor, factor: Factor, grid: Grid, *, sweeps: int = 1, block_size: int = 128
) -> Tensor:
    """Improve codes by ``sweeps`` rounds over all columns, in the factor's order.

    Args:
        W_NK: the weight the codes stand for, in the dtype of the Hessian.
        codes: ``uint8 [N, K]`` to start from.
        H_KK: Hessian, undamped.
        factor: its factor, for the damping and the order.
        grid: scales and zeros, ``[N, G]``.
        sweeps: rounds; 0 returns the codes as they are.
        block_size: columns between two updates of the rest.

    Returns:
        ``uint8 [N, K]`` whose damped loss is at most that of ``codes``, up to rounding.
    """
    order = factor.order_K.to(W_NK.device)
    group_of = (order // grid.group_size).tolist()
    scales, zeros = grid.scales.t().contiguous().to(W_NK.dtype), grid.zeros.t().contiguous().to(W_NK.dtype)
    # Transposed and in order, so that a column is contiguous.
    Q = values(codes, grid).to(W_NK.dtype).t()[order].contiguous()
    found = codes.t()[order].contiguous()
    D = W_NK - values(codes, grid).to(W_NK.dtype)
    M = times(D, H_KK).add_(D, alpha=factor.lam).t()[order].contiguous()
    for _ in range(sweeps):
        for start in range(0, len(order), block_size):
            end = min(start + block_size, len(order))
            # Rows of the damped Hessian in order; to permute all of it at once would take a copy.
            rows = H_KK[factor.order_K[start:end]].to(W_NK.device)[:, order]
            H_block = rows[:, start:end]
            diagonal = H_block.diagonal().add_(factor.lam).tolist()
            # Of what M becomes only the columns still to come in this block are looked at before all of it is updated.
            local, moved = M[start:end].clone(), torch.empty_like(Q[start:end])
            for first in range(0, end - start, STRIP):
                last = min(first + STRIP, end - start)
                for j in range(first, last):
                    q, s, z = Q[start + j], scales[group_of[start + j]], zeros[group_of[start + j]]
                    best = torch.add(q, local[j], alpha=1 / diagonal[j])
                    code = best.div_(s).round_().add_(z).clamp_(0, grid.top)
                    found[start + j] = code
                    torch.sub(code.sub_(z).mul_(s), q, out=moved[j])
                    local[j + 1 : last].addr_(H_block[j, j + 1 : last], moved[j], alpha=-1)
                local[last:].addmm_(H_block[first:last, last:].t(), moved[first:last], alpha=-1)
            Q[start:end] += moved
            M.addmm_(rows.t(), moved, alpha=-1)
    result = torch.empty_like(codes, memory_format=torch.contiguous_format)
    result[:, order] = found.t()
    return result
