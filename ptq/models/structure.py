"""Finding the decoder blocks and the Linears of any causal language model from its module tree alone."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ptq.errors import UnsupportedModelError


def find_blocks(model: nn.Module) -> str:
    """Dotted path of the decoder blocks: the outermost ModuleList that holds the most parameters.

    Where a model says which of its parts is the text decoder (beside a vision tower), it is looked for there.

    Raises:
        UnsupportedModelError: no ModuleList holds a Linear.
    """
    best, most = "", 0
    prefix = _decoder(model)
    for path, module in _outermost_lists(model.get_submodule(prefix), f"{prefix}." if prefix else ""):
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


def _decoder(model: nn.Module) -> str:
    """Path of the text decoder, as the model itself says; "" where it does not, or the decoder has no blocks."""
    ask: Callable[[], object] = getattr(model, "get_decoder", lambda: None)
    decoder = ask()
    found = next((path for path, module in model.named_modules() if module is decoder), "")
    lists = _outermost_lists(model.get_submodule(found))
    return found if any(True for _, each in lists for _ in linears(each)) else ""


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
    """Dotted path and module of every dense Linear below ``root`` (``nn.Linear`` and ``Conv1D``), in tree order.

    A subclass with a forward of its own is none: what it computes is more than a product.
    """
    for path, module in root.named_modules():
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if plain or (is_transposed(module) and hasattr(module, "nf")):
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
