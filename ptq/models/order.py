"""Whether a model can be run block by block: passes of a few tokens show how it calls its blocks.

What is run block by block must call its blocks one after another, each once, with what the one before returned, and go
on from the last one. Some models go through their blocks several times, do something between two of them, hand on more
than hidden states, or come back to what an early block returned.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptq.errors import UnsupportedModelError
from ptq.models.block_call import BlockCall, differ, equal, hidden_of, split_hidden
from ptq.models.passes import ModelPasses, Stop

_ADVICE = "it cannot be run block by block; ptq.quantize_linears quantizes a model in memory"
PROBED = 8  # tokens


class _Received(NamedTuple):
    """What a block was called with."""

    hidden: Tensor
    call: BlockCall


class _Pass(NamedTuple):
    """A forward pass in which every block was passed over."""

    received: list[_Received]
    last: Tensor  # what the last block was made to return
    logits: Tensor | None  # None where the model failed after its blocks, or returns none


def check_order(passes: ModelPasses, batch: Tensor) -> None:
    """Learns what a block returns (``passes.width``) from tokens ``int64 [B, T]``; needs `ModelPasses.outer`.

    Raises:
        UnsupportedModelError: the model does not call its blocks one after another, each once, each with nothing but
            the hidden states of the one before, and its exit with those of the last.
    """
    few = batch[:1, :PROBED]
    with passes.block(0) as block:
        passes.width = None
        following = _follow(passes, few, 0, block)
    streamed = _pass_over(passes, few, 1)
    _check_exit(passes, few, streamed)
    for index in [0] if passes.width in (None, 1) else _followed(passes):
        if index:
            with passes.block(index) as block:
                following = _follow(passes, few, index, block)
        if following is not None:
            _check_following(passes, index + 1, following, streamed.received[index + 1].call)


def _followed(passes: ModelPasses) -> list[int]:
    """A block of each kind before each other kind: all that one can hand on and the next one use."""
    kinds = [_kind(block) for block in passes.blocks]
    seen: dict[Any, int] = {}
    for index, pair in enumerate(pairwise(kinds)):
        seen.setdefault(pair, index)
    return list(seen.values())


def _kind(block: nn.Module) -> Any:
    """Alike in blocks of the same modules, shapes and settings; numbers, which may be the block's own, apart."""
    return tuple(
        (name, type(module), *(tuple(p.shape) for p in module.parameters(recurse=False)), *_settings(module))
        for name, module in block.named_modules()
    )


def _settings(module: nn.Module) -> list[tuple[str, bool | str]]:
    return [(key, value) for key, value in vars(module).items() if isinstance(value, bool | str)]


def _follow(passes: ModelPasses, batch: Tensor, index: int, block: nn.Module) -> _Received | None:
    """What the block after a loaded one receives where that one runs and those before are passed over."""
    following: list[_Received] = []
    ran: list[int] = []

    def step(at: int, *args: Any, **kwargs: Any) -> Any:
        if not ran and at != index:
            return passes.wrap(split_hidden(args, kwargs)[0])
        if ran:
            hidden, args, kwargs = split_hidden(args, kwargs)
            following.append(_Received(hidden, BlockCall(args, kwargs)))
            raise Stop
        ran.append(at)
        try:
            output = type(block).forward(block, *args, **kwargs)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            if not index:
                raise
            raise _hands_on(passes, index) from error  # it needs what an earlier one hands on
        if index == 0:
            passes.width = len(output) if isinstance(output, tuple) else None
        if at == len(passes.blocks) - 1:
            raise Stop
        return output

    passes.forward(batch, step)
    return following[0] if following else None


def _check_following(passes: ModelPasses, index: int, real: _Received, streamed: BlockCall) -> None:
    """Raises UnsupportedModelError unless a block does the same with either call.

    ``real`` is that after a block that was run: besides hidden states it holds what that one handed on.
    """
    if not differ(tuple(real.call), tuple(streamed)):
        return
    with passes.block(index) as block:
        try:
            calls = real.call, streamed
            found = [hidden_of(block(real.hidden.clone(), *call.args, **call.kwargs)) for call in calls]
            same = equal(*found)
        except (TypeError, ValueError, RuntimeError, AttributeError):  # of one that needs what is not there
            same = False
    if not same:
        raise _hands_on(passes, index)


def _hands_on(passes: ModelPasses, index: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"a block of {passes.blocks_path} must receive nothing but hidden states from the one before; block {index} of "
        f"this model receives more: {_ADVICE}"
    )


def _pass_over(passes: ModelPasses, batch: Tensor, step: float, last: Tensor | None = None) -> _Pass:
    """A forward pass to its end in which each block adds ``step``, and the last one returns ``last`` where given.

    Raises:
        UnsupportedModelError: what a block returns is not what the next one receives, or not each is called once.
    """
    called: list[int] = []
    received: list[_Received] = []
    returned: list[Tensor] = []
    ended: list[Tensor] = []
    logits: Tensor | None = None

    def pass_over(index: int, *args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = split_hidden(args, kwargs)
        if returned and not equal(hidden, returned[-1]):
            raise UnsupportedModelError(
                f"what a block of {passes.blocks_path} returns must be what the next one receives; block {index} "
                f"receives something else: {_ADVICE}"
            )
        called.append(index)
        received.append(_Received(hidden, BlockCall(args, kwargs)))
        returned[:] = [hidden + step]  # apart from every other's, as it would be
        if index == len(passes.blocks) - 1:
            returned[:] = [returned[0] if last is None else last.clone()]
            ended[:] = [returned[0].clone()]  # what comes after the blocks may change it in place
        return passes.wrap(returned[0])

    try:
        found = getattr(passes.forward(batch, pass_over), "logits", None)
        logits = found if isinstance(found, Tensor) else None
    except UnsupportedModelError:
        raise
    except Exception:
        # Beyond the blocks it comes again where logits are needed, and matters nowhere else (Llama 4, no images).
        if len(called) < len(passes.blocks):
            raise
    if called != list(range(len(passes.blocks))):
        raise UnsupportedModelError(
            f"the blocks {passes.blocks_path} must be called one after another, each once; a forward pass calls "
            f"{len(set(called))} of {len(passes.blocks)}, {len(called)} times in all: {_ADVICE}"
        )
    return _Pass(received, ended[0], logits)


def _check_exit(passes: ModelPasses, batch: Tensor, streamed: _Pass) -> None:
    """Raises UnsupportedModelError where logits change with what other blocks than the last one return."""
    if streamed.logits is None or len(passes.blocks) == 1:
        return
    again, other = (_pass_over(passes, batch, step, streamed.last).logits for step in (1, 2))
    if again is not None and _alike(again, streamed.logits) and (other is None or not _alike(other, again)):
        raise UnsupportedModelError(
            f"what a model does after its blocks {passes.blocks_path} must depend on what the last one returns; this "
            f"model's logits change with what an earlier one does: {_ADVICE}"
        )


def _alike(one: Tensor, other: Tensor) -> bool:
    """But for noise; models with random numbers in their exit have more, and are not alike to themselves."""
    noise = 1e-3 * float(one.float().nan_to_num(0, 0, 0).abs().max())
    return one.shape == other.shape and torch.allclose(
        one.float(), other.float(), rtol=1e-2, atol=noise, equal_nan=True
    )
