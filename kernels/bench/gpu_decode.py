"""Decodes with a Llama-3-8B-shaped model of random weights, 4-bit and bfloat16, by CUDA graphs: tokens a second.

Run:    python kernels/bench/gpu_decode.py out.json [--tiny]
Every layer has its own weights, so no cache holds them from token to token; attention reads the whole of a cache of
1024 positions, of which each step replaces one. q, k, v and gate, up are one product each; the head is bfloat16 and, in
a further run, 4 bits. What is not a product is compiled by torch, the same for all, or the many small kernels of a
layer would be most of the time; where that fails, the record says so.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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

    @property
    def head_width(self) -> int:
        """Of one head."""
        return self.width // self.heads


LLAMA_8B = Shape(32, 4096, 32, 8, 14336, 128256, 1024)
TINY = Shape(2, 256, 4, 2, 512, 512, 32)


class Weights(NamedTuple):
    """The products of a model."""

    layers: list[list[Linear]]  # q k v, out, gate up, down
    head: Linear


def linear(n: int, k: int, quantized: bool, device: torch.device) -> Linear:
    """A product with a random weight ``[N, K]``."""
    weight = random_weight(n, k, device)
    if quantized:
        return ours(weight)[0]
    return partial(_dense, weight.dense())


def _dense(weight: Tensor, x: Tensor) -> Tensor:
    return functional.linear(x, weight)


def layers(shape: Shape, quantized: bool, device: torch.device) -> list[list[Linear]]:
    """The products of every block."""
    qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_width
    sizes = [
        (qkv, shape.width),
        (shape.width, shape.width),
        (2 * shape.hidden, shape.width),
        (shape.width, shape.hidden),
    ]
    return [[linear(n, k, quantized, device) for n, k in sizes] for _ in range(shape.layers)]


class Decoder:
    """One step of decoding for a batch: the last token in, the most likely next one out."""

    def __init__(self, shape: Shape, batch: int, weights: Weights, device: torch.device, compiled: bool) -> None:
        self.shape, self.batch, self.weights = shape, batch, weights
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        self.embedding = torch.randn(shape.vocabulary, shape.width, **options)
        self.norm = torch.ones(shape.width, **options)
        self.keys, self.values = torch.randn(
            2, shape.layers, batch, shape.kv_heads, shape.cached, shape.head_width, **options
        )
        self.token = torch.zeros(batch, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        frequencies = 1e4 ** (-torch.arange(shape.head_width // 2, device=device) / (shape.head_width // 2))
        angles = torch.arange(shape.cached, device=device).unsqueeze(-1) * frequencies
        self.cos, self.sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
        compiler = partial(torch.compile, fullgraph=True, dynamic=False) if compiled else _as_it_is
        self.added, self.rotated, self.activated = compiler(_added), compiler(_rotated), compiler(_activated)

    def step(self) -> None:
        """Replace `token` by the next one, and one position of the cache."""
        x, normed = self.added(self.embedding[self.token], None, self.norm)
        for index, (qkv, out, gate_up, down) in enumerate(self.weights.layers):
            keys, values = self.keys[index], self.values[index]
            q = self.rotated(qkv(normed), keys, values, self.position, self.cos, self.sin)
            y = functional.scaled_dot_product_attention(q, keys, values)
            x, normed = self.added(x, out(y.reshape(self.batch, -1)), self.norm)
            x, normed = self.added(x, down(self.activated(gate_up(normed))), self.norm)
        self.token.copy_(self.weights.head(normed).argmax(-1))
        self.position.add_(1).remainder_(self.shape.cached)


def _added(x: Tensor, more: Tensor | None, norm: Tensor) -> tuple[Tensor, Tensor]:
    """The residual sum, and its RMSNorm."""
    x = x if more is None else x + more
    return x, functional.rms_norm(x, norm.shape, norm)


def _rotated(qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding; k and v go into the cache, q comes back with the heads of one key head as its rows."""
    batch, kv_heads, _, width = keys.shape
    parts = qkv.view(batch, -1, width)
    q, k, v = parts.split([parts.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    cos, sin = cos[position], sin[position]
    q, k = (torch.cat([a * cos - b * sin, b * cos + a * sin], -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
    keys.index_copy_(2, position, k.unsqueeze(2))
    values.index_copy_(2, position, v.unsqueeze(2))
    return q.view(batch, kv_heads, -1, width)


def _activated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


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


def measure(shape: Shape, batch: int, weights: Weights, device: torch.device) -> dict[str, Any]:
    """The speed; with the small kernels as they are where torch cannot compile them."""
    try:
        speed = tokens_per_second(Decoder(shape, batch, weights, device, compiled=device.type == "cuda"), 128)
        return {"tokens_per_second": speed, "compiled": device.type == "cuda"}
    except torch._dynamo.exc.TorchDynamoException as error:
        speed = tokens_per_second(Decoder(shape, batch, weights, device, compiled=False), 128)
        return {"tokens_per_second": speed, "compiled": False, "error": f"{type(error).__name__}: {error}"[:500]}


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
    blocks: list[list[Linear]] = []
    for quantized, quantized_head in ((False, False), (True, False), (True, True)):
        if not quantized_head:  # the blocks of the last run are those of the one before
            blocks.clear()
            blocks = layers(shape, quantized, device)
        weights = Weights(blocks, linear(shape.vocabulary, shape.width, quantized_head, device))
        for batch in options.batches:
            record = {"quantized": quantized, "quantized_head": quantized_head, "batch": batch}
            records.append(record | measure(shape, batch, weights, device))
            print(records[-1], flush=True)
            options.output.write_text(json.dumps({"shape": shape._asdict(), "records": records}, indent=1))
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
