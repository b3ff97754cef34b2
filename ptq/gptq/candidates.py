"""GPTQ on several grids at once, the best one kept row by row.

The scales that lose least when each weight is rounded by itself are not those that lose least once GPTQ pushes errors
onto later columns: the compensated weights reach further. What a row costs does not depend on the other rows, so every
multiple of the searched scales is solved for and each row keeps its cheapest. The copies are stacked along the rows and
share the loop over columns. Pure functions; letters as in `ptq.gptq.solver`.
"""

import torch
from torch import Tensor

from ptq.gptq.solver import Factor, gptq_solve, in_order, out_of_order, solve_columns
from ptq.grid import Grid, check_finite, round_scales

# Between two multiples of the scales. Finer steps find more by chance alone; coarser ones miss what there is.
STEP = 1.06
# Weights solved for together: bounds the temporaries.
CHUNK_WEIGHTS = 1 << 25


def solve_candidates(
    W_NK: Tensor, factor: Factor, grid: Grid, count: int, *, scale_dtype: torch.dtype, block_size: int = 128
) -> tuple[Tensor, Grid]:
    """Codes and grid of each row's cheapest candidate.

    Args:
        W_NK: weight in the dtype of the factor.
        factor: of the input's Hessian, by which the candidates are judged.
        grid: scales and zeros, ``[N, G]``, that the candidates are multiples of.
        count: candidates tried; with 1 the grid is taken as it is.
        scale_dtype: dtype of the checkpoint's scales; a candidate is rounded to it before it is solved for.
        block_size: as for `gptq_solve`.

    Returns:
        Codes ``uint8 [N, K]`` and the grid they are on. No row loses more than it would on ``grid``, up
        to rounding: a loss is a difference of sums, in which float32 leaves little of a row's own where one input is
        1e4 times as large as the others or more (there a row may lose a third more; in float64 none does).

    Raises:
        NumericsError: W holds NaN or infinity.
    """
    if count == 1:
        return gptq_solve(W_NK, factor, grid, block_size=block_size).codes, grid
    check_finite(W_NK, "weight")
    rows = max(1, CHUNK_WEIGHTS // (count * W_NK.shape[1]))
    codes, scales = [], []
    for start in range(0, len(W_NK), rows):
        part = slice(start, start + rows)
        near = grid._replace(scales=grid.scales[part], zeros=grid.zeros[part])
        found = _solve_rows(W_NK[part], factor, _multiples(near, count, scale_dtype), block_size)
        codes.append(found[0])
        scales.append(found[1])
    return torch.cat(codes), grid._replace(scales=torch.cat(scales))


def factors(count: int) -> list[float]:
    """Multiples of the searched scales, 1 among them; two thirds are above it, for compensation widens the range."""
    return [STEP ** (i - count // 3) for i in range(count)]


def _multiples(grid: Grid, count: int, scale_dtype: torch.dtype) -> Grid:
    scales = torch.cat(
        [grid.scales if factor == 1 else round_scales(grid.scales * factor, scale_dtype) for factor in factors(count)]
    )
    return grid._replace(scales=scales, zeros=grid.zeros.repeat(count, 1))


def _solve_rows(W: Tensor, factor: Factor, stacked: Grid, block_size: int) -> tuple[Tensor, Tensor]:
    codes, losses = solve_columns(in_order(W, factor), factor, stacked, block_size=block_size)
    best = losses.reshape(-1, len(W)).argmin(0)
    chosen = best * len(W) + torch.arange(len(W), device=W.device)
    return out_of_order(codes[:, chosen], factor), stacked.scales[chosen]
