"""compressed-tensors ``pack-quantized`` checkpoints: any width, any shape, mixed schemes.

``weight_packed`` int32 ``[N, ceil(K*b/32)]`` along K, ``weight_scale`` ``[N, G]`` in the model's dtype,
``weight_shape`` int64 ``(N, K)`` and, when asymmetric, ``weight_zero_point`` int32 ``[ceil(N*b/32), G]`` along N.
The library thinks in signed codes and stores them with ``2**(b-1)`` added: our unsigned codes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ptq.errors import FormatError
from ptq.formats import capability, checks
from ptq.formats.bitpack import pack_stream, unpack_stream, words_for
from ptq.formats.codec import (
    EXPERTS,
    Config,
    QuantizedWeight,
    Scheme,
    TensorSpec,
    listed_for_engines,
    spellings,
)

LAYOUT = "pack-quantized"
LIBRARY_VERSION = "0.20.0"  # the release of compressed-tensors whose layout is written
# Settings that change what the stored numbers mean; a checkpoint that uses one is not the plain weight we would run.
UNREADABLE_SETTINGS = ("kv_cache_scheme", "sparsity_config", "transform_config")

# How columns were visited; where that matters to a reader the file has weight_g_idx.
ACTORDERS = (None, False, True, "weight", "static", "group", "dynamic")


@dataclass(frozen=True)
class CompressedTensorsCodec:
    """See `ptq.formats.codec.Codec` for the methods."""

    name: str = "compressed-tensors"

    def scales_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The model's dtype, which is what readers allocate."""
        return model_dtype

    def check(self, schemes: Mapping[str, Scheme | None], shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ConfigError for what cannot be written."""
        capability.check_schemes(self.name, schemes, shapes)

    def tensor_names(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        """Zero points only when asymmetric; ``weight_g_idx`` only in old act-order files."""
        names = tuple(f"{name}.weight_{part}" for part in ("packed", "scale", "shape", "g_idx"))
        return names if scheme.symmetric else (*names, f"{name}.weight_zero_point")

    def tensor_specs(
        self, name: str, n: int, k: int, scheme: Scheme, scales_dtype: torch.dtype
    ) -> dict[str, TensorSpec]:
        """Dtype and shape of each tensor of an ``[N, K]`` weight."""
        groups = k // scheme.columns(k)
        specs: dict[str, TensorSpec] = {
            f"{name}.weight_packed": (torch.int32, (n, words_for(k, scheme.bits))),
            f"{name}.weight_scale": (scales_dtype, (n, groups)),
            f"{name}.weight_shape": (torch.int64, (2,)),
        }
        if not scheme.symmetric:
            specs[f"{name}.weight_zero_point"] = (torch.int32, (words_for(n, scheme.bits), groups))
        return specs

    def encode(self, name: str, quantized: QuantizedWeight, scales_dtype: torch.dtype) -> dict[str, Tensor]:
        """Pack the codes. Raises FormatError for what the format cannot hold."""
        checks.require_encodable(self.name, name, quantized)
        tensors = {
            f"{name}.weight_packed": pack_stream(quantized.codes, quantized.bits),
            f"{name}.weight_scale": checks.export_scales(name, quantized.scales, scales_dtype).contiguous(),
            f"{name}.weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64),
        }
        if not quantized.symmetric:
            tensors[f"{name}.weight_zero_point"] = pack_stream(quantized.zeros.t(), quantized.bits).t().contiguous()
        return tensors

    def decode(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """Unpack the codes. Raises FormatError for damage and run-time permutations."""
        quantized = self._unpack(name, tensors, scheme)
        checks.require_trivial_order(f"{name}.weight_g_idx", tensors, quantized.codes.shape[1], quantized.group_size)
        return quantized

    def decode_ordered(
        self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme
    ) -> tuple[QuantizedWeight, Tensor | None]:
        """Unpack the codes, and the group of each column, which releases before 0.16 wrote for actorder "group"."""
        quantized = self._unpack(name, tensors, scheme)
        order = checks.read_order(f"{name}.weight_g_idx", tensors, quantized.codes.shape[1], quantized.group_size)
        return quantized, order

    def read_zeros(self, name: str, tensors: Mapping[str, Tensor], grid: tuple[int, int], scheme: Scheme) -> Tensor:
        """Zero points ``[N, G]``; symmetric weights store none. Raises FormatError for damage."""
        rows, groups = grid
        if scheme.symmetric:
            device = tensors[f"{name}.weight_scale"].device
            return torch.full(grid, 1 << (scheme.bits - 1), dtype=torch.uint8, device=device)
        stored = checks.take(tensors, f"{name}.weight_zero_point", (torch.int32,), 2)
        checks.require_shape(f"{name}.weight_zero_point", stored, (words_for(rows, scheme.bits), groups))
        return unpack_stream(stored.t().contiguous(), scheme.bits, rows).t().contiguous()

    def order_name(self, name: str) -> str | None:
        """The tensor with the group of each column."""
        return f"{name}.weight_g_idx"

    def _unpack(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        bits = scheme.bits
        shape = checks.take(tensors, f"{name}.weight_shape", (torch.int64, torch.int32), 1)
        checks.require_shape(f"{name}.weight_shape", shape, (2,))
        rows, columns = (int(size) for size in shape)
        group_size, groups = checks.groups_of(name, columns, scheme)
        packed = checks.take(tensors, f"{name}.weight_packed", (torch.int32,), 2)
        checks.require_shape(f"{name}.weight_packed", packed, (rows, words_for(columns, bits)))
        scales = checks.read_scales(f"{name}.weight_scale", tensors, (rows, groups))
        return QuantizedWeight(
            codes=unpack_stream(packed, bits, columns),
            scales=scales,
            zeros=self.read_zeros(name, tensors, (rows, groups), scheme),
            bits=bits,
            group_size=group_size,
            symmetric=scheme.symmetric,
        )

    def quantization_config(
        self, schemes: Mapping[str, Scheme | None], *, damping: float | None, version: str
    ) -> Config:
        """The block for config.json: the commonest scheme for every Linear, the others by exact module names.

        A packed head is named in any case: vLLM's is no Linear. By a pattern, for it may be ``language_model.lm_head``
        there, and of names vLLM changes only those with a dot. A fused module is named beside its members: SGLang's
        Llama and others look for its own name. Experts are looked up one by one.
        Our own metadata stands at the top level because readers refuse unknown keys inside a group.
        """
        default = capability.common_scheme(schemes)
        others = [name for name in schemes if not EXPERTS.match(name)]
        members: dict[Scheme, list[str]] = {default: ["Linear"]}
        for name, scheme in schemes.items():
            if scheme is not None and (scheme != default or capability.is_head(name)):
                target = rf"re:(?:.+\.)?{name.rpartition('.')[2]}$" if capability.is_head(name) else name
                members.setdefault(scheme, []).append(target)
        return {
            "quant_method": "compressed-tensors",
            "format": LAYOUT,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{index}": {"targets": listed_for_engines(targets, others), "weights": _weights_block(scheme)}
                for index, (scheme, targets) in enumerate(members.items())
            },
            "ignore": listed_for_engines([name for name, scheme in schemes.items() if scheme is None], others),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "version": LIBRARY_VERSION,
            "meta": {"quantizer": [f"ptq:{version}"]},
        }

    def parse_config(
        self, config: Config, linears: Iterable[str], stored: Mapping[str, str] | None = None
    ) -> dict[str, Scheme | None]:
        """Scheme of each Linear: an exact name wins over a ``re:`` pattern, which wins over a class name."""
        if config.get("quantization_status") not in (None, "compressed"):
            raise FormatError(
                f"quantization_status must be 'compressed', found {config['quantization_status']!r}: the file holds "
                "no packed weights"
            )
        used = [key for key in UNREADABLE_SETTINGS if config.get(key)]
        if used:
            raise FormatError(f"this checkpoint needs {', '.join(used)}, which is not read; only packed weights are")
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise FormatError(f"compressed-tensors needs config_groups, found {groups!r}")
        targets: dict[str, Scheme] = {}
        for label in groups:
            group = checks.optional(groups, label, dict)
            scheme = self._scheme(label, group, config)
            for target in checks.names(group, "targets"):
                targets.setdefault(target, scheme)
        ignored = checks.names(config, "ignore")
        spelled = {name: spellings(name, stored) for name in linears}
        return {n: None if _best_match(names, ignored) else _lookup(names, targets) for n, names in spelled.items()}

    def _scheme(self, label: str, group: Mapping[str, Any], config: Config) -> Scheme:
        layout = group.get("format") or config.get("format")
        weights = checks.optional(group, "weights", dict)
        activations = [key for key in ("input_activations", "output_activations") if group.get(key)]
        unread = {
            "format": layout if layout != LAYOUT else None,
            "type": weights.get("type") if weights.get("type", "int") != "int" else None,
            "dynamic": weights.get("dynamic") or None,
            "actorder": None if weights.get("actorder") in ACTORDERS else weights["actorder"],
            "activations": activations or None,
        }
        unread = {key: value for key, value in unread.items() if value is not None}
        if unread or not weights:
            raise FormatError(
                f"{label} of config_groups must describe packed integer weights with float activations, "
                f"found {unread or 'no weights'}"
            )
        group_size = weights.get("group_size")
        strategy = weights.get("strategy") or ("channel" if group_size in (None, -1) else "group")
        if strategy == "channel":
            group_size = -1
        elif strategy != "group" or type(group_size) is not int:
            raise FormatError(
                f"{label} of config_groups must have strategy 'channel', or 'group' with a group_size, "
                f"found {strategy!r} with {group_size!r}"
            )
        symmetric = checks.setting({"symmetric": True, **weights}, ("symmetric",), bool)
        return checks.read_scheme(weights, capability.widths_of(self.name), group_size, symmetric=symmetric)


def _weights_block(scheme: Scheme) -> dict[str, Any]:
    block: dict[str, Any] = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False}
    if scheme.group_size == -1:
        return {**block, "strategy": "channel"}
    return {**block, "strategy": "group", "group_size": scheme.group_size}


def _lookup(names: Sequence[str], targets: Mapping[str, Scheme]) -> Scheme | None:
    target = _best_match(names, targets)
    return None if target is None else targets[target]


def _best_match(names: Sequence[str], targets: Iterable[str]) -> str | None:
    """The most specific target that covers a Linear of one of these names. Raises FormatError for a bad pattern."""
    matches: dict[int, str] = {}
    for name, target in product(names, targets):
        if target.startswith("re:"):
            try:
                rank = 1 if re.match(target.removeprefix("re:"), name) else None
            except re.error as error:
                raise FormatError(f"target {target!r} must be a regular expression: {error}") from error
        else:
            rank = 0 if target == name else 2 if target == "Linear" else None
        if rank is not None:
            matches.setdefault(rank, target)
    return matches[min(matches)] if matches else None
