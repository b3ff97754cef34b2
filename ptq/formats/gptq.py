"""GPTQ checkpoints, as AutoGPTQ introduced them: v1 ("gptq", stores ``zero - 1``) and v2 ("gptq_v2", the true zero).

``qweight`` int32 ``[K*b/32, N]`` packed along K, ``qzeros`` int32 ``[G, N*b/32]`` packed along N, ``scales`` float16
``[G, N]``, ``g_idx`` int32 ``[K]``. Act-order is read but never written: ``g_idx[k]`` is ``k // group_size``.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq.errors import FormatError
from ptq.formats import capability, checks
from ptq.formats.bitpack import pack_stream, unpack_stream, words_for
from ptq.formats.codec import EXPERTS, FUSED_LINEARS, Config, QuantizedWeight, Scheme, TensorSpec, spellings

BLOCK = re.compile(r"((?:.+?\.)?)([^.]+\.\d+\..*)")  # what comes before the first numbered module, and the rest


@dataclass(frozen=True)
class GptqCodec:
    """See `ptq.formats.codec.Codec` for the methods."""

    name: str
    zero_offset: int  # what v1 subtracts from each stored zero
    wraps: bool = False  # the writer subtracts without loss: a zero of 0 is stored as 2**bits - 1 or borrows

    def scales_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Always float16: it holds our bfloat16-rounded scales exactly, and fp16-only readers take it."""
        return torch.float16

    def check(self, schemes: Mapping[str, Scheme | None], shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ConfigError for what cannot be written."""
        capability.check_schemes(self.name, schemes, shapes)

    def tensor_names(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        """``g_idx`` may be absent from files of other writers."""
        return f"{name}.qweight", f"{name}.qzeros", f"{name}.scales", f"{name}.g_idx"

    def tensor_specs(
        self, name: str, n: int, k: int, scheme: Scheme, scales_dtype: torch.dtype
    ) -> dict[str, TensorSpec]:
        """Dtype and shape of each tensor of an ``[N, K]`` weight."""
        groups = k // scheme.columns(k)
        return {
            f"{name}.qweight": (torch.int32, (k * scheme.bits // 32, n)),
            f"{name}.qzeros": (torch.int32, (groups, n * scheme.bits // 32)),
            f"{name}.scales": (scales_dtype, (groups, n)),
            f"{name}.g_idx": (torch.int32, (k,)),
        }

    def encode(self, name: str, quantized: QuantizedWeight, scales_dtype: torch.dtype) -> dict[str, Tensor]:
        """Pack the codes. Raises FormatError for what the format cannot hold."""
        checks.require_encodable(self.name, name, quantized)
        stored_zeros = (quantized.zeros - self.zero_offset).t()
        columns = torch.arange(quantized.codes.shape[1], dtype=torch.int32, device=quantized.codes.device)
        scales = checks.export_scales(name, quantized.scales, scales_dtype)
        return {
            f"{name}.qweight": pack_stream(quantized.codes, quantized.bits).t().contiguous(),
            f"{name}.qzeros": pack_stream(stored_zeros, quantized.bits),
            f"{name}.scales": scales.t().contiguous(),
            f"{name}.g_idx": columns // quantized.group_size,
        }

    def decode(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """Unpack the codes. Raises FormatError for damage, ambiguous zeros and run-time permutations."""
        quantized = self._unpack(name, tensors, scheme)
        checks.require_trivial_order(f"{name}.g_idx", tensors, quantized.codes.shape[1], quantized.group_size)
        return quantized

    def decode_ordered(
        self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme
    ) -> tuple[QuantizedWeight, Tensor | None]:
        """Unpack the codes, and the group of each column. Raises FormatError for damage and ambiguous zeros."""
        quantized = self._unpack(name, tensors, scheme)
        order = checks.read_order(f"{name}.g_idx", tensors, quantized.codes.shape[1], quantized.group_size)
        return quantized, order

    def order_name(self, name: str) -> str | None:
        """The tensor with the group of each column."""
        return f"{name}.g_idx"

    def _unpack(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        bits = scheme.bits
        qweight = checks.take(tensors, f"{name}.qweight", (torch.int32,), 2)
        rows, columns = qweight.shape[1], qweight.shape[0] * 32 // bits
        checks.require_shape(f"{name}.qweight", qweight, (columns * bits // 32, rows))
        group_size, groups = checks.groups_of(name, columns, scheme)
        scales = checks.read_scales(f"{name}.scales", tensors, (groups, rows))
        return QuantizedWeight(
            codes=unpack_stream(qweight.t().contiguous(), bits, columns),
            scales=scales.t().contiguous(),
            zeros=self.read_zeros(name, tensors, (rows, groups), scheme),
            bits=bits,
            group_size=group_size,
            symmetric=scheme.symmetric,
        )

    def read_zeros(self, name: str, tensors: Mapping[str, Tensor], grid: tuple[int, int], scheme: Scheme) -> Tensor:
        """Zero points ``[N, G]``. Raises FormatError for damage and for ambiguous ones."""
        rows, groups = grid
        qzeros = checks.take(tensors, f"{name}.qzeros", (torch.int32,), 2)
        checks.require_shape(f"{name}.qzeros", qzeros, (groups, words_for(rows, scheme.bits)))
        if self.wraps and not scheme.symmetric:
            return _wrapped_zeros(qzeros, scheme.bits, rows).t().contiguous()
        stored = unpack_stream(qzeros, scheme.bits, rows)
        return self._true_zeros(f"{name}.qzeros", stored, scheme).t().contiguous()

    def _true_zeros(self, name: str, stored: Tensor, scheme: Scheme) -> Tensor:
        """Undo the offset on unpacked fields, where no borrow can reach the neighbour."""
        middle = 1 << (scheme.bits - 1)
        if scheme.symmetric:
            if bool((stored != middle - self.zero_offset).any()):
                raise FormatError(
                    f"{name}: {self.name} stores {middle - self.zero_offset} for every zero of a symmetric "
                    f"{scheme.bits}-bit weight, found {sorted(set(stored.flatten().tolist()))[:4]}; the zeros are "
                    "ambiguous: check `sym` and `checkpoint_format` in the config"
                )
        elif self.zero_offset and bool((stored == (1 << scheme.bits) - 1).any()):
            raise FormatError(
                f"{name}: a stored zero of {(1 << scheme.bits) - 1} is ambiguous in {self.name} (it means 0 to some "
                "writers and 2**bits to others); use a gptq_v2 checkpoint of this model"
            )
        return stored + self.zero_offset

    def quantization_config(
        self, schemes: Mapping[str, Scheme | None], *, damping: float | None, version: str
    ) -> Config:
        """The block for config.json and quantize_config.json. Raises ConfigError when nothing is quantized."""
        default = capability.common_scheme(schemes)
        config: Config = {
            "quant_method": "gptq",
            "bits": default.bits,
            "group_size": default.group_size,
            "sym": default.symmetric,
            "desc_act": False,
            "checkpoint_format": self.name,
            "format": self.name,
            "pack_dtype": "int32",
            "lm_head": any(capability.is_head(name) and scheme for name, scheme in schemes.items()),
            "static_groups": True,
            "true_sequential": True,
            "dynamic": dynamic_rules(schemes, default),
            "modules_in_block_to_quantize": None,
        }
        writer = {"quantizer": [f"ptq:{version}"]}
        # transformers hands no configuration with `meta` to AutoRound, which takes everything for v1 of one scheme.
        uniform = self.name == "gptq" and not config["dynamic"] and not config["lm_head"]
        config |= writer if uniform else {"meta": writer}
        if damping is not None:
            config["damp_percent"] = damping
        return config

    def parse_config(
        self, config: Config, linears: Iterable[str], stored: Mapping[str, str] | None = None
    ) -> dict[str, Scheme | None]:
        """Scheme of each Linear, `dynamic` honoured. Raises FormatError for what cannot be read."""
        if config.get("pack_dtype") not in (None, "int32"):
            raise FormatError(f"GPTQ words are read as int32, the config says pack_dtype {config['pack_dtype']!r}")
        default = self._scheme(config)
        only = _block_suffixes(config)
        checks.optional(config, "desc_act", bool)
        head = checks.optional(config, "lm_head", bool)
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, dict):
            raise FormatError(f"`dynamic` in the quantization config must map patterns to settings, found {dynamic!r}")
        rules = [(rule, *_parse_rule(rule)) for rule in dynamic]
        schemes: dict[str, Scheme | None] = {}
        for name in linears:
            names = spellings(name, stored)
            listed = only is None or any(f".{each}".endswith(f".{suffix}") for suffix in only for each in names)
            if not listed or (capability.is_head(name) and not head):
                schemes[name] = None
                continue
            rule, skip = next(
                ((rule, skip) for rule, skip, regex in rules if any(map(regex.match, names))), ("", False)
            )
            own = checks.optional(dynamic, rule, dict) if rule and not skip else {}
            schemes[name] = None if skip else self._scheme({**config, **own}) if rule else default
        return schemes

    def _scheme(self, config: Mapping[str, Any]) -> Scheme:
        group_size = checks.setting(config, ("group_size",), int)
        symmetric = checks.setting({"sym": True, **config}, ("sym",), bool)
        return checks.read_scheme(config, capability.widths_of(self.name), group_size, symmetric=symmetric)


def _wrapped_zeros(words: Tensor, bits: int, rows: int) -> Tensor:
    """Undo GPTQModel's conversion to v1: it subtracts 1 of every field at once, from the word as a whole.

    A zero of 0 borrows from its neighbour then, and adding the same constant gives it back. Fields of 3 bits it unpacks
    first, and wraps each.
    """
    if bits == 3:
        return (unpack_stream(words, bits, rows) + 1) % (1 << bits)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    total = (words.long() + ones) % (1 << 32)
    signed = torch.where(total >= 1 << 31, total - (1 << 32), total)
    return unpack_stream(signed.int(), bits, rows)


def dynamic_rules(schemes: Mapping[str, Scheme | None], default: Scheme) -> dict[str, dict[str, Any]]:
    """Rules for the Linears that differ from the default: ``-:`` leaves in float, ``+:`` overrides.

    Names are escaped and anchored. Siblings which engines fuse share one rule that also covers the fused name, as do
    the experts of one layer, provided that all of them agree. A head left in float needs no rule. Beside a tower
    vLLM calls the decoder ``language_model.model``, as neither transformers nor files do, and takes rules as they are:
    there a rule means its Linears wherever their blocks are.
    """
    several = len({place[1] for place in map(BLOCK.fullmatch, schemes) if place}) > 1
    rules: dict[str, dict[str, Any]] = {}
    for name, scheme in schemes.items():
        if scheme == default or (scheme is None and capability.is_head(name)):
            continue
        start, rest = _covering(name, scheme, schemes)
        pattern = _anywhere(start, rest, scheme, schemes) if several else None
        pattern = pattern or rf"^{re.escape(start)}{rest}$"
        if scheme is None:
            rules[f"-:{pattern}"] = {}
        else:
            rules[f"+:{pattern}"] = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
    return rules


def _covering(name: str, scheme: Scheme | None, schemes: Mapping[str, Scheme | None]) -> tuple[str, str]:
    """The start that the names of a rule have in common, and a regex for the rest of each."""
    experts = EXPERTS.match(name)
    if experts:
        prefix = experts[1]
        if all(other == scheme for key, other in schemes.items() if key.startswith(f"{prefix}.")):
            return prefix, r"(?:\..*)?"
    parent, _, leaf = name.rpartition(".")
    prefix = f"{parent}." if parent else ""
    for fused, members in FUSED_LINEARS.items():
        if leaf in members and all(schemes.get(prefix + other, "absent") == scheme for other in members):
            return prefix, f"(?:{'|'.join(members)}|{fused})"
    return name, ""


def _anywhere(start: str, rest: str, scheme: Scheme | None, schemes: Mapping[str, Scheme | None]) -> str | None:
    """A rule's pattern for blocks at any path; None where it would cover what has another scheme.

    A tower's Linears in float are excepted by their paths.
    """
    place = BLOCK.fullmatch(start)
    if not place and not capability.is_head(start):
        return None
    ending = re.escape(place[2] if place else start.rpartition(".")[2])
    covers = re.compile(rf"(?:.+\.)?{ending}{rest}$")
    others = [name for name, other in schemes.items() if other != scheme and covers.match(name)]
    if any(scheme is None or schemes[name] is not None for name in others):
        return None
    paths = dict.fromkeys(re.escape(name.rpartition(".")[0]) for name in others)
    excepted = rf"(?!(?:{'|'.join(paths)})\.)" if paths else ""
    return f"^{excepted}{covers.pattern}"


def _parse_rule(rule: str) -> tuple[bool, re.Pattern[str]]:
    """Whether a rule skips, and its regex. Raises FormatError for a regex that does not compile."""
    try:
        return rule.startswith("-:"), re.compile(rule.removeprefix("-:").removeprefix("+:"))
    except re.error as error:
        raise FormatError(f"the `dynamic` rule {rule!r} must be a regular expression: {error}") from error


def _block_suffixes(config: Config) -> list[str] | None:
    """``modules_in_block_to_quantize`` flattened: lists of names relative to a block, or None."""
    key = "modules_in_block_to_quantize"
    entries: list[Any] = checks.optional(config, key, list)
    flat = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
    return checks.names({key: flat}, key) or None
