"""A few rows of a table of options in which every two values of two different options meet at least once."""

import itertools
from collections.abc import Sequence
from typing import Any

Pair = tuple[int, int, int, int]  # option i has its value a, option j > i its value b


def pairs(sizes: Sequence[int]) -> set[Pair]:
    """Every pair of values that can meet."""
    return {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(sizes)), 2)
        for a, b in itertools.product(range(sizes[i]), range(sizes[j]))
    }


def pairwise(options: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Greedy: a row starts from a pair that no row has yet, and each further value is the one that meets most new."""
    sizes = [len(values) for values in options]
    missing = pairs(sizes)
    rows = []
    while missing:
        i, a, j, b = min(missing)
        row = {i: a, j: b}
        for k in sorted(set(range(len(sizes))) - {i, j}, key=lambda k: -sizes[k]):
            row[k] = max(range(sizes[k]), key=lambda c: (len(met({**row, k: c}) & missing), -c))
        missing -= met(row)
        rows.append(tuple(options[k][row[k]] for k in range(len(sizes))))
    return rows


def met(row: dict[int, int]) -> set[Pair]:
    """The pairs of a row, or of a part of one."""
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(sorted(row), 2)}
