"""Decodes with a Llama-3-8B-shaped model of random weights, 4-bit and bfloat16, by CUDA graphs: tokens a second.

Run:    python kernels/bench/gpu_decode.py out.json [--tiny] [--early between|all]
Every layer has its own weights, so no cache holds them from token to token; attention reads the whole of a cache of
1024 positions, of which each step replaces one. q, k, v and gate, up are one product each; the head is bfloat16 and, in
a further run, 4 bits. What lies between the products is one kernel each (gpu_decode_kernels.py), the same for all, or
many small kernels a layer would be most of the time. With ``--early between`` those begin before the kernel before them
has ended, with ``--early all`` the products do, too, whatever the table says.
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
from gpu_decode_kernels import Between, Cache
from gpu_linear import ours, random_weight
from ptq_kernels.triton import ahead, configs, launch

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
STEPS = 256  # that are timed
TINY = Shape(2, 128, 2, 1, 256, 256, 64)


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

    def __init__(self, shape: Shape, batch: int, weights: Weights, device: torch.device, early: bool) -> None:
        self.shape, self.weights = shape, weights
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        self.embedding = torch.randn(shape.vocabulary, shape.width, **options)
        self.norm = torch.ones(shape.width, **options)
        size = (shape.layers, batch, shape.kv_heads, shape.cached, shape.head_width)
        self.caches = [
            Cache(*both) for both in zip(torch.randn(size, **options), torch.randn(size, **options), strict=True)
        ]
        self.token = torch.zeros(batch, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        frequencies = 1e4 ** (-torch.arange(shape.head_width // 2, device=device) / (shape.head_width // 2))
        angles = torch.arange(shape.cached, device=device).unsqueeze(-1) * frequencies
        self.turns = (angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16))
        self.between = Between(self.caches[0], early)

    def step(self) -> None:
        """Replace `token` by the next one, and one position of the cache."""
        between = self.between
        x, normed = between.add_norm(self.embedding, self.norm, token=self.token)
        for (qkv, out, gate_up, down), cache in zip(self.weights.layers, self.caches, strict=True):
            y = out(between.attend(qkv(normed), cache, self.position, *self.turns))
            x, normed = between.add_norm(x, self.norm, y)
            x, normed = between.add_norm(x, self.norm, down(between.activate(gate_up(normed))))
        self.token.copy_(self.weights.head(normed).argmax(-1))
        self.position.add_(1).remainder_(self.shape.cached)


def tokens_per_second(decoder: Decoder, steps: int) -> float:
    """All sequences together."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        decoder.step()
        return len(decoder.token) / (time.perf_counter() - start)
    for _ in range(3):
        decoder.step()
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
    return len(decoder.token) * steps / (time.perf_counter() - start)


def begin_early() -> None:
    """Every product from now on."""
    usual = configs.plan
    configs.plan = lambda gpu, problem: usual(gpu, problem)._replace(early=ahead.BYTES)


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tiny", action="store_true", help="a small model, on any machine, to try the bench itself")
    parser.add_argument("--early", choices=["between", "all"], help="from compute capability 9.0 on")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = TINY if options.tiny else LLAMA_8B
    early = options.early if device.type == "cuda" and launch.gpu(0).capability >= ahead.LEAST_CAPABILITY else None
    if early == "all":
        begin_early()
    torch.manual_seed(0)
    records = []
    blocks: list[list[Linear]] = []
    for quantized, quantized_head in ((False, False), (True, False), (True, True)):
        if not quantized_head:  # the blocks of the last run are those of the one before
            blocks.clear()
            blocks = layers(shape, quantized, device)
        weights = Weights(blocks, linear(shape.vocabulary, shape.width, quantized_head, device))
        for batch in options.batches:
            decoder = Decoder(shape, batch, weights, device, early is not None)
            record = {"quantized": quantized, "quantized_head": quantized_head, "batch": batch, "early": early}
            records.append(record | {"tokens_per_second": tokens_per_second(decoder, STEPS)})
            print(records[-1], flush=True)
            options.output.write_text(json.dumps({"shape": shape._asdict(), "records": records}, indent=1))
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
