"""A random part of a text that is much larger than what calibration needs.

Tokenizing all of it may take longer than the solve: a megabyte takes about a second.
"""

import heapq
import random
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from ptq.calibration.text import pieces

T = TypeVar("T")

STRETCH = 1 << 16  # characters: what of a longer document is drawn or left out at once


def draw_part(units: Iterable[T], size: Callable[[T], int], most: int, seed: int) -> tuple[list[T], bool]:
    """Random units whose sizes add up to ``most`` (at least 1) or just beyond, in their order; and if those are all.

    One pass, holding no more than it returns and one unit: each gets a random number, and the smallest ones stay.
    """
    numbers = random.Random(seed)
    kept: list[tuple[float, int, T]] = []  # a heap, the largest number first; no two have the same index
    total, whole = 0, True
    for index, unit in enumerate(units):
        heapq.heappush(kept, (-numbers.random(), -index, unit))
        total += size(unit)
        while total - size(kept[0][2]) >= most:
            total -= size(heapq.heappop(kept)[2])
            whole = False
    return [unit for _, _, unit in sorted(kept, key=lambda entry: -entry[1])], whole


def stretches(documents: Iterable[Iterable[str]]) -> Iterator[str]:
    """The documents one after the other, those of more than ``STRETCH`` characters in several parts."""
    for document in documents:
        yield from pieces(document, STRETCH)
