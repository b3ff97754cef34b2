"""The quantizer that transformers calls for packed checkpoints, and its configuration."""

import re
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ptq.errors import FormatError, PtqError
from ptq.formats.checkpoint import CheckpointReader
from ptq.formats.codec import Config
from ptq.integration.made import describe_made
from ptq.integration.slots import PackedSlot
from ptq.models.experts import experts_of, unfuse_experts
from ptq.models.loading import load_module
from ptq.models.structure import find_blocks
from ptq.nn.linear import QuantLinear
from ptq.nn.swap import replace_module
from ptq.packed import Packed, place_packed, read_packed, require_multiplied, with_bias, written_tensors
from ptq.runtime import prepare_linear, warm_up

METHOD = "ptq"
# Packed tensors, which transformers sees in the files and finds no module for.
PACKED = r"\.(qweight|qzeros|scales|g_idx|weight_(packed|scale|shape|zero_point|g_idx))$"
PACKED_EXPERT = re.compile(r"experts\.\d+\..*\.(qweight|weight_packed)$")


class PtqConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """Asks ``from_pretrained`` to read a quantized checkpoint with this project's kernels.

    Args:
        impl: kernel, as for `ptq.load`.
        activation: "int8" rounds the inputs of packed Linears, as for `ptq.load`.
        warmup: make every kernel ready on a GPU, as for `ptq.load`.
    """

    def __init__(self, impl: str = "auto", activation: str | None = None, warmup: bool = True) -> None:
        self.quant_method = METHOD
        self.impl, self.activation, self.warmup = impl, activation, warmup
        self.stored: Config = {}

    def of_file(self, stored: Config) -> "PtqConfig":
        """The same wishes for a checkpoint with this ``quantization_config``."""
        config = PtqConfig(self.impl, self.activation, self.warmup)
        config.stored = dict(stored)
        return config

    def get(self, key: str, default: Any = None) -> Any:
        """As of the dictionary in config.json, for which transformers takes the configuration of a loaded model."""
        return self.to_dict().get(key, default)

    def to_dict(self) -> Config:
        """What stands in config.json: the file's own configuration, so that any reader of its format reads the copy."""
        return dict(self.stored) or {"quant_method": METHOD, "impl": self.impl, "activation": self.activation}


class PtqQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is not typed
    """Puts QuantLinears into a model while transformers loads the rest of it; see `HfQuantizer` for the methods."""

    requires_calibration = False
    packed: Packed
    reader: CheckpointReader

    def __init__(self, quantization_config: PtqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._conversions: list[Any] = []

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise FormatError for a float checkpoint, and for a device map that puts weights on the disk."""
        if not self.pre_quantized:
            raise FormatError(
                "PtqConfig is for reading quantized checkpoints, this one has no quantization_config in config.json; "
                "leave the argument out, or quantize the model with `ptq quantize`"
            )
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise FormatError(
                "packed weights must be in memory, device_map has 'disk' for "
                f"{next(key for key, value in device_map.items() if value == 'disk')!r}; use a device there"
            )

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        _refuse_plan(model)
        if not checkpoint_files:
            raise FormatError("packed weights are read from safetensors files; from_pretrained was given a state_dict")
        self.reader = CheckpointReader(Path(checkpoint_files[0]).parent)
        blocks = find_blocks(model)
        if any(PACKED_EXPERT.search(name) for name in self.reader.names()):
            _unfuse(model, blocks)
        require_multiplied(model.dtype)
        slot = partial(PackedSlot, dtype=model.dtype)
        self.packed = place_packed(model, self.reader, self.quantization_config.stored, slot)
        self._require(model, blocks)
        _expect_no_more(model, [*self.packed.schemes], [*experts_of(model)])

    def _require(self, model: nn.Module, blocks: str) -> None:
        """Raise FormatError if a decoder block lacks a tensor, which transformers would fill at random."""
        lenient = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        for name, _ in model.get_submodule(blocks).named_parameters(prefix=blocks):
            if name.endswith(".packed_bytes"):
                continue  # their tensors are looked for when they are read
            if not self.packed.names.is_tied(name) and not any(re.search(pattern, name) for pattern in lenient):
                self.packed.names.require(name)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        with torch.inference_mode(False):  # tensors made in it can never be saved for a gradient to pass
            for path in experts_of(model):
                self._load_experts(model, path)
            for name in self.packed.schemes:
                layer = self._load(model, name)
                layer.impl, layer.activation = config.impl, config.activation
                if not layer.qweight.is_meta:  # what waits on the CPU stays canonical, as any device reads it
                    prepare_linear(name, layer)
        del self.reader  # a model with open files can neither be copied nor pickled
        if config.warmup:
            warm_up(model, model.dtype)
        # What is saved has the names of the file already.
        self._conversions, model._weight_conversions = list(getattr(model, "_weight_conversions", None) or ()), []

    def _load(self, model: nn.Module, name: str) -> QuantLinear:
        slot = model.get_submodule(name)
        assert isinstance(slot, PackedSlot)
        device = slot.packed_bytes.device
        hook: Any = getattr(slot, "_hf_hook", None)
        waits = getattr(hook, "offload", False)
        if device.type == "meta" and not waits:
            raise FormatError(
                f"packed weights must be in memory, the device map puts {name} on the disk; allow more memory "
                "(max_memory) or choose the devices yourself"
            )
        shape, dtype = (slot.out_features, slot.in_features), slot.weight.dtype
        layer = read_packed(self.packed, self.reader, name, shape, dtype)
        bias = hook.weights_map["bias"] if waits and slot.bias is not None else slot.bias
        layer = with_bias(layer if waits else layer.to(device), bias)
        replace_module(model, name, layer)
        if hook is not None:
            from accelerate.hooks import AlignDevicesHook, add_hook_to_module

            if waits:  # on the CPU, and on its device for the time of each product
                hook = AlignDevicesHook(hook.execution_device, offload=True, offload_buffers=True)
            add_hook_to_module(layer, hook)
        return layer

    def _load_experts(self, model: Any, path: str) -> None:
        """What an experts module that was taken apart has in float: biases, Linears that were left alone, norms."""
        inside = [slot for slot in model.get_submodule(path).modules() if isinstance(slot, PackedSlot)]
        device = inside[0].packed_bytes.device if inside else next(model.parameters()).device
        slots = tuple(f"{name}.packed_bytes" for name in self.packed.schemes)
        load_module(
            model, path, self.reader, self.packed.names, device=device, dtype=model.dtype,
            skip=lambda name: name.endswith(slots),
        )  # fmt: skip

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of a file like the one that was read.

        Raises:
            PtqError: packed layers were fused or replaced after loading, or there are more than the file had.
        """
        from transformers.core_model_loading import revert_weight_conversion

        layers = [(name, _packed_at(model, name)) for name in self.packed.schemes]
        _refuse_more(model, self.packed.schemes)
        stored, tensors = written_tensors(self.packed, layers, model.dtype)
        self.quantization_config.stored = stored
        packed = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
        buffers = {f"{name}.{leaf}" for name in packed for leaf in ("qweight", "scales", "zeros", "perm")}
        state = {name: value for name, value in model.state_dict().items() if name not in buffers}
        names, apart = self.packed.names, experts_of(model)
        # What lies in the file as it is keeps the file's name; what was put together goes back the way it came.
        experts = tuple(f"{path}." for path in apart)
        stored_as = {
            name: names.written_as(name, apart) or (name if name.startswith(experts) else None)
            for name in state
            if not names.is_tied(name)
        }
        tensors |= {stored: state[name] for name, stored in stored_as.items() if stored is not None}
        rest = {name: value for name, value in state.items() if stored_as.get(name) is None}
        model._weight_conversions = self._conversions
        rest = revert_weight_conversion(model, rest)
        model._weight_conversions = []
        return {**rest, **tensors}, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Raises PtqError: ``model.dequantize()`` would hold every weight dense beside the packed ones."""
        raise PtqError(
            "a packed model stays packed in memory: to write a dense copy with an adapter added use `ptq merge`, for "
            "one dense weight QuantLinear.dequantize"
        )

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes a file like the one that was read."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through packed layers, so adapters beside them can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """A product is one operator, which torch.compile knows."""
        return True


def _refuse_plan(model: nn.Module) -> None:
    """Raise FormatError where Linears are to be split: packed ones are not, and what a plan adds up is too much."""
    plan = getattr(getattr(model, "config", None), "distributed_config", None)
    sizes = {name: getattr(plan, name, None) or 1 for name in ("tp_size", "ep_size")}
    asked = next((f"{name}={size}" for name, size in sizes.items() if size > 1), None)
    if asked is None and getattr(plan, "tp_plan", None):
        asked = "a tp_plan"
    if asked is not None:
        raise FormatError(
            f"packed weights must be whole on each device, found {asked}: load without it (device_map='auto' puts "
            "blocks on several GPUs), or serve the checkpoint with vLLM, which splits packed weights"
        )


def _packed_at(model: nn.Module, name: str) -> QuantLinear:
    layer = model.get_submodule(name)
    layer = getattr(layer, "base_layer", layer)  # below an adapter
    if isinstance(layer, QuantLinear) and layer.qweight.is_meta:
        raise PtqError(
            f"a packed model can be saved when all of it is in place; {name} waits on the CPU for its turn: load the "
            "checkpoint again with device_map='cpu' and save that"
        )
    if not isinstance(layer, QuantLinear):
        raise PtqError(
            f"a packed model can be saved as it was loaded; {name} is {type(layer).__name__} now: load the checkpoint "
            "again without fusing or replacing layers"
        )
    return layer


def _refuse_more(model: nn.Module, packed: Iterable[str]) -> None:
    """Raise PtqError for a packed layer that the file held in float: its configuration does not describe it."""
    layers = (name for name, layer in model.named_modules() if isinstance(layer, QuantLinear))
    for name in sorted({name.removesuffix(".base_layer") for name in layers} - {*packed}):
        raise PtqError(
            f"a model can be saved as it was loaded; {name} is packed now, in the checkpoint it is in float: load the "
            "checkpoint again without head_bits or other packing, and save that"
        )


def _unfuse(model: nn.Module, blocks: str) -> None:
    """Take experts apart on ``meta`` while transformers builds everything there, in the dtype of the model."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            unfuse_experts(model.get_submodule(blocks))
    finally:
        torch.set_default_dtype(default)


def _expect_no_more(model: Any, packed: Iterable[str], experts: Iterable[str]) -> None:
    """Tell transformers what it need not load, and what it need not share."""
    below = {rf"^{re.escape(path)}\." for path in experts}
    missing = {r"\.packed_bytes$"} | below
    model._keys_to_ignore_on_load_missing = set(model._keys_to_ignore_on_load_missing or ()) | missing
    unexpected = {PACKED} | {rf"{re.escape(path)}\." for path in experts}
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | unexpected
    for name in packed:  # a packed head shares nothing
        model.all_tied_weights_keys.pop(f"{name}.weight", None)


class FloatQuantizer(PtqQuantizer):
    """Of a model from a float checkpoint whose head was packed: no format that is written describes such a file."""

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The model's own tensors. Raises PtqError while a layer is packed."""
        _refuse_more(model, ())
        return model.state_dict(), {}


class MadeQuantizer(PtqQuantizer):
    """Of a model whose layers `ptq.quantize_linears` packed in memory: what file it becomes, its saving decides."""

    def __init__(self, layers: Collection[str], conversions: list[Any] | None) -> None:
        super().__init__(PtqConfig())
        self._layers, self._conversions = set(layers), conversions  # type: ignore[assignment]  # None: the class's own

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of a checkpoint, whose configuration the model then has; raises as `describe_made`."""
        model._weight_conversions = self._conversions
        self.packed = describe_made(model, self._layers)
        try:
            written = super().get_state_dict_and_metadata(model)
        finally:
            del self.packed  # it describes the model of this moment
        model.config.quantization_config = self.quantization_config
        return written


def attach(model: Any, packed: Packed | None) -> None:
    """Make ``save_pretrained`` of a model of `ptq.load` write what was read, or refuse; None: a float checkpoint."""
    if packed is None:
        model.hf_quantizer = FloatQuantizer(PtqConfig())
        return
    quantizer = PtqQuantizer(PtqConfig().of_file(packed.settings))
    quantizer.packed, quantizer._conversions = packed, packed.names.conversions
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(METHOD)(PtqQuantizer)
