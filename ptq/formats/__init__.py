"""On-disk formats: pure codecs between `QuantizedWeight` and the tensors of a checkpoint."""

from collections.abc import Mapping
from typing import Any

from ptq.errors import FormatError
from ptq.formats import checks
from ptq.formats.auto_round import translate
from ptq.formats.awq import AwqCodec
from ptq.formats.codec import Codec, Config, QuantizedWeight, Scheme
from ptq.formats.compressed_tensors import CompressedTensorsCodec
from ptq.formats.gptq import GptqCodec

__all__ = ["CODECS", "Codec", "QuantizedWeight", "Scheme", "codec_for_config", "readable_config", "schemes_by_module"]

CODECS: Mapping[str, Codec] = {
    codec.name: codec
    for codec in (
        GptqCodec("gptq", zero_offset=1),
        GptqCodec("gptq_v2", zero_offset=0),
        AwqCodec(),
        CompressedTensorsCodec(),
    )
}

# Reads asymmetric v1 as GPTQModel writes it.
GPTQMODEL_V1 = GptqCodec("gptq", zero_offset=1, wraps=True)

# quant_method -> the config keys that name the layout, the layout if none does, and the codec of each known layout.
_LAYOUTS: Mapping[str, tuple[tuple[str, ...], str, Mapping[str, str]]] = {
    "gptq": (("checkpoint_format", "format"), "gptq", {"gptq": "gptq", "gptq_v2": "gptq_v2"}),
    "awq": (("version", "checkpoint_format", "format"), "gemm", {"gemm": "awq"}),
    "compressed-tensors": (
        ("format",),
        "pack-quantized",
        # In "mixed-precision" each group names its own layout, which the codec checks.
        {"pack-quantized": "compressed-tensors", "mixed-precision": "compressed-tensors"},
    ),
}


def readable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``quantization_config`` in the words of the format whose tensors the checkpoint has.

    Raises FormatError for an auto-round configuration that no such format has words for.
    """
    return translate(dict(config)) if _method(config) in ("auto-round", "autoround") else dict(config)


def schemes_by_module(codec: Codec, config: Config, spelled: Mapping[str, str]) -> dict[str, Scheme]:
    """Schemes of the Linears that a configuration packs; ``spelled`` has what the file calls each.

    A configuration names modules as transformers does or as the file spells their tensors, or some so and some so. A
    Linear that no rule packs in one spelling may be packed in the other: which are, the file shows.

    Raises:
        FormatError: what cannot be honoured.
    """
    parsed = codec.parse_config(config, spelled, spelled)
    if any(name != stored for name, stored in spelled.items()):
        in_file, in_model = codec.parse_config(config, spelled.values()), codec.parse_config(config, spelled)
        parsed = {name: parsed[name] or in_file[stored] or in_model[name] for name, stored in spelled.items()}
    return {name: scheme for name, scheme in parsed.items() if scheme is not None}


def codec_for_config(config: Mapping[str, Any]) -> Codec:
    """The codec that reads a checkpoint with this ``quantization_config``.

    Raises FormatError for an unknown ``quant_method`` or layout, and for two keys that name different layouts.
    """
    known = "; ".join(f"{method}: {', '.join(layouts)}" for method, (_, _, layouts) in _LAYOUTS.items())
    method = _method(config)
    if method not in _LAYOUTS:
        raise FormatError(f"quant_method must name a format that is read ({known}), found {method!r}")
    keys, default, layouts = _LAYOUTS[method]
    found = {str.lower(checks.optional(config, key, str)) for key in keys if config.get(key)} or {default}
    if len(found) > 1 or not found <= layouts.keys():
        raise FormatError(
            f"the layout ({' / '.join(keys)}) of a {method} checkpoint must be one that is read ({known}), "
            f"found {', '.join(sorted(found))}"
        )
    layout = layouts[found.pop()]
    return GPTQMODEL_V1 if layout == "gptq" and _writer(config).startswith("gptqmodel") else CODECS[layout]


def _method(config: Mapping[str, Any]) -> str:
    return str.lower(checks.optional(config, "quant_method", str) or "none")


def _writer(config: Mapping[str, Any]) -> str:
    """Name and version of the first tool that a configuration names."""
    named = checks.optional(config, "meta", dict).get("quantizer") or ""
    return str.lower(str(named[0] if isinstance(named, list) and named else named))
