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


class StreamedModel(ModelPasses):
    """Entry, blocks and exit of a causal language model, each loaded only while it runs.

    ``calls`` has what each block is called with besides hidden states, by block and batch of the last `enter`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[list[BlockCall]] = []

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
            check_order(self, batches[0])
            for batch in batches:
                seen: list[BlockCall] = []
                start: list[Tensor] = []
                self.forward(batch, self._recorder(seen, start))
                for calls, call in zip(self.calls, share_equal(seen, self.calls), strict=True):
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
        return hidden_of(module(hidden.to(self.device), *call.args, **call.kwargs))

    @torch.no_grad()
    def run_in_place(self, index: int, module: nn.Module, hidden: Tensor) -> Tensor:
        """Run a float32 stand-in for a block on the first sequences of batch 0."""
        call = self.calls[index][0]
        return hidden_of(module(hidden.to(self.device).float(), *to_float(call.args), **to_float(call.kwargs)))

    @torch.no_grad()
    def logits(self, batch: Tensor, hidden: Tensor) -> Tensor:
        """Final norm and head over the last block's output; needs `outer`. Float ``[B, T, vocabulary]``."""

        def hand_over(index: int, *args: Any, **kwargs: Any) -> Any:
            return self.wrap(hidden.to(self.device))

        output = self.forward(batch, hand_over)
        logits: Tensor = output.logits
        return logits

    def _recorder(self, seen: list[BlockCall], start: list[Tensor]) -> Callable[..., Any]:
        def record(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = split_hidden(args, kwargs)
            start.append(hidden)
            seen.append(BlockCall(args, kwargs))
            if index == len(self.blocks) - 1:
                raise Stop
            return self.wrap(hidden)

        return record
