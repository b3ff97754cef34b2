"""Checkpoints with random weights: dense bfloat16, or packed by a codec of ptq. One tensor at a time is in memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.whole_model.shapes import Shape
from ptq.formats import CODECS
from ptq.formats.checkpoint import ShardWriter, atomic_write_text, staged_directory
from ptq.formats.codec import QuantizedWeight, Scheme
from ptq.version import VERSION

DEVIATION = 0.02  # of a dense weight; transformers' own for random initialisation
UNIFORM_CODES = 4.6  # standard deviation of 0 .. 15
SHARD_BYTES = 2e9
CONTEXT = 4096


class Packing(NamedTuple):
    """What is packed: groups of so many columns in the blocks, and the head as well or not."""

    group_size: int
    head: bool


def write_checkpoint(shape: Shape, packing: Packing | None, directory: Path) -> None:
    """Write a checkpoint of random weights, in bfloat16 where `packing` is None; a directory that exists is kept."""
    if directory.exists():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with staged_directory(directory, overwrite=False) as staged:
        writer = ShardWriter(staged, SHARD_BYTES)
        for tensors in _tensors(shape, packing):
            writer.add(tensors)
        writer.finish()
        atomic_write_text(staged / "config.json", json.dumps(_config(shape, packing), indent=1) + "\n")


def _config(shape: Shape, packing: Packing | None) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[shape.model_type]],
        "model_type": shape.model_type,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": shape.tied and not (packing and packing.head),
        "dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if packing is not None:
        scheme = _scheme(packing)
        schemes: dict[str, Scheme | None] = {
            f"model.layers.{i}.{name}": scheme for i in range(shape.layers) for name in shape.linears()
        }
        schemes["lm_head"] = scheme if packing.head else None
        settings["quantization_config"] = CODECS["gptq"].quantization_config(schemes, damping=None, version=VERSION)
    return settings


def _scheme(packing: Packing) -> Scheme:
    return Scheme(bits=4, group_size=packing.group_size, symmetric=True)


def _tensors(shape: Shape, packing: Packing | None) -> Iterator[dict[str, Tensor]]:
    yield {"model.embed_tokens.weight": _dense(shape.vocabulary, shape.hidden)}
    for index in range(shape.layers):
        path = f"model.layers.{index}"
        for name, (n, k) in shape.linears().items():
            yield _linear(f"{path}.{name}", n, k, packing)
        yield {f"{path}.{name}.weight": _ones(width) for name, width in shape.norms().items()}
    yield {"model.norm.weight": _ones(shape.hidden)}
    head = packing if packing and packing.head else None
    if head or not shape.tied:
        yield _linear("lm_head", shape.vocabulary, shape.hidden, head)


def _linear(name: str, n: int, k: int, packing: Packing | None) -> dict[str, Tensor]:
    if packing is None:
        return {f"{name}.weight": _dense(n, k)}
    groups = k // packing.group_size
    weight = QuantizedWeight(
        codes=torch.randint(16, (n, k), dtype=torch.uint8),
        scales=(torch.rand(n, groups) + 0.5).mul_(DEVIATION / UNIFORM_CODES).half().float(),
        zeros=torch.full((n, groups), 8, dtype=torch.uint8),
        bits=4,
        group_size=packing.group_size,
        symmetric=True,
    )
    return CODECS["gptq"].encode(name, weight, torch.float16)


def _dense(n: int, k: int) -> Tensor:
    return torch.empty(n, k, dtype=torch.bfloat16).normal_(0, DEVIATION)


def _ones(width: int) -> Tensor:
    return torch.ones(width, dtype=torch.bfloat16)
