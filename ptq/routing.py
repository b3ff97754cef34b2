"""Who runs in a mixture of experts: those the router chooses, unless one of these contexts says otherwise.

A word between those who need every expert to run (tracing, statistics of experts that few tokens reach, proofs of
folds) and `ptq.models.experts`, which makes them run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Routing:
    """Instead of what a router says."""

    rows: int | None  # the first rows of the input only
    adding: bool  # all experts put out their sum beside what the routed ones do; otherwise nothing comes out
    running: int | None = None  # which experts module runs at the moment, any number that tells it from the others


_current: ContextVar[Routing | None] = ContextVar("routing", default=None)


def current() -> Routing | None:
    """What holds now; None: the router decides."""
    return _current.get()


@contextmanager
def visiting(rows: int | None = None) -> Iterator[Routing]:
    """Feed the same rows to every expert that has a hook; what experts put out is zero."""
    with _holding(Routing(rows, adding=False)) as routing:
        yield routing


@contextmanager
def everyone() -> Iterator[Routing]:
    """Add the outputs of all experts to those of the routed ones, so that an error in any of them shows."""
    with _holding(Routing(None, adding=True)) as routing:
        yield routing


@contextmanager
def _holding(routing: Routing) -> Iterator[Routing]:
    token = _current.set(routing)
    try:
        yield routing
    finally:
        _current.reset(token)
