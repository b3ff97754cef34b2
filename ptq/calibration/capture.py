"""Statistics of what reaches each Linear while calibration data runs through a module."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptq.errors import NumericsError, UnsupportedModelError

# Rows of x multiplied at a time: bounds the float32 copy of the activations.
CHUNK_ROWS = 8192

Run = Callable[[], Any]


class InputGroup(NamedTuple):
    """Linears that read the very same tensor, in order of execution."""

    members: tuple[str, ...]


class InputStats(NamedTuple):
    """Second moment and mean magnitude of the inputs of one group."""

    hessian: Tensor  # float32 [K, K], X^T X / T
    magnitude: Tensor  # float32 [K], mean |x|
    tokens: int


class StopForward(Exception):  # noqa: N818  (control flow, not an error)
    """Raised by a hook once everything wanted has been seen."""


@contextmanager
def input_hooks(modules: Mapping[str, nn.Module], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``seen(name, x)`` whenever one of the modules is about to run on ``x``."""

    def hook(name: str) -> Callable[..., None]:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen(name, args[0] if args else next(iter(kwargs.values())))

        return before

    handles = [m.register_forward_pre_hook(hook(name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def trace_groups(modules: Mapping[str, nn.Module], run: Run) -> list[InputGroup]:
    """Which Linears share an input, in order of execution, from one forward pass.

    Raises:
        UnsupportedModelError: a Linear was not called, so nothing could be calibrated for it.
    """
    # Inputs are kept alive until the end: a freed tensor's address may be given to another one.
    inputs: list[tuple[str, Tensor]] = []
    with input_hooks(modules, lambda name, x: inputs.append((name, x))):
        run()
    groups: dict[tuple[Any, ...], list[str]] = {}
    placed: set[str] = set()
    for name, x in inputs:
        if name not in placed:
            placed.add(name)
            key = (x.data_ptr(), tuple(x.shape), x.stride(), x._version)
            groups.setdefault(key, []).append(name)
    missing = [name for name in modules if name not in placed]
    if missing:
        raise UnsupportedModelError(
            f"every Linear to be quantized must run when calibration data does; {', '.join(missing[:4])} did not: "
            "add them to `exclude`"
        )
    return [InputGroup(tuple(members)) for members in groups.values()]


@torch.no_grad()
def collect(
    modules: Mapping[str, nn.Module], groups: Sequence[InputGroup], runs: Iterable[Run], where: str = ""
) -> list[InputStats]:
    """Accumulate the statistics of each group over all runs; a run stops once the last group has been fed.

    ``H <- H n/n' + X^T X / n'`` keeps magnitudes bounded; float32 whatever the activations' dtype.

    Raises:
        NumericsError: an activation is NaN or infinite.
        UnsupportedModelError: a group was never fed.
    """
    heads = {group.members[0]: i for i, group in enumerate(groups)}
    sums: list[_Sum | None] = [None] * len(groups)
    left = 0

    def seen(name: str, x: Tensor) -> None:
        nonlocal left
        index = heads[name]
        rows = x.reshape(-1, x.shape[-1])
        current = sums[index]
        if current is None:
            sums[index] = current = _Sum(rows.shape[-1], rows.device)
        current.add(rows, f"{where}{name}")
        left -= 1
        if left == 0:
            raise StopForward

    with input_hooks({name: modules[name] for name in heads}, seen):
        for run in runs:
            left = len(groups)
            try:
                run()
            except StopForward:
                continue
    result = []
    for group, total in zip(groups, sums, strict=True):
        if total is None:
            raise UnsupportedModelError(
                f"calibration must reach every Linear; nothing reached {where}{group.members[0]}: give more samples or "
                "exclude it"
            )
        result.append(total.stats())
    return result


class _Sum:
    """Running second moment of one input."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.hessian = torch.zeros(features, features, device=device)
        self.magnitude = torch.zeros(features, device=device)
        self.tokens = 0

    def add(self, rows: Tensor, name: str) -> None:
        if not bool(torch.isfinite(rows).all()):
            raise NumericsError(
                f"activations must be finite; the input of {name} holds NaN or infinity: check the checkpoint, or run "
                "in bfloat16 or float32 where float16 overflows"
            )
        for chunk in rows.split(CHUNK_ROWS):
            x = chunk.float()
            total = self.tokens + len(x)
            self.hessian.mul_(self.tokens / total).addmm_(x.t(), x, alpha=1 / total)
            self.magnitude.mul_(self.tokens / total).add_(x.abs().sum(0), alpha=1 / total)
            self.tokens = total

    def stats(self) -> InputStats:
        return InputStats(self.hessian, self.magnitude, self.tokens)
