"""Finding the decoder blocks and the Linears of any causal language model from its module tree alone."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ptq.errors import UnsupportedModelError


def find_blocks(model: nn.Module) -> str:
    """Dotted path of the decoder blocks: the outermost ModuleList that holds the most parameters.

    Raises:
        UnsupportedModelError: no ModuleList holds a Linear.
    """
    best, most = "", 0
    for path, module in _outermost_lists(model):
        if any(True for _ in linears(module)):
            size = sum(p.numel() for p in module.parameters())
            if size > most:
                best, most = path, size
    if not best:
        raise UnsupportedModelError(
            f"a model must hold its decoder blocks in a ModuleList with Linears; {type(model).__name__} has none: "
            "quantize it as plain PyTorch with ptq.quantize_linears"
        )
    return best


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield path, child
        else:
            yield from _outermost_lists(child, path + ".")


def is_transposed(module: nn.Module) -> bool:
    """Whether a Linear keeps its weight as ``[K, N]`` (GPT-2's ``Conv1D``)."""
    return type(module).__name__ == "Conv1D"


def linears(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Dotted path and module of every dense Linear below ``root`` (``nn.Linear`` and ``Conv1D``), in tree order."""
    for path, module in root.named_modules():
        if isinstance(module, nn.Linear) or (is_transposed(module) and hasattr(module, "nf")):
            yield path, module


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a Linear as ``[N, K]``, a view."""
    weight = module.weight.data
    if not isinstance(weight, Tensor):
        raise UnsupportedModelError(f"a Linear must have a weight tensor; {type(module).__name__} has {weight!r}")
    return weight.t() if is_transposed(module) else weight


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """``(N, K)`` of a Linear."""
    n, k = weight_of(module).shape
    return int(n), int(k)


@torch.no_grad()
def set_weight(module: nn.Module, weight_NK: Tensor) -> None:
    """Overwrite the weight of a Linear in place, in its own dtype and layout."""
    weight_of(module).copy_(weight_NK)

