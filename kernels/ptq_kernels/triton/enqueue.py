"""A compiled kernel onto a stream, past the Python that Triton runs for every launch.

``compiled[grid](...)`` makes a closure, a dictionary for hooks and two calls of chains of hooks that are empty as a
rule, which takes several times what the launcher behind it does. So does asking the driver, for every tensor, for the
address that the tensor has given.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any

import triton
from torch import Tensor
from triton.compiler import CompiledKernel


@cache
def straight() -> bool:
    """Whether this Triton hands a launcher what `Compiled` does: it is asked to launch a stand-in for a kernel."""
    handed: list[tuple[Any, ...]] = []
    stand_in = SimpleNamespace(
        function="function",
        packed_metadata="metadata",
        run=lambda *arguments: handed.append(arguments),
        launch_metadata=lambda *_: None,
        _init_handles=lambda: None,
    )
    try:
        runtime = triton.knobs.runtime
        hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
        CompiledKernel.__getitem__(stand_in, (1, 2, 3))("pointer", 4, stream=5)
    except (AttributeError, TypeError):  # the stand-in lacks what another version wants
        return False
    return handed == [(1, 2, 3, 5, "function", "metadata", None, *hooks, "pointer", 4)]


def hooked() -> bool:
    """Whether someone, a profiler as a rule, wants to know of every launch."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook  # chains of hooks, each None or one function
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Compiled:
    """A kernel that Triton has compiled and launched once, with the constants that are compiled in."""

    def __init__(self, kernel: Any, constants: tuple[Any, ...]) -> None:
        self.kernel, self.constants = kernel, constants
        self.straight = straight()
        if self.straight:
            self.run, self.function, self.metadata = kernel.run, kernel.function, kernel.packed_metadata

    def __call__(
        self,
        grid: tuple[int, int, int],
        stream: int,
        described: tuple[Any, ...],
        tensors: tuple[Tensor, ...],
        sizes: tuple[int, ...],
    ) -> None:
        """Launch with these descriptors, tensors and sizes, which are of the types that it was compiled for."""
        if self.straight and not hooked():
            handed = (self.function, self.metadata, None, None, None, *described, *map(Tensor.data_ptr, tensors))
            self.run(*grid, stream, *handed, *sizes, *self.constants)
        else:
            self.kernel[grid](*described, *tensors, *sizes, *self.constants, stream=stream)
