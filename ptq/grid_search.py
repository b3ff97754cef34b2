"""Scales chosen for what a weight is multiplied by: the grid that loses least under the Hessian, group by group.

For each row and group the objective is ``d^T H_g d`` with ``d = Q(w) - w`` and ``H_g`` either the diagonal of the
Hessian over the group's columns or its whole block. For symmetric grids the scale carries a sign: ``2**bits`` codes
reach one level further on one side, and a negative scale turns that side towards the group's largest weight. Every
candidate is rounded as the checkpoint will hold it before it is judged.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ptq.formats.codec import Scheme
from ptq.grid import Grid, check_finite, grouped, min_max_grid, resolve_group_size, round_scales

# Fractions of the full range: twelve of them find what sixty do once two least-squares steps follow.
SHRINKS = tuple(1 - 0.05 * i for i in range(12))
# Enough to rank channel scales by, at a fifth of the price.
COARSE = (1.0, 0.9, 0.8, 0.7, 0.6)
REFITS = 2
# Weights looked at together: on a CPU so few that the temporaries stay in its caches, elsewhere this many times more.
CHUNK_WEIGHTS = 1 << 16
WITHOUT_CACHES = 64

# Multiplies [n, G, g] by the Hessian of each group.
Weigh = Callable[[Tensor], Tensor]


def search_grid(
    weight: Tensor,
    importance: Tensor,
    scheme: Scheme,
    *,
    scale_dtype: torch.dtype = torch.float16,
    shrinks: Sequence[float] = SHRINKS,
) -> Grid:
    """The grid of least weighted rounding error.

    Args:
        weight: float ``[N, K]``.
        importance: what an error costs: the diagonal of the (damped) Hessian ``[K]``, or its diagonal blocks
            ``[G, group_size, group_size]`` (see `diagonal_blocks`), which also see errors that cancel.
        scheme: bits, group size and symmetry.
        scale_dtype: dtype the checkpoint will keep scales in.
        shrinks: fractions of the full range to try.

    Raises:
        ConfigError: the group size does not divide K.
        NumericsError: the weight holds NaN or infinity.
    """
    check_finite(weight, "weight")
    group_size = resolve_group_size(scheme, weight.shape[1])
    weigh = _weigher(importance.to(weight.dtype), group_size)
    rows = max(1, CHUNK_WEIGHTS * (1 if weight.device.type == "cpu" else WITHOUT_CACHES) // weight.shape[1])
    parts = [_search(chunk, weigh, scheme, scale_dtype, shrinks) for chunk in torch.split(weight, rows)]
    scales, zeros = torch.cat([s for s, _ in parts]), torch.cat([z for _, z in parts])
    return Grid(scales, zeros, scheme.bits, group_size, scheme.symmetric)


def diagonal_blocks(H_KK: Tensor, group_size: int) -> Tensor:
    """The blocks ``[G, group_size, group_size]`` along the diagonal of a Hessian."""
    return torch.stack([H_KK[i : i + group_size, i : i + group_size] for i in range(0, len(H_KK), group_size)])


def _weigher(importance: Tensor, group_size: int) -> Weigh:
    if importance.dim() == 1:
        h = importance.reshape(-1, group_size)
        return lambda x: x * h
    return lambda x: torch.bmm(x.transpose(0, 1), importance).transpose(0, 1)


def _search(
    weight: Tensor, weigh: Weigh, scheme: Scheme, scale_dtype: torch.dtype, shrinks: Sequence[float]
) -> tuple[Tensor, Tensor]:
    start = min_max_grid(weight, scheme, scale_dtype=scale_dtype)
    w = grouped(weight, start.group_size)
    best = _Best(w, weigh, start)
    for scales, zeros in _candidates(w, start, scheme, shrinks):
        best.offer(round_scales(scales, scale_dtype), zeros)
    for _ in range(REFITS):
        c = best.codes(best.scales, best.zeros) - best.zeros.unsqueeze(-1)
        # least squares for the scale with the codes held
        weighed = weigh(c)
        norm = (weighed * c).sum(-1)
        fitted = torch.where(norm > 0, (weighed * w).sum(-1) / norm, best.scales)
        best.offer(round_scales(torch.where(fitted == 0, best.scales, fitted), scale_dtype), best.zeros)
    return best.scales, best.zeros


def _candidates(w: Tensor, start: Grid, scheme: Scheme, shrinks: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    if scheme.symmetric:
        largest = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
        full = -largest / 2 ** (scheme.bits - 1)
        for shrink in shrinks:
            yield shrink * full, start.zeros
            yield -shrink * full, start.zeros
        return
    for shrink in shrinks:
        for shift in (-1, 0, 1):
            yield shrink * start.scales, (start.zeros + shift).clamp(0, start.top)


class _Best:
    """The best grid so far of every row and group."""

    def __init__(self, w: Tensor, weigh: Weigh, start: Grid) -> None:
        self._w, self._weigh, self._top = w, weigh, start.top
        self.scales, self.zeros = start.scales, start.zeros
        self._least = self._loss(start.scales, start.zeros)

    def codes(self, scales: Tensor, zeros: Tensor) -> Tensor:
        rounded = torch.round(self._w / scales.unsqueeze(-1)).add_(zeros.unsqueeze(-1))
        return rounded.clamp_(0, self._top)

    def _loss(self, scales: Tensor, zeros: Tensor) -> Tensor:
        error = self.codes(scales, zeros).sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).sub_(self._w)
        return (self._weigh(error) * error).sum(-1)

    def offer(self, scales: Tensor, zeros: Tensor) -> None:
        loss = self._loss(scales, zeros)
        better = loss < self._least
        self._least = torch.where(better, loss, self._least)
        self.scales = torch.where(better, scales, self.scales)
        self.zeros = torch.where(better, zeros, self.zeros)
