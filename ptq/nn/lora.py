"""A LoRA layer of PEFT over a packed weight. Importing this needs PEFT, so `ptq.adapters` does it in its functions."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from ptq.errors import ConfigError
from ptq.nn.linear import QuantLinear

INITIAL = (True, False, "gaussian")  # what does not look into the base weight
# Options of LoraConfig with which the layer is no longer W x + s B A x, or A and B are no longer all of it.
VARIANTS = (
    *("use_dora", "use_qalora", "use_bdlora", "velora_config", "kasa_config", "monteclora_config", "arrow_config"),
    "alora_invocation_tokens",
)


def refuse_variants(options: Mapping[str, Any]) -> None:
    """Raises ConfigError for options of LoraConfig that need the dense weight or are more than a product beside it."""
    initial = options.get("init_lora_weights", True)
    if initial not in INITIAL:
        raise ConfigError(
            f"an adapter on packed weights must not need the dense ones: init_lora_weights must be "
            f"{' or '.join(map(repr, INITIAL))}, found {initial!r}"
        )
    for key in VARIANTS:
        if options.get(key):
            raise ConfigError(
                f"an adapter on packed weights must be plain LoRA: leave {key} out, found {options[key]!r}"
            )


class LoraQuantLinear(Linear):  # type: ignore[misc]  # PEFT is not typed
    """``QuantLinear(x) + scaling * B(A(dropout(x)))``: PEFT's layer, except that a packed weight takes no sums in.

    A and B are float parameters; the codes below get no gradient and never change.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **options)
        self.fan_in_fan_out = False  # a packed weight is [N, K], also where the float layer was a Conv1D

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options: Any) -> None:
        """As PEFT has it, which comes here with every adapter. Raises ConfigError as `refuse_variants` does."""
        refuse_variants(vars(config))
        super().update_layer(adapter_name, r, lora_alpha, config, **options)

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
