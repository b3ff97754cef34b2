"""Putting QuantLinear where a Linear stood."""

import re

import torch
from torch import Tensor, nn

from ptq.formats.codec import QuantizedWeight
from ptq.nn.linear import QuantLinear


def exact_dtype(scales: Tensor) -> torch.dtype:
    """The narrowest dtype that holds every scale exactly: bfloat16, float16 or float32."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scales.to(dtype).float(), scales.float()):
            return dtype
    return torch.float32


def to_quant_linear(
    quantized: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, g_idx: Tensor | None = None
) -> QuantLinear:
    """A QuantLinear of a solver's or a file's result; ``dtype`` is that of the weight it stands for.

    For ``g_idx`` see `QuantLinear.from_quantized`.
    """
    layer = QuantLinear.from_quantized(quantized, bias, exact_dtype(quantized.scales), g_idx)
    layer.weight_dtype = dtype
    return layer


def take_hooks(new: nn.Module, old: nn.Module) -> None:
    """Let the hooks of ``old``'s forward and backward pass be ``new``'s; their handles remove them there."""
    for name, value in vars(old).items():
        if re.fullmatch(r"_(forward|backward)_(pre_)?hooks(_with_kwargs|_always_called)?|_is_full_backward_hook", name):
            new.__dict__[name] = value


def replace_module(root: nn.Module, path: str, new: nn.Module) -> None:
    """Put ``new`` where the module at ``path`` stands."""
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)
