"""Write a random Llama-3-8B-shaped checkpoint as the hub keeps it: bfloat16 shards of 5 GB and an index.

``python benchmarks/random_model.py FOLDER [--layers 32]``: 16 GB with all layers, written tensor by tensor, so that it
takes the memory of the largest one. As in real models columns differ in scale and a few inputs are far stronger than
the rest: norms and columns are log-normal with outliers. The tokenizer is the example's, whose ids are the first of the
vocabulary.
"""

import argparse
import json
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "examples" / "tiny-llama"
SHARD = 5 * 10**9  # bytes
WIDTH, INNER, HEADS, KV_HEADS, VOCABULARY = 4096, 14336, 32, 8, 128256
OUTLIERS, STRENGTH = 0.002, 8.0  # share of the columns that are stronger, and how much


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors, in the order of the hub's files."""
    yield "model.embed_tokens.weight", (VOCABULARY, WIDTH)
    inner = WIDTH * KV_HEADS // HEADS
    for i in range(layers):
        block = f"model.layers.{i}."
        yield block + "input_layernorm.weight", (WIDTH,)
        for name, n in (("q", WIDTH), ("k", inner), ("v", inner), ("o", WIDTH)):
            yield f"{block}self_attn.{name}_proj.weight", (n, WIDTH)
        yield block + "post_attention_layernorm.weight", (WIDTH,)
        yield block + "mlp.gate_proj.weight", (INNER, WIDTH)
        yield block + "mlp.up_proj.weight", (INNER, WIDTH)
        yield block + "mlp.down_proj.weight", (WIDTH, INNER)
    yield "model.norm.weight", (WIDTH,)
    yield "lm_head.weight", (VOCABULARY, WIDTH)


def column_scales(size: int, spread: float, generator: torch.Generator) -> Tensor:
    """Log-normal, with outliers."""
    scales = torch.exp(spread * torch.randn(size, generator=generator))
    strong = torch.rand(size, generator=generator) < OUTLIERS
    return torch.where(strong, scales * STRENGTH, scales)


def random_tensor(name: str, shape: tuple[int, ...], layers: int, generator: torch.Generator) -> Tensor:
    """A weight whose outputs keep the size of its inputs; what is added to the residual is smaller with depth."""
    if len(shape) == 1:
        return column_scales(shape[0], 0.3, generator).bfloat16()
    weight = torch.empty(shape, dtype=torch.bfloat16)
    scales = column_scales(shape[1], 0.3, generator)
    scales *= 1 / math.sqrt(shape[1]) / scales.square().mean().sqrt()
    if "embed" in name:
        scales = torch.full((shape[1],), 0.02)
    elif name.endswith(("o_proj.weight", "down_proj.weight")):
        scales *= 1 / math.sqrt(2 * layers)
    for rows in weight.split(2048):
        rows.copy_(torch.randn(rows.shape, generator=generator) * scales)
    return weight


def in_shards(layers: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Tensors by file: a file is full when the next one would take it past its size."""
    files: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    used = 0
    for name, shape in shapes(layers):
        size = 2 * math.prod(shape)
        if files[-1] and used + size > SHARD:
            files.append([])
            used = 0
        files[-1].append((name, shape))
        used += size
    return files


def write(folder: Path, layers: int, seed: int = 0) -> None:
    """Write shards, index, configuration and tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    files = in_shards(layers)
    index: dict[str, str] = {}
    for number, tensors in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header, end = {}, 0
        for name, shape in tensors:
            index[name] = file
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name, shape in tensors:
                out.write(random_tensor(name, shape, layers, generator).view(torch.uint8).numpy().data)
    total = sum(2 * math.prod(shape) for _, shape in shapes(layers))
    document = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, vocab_size=VOCABULARY, max_position_embeddings=8192,
        rope_theta=500000.0, tie_word_embeddings=False, dtype="bfloat16",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    ).save_pretrained(folder)  # fmt: skip


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    if options.folder.exists() and shutil.disk_usage(options.folder).free < 20 * 10**9:
        parser.error("16 GB are written; there is too little room")
    write(options.folder, options.layers)


if __name__ == "__main__":
    main()
