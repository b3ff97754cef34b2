"""Statistics of what reaches each Linear while calibration data runs through a module."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptq.calibration.held import Run, StopForward, first_input, rows_of
from ptq.distributed import ALONE, Ranks
from ptq.errors import NumericsError, UnsupportedModelError
from ptq.grid import check_finite
from ptq.half_products import float32_products
from ptq.routing import visiting
from ptq.squares import add_product

# Rows of x multiplied at a time: bounds the float32 copy of the activations.
CHUNK_ROWS = 8192
# An expert with fewer than 1/STARVED tokens an input channel is short of them; all tokens then weigh 1/PRIOR a channel.
STARVED = 8
PRIOR = 4
# Mean square of the strongest channel below which float32 no longer holds what products with it come to.
FAINTEST = 1e-30


class InputGroup(NamedTuple):
    """Linears that read the very same tensors, in order of execution."""

    members: tuple[str, ...]
    calls: int = 1  # how often each of them runs in a forward pass
    pool: int | None = None  # which experts module they belong to, counted from 0; it may leave them out of a pass


class InputStats(NamedTuple):
    """Second moment and mean magnitude of the inputs of one group."""

    hessian: Tensor  # float32 [K, K], X^T X / T
    magnitude: Tensor  # float32 [K], mean |x|; empty where nothing asks for it
    tokens: int
    routed: int | None = None  # of experts: how many of the tokens a router sent there
    faint: bool = False  # too small to be squared: the second moment is the identity instead


@contextmanager
def input_hooks(modules: Mapping[str, nn.Module], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``seen(name, x)`` whenever one of the modules is about to run on ``x``."""

    def hook(name: str) -> Callable[..., None]:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen(name, first_input(args, kwargs))

        return before

    handles = [m.register_forward_pre_hook(hook(name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def trace_groups(modules: Mapping[str, nn.Module], runs: Sequence[Run]) -> list[InputGroup]:
    """Which Linears share an input in each of the runs, in order of execution; every expert runs, on one token.

    Raises:
        UnsupportedModelError: a Linear was not called, so nothing could be calibrated for it.
    """
    # Inputs are kept alive until the end of a run: a freed tensor's address may be given to another one.
    alive: list[Tensor] = []
    passes: list[dict[str, list[tuple[Any, ...]]]] = []
    pools: dict[str, int] = {}
    order: dict[int, int] = {}

    def seen(name: str, x: Tensor) -> None:
        # The version tells the contents before an in-place change from those after it; inference tensors have none.
        version = -len(alive) if x.is_inference() else x._version
        passes[-1].setdefault(name, []).append((x.data_ptr(), tuple(x.shape), x.stride(), version))
        alive.append(x)
        if mode.running is not None:
            pools[name] = order.setdefault(mode.running, len(order))

    with visiting(rows=1) as mode, input_hooks(modules, seen):
        for run in runs:
            passes.append({})
            run()
            alive.clear()
    groups: dict[tuple[tuple[Any, ...], ...], list[str]] = {}
    for name in dict.fromkeys(name for each in passes for name in each):
        groups.setdefault(tuple(tuple(each.get(name, ())) for each in passes), []).append(name)
    missing = [name for name in modules if not any(name in each for each in passes)]
    if missing:
        raise UnsupportedModelError(
            f"every Linear to be quantized must run when calibration data does; {', '.join(missing[:4])} did not: "
            "add them to `exclude`"
        )
    return [
        InputGroup(tuple(members), max(map(len, calls)), pools.get(members[0])) for calls, members in groups.items()
    ]


@torch.no_grad()
def collect(
    modules: Mapping[str, nn.Module],
    groups: Sequence[InputGroup],
    runs: Iterable[Run],
    where: str = "",
    ranks: Ranks = ALONE,
    home: torch.device | None = None,
) -> list[InputStats]:
    """Accumulate the statistics of each group over all runs; a run stops once all groups have been fed.

    ``H <- H n/n' + X^T X / n'`` keeps magnitudes bounded; float32 whatever the activations' dtype. An expert that fewer
    than K/8 tokens were sent to is fed all tokens in another pass; that counts as K/4 tokens beside its own. Of several
    processes each gets the statistics of all. Second moments lie on ``home``, by default where the activations are.

    Raises:
        NumericsError: an activation is NaN or infinite, or so large that its square is.
        UnsupportedModelError: a group was never fed.
    """
    runs = list(runs)
    sums = _joined(_sums(modules, groups, runs, where, home), modules, groups, ranks, home)
    starved = [i for i, group in enumerate(groups) if group.pool is not None and _is_starved(sums[i])]
    stats = []
    with visiting():
        few = [groups[i] for i in starved]
        everything = _joined(_sums(modules, few, runs, where, home), modules, few, ranks, home)
        whole = dict(zip(starved, everything, strict=True))
    for i, (group, total) in enumerate(zip(groups, sums, strict=True)):
        name = f"{where}{group.members[0]}"
        if i in whole:
            stats.append(_blended(total, _finished(whole[i], name)))
        else:
            found = _finished(total, name)
            stats.append(found if group.pool is None else found._replace(routed=found.tokens))
    return stats


def _sums(
    modules: Mapping[str, nn.Module],
    groups: Sequence[InputGroup],
    runs: Sequence[Run],
    where: str,
    home: torch.device | None,
) -> "list[_Sum | None]":
    heads = {group.members[0]: i for i, group in enumerate(groups)}
    sums: list[_Sum | None] = [None] * len(groups)
    left: dict[str, int] = {}

    def seen(name: str, x: Tensor) -> None:
        index = heads[name]
        rows = x.reshape(-1, x.shape[-1])
        current = sums[index]
        if current is None:
            sums[index] = current = _Sum(rows.shape[-1], home or rows.device)
        current.add(rows, f"{where}{name}")
        left[name] -= 1
        if max(left.values()) <= 0:
            raise StopForward

    with input_hooks({name: modules[name] for name in heads}, seen):
        for run in runs if heads else ():
            left.update({group.members[0]: group.calls for group in groups})
            try:
                run()
            except StopForward:
                continue
    return sums


def _joined(
    sums: "list[_Sum | None]",
    modules: Mapping[str, nn.Module],
    groups: Sequence[InputGroup],
    ranks: Ranks,
    home: torch.device | None,
) -> "list[_Sum | None]":
    """The sums over what all processes have seen."""
    if ranks.size == 1:
        return sums
    found = ranks.gather([(0, 0) if own is None else (own.tokens, len(own.hessian)) for own in sums])
    for i, group in enumerate(groups):
        tokens, features = sum(each[i][0] for each in found), max(each[i][1] for each in found)
        own = sums[i]
        if own is None and features:  # no token reached this process's copy of an expert
            sums[i] = own = _Sum(features, home or next(modules[group.members[0]].parameters()).device)
        if own is not None:
            own.join(ranks, tokens)
    return sums


def _is_starved(total: "_Sum | None") -> bool:
    return total is None or total.tokens < len(total.hessian) / STARVED


def _blended(own: "_Sum | None", whole: InputStats) -> InputStats:
    """``(n H + n0 H_all) / (n + n0)`` with ``n0 = K / 4``: the fewer tokens an expert saw, the more it is like all."""
    n = own.tokens if own is not None else 0
    share = n / (n + len(whole.hessian) / PRIOR)
    if own is None:
        return whole._replace(routed=0)
    hessian, magnitude = own.hessian.lerp(whole.hessian, 1 - share), own.magnitude.lerp(whole.magnitude, 1 - share)
    return InputStats(hessian, magnitude, whole.tokens, n, whole.faint)


@torch.no_grad()
def collect_drift(
    module: nn.Module,
    float_module: nn.Module,
    calls: int,
    runs: Iterable[tuple[Run, Run]],
    name: str,
    ranks: Ranks = ALONE,
    home: torch.device | None = None,
) -> tuple[InputStats, Tensor | None]:
    """Statistics of one input X, and ``(X_float - X)^T X / T``: how far it is from what the float model has there.

    Args:
        module: the Linear that reads X.
        float_module: the same Linear in the float model.
        calls: how often a run calls it.
        runs: pairs of runs on the same batch, of the quantized and of the float model.
        name: for messages.
        ranks: processes that share the run; each has runs of its own and gets the statistics of all.
        home: where second moment and drift lie; by default where the activations are.

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
        rows, float_rows = rows_of(module, calls, run), rows_of(float_module, calls, float_run)
        if rows is None or float_rows is None:
            paired = paired and rows is float_rows
            continue
        if total is None:
            total = _Sum(rows.shape[-1], home or rows.device, with_magnitude=False)
            drift = torch.zeros_like(total.hessian)
        assert drift is not None
        paired = paired and rows.shape == float_rows.shape
        before = total.tokens
        total.add(rows, name)
        if paired and total.tokens:
            drift.mul_(before / total.tokens)
            with exact_products(rows):
                for x, x_float in zip(rows.split(CHUNK_ROWS), float_rows.split(CHUNK_ROWS), strict=True):
                    add_product(drift, (x_float - x).float(), x.float(), 1 / total.tokens)
    if total is not None and drift is not None and ranks.size > 1:
        found = ranks.gather((total.tokens, paired))
        tokens, paired = sum(n for n, _ in found), all(each for _, each in found)
        ranks.add_up(drift.mul_(total.tokens / max(tokens, 1)))
        total.join(ranks, tokens)
    stats = _finished(total, name)
    return stats, drift if paired else None


def _finished(total: "_Sum | None", name: str) -> InputStats:
    if total is None or total.tokens == 0:
        raise UnsupportedModelError(
            f"calibration must reach every Linear; nothing reached {name}: give more samples or exclude it"
        )
    check_finite(total.hessian, f"the second moment of the input of {name}")
    faint = bool(total.fed) and float(total.hessian.diagonal().max()) < FAINTEST
    if faint:  # every input counts the same: at least the weight itself is kept
        total.hessian.zero_().fill_diagonal_(1.0)
        total.magnitude.fill_(1.0)
    return InputStats(total.hessian, total.magnitude, total.tokens, faint=faint)


def exact_products(x: Tensor) -> AbstractContextManager[None]:
    """Let float32 products of x's values use the matrix units for shorter types, where these hold every value of x.

    bfloat16 values are exact in bfloat16 units, float16 and bfloat16 values in TF32 units; both add up in float32, so
    only the order of the sums differs. Other values may not, whatever `torch.set_float32_matmul_precision` permits.
    """
    return float32_products(
        on_cuda="tf32" if x.dtype in (torch.bfloat16, torch.float16) else "ieee",
        on_cpu="bf16" if x.dtype == torch.bfloat16 else "ieee",
    )


class _Sum:
    """Running second moment of one input."""

    def __init__(self, features: int, device: torch.device, *, with_magnitude: bool = True) -> None:
        self.hessian = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.magnitude = torch.zeros(features if with_magnitude else 0, dtype=torch.float32, device=device)
        self.tokens = 0
        self.fed: bool | Tensor = False  # whether anything but 0 was

    def add(self, rows: Tensor, name: str) -> None:
        for chunk in rows.split(CHUNK_ROWS) if len(rows) else ():
            x = chunk.float()
            # A sum is the cheapest look at every number; where it is finite so are they.
            found = float(x.sum())
            if not math.isfinite(found) and not bool(torch.isfinite(x).all()):
                raise NumericsError(
                    f"activations must be finite; the input of {name} holds NaN or infinity: check the checkpoint, or "
                    "run in bfloat16 or float32 where float16 overflows"
                )
            self.fed = self.fed or found != 0 or bool(x.any())
            total = self.tokens + len(x)
            with exact_products(chunk):
                add_product(self.hessian, x, x, 1 / total, self.tokens / total)
            if len(self.magnitude):
                magnitude = x.abs().sum(0).to(self.magnitude.device)
                self.magnitude.mul_(self.tokens / total).add_(magnitude, alpha=1 / total)
            self.tokens = total

    def join(self, ranks: Ranks, tokens: int) -> None:
        """Add those of the other processes, with which these are ``tokens``."""
        for mean in (self.hessian, self.magnitude):
            ranks.add_up(mean.mul_(self.tokens / max(tokens, 1)))
        fed = torch.full((1,), float(self.fed), device=self.hessian.device)
        ranks.add_up(fed)
        self.fed = fed
        self.tokens = tokens
