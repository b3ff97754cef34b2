"""Scales chosen for what a weight is multiplied by: the grid that loses least under the Hessian, group by group.

For each row and group the objective is ``d^T H_g d`` with ``d = Q(w) - w`` and ``H_g`` either the diagonal of the
Hessian over the group's columns or its whole block. For symmetric grids the scale carries a sign: ``2**bits`` codes
reach one level further on one side, and a negative scale turns that side towards the group's largest weight. Every
candidate is rounded as the checkpoint will hold it before it is judged.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from ptq_kernels.cpu import grids as library
from torch import Tensor

from ptq.formats.codec import Scheme
from ptq.grid import SMALLEST_SCALE, Grid, check_finite, grouped, min_max_grid, resolve_group_size, round_scales

# Fractions of the full range: twelve of them find what sixty do once two least-squares steps follow.
SHRINKS = tuple(1 - 0.05 * i for i in range(12))
# Enough to rank channel scales by, at a fifth of the price.
COARSE = (1.0, 0.9, 0.8, 0.7, 0.6)
REFITS = 2
# Weights looked at together: where torch does it on a CPU so few that the temporaries stay in its caches, elsewhere
# this many times more.
CHUNK_WEIGHTS = 1 << 16
WITHOUT_CACHES = 64
# Groups looked at together: bounds the two or three dozen candidates of each.
CHUNK_GROUPS = 1 << 15


def search_grid(
    weight: Tensor,
    importance: Tensor,
    scheme: Scheme,
    *,
    scale_dtype: torch.dtype = torch.float16,
    shrinks: Sequence[float] = SHRINKS,
    smallest: float = SMALLEST_SCALE,
) -> Grid:
    """The grid of least weighted rounding error.

    Args:
        weight: float ``[N, K]``.
        importance: what an error costs: the diagonal of the (damped) Hessian ``[K]``, or its diagonal blocks
            ``[G, group_size, group_size]`` (see `diagonal_blocks`), which also see errors that cancel.
        scheme: bits, group size and symmetry.
        scale_dtype: dtype the checkpoint will keep scales in.
        shrinks: fractions of the full range to try.
        smallest: least scale.

    Raises:
        ConfigError: the group size does not divide K.
        NumericsError: the weight holds NaN or infinity.
    """
    check_finite(weight, "weight")
    group_size = resolve_group_size(scheme, weight.shape[1])
    judge = _judge(weight, importance.to(weight.dtype), group_size, 2**scheme.bits - 1)
    most = CHUNK_WEIGHTS * (1 if judge.by_torch_on_cpu else WITHOUT_CACHES)
    rows = max(1, min(most, CHUNK_GROUPS * group_size) // weight.shape[1])
    held = _Held(scale_dtype, smallest)
    parts = [_search(chunk, judge, scheme, held, shrinks) for chunk in torch.split(weight, rows)]
    scales, zeros = torch.cat([s for s, _ in parts]), torch.cat([z for _, z in parts])
    return Grid(scales, zeros, scheme.bits, group_size, scheme.symmetric)


def diagonal_blocks(H_KK: Tensor, group_size: int) -> Tensor:
    """The blocks ``[G, group_size, group_size]`` along the diagonal of a Hessian."""
    return torch.stack([H_KK[i : i + group_size, i : i + group_size] for i in range(0, len(H_KK), group_size)])


class _Held(NamedTuple):
    """How a file holds scales (see `round_scales`)."""

    dtype: torch.dtype
    smallest: float


def _search(
    weight: Tensor, judge: "_Judge", scheme: Scheme, held: _Held, shrinks: Sequence[float]
) -> tuple[Tensor, Tensor]:
    start = min_max_grid(weight, scheme, scale_dtype=held.dtype, smallest=held.smallest)
    w = grouped(weight, start.group_size)
    scales, zeros = _candidates(w, start, scheme, shrinks)
    scales = torch.cat([start.scales[None], round_scales(scales, *held)])
    zeros = torch.cat([start.zeros[None], zeros])
    best = _cheapest(judge.losses(w, scales, zeros), scales, zeros)
    for _ in range(REFITS):
        # least squares for the scale with the codes held
        squares, products = judge.moments(w, best.scales, best.zeros)
        fitted = torch.where(squares > 0, products / squares, best.scales)
        scales = round_scales(torch.where(fitted == 0, best.scales, fitted), *held)
        scales, zeros = torch.stack([best.scales, scales]), torch.stack([best.zeros, best.zeros])
        losses = torch.stack([best.losses, *judge.losses(w, scales[1:], zeros[1:])])
        best = _cheapest(losses, scales, zeros)
    return best.scales, best.zeros


def _candidates(w: Tensor, start: Grid, scheme: Scheme, shrinks: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Scales, yet to be rounded, and zeros: ``[C, n, G]``."""
    shrunk = torch.tensor(shrinks, dtype=w.dtype, device=w.device).view(-1, 1, 1)
    if scheme.symmetric:
        largest = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
        full = shrunk * (-largest / 2 ** (scheme.bits - 1))
        scales = torch.cat([full, -full])
        return scales, start.zeros.expand_as(scales)
    zeros = torch.stack([(start.zeros + shift).clamp(0, start.top) for shift in (-1, 0, 1)])
    scales = shrunk * start.scales
    return scales.repeat_interleave(len(zeros), 0), zeros.repeat(len(shrunk), 1, 1)


