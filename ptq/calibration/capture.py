"""Statistics of what reaches each Linear while calibration data runs through a module."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptq.errors import NumericsError, UnsupportedModelError
from ptq.grid import check_finite

# Rows of x multiplied at a time: bounds the float32 copy of the activations.
CHUNK_ROWS = 8192

Run = Callable[[], Any]


class InputGroup(NamedTuple):
    """Linears that read the very same tensors, in order of execution."""

    members: tuple[str, ...]
    calls: int = 1  # how often each of them runs in a forward pass


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
    alive: list[Tensor] = []
    read: dict[str, list[tuple[Any, ...]]] = {}

    def seen(name: str, x: Tensor) -> None:
        # The version tells the contents before an in-place change from those after it; inference tensors have none.
        version = -len(alive) if x.is_inference() else x._version
        read.setdefault(name, []).append((x.data_ptr(), tuple(x.shape), x.stride(), version))
        alive.append(x)

    with input_hooks(modules, seen):
        run()
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, keys in read.items():
        groups.setdefault(tuple(keys), []).append(name)
    missing = [name for name in modules if name not in read]
    if missing:
        raise UnsupportedModelError(
            f"every Linear to be quantized must run when calibration data does; {', '.join(missing[:4])} did not: "
            "add them to `exclude`"
        )
    return [InputGroup(tuple(members), len(keys)) for keys, members in groups.items()]


@torch.no_grad()
def collect(
    modules: Mapping[str, nn.Module], groups: Sequence[InputGroup], runs: Iterable[Run], where: str = ""
) -> list[InputStats]:
    """Accumulate the statistics of each group over all runs; a run stops once all groups have been fed.

    ``H <- H n/n' + X^T X / n'`` keeps magnitudes bounded; float32 whatever the activations' dtype.

    Raises:
        NumericsError: an activation is NaN or infinite, or so large that its square is.
        UnsupportedModelError: a group was never fed.
    """
    heads = {group.members[0]: i for i, group in enumerate(groups)}
    sums: list[_Sum | None] = [None] * len(groups)
    left: dict[str, int] = {}

    def seen(name: str, x: Tensor) -> None:
        index = heads[name]
        rows = x.reshape(-1, x.shape[-1])
        current = sums[index]
        if current is None:
            sums[index] = current = _Sum(rows.shape[-1], rows.device)
        current.add(rows, f"{where}{name}")
        left[name] -= 1
        if max(left.values()) <= 0:
            raise StopForward

    with input_hooks({name: modules[name] for name in heads}, seen):
        for run in runs:
            left.update({group.members[0]: group.calls for group in groups})
            try:
                run()
            except StopForward:
                continue
    return [_finished(total, f"{where}{group.members[0]}") for group, total in zip(groups, sums, strict=True)]


@torch.no_grad()
def collect_drift(
    module: nn.Module, float_module: nn.Module, calls: int, runs: Iterable[tuple[Run, Run]], name: str
) -> tuple[InputStats, Tensor | None]:
    """Statistics of one input X, and ``(X_float - X)^T X / T``: how far it is from what the float model has there.

    Args:
        module: the Linear that reads X.
        float_module: the same Linear in the float model.
        calls: how often a run calls it.
        runs: pairs of runs on the same batch, of the quantized and of the float model.
        name: for messages.

    Returns:
        The statistics and the drift, float32 ``[K, K]``; None for the drift where the two models did not feed the same
        number of rows (a router that decided differently).

    Raises:
        NumericsError: an activation is NaN or infinite, or so large that its square is.
        UnsupportedModelError: the Linear was never fed.
    """
    total: _Sum | None = None
    drift: Tensor | None = None
    paired = True
    for run, float_run in runs:
        rows, float_rows = _rows(module, calls, run), _rows(float_module, calls, float_run)
        if total is None:
            total = _Sum(rows.shape[-1], rows.device)
            drift = torch.zeros_like(total.hessian)
        assert drift is not None
        paired = paired and rows.shape == float_rows.shape
        before = total.tokens
        total.add(rows, name)
        if paired and total.tokens:
            drift.mul_(before / total.tokens)
            for x, x_float in zip(torch.split(rows, CHUNK_ROWS), torch.split(float_rows, CHUNK_ROWS), strict=True):
                drift.addmm_((x_float.float() - x.float()).t(), x.float(), alpha=1 / total.tokens)
    stats = _finished(total, name)
    return stats, drift if paired else None


def _rows(module: nn.Module, calls: int, run: Run) -> Tensor:
    """Everything a module reads in its first ``calls`` calls of a run, ``[T, K]``."""
    inputs: list[Tensor] = []

    def seen(_name: str, x: Tensor) -> None:
        inputs.append(x.reshape(-1, x.shape[-1]))
        if len(inputs) == calls:
            raise StopForward

    with input_hooks({"": module}, seen), suppress(StopForward):
        run()
    return torch.cat(inputs) if len(inputs) > 1 else inputs[0]


def _finished(total: "_Sum | None", name: str) -> InputStats:
    if total is None or total.tokens == 0:
        raise UnsupportedModelError(
            f"calibration must reach every Linear; nothing reached {name}: give more samples or exclude it"
        )
    check_finite(total.hessian, f"the second moment of the input of {name}")
    return InputStats(total.hessian, total.magnitude, total.tokens)


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
        for chunk in rows.split(CHUNK_ROWS) if len(rows) else ():
            x = chunk.float()
            total = self.tokens + len(x)
            self.hessian.mul_(self.tokens / total).addmm_(x.t(), x, alpha=1 / total)
            self.magnitude.mul_(self.tokens / total).add_(x.abs().sum(0), alpha=1 / total)
            self.tokens = total
