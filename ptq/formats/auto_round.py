"""AutoRound's own checkpoints: GPTQ or AWQ tensors under a configuration of its own, which is translated here."""

import re
from typing import Any

from ptq.errors import FormatError
from ptq.formats import checks
from ptq.formats.codec import Config

LAYOUTS = {
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_gptq": "gptq",
    "auto_round:auto_awq": "awq",
}
SETTINGS = ("bits", "group_size", "sym")
FLOAT_BITS = 16


def translate(config: Config) -> Config:
    """The configuration of a GPTQ or AWQ checkpoint with the same tensors.

    Raises FormatError for a layout that is not one of these, quantized activations, and rules that AWQ cannot say.
    """
    layout = checks.optional(config, "packing_format", str) or checks.optional(config, "backend", str)
    if layout not in LAYOUTS:
        raise FormatError(
            f"packing_format of an auto-round checkpoint must be one of {', '.join(LAYOUTS)}, found {layout!r}"
        )
    for key, wanted in (("act_bits", FLOAT_BITS), ("data_type", "int")):
        if config.get(key) not in (None, wanted):
            raise FormatError(f"{key} of an auto-round checkpoint must be {wanted!r}, found {config[key]!r}")
    rules = _rules(checks.optional(config, "extra_config", dict))
    head = any(name.rpartition(".")[2] == "lm_head" and rule for name, rule in rules.items())
    known = {"bits": config.get("bits"), "group_size": config.get("group_size"), "lm_head": head}
    if LAYOUTS[layout] != "awq":
        dynamic = {f"{'+' if rule else '-'}:{_pattern(name)}": rule or {} for name, rule in rules.items()}
        symmetric = config.get("sym", True)
        layouts = {"checkpoint_format": LAYOUTS[layout]}
        return {"quant_method": "gptq", "sym": symmetric, "dynamic": dynamic, **known, **layouts}
    mixed = next((name for name, rule in rules.items() if rule), None)
    if mixed is not None:
        raise FormatError(
            f"extra_config of an AWQ checkpoint may only leave Linears in float; {mixed} has {rules[mixed]}"
        )
    return {
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": list(rules),
        **known,
    }


def _rules(extra: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """Settings of each name or pattern, None for float; exact names first."""
    ordered = sorted(extra.items(), key=lambda item: not _is_name(item[0]))
    found: dict[str, dict[str, Any] | None] = {}
    for name, _ in ordered:
        if not isinstance(settings := extra[name], dict):
            raise FormatError(f"{name} in the quantization config must be dict, found {settings!r:.80}")
        in_float = checks.optional(settings, "bits", int) >= FLOAT_BITS
        own = {key: settings[key] for key in SETTINGS if settings.get(key) is not None}
        found[name] = None if in_float else own
    return found


def _is_name(name: str) -> bool:
    return re.fullmatch(r"[\w.\-]+", name) is not None


def _pattern(name: str) -> str:
    return f"^{re.escape(name)}$" if _is_name(name) else name
