"""Decodes with a Llama-3-8B-shaped model of random weights, 4-bit and bfloat16, by CUDA graphs: tokens a second.

Run:    python kernels/bench/gpu_decode.py out.json [--tiny]
Attention reads a static cache that is already half full. Every layer has its own weights, so no cache holds them from
token to token. q, k, v and gate, up are one product each; the head is bfloat16 and, in a further run, 4 bits.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_linear import ours, random_weight

Linear = Callable[[Tensor], Tensor]


class Shape(NamedTuple):
    """The sizes of a Llama."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    cached: int  # positions in the cache


LLAMA_8B = Shape(32, 4096, 32, 8, 14336, 128256, 1024)
TINY = Shape(2, 256, 4, 2, 512, 512, 32)


def linear(n: int, k: int, quantized: bool, device: torch.device) -> Linear:
    """A product with a random weight ``[N, K]``."""
    weight = random_weight(n, k, device)
    if quantized:
        return ours(weight)[0]
    return partial(_dense, weight.dense())


def _dense(weight: Tensor, x: Tensor) -> Tensor:
    return functional.linear(x, weight)


class Decoder:
    """One step of decoding for a batch: embeddings in, the most likely token out."""

    def __init__(self, shape: Shape, batch: int, quantized: bool, quantized_head: bool, device: torch.device) -> None:
        self.shape, self.batch = shape, batch
        self.head_width = shape.width // shape.heads
        qkv = (shape.heads + 2 * shape.kv_heads) * self.head_width
        sizes = [
            (qkv, shape.width),
            (shape.width, shape.width),
            (2 * shape.hidden, shape.width),
            (shape.width, shape.hidden),
        ]
        self.layers = [[linear(n, k, quantized, device) for n, k in sizes] for _ in range(shape.layers)]
        self.head = linear(shape.vocabulary, shape.width, quantized_head, device)
        options = {"dtype": torch.bfloat16, "device": device}
        self.embedding = torch.randn(shape.vocabulary, shape.width, **options)
        self.norm = torch.ones(shape.width, **options)
        cache = (shape.layers, 2, batch, shape.kv_heads, shape.cached, self.head_width)
        self.cache = torch.randn(cache, **options)
        self.token = torch.zeros(batch, dtype=torch.long, device=device)
        self.position = torch.tensor([shape.cached // 2], device=device)
        angles = torch.rand(self.head_width // 2, device=device)
        self.cos, self.sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
        self.mask = torch.arange(shape.cached, device=device) <= shape.cached // 2

    def step(self) -> None:
        """Replace `token` by the next one."""
        x = self.embedding[self.token]
        for layer, products in enumerate(self.layers):
            qkv, out, gate_up, down = products
            x = x + out(self.attention(layer, qkv(self.normed(x))))
            gate, up = gate_up(self.normed(x)).chunk(2, dim=-1)
            x = x + down(functional.silu(gate) * up)
        self.token.copy_(self.head(self.normed(x)).argmax(-1))

    def normed(self, x: Tensor) -> Tensor:
        """RMSNorm."""
        return functional.rms_norm(x, (self.shape.width,), self.norm)

    def rotate(self, x: Tensor) -> Tensor:
        """The rotary embedding of one position."""
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], dim=-1)

    def attention(self, layer: int, qkv: Tensor) -> Tensor:
        """One query a sequence against the cache."""
        heads, kv_heads, width = self.shape.heads, self.shape.kv_heads, self.head_width
        parts = qkv.view(self.batch, heads + 2 * kv_heads, 1, width)
        q, k, v = parts.split([heads, kv_heads, kv_heads], dim=1)
        keys, values = self.cache[layer]
        keys.index_copy_(2, self.position, self.rotate(k))
        values.index_copy_(2, self.position, v)
        y = functional.scaled_dot_product_attention(
            self.rotate(q), keys, values, attn_mask=self.mask.view(1, 1, 1, -1), enable_gqa=True
        )
        return y.reshape(self.batch, heads * width)


def tokens_per_second(decoder: Decoder, steps: int) -> float:
    """All sequences together."""
    for _ in range(3):
        decoder.step()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        decoder.step()
        return decoder.batch / (time.perf_counter() - start)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step()
    graph.replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        graph.replay()
    torch.cuda.synchronize()
    return decoder.batch * steps / (time.perf_counter() - start)


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tiny", action="store_true", help="a small model, on any machine, to try the bench itself")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = TINY if options.tiny else LLAMA_8B
    torch.manual_seed(0)
    records = []
    for quantized, head in ((False, False), (True, False), (True, True)):
        for batch in options.batches:
            decoder = Decoder(shape, batch, quantized, head, device)
            speed = tokens_per_second(decoder, 64)
            record = {"quantized": quantized, "quantized_head": head, "batch": batch, "tokens_per_second": speed}
            records.append(record)
            print(record, flush=True)
            options.output.write_text(json.dumps({"shape": shape._asdict(), "records": records}, indent=1))
            del decoder
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
