"""What a weight error costs: the mean squared output error it causes."""

import math

import torch
from torch import Tensor

from ptq.grid import Grid, nearest_codes, values
from ptq.squares import times

# Panels of columns, at most so many and at least so wide: of n panels, (n + 1) / 2n of the whole product are computed.
PANELS = 8
NARROWEST = 256


def quadratic_loss(D_NK: Tensor, H_KK: Tensor) -> float:
    """``trace(D H D^T)``: mean squared output error a token of a weight error D, summed over the N outputs.

    H is symmetric, so what two panels of columns lose together is computed once and counts twice.
    """
    loss = torch.zeros((), dtype=torch.float64, device=D_NK.device)
    for here in _panels(D_NK.shape[1]):
        D = D_NK[:, here]
        found = times(D, H_KK[here, here])
        if here.start:
            found.add_(times(D_NK[:, : here.start], H_KK[: here.start, here]), alpha=2)
        loss += found.mul_(D).sum(dtype=torch.float64)
    return float(loss)


def multiplied(columns: int) -> float:
    """Multiplications of `quadratic_loss` for each weight of so many columns."""
    return math.fsum(here.stop * (here.stop - here.start) for here in _panels(columns)) / columns


def _panels(columns: int) -> list[slice]:
    width = max(NARROWEST, -(-columns // PANELS))
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def rounding_loss(W_NK: Tensor, H_KK: Tensor, grid: Grid) -> float:
    """Loss of plain rounding on a grid, to judge a solver by."""
    return quadratic_loss(W_NK - values(nearest_codes(W_NK, grid), grid).to(W_NK.dtype), H_KK)