class _Cheapest(NamedTuple):
    """Of every row and group, ``[n, G]``."""

    losses: Tensor
    scales: Tensor
    zeros: Tensor


def _cheapest(losses: Tensor, scales: Tensor, zeros: Tensor) -> _Cheapest:
    """The first of those that lose least, of ``[C, n, G]``."""
    chosen = losses.nan_to_num(nan=torch.inf, posinf=torch.inf).argmin(0, keepdim=True)
    return _Cheapest(*(each.gather(0, chosen).squeeze(0) for each in (losses, scales, zeros)))


def _judge(weight: Tensor, importance: Tensor, group_size: int, top: int) -> "_Judge":
    diagonal = importance.dim() == 1
    cost = importance.reshape(-1, group_size).contiguous() if diagonal else importance
    if diagonal and library.serves(library.Groups(grouped(weight[:1], group_size), cost, top)):
        return _Compiled(cost, top)
    return _ByTorch(cost, top)


class _Compiled:
    """What candidates lose, by the C++ library of `ptq_kernels`."""

    by_torch_on_cpu = False

    def __init__(self, cost: Tensor, top: int) -> None:
        self._cost, self._top = cost, top

    def losses(self, w: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """``[C, n, G]`` for grids of that shape and ``w [n, G, g]``."""
        return library.losses(self._groups(w), scales, zeros)

    def moments(self, w: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """``c^T H c`` and ``c^T H w`` with c the codes minus the zeros, ``[n, G]`` each."""
        return library.moments(self._groups(w), scales, zeros)

    def _groups(self, w: Tensor) -> library.Groups:
        return library.Groups(w.contiguous(), self._cost, self._top)


class _ByTorch:
    """The same by torch, on any device, under the diagonal of each ``H_g`` or all of it."""

    def __init__(self, cost: Tensor, top: int) -> None:
        self._cost, self._top, self.by_torch_on_cpu = cost, top, cost.device.type == "cpu"

    def losses(self, w: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """As `_Compiled.losses`."""
        pairs = zip(scales.unsqueeze(-1), zeros.unsqueeze(-1), strict=True)
        return torch.stack([self._loss(self._from_zero(w, s, z).mul_(s).sub_(w)) for s, z in pairs])

    def moments(self, w: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """As `_Compiled.moments`."""
        c = self._from_zero(w, scales.unsqueeze(-1), zeros.unsqueeze(-1))
        weighed = self._weigh(c)
        return (weighed * c).sum(-1), (weighed * w).sum(-1)

    def _loss(self, error: Tensor) -> Tensor:
        return (self._weigh(error) * error).sum(-1)

    def _from_zero(self, w: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        return torch.round(w / scales).add_(zeros).clamp_(0, self._top).sub_(zeros)

    def _weigh(self, x: Tensor) -> Tensor:
        """``[n, G, g]`` times the Hessian of each group."""
        if self._cost.dim() == 2:
            return x * self._cost
        return torch.bmm(x.transpose(0, 1), self._cost).transpose(0, 1)


_Judge = _Compiled | _ByTorch
