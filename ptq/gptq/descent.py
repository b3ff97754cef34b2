"""Coordinate descent on codes: each one is the best there is, given all others.

GPTQ decides a column once and never comes back to it. With the grid held, the error ``trace(D Hd D^T)`` is a quadratic
function of each column's values, minimised by ``q_j + (D Hd)_j / Hd_jj``; rounding that to the grid can only lower it.
QuantEase (arXiv 2309.01885) goes through the columns so. Pure functions; letters as in `ptq.gptq.solver`, ``Hd`` is
``H + lam I``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ptq.gptq.columns import descend_block, steps_of
from ptq.gptq.solver import Factor, in_order, out_of_order
from ptq.grid import Grid, values
from ptq.squares import times


class Descended(NamedTuple):
    """Codes ``uint8 [N, K]`` and their loss ``trace(D H D^T)``, which the rounds leave behind for nothing."""

    codes: Tensor
    loss: float


def descend(
    W_NK: Tensor, codes: Tensor, H_KK: Tensor, factor: Factor, grid: Grid, *, sweeps: int = 1, block_size: int = 128
) -> Descended:
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
        Codes whose damped loss is at most that of ``codes``, up to rounding.
    """
    order = factor.order_K.to(W_NK.device)
    steps = steps_of(grid, factor.order_K, W_NK.dtype)
    dense = values(codes, grid).to(W_NK.dtype)
    W, Q, found = (in_order(each, factor) for each in (W_NK, dense, codes))
    D = W_NK - dense
    M = in_order(times(D, H_KK).add_(D, alpha=factor.lam), factor)
    for _ in range(sweeps):
        for start in range(0, len(order), block_size):
            end = min(start + block_size, len(order))
            # Rows of the damped Hessian in order; to permute all of it at once would take a copy.
            rows = H_KK[factor.order_K[start:end]].to(W_NK.device)[:, order]
            H_block = rows[:, start:end]
            H_block.diagonal().add_(factor.lam)
            moved = descend_block(Q[start:end], M[start:end], H_block, steps, start, found[start:end])
            M.addmm_(rows.t(), moved, alpha=-1)
    D = W.sub_(Q)
    loss = float(M.sub_(D, alpha=factor.lam).mul_(D).sum(dtype=torch.float64))
    return Descended(out_of_order(found, factor), loss)
