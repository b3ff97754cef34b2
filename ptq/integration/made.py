"""Models of transformers whose layers were packed in memory, and the checkpoints that they become."""

import copy
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ptq.errors import ConfigError, PtqError
from ptq.formats import CODECS
from ptq.formats.codec import Codec, Scheme
from ptq.models.experts import routers, stacks
from ptq.models.loading import build_skeleton
from ptq.models.names import SourceNames
from ptq.models.structure import linears
from ptq.models.tying import untie
from ptq.nn.linear import QuantLinear
from ptq.packed import Packed
from ptq.version import VERSION

FORMATS = ("gptq", "gptq_v2", "compressed-tensors")  # the first that holds a model is written, as more programs read it


def attach_made(root: nn.Module) -> None:
    """Let ``save_pretrained`` of the transformers models in ``root`` write their packed layers in a format."""
    for model in _models(root):
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None and type(quantizer).__name__ not in ("MadeQuantizer", "FloatQuantizer"):
            continue  # it knows a file, of which the layers that are new are no part: it refuses to save them
        from ptq.integration.quantizer import MadeQuantizer

        _untie(model)
        known = getattr(model, "_weight_conversions", None) if quantizer is None else quantizer._conversions
        model.hf_quantizer = MadeQuantizer([*_packed_layers(model)], known)


def _models(root: nn.Module) -> Iterator[Any]:
    """Models of transformers, none inside another one; where nobody has imported it there are none."""
    loaded: Any = sys.modules.get("transformers.modeling_utils")
    if loaded is not None and isinstance(root, loaded.PreTrainedModel):
        yield root
    elif loaded is not None:
        for child in root.children():
            yield from _models(child)


def _packed_layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}


def _untie(model: Any) -> None:
    """A packed head shares nothing; where nothing else is shared, the configuration says so."""
    packed = {f"{path}.weight" for path in _packed_layers(model)}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    gone = [name for name, origin in tied.items() if packed & {name, origin}]
    for name in gone:
        del tied[name]
    if gone and not tied:
        untie(model.config)


def describe_made(model: Any, expected: Collection[str]) -> Packed:
    """How a file holds a model of which these layers were packed in memory.

    Raises:
        PtqError: layers were fused, replaced or packed since, or one stands in two places.
    """
    layers = _packed_layers(model)
    _require_unchanged(model, layers, expected)
    packed = {path: Scheme(layer.bits, layer.group_size, layer.symmetric) for path, layer in layers.items()}
    schemes: dict[str, Scheme | None] = {**dict.fromkeys(_in_float(model)), **packed}
    shapes = {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}
    codec = _codec(schemes, shapes)
    names = SourceNames(model, _names_in_file(model, layers))
    settings = codec.quantization_config(names.both_spellings(schemes, whole=True), damping=None, version=VERSION)
    return Packed(settings, codec, packed, names)


def _require_unchanged(model: nn.Module, layers: Collection[str], expected: Collection[str]) -> None:
    everywhere = {path for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantLinear)}
    changed = sorted({path.removesuffix(".base_layer") for path in everywhere} ^ set(expected))
    if changed or everywhere != set(layers):
        raise PtqError(
            "a model that ptq.quantize_linears packed can be saved with the layers that it put in, each in one place; "
            f"{(changed or sorted(everywhere - set(layers)))[0]} is another now, or stands in several: save before you "
            "fuse or replace layers, or keep model.state_dict()"
        )


def _codec(schemes: Mapping[str, Scheme | None], shapes: Mapping[str, tuple[int, int]]) -> Codec:
    """The first format that holds all; the last one takes every width and shape."""
    for name in FORMATS[:-1]:
        try:
            CODECS[name].check(schemes, shapes)
        except ConfigError:
            continue
        return CODECS[name]
    return CODECS[FORMATS[-1]]


def _in_float(model: Any) -> list[str]:
    """Linears that stay in float, which other programs must be told.

    Experts that lie in stacks are Linears to whoever takes them apart, and so are routers.
    """
    left = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    left += [path for path, _ in linears(model)]
    if any(True for _ in stacks(model)):
        config = copy.deepcopy(model.config)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config  # the float model is built
        try:
            skeleton = build_skeleton(config, model.dtype)
        except PtqError:  # nobody but the class itself reads it, and that one keeps its stacks
            return left
        left += [*dict(linears(skeleton)), *routers(skeleton)]
    return left


def _names_in_file(model: Any, layers: Mapping[str, QuantLinear]) -> Collection[str]:
    """The names under which transformers would write a model whose layers are not packed."""
    from transformers.core_model_loading import revert_weight_conversion

    shapes = {name: parameter.detach().to("meta") for name, parameter in model.named_parameters(remove_duplicate=False)}
    for path, layer in layers.items():
        shapes[f"{path}.weight"] = torch.empty(layer.out_features, layer.in_features, dtype=model.dtype, device="meta")
    return set(revert_weight_conversion(model, shapes))
