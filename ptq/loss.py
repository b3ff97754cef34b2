"""What a weight error costs: the mean squared output error it causes."""

import torch
from torch import Tensor

from ptq.grid import Grid, nearest_codes, values
from ptq.squares import times


def quadratic_loss(D_NK: Tensor, H_KK: Tensor) -> float:
    """``trace(D H D^T)``: mean squared output error a token of a weight error D, summed over the N outputs."""
    return float(times(D_NK, H_KK).mul_(D_NK).sum(dtype=torch.float64))


def rounding_loss(W_NK: Tensor, H_KK: Tensor, grid: Grid) -> float:
    """Loss of plain rounding on a grid, to judge a solver by."""
    return quadratic_loss(W_NK - values(nearest_codes(W_NK, grid), grid).to(W_NK.dtype), H_KK)
