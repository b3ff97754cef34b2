"""The packed weights of a checkpoint, and the QuantLinears of a model that they belong to."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptq.errors import ConfigError, FormatError
from ptq.formats import CODECS, codec_for_config, readable_config, schemes_by_module
from ptq.formats.checkpoint import CheckpointReader
from ptq.formats.codec import WIDTHS, Codec, Config, QuantizedWeight, Scheme
from ptq.models.names import SourceNames
from ptq.models.structure import linears, weight_shape
from ptq.nn.linear import QuantLinear
from ptq.nn.swap import exact_dtype, replace_module, to_quant_linear

MULTIPLIED = (torch.bfloat16, torch.float16, torch.float32)  # dtypes of rows that kernels know
Placeholder = Callable[[nn.Module, Scheme], nn.Module]  # what stands in a Linear's place until its weight is read


class Packed(NamedTuple):
    """Which Linears of a model a checkpoint holds packed, and how."""

    settings: Config  # quantization_config as it is in the file
    codec: Codec
    schemes: dict[str, Scheme]  # by module
    names: SourceNames


def place_packed(model: nn.Module, reader: CheckpointReader, settings: Config, placeholder: Placeholder) -> Packed:
    """Find the Linears that a checkpoint holds packed and put placeholders in their places.

    Raises:
        FormatError: a quantization that is not read, or packed tensors where the configuration says there are none.
    """
    known = readable_config(settings)
    codec = codec_for_config(known)
    stored = set(reader.names())
    names = SourceNames(model, stored)
    found = dict(linears(model))
    schemes = schemes_by_module(codec, known, {name: names.of_module(name) for name in found})
    # No codec has a tensor called weight: where there is one, the Linear was left in float.
    schemes = {n: s for n, s in schemes.items() if f"{names.of_module(n)}.weight" not in stored}
    schemes = {n: s for n, s in schemes.items() if not _is_new(model, n, f"{names.of_module(n)}.", stored)}
    _refuse_strays(codec, {names.of_module(n): schemes.get(n) for n in found}, stored)
    _require_orders(known, stored)
    for name, scheme in schemes.items():
        replace_module(model, name, placeholder(found[name], scheme))
    return Packed(settings, codec, schemes, SourceNames(model, stored))


def _is_new(model: nn.Module, name: str, prefix: str, stored: set[str]) -> bool:
    """Whether a Linear is of a head, as a classifier's, that the file's class of model has not: it begins untrained."""
    architectures = getattr(getattr(model, "config", None), "architectures", None) or [type(model).__name__]
    if type(model).__name__ in architectures or name.startswith(f"{getattr(model, 'base_model_prefix', '')}."):
        return False
    return not any(tensor.startswith(prefix) for tensor in stored)


def _refuse_strays(codec: Codec, schemes: Mapping[str, Scheme | None], stored: set[str]) -> None:
    """Raise FormatError for packed tensors of a Linear that is in float by the configuration, or by its own weight."""
    any_scheme = next((s for s in schemes.values() if s is not None), None)
    if any_scheme is None:
        raise FormatError(
            "quantization_config describes packed weights, but the file holds none for this model's Linears"
        )
    asymmetric = any_scheme._replace(symmetric=False)
    for name, scheme in schemes.items():
        packed = [tensor for tensor in codec.tensor_names(name, asymmetric) if tensor in stored]
        if scheme is None and packed:
            reason = "its weight as well" if f"{name}.weight" in stored else "no scheme in quantization_config"
            raise FormatError(
                f"{name} must be packed or in float: the file holds {packed[0]}, and there is {reason}; config.json "
                "and the shards do not belong together"
            )


def _require_orders(config: Config, stored: set[str]) -> None:
    """Raise FormatError if columns were regrouped (actorder "group") and the file does not say how."""
    for label, group in (config.get("config_groups") or {}).items():
        order = (group.get("weights") or {}).get("actorder")
        if order in ("group", "dynamic", True) and not any(name.endswith(".weight_g_idx") for name in stored):
            raise FormatError(
                f"actorder {order!r} in {label} of config_groups needs weight_g_idx tensors, the file has none; use "
                "actorder 'weight', which needs none"
            )


def require_described(directory: Path, names: Iterable[str]) -> None:
    """Raise FormatError for packed tensors in a directory whose config.json has no word about them."""
    packed = sorted(name for name in names if name.endswith((".qweight", ".weight_packed")))
    if packed:
        raise FormatError(
            f"packed weights must be described by quantization_config in config.json; {directory} holds "
            f"{packed[0]} ({len(packed)} such in all), and its config.json has none, without which they say nothing: "
            "where another tool wrote the directory, fetch its config.json again; where a part or a state dict of a "
            "model of ptq.quantize_linears was saved, give quantize_linears the whole transformers model and call its "
            "save_pretrained, or run `ptq quantize` on the float checkpoint"
        )


def require_multiplied(dtype: torch.dtype) -> None:
    """Raise ConfigError for a dtype that packed layers cannot compute in, which the first forward would be refused."""
    if dtype not in MULTIPLIED:
        names = [str(known).removeprefix("torch.") for known in MULTIPLIED]
        raise ConfigError(
            f"packed layers compute in {', '.join(names)}; the dtype asked for, or that config.json names, is "
            f"{str(dtype).removeprefix('torch.')}: set dtype to one of the three"
        )


def empty_linear(linear: nn.Module, scheme: Scheme, dtype: torch.dtype) -> QuantLinear:
    """A QuantLinear on ``meta`` with the shape of a Linear."""
    n, k = weight_shape(linear)
    return QuantLinear.empty(k, n, scheme, getattr(linear, "bias", None) is not None, dtype)


def read_packed(
    packed: Packed, reader: CheckpointReader, name: str, shape: tuple[int, int], dtype: torch.dtype
) -> QuantLinear:
    """The layer of one module ``[N, K]`` of a model of ``dtype``, without its bias, on the CPU.

    Raises:
        FormatError: tensors that are missing, damaged, or of another shape than the model's.
    """
    scheme, stored = packed.schemes[name], packed.names.of_module(name)
    if scheme.bits not in WIDTHS:
        raise FormatError(
            f"{stored} has {scheme.bits} bits; weights of {', '.join(map(str, WIDTHS))} bits can be run: quantize "
            "the model again with one of these"
        )
    names = packed.codec.tensor_names(stored, scheme)
    for extra in set(packed.codec.tensor_names(stored, scheme._replace(symmetric=False))) - set(names):
        if any(bool(found.any()) for found in reader.tensors([extra]).values()):
            raise FormatError(
                f"{stored} is symmetric by quantization_config, which needs no zero points; the file holds {extra}: "
                "config.json and the shards do not belong together"
            )
    tensors = reader.tensors(names)
    quantized, order = packed.codec.decode_ordered(stored, tensors, scheme)
    if tuple(quantized.codes.shape) != shape:
        raise FormatError(
            f"{stored} must be a packed {shape[0]} x {shape[1]} weight; the checkpoint holds "
            f"{tuple(quantized.codes.shape)}: config.json and the shards do not belong together"
        )
    return to_quant_linear(quantized, None, dtype, order)


def written_tensors(
    packed: Packed, layers: Iterable[tuple[str, QuantLinear]], dtype: torch.dtype
) -> tuple[Config, dict[str, Tensor]]:
    """The configuration and tensors with which a file holds these layers, as the one they were read from did.

    Scales are written in what the format has for a model of ``dtype``, where that holds them exactly.

    Asymmetric GPTQ v1 becomes v2, which says the same without ambiguity.

    Raises:
        FormatError: a scale that is zero, which no format is written with.
    """
    config, codec = packed.settings, packed.codec
    if codec.name == "gptq" and any(not scheme.symmetric for scheme in packed.schemes.values()):
        codec = CODECS["gptq_v2"]
        config = {**readable_config(config), "checkpoint_format": "gptq_v2", "format": "gptq_v2"}
    tensors: dict[str, Tensor] = {}
    for name, layer in layers:
        stored = packed.names.of_module(name)
        quantized, order = _in_columns(layer)
        scales_dtype = codec.scales_dtype(dtype)
        holds = torch.equal(quantized.scales.to(scales_dtype).float(), quantized.scales)
        tensors |= codec.encode(stored, quantized, scales_dtype if holds else exact_dtype(quantized.scales))
        order_name = codec.order_name(stored)
        if order is not None:
            assert order_name is not None  # only a format that has it was read with one
            tensors[order_name] = order
    return config, tensors


def _in_columns(layer: QuantLinear) -> tuple[QuantizedWeight, Tensor | None]:
    """The codes with columns in the input's order on the CPU, and int32 ``[K]``: the group of each."""
    quantized = layer.quantized().to("cpu")
    if layer.perm is None:
        return quantized, None
    perm = layer.perm.cpu().long()
    codes, order = torch.empty_like(quantized.codes), torch.empty(len(perm), dtype=torch.int32)
    codes[:, perm] = quantized.codes
    order[perm] = torch.arange(len(perm), dtype=torch.int32) // quantized.group_size
    return quantized._replace(codes=codes), order


def with_bias(layer: QuantLinear, bias: Any) -> QuantLinear:
    """Give a layer a bias ``[N]``, or none."""
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer
