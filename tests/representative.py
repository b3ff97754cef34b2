"""Which of many like cases the fast tests take."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


def representative(cases: Iterable[T], traits: Callable[[T], Iterable[Hashable]]) -> list[Any]:
    """Parameters of a test: a case with a trait that none before it has runs always, the others are marked slow."""
    seen: set[Hashable] = set()
    parameters = []
    for case in cases:
        new = set(traits(case)) - seen
        seen |= new
        parameters.append(pytest.param(case, marks=() if new else pytest.mark.slow))
    return parameters
