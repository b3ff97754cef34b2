"""What stands in a Linear's place while transformers loads everything that is not packed."""

import math

import torch
from torch import Tensor, nn

from ptq.formats.codec import Scheme
from ptq.models.structure import is_transposed, weight_shape


class PackedSlot(nn.Module):
    """As many bytes as the packed weight will take, under a name no file has, and the bias.

    A device map is made from these sizes, and hooks for several devices are put on this module. ``weight`` is no
    parameter: some models initialize the weights of a module's children by name, and find a tensor that takes anything
    and holds nothing. The module's own parameters and buffers get what transformers gives them.
    """

    packed_bytes: nn.Parameter
    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Module, scheme: Scheme, dtype: torch.dtype) -> None:
        """For a Linear ``[N, K]`` of a model in ``dtype``; everything is on ``meta``."""
        super().__init__()
        self.out_features, self.in_features = n, k = weight_shape(linear)
        groups = math.ceil(k / scheme.columns(k))
        size = n * math.ceil(k * scheme.bits / 32) * 4 + n * groups * (2 if scheme.symmetric else 3)
        # A parameter, though nothing trains it: buffers of modules that wait on the CPU are put on the GPU by default.
        self.packed_bytes = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        has_bias = getattr(linear, "bias", None) is not None
        bias = nn.Parameter(torch.empty(n, dtype=dtype, device="meta"), requires_grad=False) if has_bias else None
        self.register_parameter("bias", bias)
        # Of the Linear's own layout; functions of transformers and torch leave alone what has this mark.
        self.weight = torch.empty((k, n) if is_transposed(linear) else (n, k), dtype=dtype, device="meta")
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]  # a mark of transformers' own
        self._is_hf_initialized = True  # transformers must not initialize it
