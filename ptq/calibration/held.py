"""Forward passes that wait where a Linear is about to run, and go on from there once it is quantized.

GPTQ calibrates each input of a block on what the quantized Linears before it put out. Running the block anew up to
every input costs about three passes where one that waits costs one. What a waiting pass has computed stays in memory,
so only as many batches wait as fit into what the caller allows; the others start over each time, to the same results.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ptq.errors import UnsupportedModelError

Run = Callable[[], Any]


class StopForward(Exception):  # noqa: N818  (control flow, not an error)
    """Raised by a hook once everything wanted has been seen."""


class HeldRun:
    """A run that can wait. Called, it runs to its end, from where it waits or from the start.

    Valid while nothing that has already run is changed: whoever does so calls `let_go`.
    """

    def __init__(self, run: Run) -> None:
        """``run`` runs a module on one calibration batch."""
        self._run = run
        self._waiting: Any = None  # the greenlet of a pass that has begun

    def __call__(self) -> Any:
        """The output of the pass."""
        if self._waiting is None:
            return self._run()
        waiting, self._waiting = self._waiting, None
        with torch.no_grad():
            return waiting.switch()

    def reach(self, module: nn.Module) -> Tensor | None:
        """Go on until ``module`` is about to run: what it reads, or None where the pass ends before."""
        from greenlet import getcurrent, greenlet

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            getcurrent().parent.switch(first_input(args, kwargs))

        waiting, self._waiting = self._waiting or greenlet(self._run), None
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
        try:
            # Gradient mode belongs to the thread, not to the pass: it must be the same whenever one goes on.
            with torch.no_grad():
                x: Tensor = waiting.switch()
        finally:
            handle.remove()
        if waiting.dead:
            return None
        self._waiting = waiting
        return x

    def let_go(self) -> None:
        """Forget what the pass has computed."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            # Ending it leaves its `no_grad` blocks, which would switch gradients off for whoever goes on here.
            with torch.set_grad_enabled(torch.is_grad_enabled()):
                waiting.throw()

    def __del__(self) -> None:
        """A pass that nobody asks for any more ends the same way."""
        self.let_go()


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a Linear is called with.

    Raises:
        UnsupportedModelError: no tensor, a sparse one, or one of a transform of torch.func, which has no numbers yet.
    """
    x: Any = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(x, Tensor):
        found = f"a {type(x).__name__}"
    elif x.layout != torch.strided or x.is_nested:
        found = "a nested one" if x.is_nested else f"one of layout {x.layout}"
    elif torch._C._functorch.is_functorch_wrapped_tensor(x):
        found = "one inside torch.vmap or another transform"
    else:
        return x
    raise UnsupportedModelError(
        f"a Linear must be called with a plain dense tensor to be calibrated; one is called with {found}: make the "
        "calibration batches tensors, or exclude the layer"
    )


def run_watched(run: Run, module: nn.Module, before: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
    """Run with ``before`` called whenever ``module`` is; it ends the run by raising StopForward."""
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: before(args, kwargs), with_kwargs=True)
    try:
        with suppress(StopForward):
            run()
    finally:
        handle.remove()


def can_hold() -> bool:
    """Whether runs can wait: with the package greenlet."""
    from importlib.util import find_spec

    return find_spec("greenlet") is not None


def let_go(runs: Iterable[Run]) -> None:
    """No run waits any longer."""
    for run in runs:
        if isinstance(run, HeldRun):
            run.let_go()


def rows_of(module: nn.Module, calls: int, run: Run) -> Tensor | None:
    """Everything a module reads in its first ``calls`` calls of a run, ``[T, K]``; None where it does not run."""
    if isinstance(run, HeldRun) and calls == 1:
        x = run.reach(module)
        return None if x is None else x.reshape(-1, x.shape[-1])
    inputs: list[Tensor] = []

    def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_input(args, kwargs)
        inputs.append(x.reshape(-1, x.shape[-1]))
        if len(inputs) == calls:
            raise StopForward

    run_watched(run, module, note)
    if not inputs:
        return None
    return torch.cat(inputs) if len(inputs) > 1 else inputs[0]


def held(runs: Sequence[Run], sizes: Sequence[int], room: int) -> list[Run]:
    """The runs, as many of the first ones able to wait as ``room`` bytes allow; ``sizes``: bytes that each holds."""
    found: list[Run] = []
    for run, size in zip(runs, sizes, strict=True):
        room -= size
        found.append(HeldRun(run) if room >= 0 and can_hold() else run)
    return found
