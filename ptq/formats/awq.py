"""AWQ checkpoints in the GEMM layout of AutoAWQ: the most widely read 4-bit container with explicit zeros.

``qweight`` int32 ``[K, N/8]`` and ``qzeros`` int32 ``[G, N/8]`` are packed along N, eight codes a word in the order
0 2 4 6 1 3 5 7; ``scales`` float16 ``[G, N]``. Zeros are the true zeros; symmetric weights store 8 everywhere.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.formats import capability, checks
from ptq.formats.bitpack import pack_stream, unpack_stream
from ptq.formats.codec import Config, QuantizedWeight, Scheme, TensorSpec, listed_for_engines, spellings

BITS = 4
PACK_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column PACK_ORDER[i]
UNPACK_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the inverse permutation


@dataclass(frozen=True)
class AwqCodec:
    """See `ptq.formats.codec.Codec` for the methods."""

    name: str = "awq"

    def scales_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Always float16, as every AWQ kernel expects."""
        return torch.float16

    def check(self, schemes: Mapping[str, Scheme | None], shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ConfigError for what cannot be written."""
        capability.check_schemes(self.name, schemes, shapes)

    def tensor_names(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        """The three tensors of a module."""
        return f"{name}.qweight", f"{name}.qzeros", f"{name}.scales"

    def tensor_specs(
        self, name: str, n: int, k: int, scheme: Scheme, scales_dtype: torch.dtype
    ) -> dict[str, TensorSpec]:
        """Dtype and shape of each tensor of an ``[N, K]`` weight."""
        groups = k // scheme.columns(k)
        return {
            f"{name}.qweight": (torch.int32, (k, n // 8)),
            f"{name}.qzeros": (torch.int32, (groups, n // 8)),
            f"{name}.scales": (scales_dtype, (groups, n)),
        }

    def encode(self, name: str, quantized: QuantizedWeight, scales_dtype: torch.dtype) -> dict[str, Tensor]:
        """Pack the codes. Raises FormatError for what the format cannot hold."""
        checks.require_encodable(self.name, name, quantized)
        scales = checks.export_scales(name, quantized.scales, scales_dtype)
        return {
            f"{name}.qweight": _pack_rows(quantized.codes.t()),
            f"{name}.qzeros": _pack_rows(quantized.zeros.t()),
            f"{name}.scales": scales.t().contiguous(),
        }

    def decode(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """Unpack the codes. Raises FormatError for damage and for zeros other than 8 in a symmetric weight."""
        qweight = checks.take(tensors, f"{name}.qweight", (torch.int32,), 2)
        columns, rows = qweight.shape[0], qweight.shape[1] * 8
        group_size, groups = checks.groups_of(name, columns, scheme)
        scales = checks.read_scales(f"{name}.scales", tensors, (groups, rows))
        return QuantizedWeight(
            codes=_unpack_rows(qweight).t().contiguous(),
            scales=scales.t().contiguous(),
            zeros=self.read_zeros(name, tensors, (rows, groups), scheme),
            bits=BITS,
            group_size=group_size,
            symmetric=scheme.symmetric,
        )

    def decode_ordered(
        self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme
    ) -> tuple[QuantizedWeight, Tensor | None]:
        """As `decode`: groups are contiguous in this format."""
        return self.decode(name, tensors, scheme), None

    def read_zeros(self, name: str, tensors: Mapping[str, Tensor], grid: tuple[int, int], scheme: Scheme) -> Tensor:
        """Zero points ``[N, G]``. Raises FormatError for damage and for zeros other than 8 in a symmetric weight."""
        rows, groups = grid
        qzeros = checks.take(tensors, f"{name}.qzeros", (torch.int32,), 2)
        checks.require_shape(f"{name}.qzeros", qzeros, (groups, rows // 8))
        zeros = _unpack_rows(qzeros)
        checks.require_zeros(f"{name}.qzeros", zeros, BITS, symmetric=scheme.symmetric)
        return zeros.t().contiguous()

    def order_name(self, name: str) -> str | None:
        """The format has no act-order."""
        return None

    def quantization_config(
        self, schemes: Mapping[str, Scheme | None], *, damping: float | None, version: str
    ) -> Config:
        """The block for config.json. ``zero_point`` is always true: without it readers fall to slow kernels.

        Readers match ``modules_to_not_convert`` in three different ways; only full names mean the same to all. SGLang
        asks whether an entry is part of a fused module's name, so that is listed beside its members.
        """
        default = capability.common_scheme(schemes)
        return {
            "quant_method": "awq",
            "bits": default.bits,
            "group_size": default.group_size,
            "zero_point": True,
            "version": "gemm",
            "lm_head": any(capability.is_head(name) and scheme for name, scheme in schemes.items()),
            "modules_to_not_convert": listed_for_engines(
                [n for n, scheme in schemes.items() if scheme is None], schemes
            ),
            "meta": {"quantizer": [f"ptq:{version}"], "symmetric": default.symmetric},
        }

    def parse_config(
        self, config: Config, linears: Iterable[str], stored: Mapping[str, str] | None = None
    ) -> dict[str, Scheme | None]:
        """Scheme of each Linear. An entry of ``modules_to_not_convert`` matches whole name components.

        Other writers do not say whether all zeros are 8, so their weights are read as asymmetric.
        """
        group_size = checks.setting(config, ("group_size", "q_group_size"), int)
        symmetric = checks.optional(config, "meta", dict).get("symmetric") is True
        scheme = checks.read_scheme(config, (BITS,), group_size, symmetric=symmetric)
        skipped = checks.names(config, "modules_to_not_convert")
        checks.optional(config, "zero_point", bool)
        head = checks.optional(config, "lm_head", bool)
        return {
            name: None
            if (capability.is_head(name) and not head)
            or any(f".{entry}." in f".{each}." for entry in skipped for each in spellings(name, stored))
            else scheme
            for name in linears
        }


def _pack_rows(codes: Tensor) -> Tensor:
    """uint8 ``[R, N]`` to int32 ``[R, N/8]``."""
    grouped = codes.reshape(codes.shape[0], codes.shape[1] // 8, 8)[..., PACK_ORDER]
    return pack_stream(grouped.reshape(codes.shape), BITS)


def _unpack_rows(words: Tensor) -> Tensor:
    """int32 ``[R, N/8]`` to uint8 ``[R, N]``."""
    codes = unpack_stream(words, BITS, words.shape[1] * 8)
    return codes.view(words.shape[0], words.shape[1], 8)[..., UNPACK_ORDER].reshape(codes.shape)
