"""Coordinate descent on codes: each one is the best there is, given all others.

GPTQ decides a column once and never comes back to it. With the grid held, the error ``trace(D Hd D^T)`` is a quadratic
function of each column's values, minimised by ``q_j + (D Hd)_j / Hd_jj``; rounding that to the grid can only lower it.
Pure functions; letters as in `ptq.gptq.solver`.
"""

import torch
from torch import Tensor

from ptq.gptq.solver import STRIP, Factor
from ptq.grid import Grid, values


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
    order = factor.order_K
    Hd = H_KK[order][:, order]
    Hd.diagonal().add_(factor.lam)
    group_of, diagonal = (order // grid.group_size).tolist(), Hd.diagonal().tolist()
    scales, zeros = grid.scales.t().contiguous().to(W_NK.dtype), grid.zeros.t().contiguous().to(W_NK.dtype)
    # Transposed and in order, so that a column is contiguous.
    Q = values(codes, grid).to(W_NK.dtype).t()[order].contiguous()
    found = codes.t()[order].contiguous()
    M = Hd @ (W_NK.t()[order] - Q)
    for _ in range(sweeps):
        for start in range(0, len(order), block_size):
            end = min(start + block_size, len(order))
            # Of what M becomes only the columns still to come in this block are looked at before all of it is updated.
            local, moved = M[start:end].clone(), torch.empty_like(Q[start:end])
            for first in range(start, end, STRIP):
                last = min(first + STRIP, end)
                for j in range(first, last):
                    s, z, step = scales[group_of[j]], zeros[group_of[j]], moved[j - start]
                    best = torch.add(Q[j], local[j - start], alpha=1 / diagonal[j])
                    code = best.div_(s).round_().add_(z).clamp_(0, grid.top)
                    found[j] = code
                    torch.sub(code.sub_(z).mul_(s), Q[j], out=step)
                    local[j + 1 - start : last - start].addr_(Hd[j, j + 1 : last], step, alpha=-1)
                rest = local[last - start :]
                rest.addmm_(Hd[first:last, last:end].t(), moved[first - start : last - start], alpha=-1)
            Q[start:end] += moved
            M.addmm_(Hd[:, start:end], moved, alpha=-1)
    result = torch.empty_like(codes, memory_format=torch.contiguous_format)
    result[:, order] = found.t()
    return result
