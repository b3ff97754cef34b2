"""Axes of charts: where a value stands, and round values to label."""

import math
from collections.abc import Sequence
from typing import NamedTuple

# Labels an axis should have at most.
TICKS = 8


class Scale(NamedTuple):
    """Values between ``low`` and ``high`` on a line from ``start`` to ``end``, in points."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[tuple[float, str], ...]  # value and label

    def __call__(self, value: float) -> float:
        """Where a value stands."""
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / (high - low)


def linear_scale(values: Sequence[float], start: float, end: float, *, whole: bool = False) -> Scale:
    """An axis a little longer than its values; with ``whole`` labels are whole numbers."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    low, high = low - 0.06 * span, high + 0.06 * span
    step = _round_step((high - low) / TICKS)
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step)
    digits = max(0, -math.floor(math.log10(step)))
    count = math.floor(high / step) - first + 1
    ticks = tuple(((first + i) * step, f"{(first + i) * step:.{digits}f}") for i in range(count))
    return Scale(low, high, start, end, False, ticks)


def log_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """A logarithmic axis for positive values, labelled at 1, 2 and 5 where there is room, else at powers of ten."""
    low, high = min(values) / 1.3, max(values) * 1.3
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [v for d in decades for m in digits if low <= (v := m * 10.0**d) <= high]
        if len(found) <= TICKS:
            break
    every = -(-len(found) // TICKS) or 1
    return Scale(low, high, start, end, True, tuple((v, f"{v:.4g}") for v in found[::every]))


def _round_step(least: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))
