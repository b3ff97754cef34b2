"""A model's own forward pass with other things in its blocks' places, and its blocks in memory one at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Loader = Callable[[nn.Module, str], None]


class Stop(Exception):  # noqa: N818  (control flow, not an error)
    """Raised in a block's place to end a forward pass there."""


class ModelPasses:
    """Loads the blocks of a model, or all but them, and runs its forward pass with replacements of its blocks.

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
        self.width: int | None = None  # of the tuple that a block returns; None: a tensor

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

    def wrap(self, hidden: Tensor) -> Any:
        """Hidden states in what a block returns: alone, or first in a tuple as long as its own."""
        return hidden if self.width is None else (hidden, *[None] * (self.width - 1))

    def forward(self, batch: Tensor, replacement: Callable[..., Any]) -> Any:
        """What the model returns with ``replacement(index, ...)`` called for each block; None at a `Stop`."""
        for index, block in enumerate(self.blocks):
            block.forward = partial(replacement, index)
        try:
            return self.model(input_ids=batch.to(self.device), use_cache=False)
        except Stop:
            return None
        finally:
            for block in self.blocks:
                del block.forward
