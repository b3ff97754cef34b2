"""A LoRA layer of PEFT over a packed weight. Importing this needs PEFT, so `ptq.adapters` does it in its functions."""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from ptq.errors import ConfigError
from ptq.nn.linear import QuantLinear


class LoraQuantLinear(Linear):  # type: ignore[misc]  # PEFT is not typed
    """``QuantLinear(x) + scaling * B(A(dropout(x)))``: PEFT's layer, except that a packed weight takes no sums in.

    A and B are float parameters; the codes below get no gradient and never change.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **options)
        self.fan_in_fan_out = False  # a packed weight is [N, K], also where the float layer was a Conv1D

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """PEFT asks here, and warns about classes that it does not know."""
        return module.in_features, module.out_features  # type: ignore[return-value]  # of a QuantLinear

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA alone: the variants read or change the base weight at every step."""
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ConfigError: the sum of codes and an adapter has no codes."""
        raise ConfigError(
            f"an adapter can be merged into a dense weight only; this one is over a packed weight of "
            f"{self.get_base_layer().bits} bits: write a dense copy with ptq.adapters.merge or `ptq merge`"
        )


def merged_weights(layer: LoraLayer) -> dict[str, Tensor]:
    """``weight`` and, where there is one, ``bias`` with the active adapters added, float32; the layer stays as it is.

    The weight is ``[N, K]`` over a QuantLinear and as the base layer has it otherwise.
    """
    base = layer.get_base_layer()
    packed = isinstance(base, QuantLinear)
    dense = nn.Linear(layer.in_features, layer.out_features, bias=base.bias is not None, device="meta")
    weight = base.dequantize(torch.float32) if packed else base.weight.detach().float().clone()
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if base.bias is not None:
        dense.bias = nn.Parameter(base.bias.detach().float().clone(), requires_grad=False)
    layer.base_layer = dense
    try:
        Linear.merge(layer)
    finally:
        layer.base_layer = base
        layer.merged_adapters.clear()
    return {name: parameter.detach() for name, parameter in dense.named_parameters()}
