"""AWQ (Lin et al., arXiv 2306.00978): scale input channels before rounding, so that the ones that matter lose less.

For an input x and a positive s, ``(W s) (x / s) = W x``; what changes is where rounding hurts. Everything is computed
from the second moment ``H = X^T X / T`` without another forward pass: a candidate's loss is ``trace(D H D^T)`` with
``D = Q(W s) / s - W``, exactly the mean squared output error (the paper's equation 4). Pure functions, tensors in and
out.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ptq.formats.codec import Scheme
from ptq.grid import Grid, grouped, min_max_grid, nearest_codes, values
from ptq.grid_search import COARSE, diagonal_blocks, search_grid
from ptq.loss import quadratic_loss

# Rows of each weight on which all candidates are screened, and on which the best few are then judged.
SCREENED_ROWS = 128
CONFIRMED_ROWS = 1024
CONFIRMED = 3
# Keeps inputs that hardly fire from counting nothing.
DAMPING = 0.01


class ScaleSearch(NamedTuple):
    """Channel scales ``[K]`` and their loss beside that of no scaling (all ones)."""

    scales: Tensor
    loss: float
    identity_loss: float


def search_scales(
    weights: Sequence[Tensor],
    H_KK: Tensor,
    magnitude_K: Tensor,
    schemes: Sequence[Scheme],
    *,
    grid: int = 20,
    clip: bool = True,
    scale_dtype: torch.dtype = torch.float16,
    tied: Tensor | None = None,
) -> ScaleSearch:
    """Find channel scales for the Linears that share an input; no scaling is always among the candidates.

    Args:
        weights: float32 ``[N_i, K]`` each.
        H_KK: second moment of the input.
        magnitude_K: mean ``|x|`` of each channel.
        schemes: how each weight will be quantized.
        grid: exponents tried between 0 and 1.
        clip: judge candidates by grids with searched ranges, as `search_clip` will choose them, not by full ranges.
        scale_dtype: dtype of the checkpoint's scales.
        tied: int64 ``[K]``; channels with the same entry must get the same scale (grouped-query attention).
    """
    ones = torch.ones_like(magnitude_K)

    def judge(rows: int, s: Tensor) -> float:
        losses = [_scaled_loss(w[:: -(-len(w) // rows)], H_KK, s, scheme, clip, scale_dtype)
                  for w, scheme in zip(weights, schemes, strict=True)]  # fmt: skip
        return sum(losses)

    candidates = list(_candidates(weights, magnitude_K, schemes, grid, tied))
    candidates.sort(key=lambda s: judge(SCREENED_ROWS, s))
    identity = judge(CONFIRMED_ROWS, ones)
    best = ScaleSearch(ones, identity, identity)
    for s in candidates[:CONFIRMED]:
        loss = judge(CONFIRMED_ROWS, s)
        if loss < best.loss:
            best = ScaleSearch(s, loss, identity)
    return best


def _candidates(
    weights: Sequence[Tensor], x: Tensor, schemes: Sequence[Scheme], grid: int, tied: Tensor | None
) -> Iterator[Tensor]:
    """``x^r`` and ``x^r / w^(1-r)`` for r between 0 and 1, w the mean magnitude of a channel's normalized weights.

    The former is the paper's equation 5, the latter AutoAWQ's ``duo_scaling``.
    """
    shares = [_normalized(weight, scheme).sum(0) for weight, scheme in zip(weights, schemes, strict=True)]
    w = torch.stack(shares).sum(0) / sum(len(weight) for weight in weights)
    for step in range(1, grid + 1):
        r = step / grid
        for s in (x**r, x**r / (w ** (1 - r) + 1e-4)):
            s = torch.nan_to_num(s, nan=1.0, posinf=1.0, neginf=1.0).clamp(min=1e-4)
            yield tie(s / (s.max() * s.min()).sqrt(), tied)


def _normalized(weight: Tensor, scheme: Scheme) -> Tensor:
    groups = grouped(weight.abs(), scheme.columns(weight.shape[1]))
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).reshape(weight.shape)


def tie(scales: Tensor, tied: Tensor | None) -> Tensor:
    """Give channels that must agree the largest of their scales."""
    if tied is None:
        return scales
    shared = torch.zeros(int(tied.max()) + 1, dtype=scales.dtype, device=scales.device)
    return shared.scatter_reduce_(0, tied, scales, "amax", include_self=False)[tied]


def _scaled_loss(
    weight: Tensor, H_KK: Tensor, s: Tensor, scheme: Scheme, clip: bool, scale_dtype: torch.dtype
) -> float:
    scaled = weight * s
    if clip:
        importance = H_KK.diagonal() / s.square()
        importance = importance + DAMPING * importance.mean()
        chosen = search_grid(scaled, importance, scheme, scale_dtype=scale_dtype, shrinks=COARSE)
    else:
        chosen = min_max_grid(scaled, scheme, scale_dtype=scale_dtype)
    return quadratic_loss((values(nearest_codes(scaled, chosen), chosen) - scaled) / s, H_KK)


def rescale(H_KK: Tensor, s: Tensor) -> Tensor:
    """Second moment of ``x / s``."""
    return H_KK / torch.outer(s, s)


def search_clip(W_NK: Tensor, H_KK: Tensor, scheme: Scheme, *, scale_dtype: torch.dtype = torch.float16) -> Grid:
    """A grid whose range is shrunk, row by row and group by group, where rounding the rest finer pays for the clipping.

    The error of one group's part of the output is ``d^T H_gg d`` with ``H_gg`` the group's diagonal block of H: exact,
    and no token is needed.
    """
    blocks = diagonal_blocks(H_KK, scheme.columns(W_NK.shape[1]))
    return search_grid(W_NK, blocks, scheme, scale_dtype=scale_dtype)
