"""The canonical result of quantization, from which every format is written and to which every format is read.

Codes are computed once, by a solver, and every codec packs these codes; a dense weight is never quantized a second
time on export (rounding ``w / s + z`` again in half precision can flip codes).
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

WIDTHS = (2, 3, 4, 8)  # bits that kernels run
Config = dict[str, Any]  # the quantization_config block of config.json
TensorSpec = tuple[torch.dtype, tuple[int, ...]]

# vLLM and SGLang fuse these siblings into one module.
FUSED_LINEARS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
EXPERTS = re.compile(r"(.*\.experts)\.\d+\.")


class Scheme(NamedTuple):
    """How one Linear is to be (or was) quantized."""

    bits: int
    group_size: int  # columns of a group; -1: one group a row ("per channel")
    symmetric: bool

    def columns(self, in_features: int) -> int:
        """Columns of one group once -1 is resolved."""
        return in_features if self.group_size == -1 else self.group_size


def spellings(name: str, stored: Mapping[str, str] | None) -> tuple[str, ...]:
    """A Linear's names by which a configuration may mean it: the file's before the model's."""
    return tuple(dict.fromkeys(((stored or {}).get(name, name), name)))


def fused_modules(names: Iterable[str]) -> dict[str, list[str]]:
    """What engines run as one module, by its name there: q, k, v; gate, up; all experts of a layer."""
    found: dict[str, list[str]] = {}
    for name in names:
        experts = EXPERTS.match(name)
        parent, dot, leaf = name.rpartition(".")
        for fused, members in FUSED_LINEARS.items():
            if experts:
                found.setdefault(experts[1], []).append(name)
                break
            if leaf in members:
                found.setdefault(f"{parent}{dot}{fused}", []).append(name)
    whole = {fused: len(members) for fused, members in FUSED_LINEARS.items()}
    return {name: each for name, each in found.items() if len(each) == whole.get(name.rpartition(".")[2], len(each))}


def listed_for_engines(listed: Collection[str], names: Iterable[str]) -> list[str]:
    """``listed``, some of ``names``, and the fused modules that hold no other: SGLang may ask for these alone."""
    chosen = set(listed)
    return [*listed, *(fused for fused, members in fused_modules(names).items() if chosen.issuperset(members))]


class QuantizedWeight(NamedTuple):
    """One quantized ``[N, K]`` weight with ``G`` groups of ``group_size`` consecutive columns a row.

    ``weight[n, k] = scales[n, k // group_size] * (codes[n, k] - zeros[n, k // group_size])``
    """

    codes: Tensor  # uint8 [N, K], 0 .. 2**bits - 1
    scales: Tensor  # float32 [N, G]; never zero; may be negative; every value exact in the export dtype
    zeros: Tensor  # uint8 [N, G]; 2**(bits-1) everywhere when symmetric
    bits: int
    group_size: int  # resolved, never -1: K // G
    symmetric: bool

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense ``[N, K]`` weight; the product is formed in float32 and rounded once."""
        n, k = self.codes.shape
        grouped = self.codes.view(n, -1, self.group_size).float()
        dense = (grouped - self.zeros.float().unsqueeze(-1)) * self.scales.float().unsqueeze(-1)
        return dense.view(n, k).to(dtype)

    def rows(self, part: slice) -> "QuantizedWeight":
        """Some rows of it."""
        return self._replace(codes=self.codes[part], scales=self.scales[part], zeros=self.zeros[part])

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """The same on another device."""
        return self._replace(codes=self.codes.to(device), scales=self.scales.to(device), zeros=self.zeros.to(device))


class Codec(Protocol):
    """One on-disk format: pure functions between `QuantizedWeight` and named tensors, and its configuration block."""

    @property
    def name(self) -> str:
        """The key of `ptq.formats.CODECS`."""

    def scales_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype scales are written in, for a model of ``model_dtype``."""

    def check(self, schemes: Mapping[str, Scheme | None], shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ConfigError for the first module (``(N, K)`` in ``shapes``) the format cannot hold; None is float."""

    def encode(self, name: str, quantized: QuantizedWeight, scales_dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of one module, without its bias. Raises FormatError rather than re-round or wrap a value."""

    def decode(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """Exact inverse of `encode`, scales as float32. Raises FormatError naming the tensor, expected and found.

        Columns whose groups are not contiguous are refused: see `decode_ordered`.
        """

    def decode_ordered(
        self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme
    ) -> tuple[QuantizedWeight, Tensor | None]:
        """As `decode`, but a weight may come with the group of each column, int64 ``[K]`` (act-order).

        ``scales[:, g]`` and ``zeros[:, g]`` then belong to the columns whose group is ``g``. None: column k is in group
        ``k // group_size``.
        """

    def read_zeros(self, name: str, tensors: Mapping[str, Tensor], grid: tuple[int, int], scheme: Scheme) -> Tensor:
        """Zero points uint8 ``[N, G]`` (``grid``) of one module. Raises FormatError for damage and ambiguous ones."""

    def order_name(self, name: str) -> str | None:
        """The tensor with the group of each column; None where the format cannot say it."""

    def tensor_names(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        """Checkpoint names that may hold one quantized module, without its bias; `decode` says which one it misses."""

    def tensor_specs(
        self, name: str, n: int, k: int, scheme: Scheme, scales_dtype: torch.dtype
    ) -> dict[str, TensorSpec]:
        """Dtype and shape of what `encode` writes for an ``[N, K]`` weight, without data."""

    def quantization_config(
        self, schemes: Mapping[str, Scheme | None], *, damping: float | None, version: str
    ) -> Config:
        """The ``quantization_config`` block; ``version`` is this package's, ``damping`` GPTQ's if it ran."""

    def parse_config(
        self, config: Config, linears: Iterable[str], stored: Mapping[str, str] | None = None
    ) -> dict[str, Scheme | None]:
        """The scheme of each named Linear, None for float.

        ``stored`` has what a file calls them, where that differs: the most specific rule for either name counts.

        Raises:
            FormatError: what cannot be honoured.
        """
