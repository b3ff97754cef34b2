"""A model that runs block by block: one block in memory at a time, whatever its depth.

The model's own forward pass is used, with the blocks' forwards replaced: on the way in they record what they are
called with, on the way out the last one hands over the final hidden states. So masks, rotary tables, embeddings'
scaling, final norms and logit caps are the model's own, for every architecture, without a line about any of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptq.models.block_call import BlockCall, hidden_of, share_equal, split_hidden, to_float
from ptq.models.order import check_order
from ptq.models.passes import ModelPasses, Stop

# About as many tokens, of few sequences, prove that a block's function is unchanged: what is wrong shows at any token.
PROBE_TOKENS = 256


class StreamedModel(ModelPasses):
    """Entry, blocks and exit of a causal language model, each loaded only while it runs.

    ``calls`` has what each block is called with besides hidden states, by block and batch of the last `enter`;
    ``probe`` what it is called with for a few tokens, and the shape of its hidden states then.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[list[BlockCall]] = []
        self.probe: tuple[list[BlockCall], torch.Size] | None = None

    @torch.no_grad()
    def enter(
        self, batches: Sequence[Tensor], keep: Callable[[Tensor], Tensor] | None = None, *, probed: bool = False
    ) -> list[Tensor]:
        """Embed token batches ``int64 [B, T]``: the hidden states block 0 receives, on the CPU, and every block's call.

        ``keep``, where given, takes each batch's hidden states and returns what stands for them in the result;
        ``probed``: `run_probe` will be used.

        Raises:
            UnsupportedModelError: the model does not call its blocks one after another, each once.
        """
        self.calls = [[] for _ in self.blocks]
        hidden: list[Tensor] = []
        with self.outer():
            check_order(self, batches[0])
            for batch in batches:
                seen, start = self._calls_for(batch)
                for calls, call in zip(self.calls, share_equal(seen, self.calls), strict=True):
                    calls.append(call)
                first = start.cpu()
                hidden.append(first if keep is None else keep(first))
            if probed:
                few = batches[0][:, :PROBE_TOKENS]
                seen, start = self._calls_for(few[: -(-PROBE_TOKENS // few.shape[1])])
                self.probe = seen, start.shape
        return hidden

    @torch.no_grad()
    def run_block(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """The output of a loaded block for one batch of hidden states, on the device it runs on."""
        return self.run_as_block(index, self.blocks[index], batch, hidden)

    @torch.no_grad()
    def run_as_block(self, index: int, module: nn.Module, batch: int, hidden: Tensor) -> Tensor:
        """The output of another module in a block's place."""
        call = self.calls[index][batch]
        return hidden_of(module(hidden.to(self.device), *call.args, **call.kwargs))

    @torch.no_grad()
    def run_probe(self, index: int, module: nn.Module, hidden: Tensor) -> Tensor:
        """The output of a float32 stand-in for a block for the first tokens of batch 0, given its hidden states."""
        assert self.probe is not None, "enter was not told that a probe will run"
        calls, shape = self.probe
        call, few = calls[index], hidden[tuple(map(slice, shape))]
        return hidden_of(module(few.to(self.device).float(), *to_float(call.args), **to_float(call.kwargs)))

    @torch.no_grad()
    def logits(self, batch: Tensor, hidden: Tensor) -> Tensor:
        """Final norm and head over the last block's output; needs `outer`. Float ``[B, T, vocabulary]``."""

        def hand_over(index: int, *args: Any, **kwargs: Any) -> Any:
            return self.wrap(hidden.to(self.device))

        output = self.forward(batch, hand_over)
        logits: Tensor = output.logits
        return logits

    def _calls_for(self, batch: Tensor) -> tuple[list[BlockCall], Tensor]:
        """What every block is called with, and the hidden states that the first one receives."""
        seen: list[BlockCall] = []
        start: list[Tensor] = []
        self.forward(batch, self._recorder(seen, start))
        return seen, start[0]

    def _recorder(self, seen: list[BlockCall], start: list[Tensor]) -> Callable[..., Any]:
        def record(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = split_hidden(args, kwargs)
            start.append(hidden)
            seen.append(BlockCall(args, kwargs))
            if index == len(self.blocks) - 1:
                raise Stop
            return self.wrap(hidden)

        return record
