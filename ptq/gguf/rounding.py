"""Scales of a block format chosen for what a weight is multiplied by, and the codes nearest to the weight on them.

The objective is the squared error weighted by an importance for each input, the diagonal of the Hessian. Every number
is rounded as the file will hold it before it is judged: K-quants fix their small factors here, so that a solver that
runs afterwards makes up for their rounding. Pure functions.
"""

import torch
from torch import Tensor

from ptq.errors import NumericsError
from ptq.formats.codec import Scheme
from ptq.gguf.blocks import KINDS, Blocks, levels, row_bytes, stack_rows
from ptq.grid import check_finite, grouped
from ptq.grid_search import search_grid

SMALLEST = 2.0**-24  # the least positive float16
LARGEST = 65504.0
TINY = torch.finfo(torch.float32).tiny  # below any sum of importances that is not zero
# The largest small factor of each kind that has some.
FACTORS = {"Q4_K": 63, "Q5_K": 63, "Q6_K": 127}
# Fractions of the range's two ends that are tried together.
ENDS = (1.0, 0.9, 0.8, 0.7)
REFITS = 2
ROUNDS = 2  # of factors, then block scales
CHUNK_WEIGHTS = 1 << 22


def round_blocks(kind: str, weight: Tensor, importance: Tensor, name: str = "weight") -> Blocks:
    """The block format of least weighted rounding error.

    Args:
        kind: key of `KINDS`.
        weight: float ``[N, K]``.
        importance: ``[K]``, what an error in each input costs, positive.
        name: what errors call the weight.

    Raises:
        FormatError: blocks do not fill a row.
        NumericsError: the weight holds NaN or infinity, or is larger than the kind's scales reach.
    """
    row_bytes(kind, weight.shape[1])
    check_finite(weight, name)
    _require_reached(kind, weight, name)
    rows = max(1, CHUNK_WEIGHTS // weight.shape[1])
    chunks = torch.split(weight, rows)
    return stack_rows([_round(kind, chunk.float(), importance.to(chunk.device).float()) for chunk in chunks])


def raised_groups(kind: str, weight: Tensor) -> int:
    """Groups of a weight ``[N, K]`` that are too small for a scale, though not zero: rounded with a step of 2**-24."""
    step, _ = _ranges(kind, weight)
    return int(((step > 0) & (step < SMALLEST)).sum())


def _ranges(kind: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes ``[N, G]`` of the step and the minimum that span each group."""
    shape = KINDS[kind]
    low, high = (x.float() for x in torch.aminmax(grouped(weight, shape.group), dim=-1))
    if not shape.minimum:
        return torch.maximum(high, -low) / 2 ** (shape.bits - 1), torch.zeros_like(low)
    if kind in FACTORS:  # whose minimum is not above zero
        low, high = low.clamp(max=0), high.clamp(min=0)
    return (high - low) / (2**shape.bits - 1), low.abs()


def _require_reached(kind: str, weight: Tensor, name: str) -> None:
    step, minimum = _ranges(kind, weight)
    most = LARGEST * FACTORS.get(kind, 1)
    if step.numel() and float(torch.maximum(step, minimum).max()) > most:
        kept = "a step and a minimum" if KINDS[kind].minimum else "a step"
        raise NumericsError(
            f"{name} must be small enough for {kind}, which keeps {kept} of at most {most:g} for every "
            f"{KINDS[kind].group} weights; its largest weight is {float(weight.abs().max()):.3g}: export another type, "
            "or check the checkpoint"
        )


def nearest(blocks: Blocks, weight: Tensor) -> Tensor:
    """Codes ``uint8 [N, K]`` nearest to a weight on the scales of ``blocks``."""
    found, kind = levels(blocks), KINDS[blocks.kind]
    codes = _codes(grouped(weight, kind.group), found.step, found.offset, found.zero, kind.bits)
    return codes.to(torch.uint8).view(weight.shape)


def _round(kind: str, weight: Tensor, importance: Tensor) -> Blocks:
    shape = KINDS[kind]
    if shape.minimum:
        scaled = _with_minimum(kind, weight, importance)
    elif kind == "Q6_K":
        scaled = _six(weight, importance)
    else:
        scheme = Scheme(shape.bits, shape.group, True)
        grid = search_grid(weight, importance, scheme, scale_dtype=torch.float16, smallest=SMALLEST)
        scaled = Blocks(kind, torch.empty(0), grid.scales.half(), None, None, None)
    return scaled._replace(codes=nearest(scaled, weight))


def _codes(w: Tensor, step: Tensor, offset: Tensor | None, zero: int, bits: int) -> Tensor:
    shifted = w if offset is None else w + offset.unsqueeze(-1)
    return torch.round(shifted / step.unsqueeze(-1)).add_(zero).clamp_(0, 2**bits - 1)


def _as_half(x: Tensor) -> Tensor:
    """Positive numbers as float16 holds them, never zero."""
    return x.clamp(SMALLEST, LARGEST).half()


def _affine(w: Tensor, h: Tensor, bits: int, positive: bool) -> tuple[Tensor, Tensor]:
    """Steps and offsets ``[n, G]`` of ``step * q - offset`` for groups ``[n, G, g]``; offsets not below 0 on demand."""
    top = 2**bits - 1
    low, high = w.amin(-1), w.amax(-1)
    if positive:
        low, high = low.clamp(max=0), high.clamp(min=0)
    middle = torch.zeros_like(low) if positive else (low + high) / 2
    best_s = ((high - low) / top).clamp_min(SMALLEST)
    best_m = -low
    least = _affine_loss(w, h, best_s, best_m, bits)
    tries = [(a, b) for a in ENDS for b in ENDS] + [(1.0, 1.0)] * REFITS
    for index, (a, b) in enumerate(tries):
        if index < len(ENDS) ** 2:
            start = middle + (low - middle) * a
            s, m = ((middle + (high - middle) * b - start) / top).clamp_min(SMALLEST), -start
        else:
            s, m = best_s, best_m
        s, m = _fit_affine(w, h, _codes(w, s, m, 0, bits), s, positive)
        loss = _affine_loss(w, h, s, m, bits)
        better = loss < least
        least = torch.where(better, loss, least)
        best_s, best_m = torch.where(better, s, best_s), torch.where(better, m, best_m)
    return best_s, best_m


def _affine_loss(w: Tensor, h: Tensor, s: Tensor, m: Tensor, bits: int) -> Tensor:
    error = _codes(w, s, m, 0, bits).mul_(s.unsqueeze(-1)).sub_(m.unsqueeze(-1)).sub_(w)
    return error.square_().mul_(h).sum(-1)


def _fit_affine(w: Tensor, h: Tensor, q: Tensor, s: Tensor, positive: bool) -> tuple[Tensor, Tensor]:
    """Weighted least squares for step and offset with the codes held; the step stays where the codes are all equal."""
    total = h.sum(-1)
    mean_q, mean_w = (h * q).sum(-1) / total, (h * w).sum(-1) / total
    dq, dw = q - mean_q.unsqueeze(-1), w - mean_w.unsqueeze(-1)
    spread = (h * dq * dq).sum(-1)
    step = torch.where(spread > 0, (h * dq * dw).sum(-1) / spread.clamp_min(TINY), s)
    step = torch.where(step > 0, step, s)
    offset = step * mean_q - mean_w
    if positive:
        through_zero = (h * q * w).sum(-1) / (h * q * q).sum(-1).clamp_min(TINY)
        step = torch.where((offset < 0) & (through_zero > 0), through_zero, step)
        offset = offset.clamp(min=0)
    return step.clamp_min(SMALLEST), offset


def _with_minimum(kind: str, weight: Tensor, importance: Tensor) -> Blocks:
    shape = KINDS[kind]
    w, h = weight.view(len(weight), -1, shape.group), importance.view(-1, shape.group)
    s, m = _affine(w, h, shape.bits, positive=shape.columns == 256)
    if shape.columns == 256:
        return _nest(kind, w, h, s, m)
    d = _as_half(s)
    q = _codes(w, d.float(), m, 0, shape.bits)
    offset = ((q * d.float().unsqueeze(-1) - w) * h).sum(-1) / h.sum(-1)  # the rounding of d taken into account
    return Blocks(kind, torch.empty(0), d, (-offset).clamp(-LARGEST, LARGEST).half(), None, None)


def _covering(largest: Tensor, factor: int) -> Tensor:
    """The float16 number whose multiple by ``factor`` is nearest to ``largest``, or the next one up.

    Near float16's least the nearest one may be so much smaller that the largest step would be cut.
    """
    d = _as_half(largest / factor)
    return torch.where(d.float() * (factor + 0.5) < largest, _as_half(d.float() + SMALLEST), d)


def _nest(kind: str, w: Tensor, h: Tensor, s: Tensor, m: Tensor) -> Blocks:
    """Group steps and offsets as whole multiples, 6 bits each, of one step and one offset for 8 groups."""
    n, bits = len(w), KINDS[kind].bits
    d, dmin = (_covering(x.view(n, -1, 8).amax(-1), 63) for x in (s, m))
    sc = torch.round(s / _spread(d, 8)).clamp_(1, 63)
    mn = torch.round(m / _spread(dmin, 8)).clamp_(0, 63)
    for _ in range(ROUNDS):
        sc, mn = _best_factors(w, h, (d, dmin), (sc, mn), bits)
        d, dmin = _best_scales(w, h, (d, dmin), (sc, mn), bits)
    return Blocks(kind, torch.empty(0), d, dmin, sc.to(torch.int16), mn.to(torch.int16))


def _spread(x: Tensor, groups: int) -> Tensor:
    """``[n, B]`` as float32 ``[n, G]``."""
    return x.float().repeat_interleave(groups, 1)


Pair = tuple[Tensor, Tensor]


def _best_factors(w: Tensor, h: Tensor, scales: Pair, factors: Pair, bits: int) -> Pair:
    """The best of each group's factors and their neighbours."""
    d, dmin = _spread(scales[0], 8), _spread(scales[1], 8)
    best = factors
    least = _affine_loss(w, h, d * best[0], dmin * best[1], bits)
    for step in (-1, 0, 1):
        for shift in (-1, 0, 1):
            sc, mn = (factors[0] + step).clamp(1, 63), (factors[1] + shift).clamp(0, 63)
            loss = _affine_loss(w, h, d * sc, dmin * mn, bits)
            better = loss < least
            least = torch.where(better, loss, least)
            best = torch.where(better, sc, best[0]), torch.where(better, mn, best[1])
    return best


def _best_scales(w: Tensor, h: Tensor, scales: Pair, factors: Pair, bits: int) -> Pair:
    """Least squares for the two scales of every block, kept where their float16 values lose less."""
    n = len(w)

    def by_block(x: Tensor) -> Tensor:
        return x.sum(-1).view(n, -1, 8).sum(-1)

    def loss(d: Tensor, dmin: Tensor) -> Tensor:
        error = _affine_loss(w, h, _spread(d, 8) * factors[0], _spread(dmin, 8) * factors[1], bits)
        return error.view(n, -1, 8).sum(-1)

    q = _codes(w, _spread(scales[0], 8) * factors[0], _spread(scales[1], 8) * factors[1], 0, bits)
    a, b = q * factors[0].unsqueeze(-1), -factors[1].unsqueeze(-1).expand_as(q)
    aa, ab, bb = by_block(h * a * a), by_block(h * a * b), by_block(h * b * b)
    aw, bw = by_block(h * a * w), by_block(h * b * w)
    determinant = aa * bb - ab * ab
    solvable = determinant > 1e-6 * aa * bb
    determinant = torch.where(solvable, determinant, torch.ones_like(determinant))
    d = torch.where(solvable, (aw * bb - bw * ab) / determinant, scales[0].float())
    dmin = torch.where(solvable, (bw * aa - aw * ab) / determinant, scales[1].float())
    fitted = _as_half(d), _as_half(dmin)
    better = (d > 0) & (dmin > 0) & (loss(*fitted) < loss(*scales))
    return torch.where(better, fitted[0], scales[0]), torch.where(better, fitted[1], scales[1])


def _six_steps(weight: Tensor, importance: Tensor) -> Tensor:
    """Steps ``[N, G]`` of 16 weights, each group brought near 1 by a power of two while they are searched.

    What stands for them, ``d * sc``, is a float32 number: float16's limits are not theirs.
    """
    groups = grouped(weight, 16)
    exponents = torch.frexp(groups.abs().amax(-1)).exponent.clamp(min=-100)
    near_one = torch.ldexp(groups, -exponents.unsqueeze(-1)).view(weight.shape)
    return torch.ldexp(search_grid(near_one, importance, Scheme(6, 16, True)).scales, exponents)


def _six(weight: Tensor, importance: Tensor) -> Blocks:
    """Q6_K: signed scales of 16 weights as whole multiples, 8 bits with a sign, of one scale for 256."""
    n = len(weight)
    s = _six_steps(weight, importance)
    w, h = weight.view(n, -1, 16), importance.view(-1, 16)

    def loss(d: Tensor, sc: Tensor) -> Tensor:
        step = _spread(d, 16) * sc
        error = _codes(w, step, None, 32, 6).sub_(32).mul_(step.unsqueeze(-1)).sub_(w)
        return error.square_().mul_(h).sum(-1)

    def whole(x: Tensor) -> Tensor:
        """In range and never zero."""
        rounded = torch.round(x).clamp(-127, 127)
        return torch.where(rounded == 0, torch.copysign(torch.ones_like(x), x), rounded)

    d = _covering(s.abs().view(n, -1, 16).amax(-1), 127)
    sc = whole(s / _spread(d, 16))
    for _ in range(ROUNDS):
        tries = torch.stack([sc, whole(sc - 1), whole(sc + 1)])
        losses = torch.stack([loss(d, each) for each in tries])
        sc = tries.gather(0, losses.argmin(0, keepdim=True)).squeeze(0)
        c = (_codes(w, _spread(d, 16) * sc, None, 32, 6) - 32) * sc.unsqueeze(-1)
        norm, product = ((h * c * x).sum(-1).view(n, -1, 16).sum(-1) for x in (c, w))
        fitted = _as_half(product / norm.clamp_min(TINY))
        before, after = (loss(each, sc).view(n, -1, 16).sum(-1) for each in (d, fitted))
        d = torch.where((product > 0) & (after < before), fitted, d)
    return Blocks("Q6_K", torch.empty(0), d, None, sc.to(torch.int16), None)
