"""Modules whose parameters take no memory: on ``meta`` from the moment they are registered; buffers are real."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_lock = threading.Lock()
_building: Any = threading.local()  # depth: how often this thread is within `empty_parameters`
_threads = 0  # that are; guarded by the lock
_register: Any = None  # nn.Module.register_parameter while there are any


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Put the parameters of modules that this thread makes on ``meta``; other threads' are as they would be.

    `torch.device("meta")` would put buffers there as well, whose values (rotary frequencies) no checkpoint has. Each
    name gets a Parameter of its own, also where one was to be tied to another: which are, `SourceNames` knows.
    """
    _building.depth = int(getattr(_building, "depth", 0)) + 1
    _enter()
    try:
        yield
    finally:
        _leave()
        _building.depth -= 1


def _enter() -> None:
    global _threads, _register
    with _lock:
        _threads += 1
        if _threads == 1:
            _register = nn.Module.register_parameter
            nn.Module.register_parameter = _registered  # type: ignore[assignment, method-assign]


def _leave() -> None:
    global _threads
    with _lock:
        _threads -= 1
        if not _threads:
            nn.Module.register_parameter = _register  # type: ignore[method-assign]


def _registered(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
    _register(module, name, param)
    if param is not None and bool(getattr(_building, "depth", False)):
        kind: Any = type(param)  # a class of Parameters of its own, where it has one
        empty = kind(param.detach().to("meta"), requires_grad=param.requires_grad)
        empty.__dict__.update(param.__dict__)  # what transformers and others note on their parameters
        module._parameters[name] = empty
