"""Running a copy of a block in float32 on what the block itself is called with."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ptq.calibration.held import Run, StopForward, run_watched


class Call(NamedTuple):
    """Everything a module is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call_of(module: nn.Module, run: Run) -> Call:
    """What ``run`` calls the module with, floating-point tensors in float32; the module itself does not run."""
    seen: list[Call] = []

    def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(Call(args, kwargs))
        raise StopForward

    run_watched(run, module, note)
    return Call(_mapped(seen[0].args, _float32), _mapped(seen[0].kwargs, _float32))


def floating(output: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists and mappings, in float32."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.numel():
            found.append(tensor.float())
        return tensor

    _mapped(output, note)
    return found


def _float32(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    # autograd refuses to keep inference tensors
    return tensor.float().clone() if tensor.is_inference() else tensor.float()


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(each, function) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(each, function) for each in value)
    return value
