"""A model that runs block by block: one block in memory at a time, whatever its depth.

The model's own forward pass is used, with the blocks' forwards replaced: on the way in they record what they are
called with, on the way out the last one hands over the final hidden states. So masks, rotary tables, embeddings'
scaling, final norms and logit caps are the model's own, for every architecture, without a line about any of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptq.errors import UnsupportedModelError

_ADVICE = "it cannot be run block by block; ptq.quantize_linears quantizes a model in memory"
PROBED = 8  # tokens of the pass that shows how a model calls its blocks

Loader = Callable[[nn.Module, str], None]


class BlockCall(NamedTuple):
    """What one block is called with besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stop(Exception):  # noqa: N818  (control flow, not an error)
    pass


class StreamedModel:
    """Entry, blocks and exit of a causal language model, each loaded only while it runs.

    Args:
        model: skeleton with parameters on ``meta``.
        blocks: dotted path of its ModuleList of blocks.
        load: puts real weights into the module at a path; for path "" into all that is not in the blocks.
        unload: takes the weights out of a module and all below it.
        device: where everything runs.
    """

    def __init__(
        self, model: nn.Module, blocks: str, load: Loader, unload: Callable[[nn.Module], None], device: torch.device
    ) -> None:
        self.model, self.blocks_path, self.device = model, blocks, device
        self._load, self._unload = load, unload
        self.blocks: Sequence[nn.Module] = list(model.get_submodule(blocks).children())
        self._entered = 0  # how many stay in `outer`
        self._width: int | None = None  # of the tuple that a block returns; None: a tensor
        self.calls: list[list[BlockCall]] = []

    def block_path(self, index: int) -> str:
        """Dotted path of one block."""
        return f"{self.blocks_path}.{index}"

    @contextmanager
    def outer(self) -> Iterator[None]:
        """Everything but the blocks in memory, once also where this is entered within itself."""
        try:
            self._entered += 1
            if self._entered == 1:
                self._load(self.model, "")
            yield
        finally:
            self._entered -= 1
            if not self._entered:
                self._unload(self.model)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """One block in memory."""
        try:
            self._load(self.model, self.block_path(index))
            yield self.blocks[index]
        finally:
            self._unload(self.blocks[index])

    @torch.no_grad()
    def enter(self, batches: Sequence[Tensor], keep: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """Embed token batches ``int64 [B, T]``: the hidden states block 0 receives, on the CPU, and every block's call.

        ``keep``, where given, takes each batch's hidden states and returns what stands for them in the result.

        Raises:
            UnsupportedModelError: the model does not call its blocks one after another, each once.
        """
        self.calls = [[] for _ in self.blocks]
        hidden: list[Tensor] = []
        with self.outer():
            few = batches[0][:1, :PROBED]
            with self.block(0):
                second = self._learn_output(few)
            streamed = self._check_order(few)
            if second is not None and _differ(tuple(second[1]), tuple(streamed)):
                self._check_second(*second, streamed)
            for batch in batches:
                seen: list[BlockCall] = []
                start: list[Tensor] = []
                self._forward(batch, self._recorder(seen, start))
                for calls, call in zip(self.calls, _share_equal(seen, self.calls), strict=True):
                    calls.append(call)
                first = start[0].cpu()
                hidden.append(first if keep is None else keep(first))
        return hidden

    @torch.no_grad()
    def run_block(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """The output of a loaded block for one batch of hidden states, on the device it runs on."""
        return self.run_as_block(index, self.blocks[index], batch, hidden)

    @torch.no_grad()
    def run_as_block(self, index: int, module: nn.Module, batch: int, hidden: Tensor) -> Tensor:
        """The output of another module in a block's place."""
        call = self.calls[index][batch]
        return _hidden_of(module(hidden.to(self.device), *call.args, **call.kwargs))

    @torch.no_grad()
    def run_in_place(self, index: int, module: nn.Module, hidden: Tensor) -> Tensor:
        """Run a float32 stand-in for a block on the first sequences of batch 0."""
        call = self.calls[index][0]
        return _hidden_of(module(hidden.to(self.device).float(), *_to_float(call.args), **_to_float(call.kwargs)))

    @torch.no_grad()
    def logits(self, batch: Tensor, hidden: Tensor) -> Tensor:
        """Final norm and head over the last block's output; needs `outer`. Float ``[B, T, vocabulary]``."""

        def hand_over(index: int, *args: Any, **kwargs: Any) -> Any:
            return self._wrap(hidden.to(self.device))

        output = self._forward(batch, hand_over)
        logits: Tensor = output.logits
        return logits

    def _recorder(self, seen: list[BlockCall], start: list[Tensor]) -> Callable[..., Any]:
        def record(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = _split_hidden(args, kwargs)
            start.append(hidden)
            seen.append(BlockCall(args, kwargs))
            if index == len(self.blocks) - 1:
                raise _Stop
            return self._wrap(hidden)

        return record

    def _wrap(self, hidden: Tensor) -> Any:
        return hidden if self._width is None else (hidden, *[None] * (self._width - 1))

    def _learn_output(self, batch: Tensor) -> tuple[Tensor, BlockCall] | None:
        """Blocks return a tensor or a tuple, by architecture: run the first one and see, and what the next one gets."""
        following: list[tuple[Tensor, BlockCall]] = []
        started: list[int] = []

        def real(index: int, *args: Any, **kwargs: Any) -> Any:
            if started:
                hidden, args, kwargs = _split_hidden(args, kwargs)
                following.append((hidden, BlockCall(args, kwargs)))
                raise _Stop
            started.append(index)
            output = type(self.blocks[0]).forward(self.blocks[0], *args, **kwargs)
            self._width = len(output) if isinstance(output, tuple) else None
            if len(self.blocks) == 1:
                raise _Stop
            return output

        self._forward(batch, real)
        return following[0] if following else None

    def _check_second(self, hidden: Tensor, real: BlockCall, streamed: BlockCall) -> None:
        """Raises UnsupportedModelError unless the second block does the same with either call.

        ``real`` is that after a first block that was run: besides hidden states it holds what that one handed on.
        """
        with self.block(1) as block:
            try:
                found = [_hidden_of(block(hidden, *call.args, **call.kwargs)) for call in (real, streamed)]
                same = _equal(*found)
            except (TypeError, ValueError, RuntimeError, AttributeError):  # of one that needs what is not there
                same = False
        if not same:
            raise UnsupportedModelError(
                f"a block of {self.blocks_path} must receive nothing but hidden states from the one before; this "
                f"model's hand on more: {_ADVICE}"
            )

    def _check_order(self, batch: Tensor) -> BlockCall:
        """What the second block (the only one) is called with besides hidden states.

        Some models go through their blocks several times, or do something between two of them: what a block returns
        must be what the next one receives, and each must be called once.

        Raises:
            UnsupportedModelError: a forward pass to its end is something else.
        """
        called: list[int] = []
        calls: list[BlockCall] = []
        last: list[Tensor] = []

        def record(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = _split_hidden(args, kwargs)
            if last and not _equal(hidden, last[0]):
                raise UnsupportedModelError(
                    f"what a block of {self.blocks_path} returns must be what the next one receives; block {index} "
                    f"receives something else: {_ADVICE}"
                )
            called.append(index)
            calls.append(BlockCall(args, kwargs))
            last[:] = [hidden + 1]  # apart from every other block's, as it would be
            return self._wrap(last[0])

        try:
            self._forward(batch, record)
        except UnsupportedModelError:
            raise
        except Exception:
            # Beyond the blocks it comes again where logits are needed, and matters nowhere else (Llama 4, no images).
            if len(called) < len(self.blocks):
                raise
        if called != list(range(len(self.blocks))):
            raise UnsupportedModelError(
                f"the blocks {self.blocks_path} must be called one after another, each once; a forward pass calls "
                f"{len(set(called))} of {len(self.blocks)}, {len(called)} times in all: {_ADVICE}"
            )
        return calls[min(1, len(calls) - 1)]

    def _forward(self, batch: Tensor, replacement: Callable[..., Any]) -> Any:
        for index, block in enumerate(self.blocks):
            block.forward = _bind(replacement, index)
        try:
            return self.model(input_ids=batch.to(self.device), use_cache=False)
        except _Stop:
            return None
        finally:
            for block in self.blocks:
                del block.forward


def _hidden_of(output: Any) -> Tensor:
    """A block returns its hidden states alone or first in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _bind(function: Callable[..., Any], index: int) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(index, *args, **kwargs)


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args and isinstance(args[0], Tensor):
        return args[0], args[1:], kwargs
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return kwargs["hidden_states"], args, {k: v for k, v in kwargs.items() if k != "hidden_states"}
    found = [type(a).__name__ for a in args] + list(kwargs)
    raise UnsupportedModelError(
        f"a block must receive its hidden states as the first argument or as hidden_states; it was called with {found}"
    )


def _share_equal(seen: list[BlockCall], earlier: list[list[BlockCall]]) -> list[BlockCall]:
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


def _equal(one: Tensor, other: Tensor) -> bool:
    """Value for value; NaN, of which others speak, equals NaN."""
    if one.shape != other.shape:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _differ(real: Any, recorded: Any) -> bool:
    """Whether tensors in nested arguments are others, or not there."""
    if isinstance(real, Tensor):
        return not (isinstance(recorded, Tensor) and _equal(real, recorded))
    if isinstance(real, tuple | list):
        return len(real) != len(recorded or ()) or any(map(_differ, real, recorded))
    if isinstance(real, dict):
        return any(_differ(value, (recorded or {}).get(key)) for key, value in real.items())
    return False


def _to_float(value: Any) -> Any:
    """Floating-point tensors of nested arguments in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_to_float(each) for each in value)
    if isinstance(value, dict):
        return {key: _to_float(each) for key, each in value.items()}
    return value
