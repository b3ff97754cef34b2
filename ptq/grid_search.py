"""Scales chosen for what a weight is multiplied by: the grid that loses least under the Hessian's diagonal.

For each row and group the objective is ``sum_k h_k (Q(w_k) - w_k)^2``, the diagonal part of the true output error. For
symmetric grids the scale carries a sign: ``2**bits`` codes reach one level further on one side, and a negative scale
turns that side towards the group's largest weight. Every candidate is rounded as the checkpoint will hold it before it
is judged.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ptq.formats.codec import Scheme
from ptq.grid import Grid, check_finite, grouped, min_max_grid, resolve_group_size, round_scales

# Fractions of the full range: twelve of them find what sixty do once two least-squares steps follow.
SHRINKS = tuple(1 - 0.05 * i for i in range(12))
REFITS = 2
# Weights looked at together: bounds the temporaries.
CHUNK_WEIGHTS = 1 << 22


def search_grid(
    weight: Tensor, importance: Tensor, scheme: Scheme, *, scale_dtype: torch.dtype = torch.float16
) -> Grid:
    """The grid of least weighted rounding error.

    Args:
        weight: float ``[N, K]``.
        importance: ``[K]``, positive: the damped diagonal of the Hessian.
        scheme: bits, group size and symmetry.
        scale_dtype: dtype the checkpoint will keep scales in.

    Raises:
        ConfigError: the group size does not divide K.
        NumericsError: the weight holds NaN or infinity.
    """
    check_finite(weight, "weight")
    group_size = resolve_group_size(scheme, weight.shape[1])
    h = importance.to(weight.dtype).reshape(-1, group_size)
    rows = max(1, CHUNK_WEIGHTS // weight.shape[1])
    parts = [_search(chunk, h, scheme, scale_dtype) for chunk in torch.split(weight, rows)]
    scales, zeros = torch.cat([s for s, _ in parts]), torch.cat([z for _, z in parts])
    return Grid(scales, zeros, scheme.bits, group_size, scheme.symmetric)


def _search(weight: Tensor, h: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    w = grouped(weight, h.shape[1])
    top = 2**scheme.bits - 1
    start = min_max_grid(weight, scheme, scale_dtype=scale_dtype)
    best = _Best(w, h, top)
    best.offer(start.scales, start.zeros)
    for scales, zeros in _candidates(w, start, scheme):
        best.offer(round_scales(scales, scale_dtype), zeros)
    for _ in range(REFITS):
        c = best.codes() - best.zeros.unsqueeze(-1)
        # least squares for the scale with the codes held
        fitted = (h * w * c).sum(-1) / (h * c * c).sum(-1).clamp(min=torch.finfo(w.dtype).tiny)
        fitted = torch.where(fitted == 0, best.scales, fitted)
        best.offer(round_scales(fitted, scale_dtype), best.zeros)
    return best.scales, best.zeros


def _candidates(w: Tensor, start: Grid, scheme: Scheme) -> Iterator[tuple[Tensor, Tensor]]:
    if scheme.symmetric:
        largest = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
        full = -largest / 2 ** (scheme.bits - 1)
        for shrink in SHRINKS:
            yield shrink * full, start.zeros
            yield -shrink * full, start.zeros
        return
    for shrink in SHRINKS:
        for shift in (-1, 0, 1):
            yield shrink * start.scales, (start.zeros + shift).clamp(0, start.top)


class _Best:
    """The best grid so far of every row and group."""

    def __init__(self, w: Tensor, h: Tensor, top: int) -> None:
        self._w, self._h, self._top = w, h, top
        self.scales = self.zeros = torch.empty(0)
        self._least: Tensor | None = None

    def codes(self) -> Tensor:
        return self._codes(self.scales, self.zeros)

    def _codes(self, scales: Tensor, zeros: Tensor) -> Tensor:
        rounded = torch.round(self._w / scales.unsqueeze(-1)).add_(zeros.unsqueeze(-1))
        return rounded.clamp_(0, self._top)

    def offer(self, scales: Tensor, zeros: Tensor) -> None:
        error = self._codes(scales, zeros).sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).sub_(self._w)
        loss = error.square_().mul_(self._h).sum(-1)
        if self._least is None:
            self.scales, self.zeros, self._least = scales, zeros, loss
            return
        better = loss < self._least
        self._least = torch.where(better, loss, self._least)
        self.scales = torch.where(better, scales, self.scales)
        self.zeros = torch.where(better, zeros, self.zeros)
