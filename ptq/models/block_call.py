"""What a block of a model is called with and returns: its hidden states, and what comes beside them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptq.errors import UnsupportedModelError


class BlockCall(NamedTuple):
    """What one block is called with besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def hidden_of(output: Any) -> Tensor:
    """A block returns its hidden states alone or first in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Hidden states, and the rest of what a block is called with.

    Raises:
        UnsupportedModelError: they are neither the first argument nor ``hidden_states``.
    """
    if args and isinstance(args[0], Tensor):
        return args[0], args[1:], kwargs
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return kwargs["hidden_states"], args, {k: v for k, v in kwargs.items() if k != "hidden_states"}
    found = [type(a).__name__ for a in args] + list(kwargs)
    raise UnsupportedModelError(
        f"a block must receive its hidden states as the first argument or as hidden_states; it was called with {found}"
    )


def share_equal(seen: list[BlockCall], earlier: list[list[BlockCall]]) -> list[BlockCall]:
    """Calls whose tensors equal those of the previous batch keep one copy of them (rotary tables, masks)."""
    shared: dict[int, Any] = {}

    def same(new: Any, old: Any) -> Any:
        if isinstance(new, Tensor):
            if id(new) not in shared:
                equal = isinstance(old, Tensor) and new.shape == old.shape and torch.equal(new, old)
                shared[id(new)] = old if equal else new
            return shared[id(new)]
        if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
            return tuple(same(n, o) for n, o in zip(new, old, strict=True))
        return new

    result = []
    for call, calls in zip(seen, earlier, strict=True):
        before = calls[-1] if calls else call
        kwargs = {k: same(v, before.kwargs.get(k)) for k, v in call.kwargs.items()}
        paired = before.args if len(before.args) == len(call.args) else call.args
        result.append(BlockCall(tuple(same(n, o) for n, o in zip(call.args, paired, strict=True)), kwargs))
    return result


def equal(one: Tensor, other: Tensor) -> bool:
    """Value for value; NaN, of which others speak, equals NaN."""
    if one.shape != other.shape:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def differ(real: Any, recorded: Any) -> bool:
    """Whether tensors in nested arguments are others, or not there."""
    if isinstance(real, Tensor):
        return not (isinstance(recorded, Tensor) and equal(real, recorded))
    if isinstance(real, tuple | list):
        return len(real) != len(recorded or ()) or any(map(differ, real, recorded))
    if isinstance(real, dict):
        return any(differ(value, (recorded or {}).get(key)) for key, value in real.items())
    return False


def to_float(value: Any) -> Any:
    """Floating-point tensors of nested arguments in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(to_float(each) for each in value)
    if isinstance(value, dict):
        return {key: to_float(each) for key, each in value.items()}
    return value
