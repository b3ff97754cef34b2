"""Running any module on a caller's batches: as it computes by itself, beside a float copy, and to compare outputs."""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from ptq.calibration.given import copied
from ptq.errors import ConfigError
from ptq.task import FloatTwin

_EAGER = RLock()


@contextmanager
def eagerly() -> Iterator[None]:
    """As the module itself computes: without autocast, and uncompiled, as passes stop and wait at its Linears.

    torch has one stance for all threads: one at a time is here, or the last to leave might put back another's.
    """
    with (
        _EAGER, torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False),
        torch.compiler.set_stance("force_eager"),
    ):  # fmt: skip
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, then every submodule as it was."""
    training = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, flag in training:
            child.training = flag


def float_twin(module: nn.Module, batches: Iterable[Any]) -> FloatTwin:
    """The module as it is now, to say what its layers would read without quantization."""
    twin = copy.deepcopy(module)
    return FloatTwin(twin, [runner(twin, batch, index) for index, batch in enumerate(batches)])


def runner(module: nn.Module, batch: Any, index: int = 0) -> Callable[[], Any]:
    """A call of the module on one batch, which is copied each time; ``index`` is for errors.

    Raises, when called:
        ConfigError: the batch does not fit the module's forward.
    """

    def run() -> Any:
        given = copied(batch)  # a module may change its arguments in place, or fill a cache among them
        named = given if isinstance(given, Mapping) else {}
        placed = () if named is given else given if isinstance(given, tuple | list) else (given,)
        try:
            return module(*placed, **named)
        except TypeError as error:
            try:
                inspect.signature(module.forward).bind(*placed, **named)
            except TypeError as misfit:
                raise ConfigError(
                    f"a batch must be the arguments of the module, found one that does not fit its forward: {misfit}; "
                    "leave labels out, and name arguments in a dict"
                ) from error
            raise
        except RuntimeError as error:
            shown = (
                f"a tensor of {batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            )
            error.add_note(f"{type(module).__name__} was run on calibration batch {index}, {shown}")
            raise

    return run


class Probe:
    """Runs a float32 stand-in for the module on the first batch that is not empty: all its outputs, as one vector.

    Each output is divided by the largest magnitude it has for the module itself, so that a small one counts as well.
    """

    def __init__(self, module: nn.Module, batches: Sequence[Any]) -> None:
        """Raises ConfigError where no output of a batch holds floating-point numbers."""
        for batch in batches:
            self._batch = _map_floats(batch, Tensor.float)
            outputs = self._outputs(copy.deepcopy(module).float())
            if outputs:
                break
        else:
            raise ConfigError(
                "method awq proves by the module's output that folding scales leaves it unchanged; the output of "
                f"{type(module).__name__} holds no floating-point tensor: return one, or use method='gptq'"
            )
        self._largest = [float(y.abs().max().clamp(min=1e-30)) for y in outputs]

    def _outputs(self, module: nn.Module) -> list[Tensor]:
        outputs: list[Tensor] = []
        _map_floats(runner(module, self._batch)(), outputs.append)
        return [y for y in outputs if y.numel()]

    def __call__(self, module: nn.Module) -> Tensor:
        """float64 ``[n]``."""
        pairs = zip(self._outputs(module), self._largest, strict=True)
        return torch.cat([y.double().reshape(-1) / largest for y, largest in pairs])


def _map_floats(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Nested tuples, lists and mappings with ``function`` applied to every floating-point tensor."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _map_floats(each, function) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_map_floats(each, function) for each in value]
    return value
