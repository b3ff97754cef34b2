"""Quantization done the slow way, in float64, from the definitions. Nothing here imports the code under test."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Obs(NamedTuple):
    codes: Tensor  # int64 [N, K]
    squared: float  # sum over all roundings of (w - q)^2 / [inv(Hd)]_jj


def correlated_inputs(tokens: int, features: int, seed: int = 0, outliers: int = 1) -> Tensor:
    """Float64 ``[T, K]``: channels that move together, with very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, dtype=torch.float64, generator=generator)
    x = torch.randn(tokens, features, dtype=torch.float64, generator=generator)
    strength = torch.rand(features, dtype=torch.float64, generator=generator) + 0.1
    strength[:outliers] *= 10
    return (x + 0.5 * x @ mix / features**0.5) * strength


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator)


def second_moment(batches: Iterable[Tensor]) -> Tensor:
    """``X^T X / T`` over the rows of all batches."""
    x = torch.cat([batch.reshape(-1, batch.shape[-1]).double() for batch in batches])
    return sum(torch.outer(row, row) for row in x) / len(x)


def output_error(x: Tensor, error: Tensor) -> float:
    """Mean over tokens of the squared norm of what a weight error ``[N, K]`` adds to the output."""
    return sum(float((error.double() @ token).square().sum()) for token in x.double()) / len(x)


def nearest_code(w: float, scale: float, zero: float, top: int) -> int:
    """Code whose value is nearest, by trying each; of two equally near ones that with an even ``code - zero``."""
    return min(range(top + 1), key=lambda code: (abs(scale * (code - zero) - w), (code - zero) % 2))


def round_to_codes(weight: Tensor, scales: Tensor, zeros: Tensor, top: int) -> Tensor:
    n, k = weight.shape
    group_size = k // scales.shape[1]
    rows = [
        [
            nearest_code(float(weight[i, j]), float(scales[i, j // group_size]), float(zeros[i, j // group_size]), top)
            for j in range(k)
        ]
        for i in range(n)
    ]
    return torch.tensor(rows)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Float64 ``scale * (code - zero)``, one column after the other."""
    group_size = codes.shape[1] // scales.shape[1]
    columns = [
        scales[:, j // group_size].double() * (codes[:, j].double() - zeros[:, j // group_size].double())
        for j in range(codes.shape[1])
    ]
    return torch.stack(columns, 1)


def obs(weight: Tensor, damped: Tensor, order: Iterable[int], scales: Tensor, zeros: Tensor, top: int) -> Obs:
    """Optimal Brain Quantization in a given order, with the explicit inverse Hessian.

    Round a column, move the columns that are left by ``-(w - q) / [inv]_jj * inv_j,:``, then take column j out of the
    inverse by one step of Gaussian elimination, as the GPTQ paper writes it before it arrives at Cholesky.
    """
    w, inverse = weight.double().clone(), torch.linalg.inv(damped.double())
    codes = torch.zeros(weight.shape, dtype=torch.int64)
    left = list(range(weight.shape[1]))
    group_size = weight.shape[1] // scales.shape[1]
    squared = 0.0
    for j in order:
        g = j // group_size
        column = [(slice(None), slice(j, j + 1)), (slice(None), slice(g, g + 1))]
        codes[:, j] = round_to_codes(w[column[0]], scales[column[1]], zeros[column[1]], top)[:, 0]
        error = w[:, j] - dequantize(codes[column[0]], scales[column[1]], zeros[column[1]])[:, 0]
        squared += float(error.square().sum() / inverse[j, j])
        left.remove(j)
        w[:, left] -= torch.outer(error / inverse[j, j], inverse[j, left])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j, :]) / inverse[j, j]
    return Obs(codes, squared)


def group_loss(w: Tensor, hessian: Tensor, scale: float, zero: float, top: int) -> float:
    """``d^T H d`` of rounding one group ``[g]`` on one grid."""
    codes = round_to_codes(w[None], torch.tensor([[scale]]), torch.tensor([[zero]]), top)
    d = (codes[0].double() - zero) * scale - w.double()
    return float(d @ hessian.double() @ d)


def best_grid(
    w: Tensor, hessian: Tensor, candidates: Iterable[tuple[float, float]], top: int
) -> tuple[tuple[float, float], float]:
    """The (scale, zero) of least `group_loss`, the first one of several, and its loss."""
    losses = [(candidate, group_loss(w, hessian, *candidate, top)) for candidate in candidates]
    return min(losses, key=lambda pair: pair[1])
