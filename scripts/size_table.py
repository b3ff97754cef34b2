"""Sizes of well-known models at each number of bits, from their shapes: the tables in docs/bits.md.

Every architecture is built on ``meta`` with one block; a packed Linear takes what the gptq format writes for it, all
else 2 bytes a parameter. Blocks are alike, so one of them and what is outside give the whole.
"""

import argparse
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from ptq.formats import CODECS
from ptq.formats.codec import Scheme
from ptq.models.experts import routers
from ptq.models.loading import build_skeleton
from ptq.models.structure import find_blocks, linears, weight_shape

LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
QWEN = {"model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
# As in each model's config.json.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {**QWEN, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "tie_word_embeddings": True},
    "Llama-3.2-1B": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "num_attention_heads": 32, "head_dim": 64, "tie_word_embeddings": True},
    "Qwen3-4B": {**QWEN, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "tie_word_embeddings": True},
    "Llama-3-8B": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "head_dim": 128},
    "Qwen3-32B": {**QWEN, "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
                  "num_attention_heads": 64, "tie_word_embeddings": False},
    "Mixtral-8x7B": {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000,
                     "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                     "num_local_experts": 8, "tie_word_embeddings": False},
    "Llama-3-70B": {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64, "head_dim": 128},
}  # fmt: skip
WIDTHS = (16, 8, 4, 3, 2)
GROUP = 128
MEMORY = (6, 8, 12, 16, 24, 48, 80)  # GB
CONTEXT = 8192  # tokens whose keys and values are kept
REST = 1.0  # GB left for everything else
HALF = 2  # bytes of bfloat16


class Sizes(NamedTuple):
    """Of one model: parameters, bytes of its checkpoint by bits a code, bytes of keys and values a token."""

    parameters: int
    checkpoint: dict[int, int]
    cache: int


def sizes(settings: dict[str, Any]) -> Sizes:
    """Count one model; 16 bits is the float model in bfloat16, everything but Linears of the blocks stays so."""
    depth = settings["num_hidden_layers"]
    config = AutoConfig.for_model(**{**settings, "num_hidden_layers": 1})
    model = build_skeleton(config, torch.bfloat16)
    blocks, beside = find_blocks(model), routers(model)
    packed = {p: weight_shape(m) for p, m in linears(model) if p.startswith(f"{blocks}.") and p not in beside}
    tied = model.get_output_embeddings().weight if settings["tie_word_embeddings"] else None  # stored once
    parameters, checkpoint = 0, dict.fromkeys(WIDTHS, 0)
    for name, parameter in model.named_parameters():
        if parameter is tied:
            continue
        times = depth if name.startswith(f"{blocks}.") else 1
        parameters += times * parameter.numel()
        path = name.removesuffix(".weight")
        for bits in WIDTHS:
            kept = bits == 16 or path not in packed
            size = HALF * parameter.numel() if kept else _packed(path, packed[path], bits)
            checkpoint[bits] += times * size
    cache = 2 * HALF * depth * settings["num_key_value_heads"] * settings["head_dim"]
    return Sizes(parameters, checkpoint, cache)


def _packed(path: str, shape: tuple[int, int], bits: int) -> int:
    """Bytes of the tensors of one Linear ``[N, K]``, as in `ptq.plan_size.estimate_size`."""
    codec = CODECS["gptq"]
    specs = codec.tensor_specs(path, *shape, Scheme(bits, GROUP, True), codec.scales_dtype(torch.bfloat16))
    return sum(torch.Size(size).numel() * dtype.itemsize for dtype, size in specs.values())


def size_table(found: dict[str, Sizes]) -> str:
    """GB of each model's checkpoint at each width, and of the keys and values of `CONTEXT` tokens."""
    head = ["model", "parameters", "bfloat16", *(f"{bits} bits" for bits in WIDTHS[1:]), f"cache, {CONTEXT} tokens"]
    rows = [
        [name, f"{each.parameters / 1e9:.2f} G", *(f"{each.checkpoint[bits] / 1e9:.2f}" for bits in WIDTHS),
         f"{CONTEXT * each.cache / 1e9:.2f}"]
        for name, each in found.items()
    ]  # fmt: skip
    return _markdown(head, rows)


def fit_table(found: dict[str, Sizes]) -> str:
    """The widest codes with which each model fits each memory, with a cache of `CONTEXT` tokens and `REST` GB left."""
    rows = []
    for name, each in found.items():
        beside = CONTEXT * each.cache + REST * 1e9
        fitting = [[b for b in WIDTHS if each.checkpoint[b] + beside <= memory * 1e9] for memory in MEMORY]
        rows.append([name, *(str(widths[0]) if widths else "-" for widths in fitting)])
    return _markdown(["memory", *(f"{memory} GB" for memory in MEMORY)], rows)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    about = "Prints the two tables of docs/bits.md: sizes of well-known models, and the widest codes that fit a memory."
    argparse.ArgumentParser(prog="scripts/size_table", description=about).parse_args()
    all_sizes = {name: sizes(settings) for name, settings in MODELS.items()}
    print(size_table(all_sizes), fit_table(all_sizes), sep="\n\n")
