"""Checkpoints of any tool as dense float32 tensors: a reader that shares no code with the tools it reads.

Codes are taken from the words bit by bit; nothing is vectorised for speed. Bits and group sizes follow from the shapes
of the tensors, so that only the layout is taken from config.json. Layouts: GPTQ v1 and v2, AWQ GEMM,
compressed-tensors pack-quantized, and AutoRound's names for the first two.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

# Position of columns 0 .. 7 among the eight nibbles of an AWQ word.
AWQ_POSITIONS = (0, 4, 1, 5, 2, 6, 3, 7)
AUTO_ROUND_LAYOUTS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round": "gptq_v2",
    "auto_round:auto_awq": "awq",
}


class Dense(NamedTuple):
    """A checkpoint's tensors under the parent's names, and the stored bits of a quantized weight."""

    tensors: dict[str, Tensor]
    quantized: tuple[str, ...]  # modules
    bits_per_weight: float


class Codes(NamedTuple):
    """Codes and zeros ``int64``, scales ``float32``: ``[N, K]``, ``[N, G]``, ``[N, G]``; ``group_K`` of each column."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    group_K: Tensor

    def dense(self) -> Tensor:
        """``scale * (code - zero)``, float32 ``[N, K]``."""
        return self.scales[:, self.group_K] * (self.codes - self.zeros[:, self.group_K]).float()


def read_dense(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> Dense:
    """Read a checkpoint.

    Args:
        directory: of the checkpoint.
        shapes: of the parent's tensors, by name.

    Raises:
        ValueError: a layout that is not known, or tensors that do not fit the parent's.
    """
    stored = read_tensors(directory)
    layout = layout_of(json.loads((directory / "config.json").read_text()).get("quantization_config", {}))
    tensors = {name: stored[name].float() for name in shapes if name in stored}
    quantized, payload, weights = [], 0, 0
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        parts = {key.removeprefix(f"{module}."): t for key, t in stored.items() if key.startswith(f"{module}.")}
        if name in stored or not parts:
            continue
        codes = DECODERS[layout](parts, shape)
        tensors[name] = codes.dense()
        quantized.append(module)
        payload += 8 * sum(t.nbytes for key, t in parts.items() if key not in ("g_idx", "weight_shape", "bias"))
        if not torch.equal(codes.group_K, _in_order(codes)):
            payload += 8 * parts["g_idx"].nbytes  # an order that cannot be done without
        weights += codes.codes.numel()
    return Dense(tensors, tuple(quantized), payload / weights)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory's safetensors files."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    return tensors


def layout_of(settings: Mapping[str, Any]) -> str:
    """The layout a ``quantization_config`` means. Raises ValueError."""
    method = settings.get("quant_method")
    if method == "gptq" and "gptq_v2" in (settings.get("checkpoint_format"), settings.get("format")):
        return "gptq_v2"
    if method == "auto-round":
        return AUTO_ROUND_LAYOUTS[settings["packing_format"]]
    if method not in DECODERS:
        raise ValueError(f"quant_method must be one of {', '.join(DECODERS)} or auto-round, found {method!r}")
    return str(method)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes, int64 ``[R, count]``, of int32 words ``[R, W]``; least significant bits come first."""
    position = torch.arange(count * bits)
    stream = (words.long()[:, position // 32] >> (position % 32)) & 1
    return (stream.view(len(words), count, bits) << torch.arange(bits)).sum(-1)


def _gptq(parts: Mapping[str, Tensor], shape: tuple[int, ...], *, zero_offset: int) -> Codes:
    n, k = shape
    bits = 32 * parts["qweight"].numel() // (n * k)
    scales = parts["scales"].float().t()
    groups = scales.shape[1]
    codes = unpack(parts["qweight"].t(), bits, k)
    zeros = (unpack(parts["qzeros"], bits, n) + zero_offset).t()
    group_K = parts["g_idx"].long() if "g_idx" in parts else torch.arange(k) // (k // groups)
    return _checked(Codes(codes, zeros, scales, group_K), shape)


def _gptq_v1(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Codes:
    return _gptq(parts, shape, zero_offset=1)


def _gptq_v2(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Codes:
    return _gptq(parts, shape, zero_offset=0)


def _awq(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Codes:
    n, k = shape

    def columns(words: Tensor) -> Tensor:
        return unpack(words, 4, n).view(len(words), n // 8, 8)[..., AWQ_POSITIONS].reshape(len(words), n)

    scales = parts["scales"].float().t()
    group_K = torch.arange(k) // (k // scales.shape[1])
    return _checked(Codes(columns(parts["qweight"]).t(), columns(parts["qzeros"]).t(), scales, group_K), shape)


def _compressed(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Codes:
    n, k = shape
    words = parts["weight_packed"]
    bits = 32 * words.shape[1] // k
    scales = parts["weight_scale"].float()
    zeros = torch.full(scales.shape, 1 << (bits - 1))
    if "weight_zero_point" in parts:
        zeros = unpack(parts["weight_zero_point"].t(), bits, n).t()
    group_K = torch.arange(k) // (k // scales.shape[1])
    return _checked(Codes(unpack(words, bits, k), zeros, scales, group_K), shape)


DECODERS = {"gptq": _gptq_v1, "gptq_v2": _gptq_v2, "awq": _awq, "compressed-tensors": _compressed}


def _in_order(codes: Codes) -> Tensor:
    k, groups = codes.codes.shape[1], codes.scales.shape[1]
    return torch.arange(k) // (k // groups)


def _checked(codes: Codes, shape: tuple[int, ...]) -> Codes:
    grid = (shape[0], int(codes.group_K.max()) + 1)
    found = [tuple(t.shape) for t in codes[:3]]
    if found != [tuple(shape), grid, grid]:
        raise ValueError(f"codes, zeros and scales must be {[tuple(shape), grid, grid]} for this weight, found {found}")
    return codes
