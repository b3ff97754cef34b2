"""A stage of tiles_on_gpu.py: the kernels of the decoding bench, against the model's formulas in float64."""

import sys
from itertools import product
from pathlib import Path

import torch
from gpu_place import DEVICE, ON_GPU, captured
from ptq_kernels.triton import ahead, launch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels" / "bench"))
import gpu_decode
import gpu_decode_kernels
from gpu_decode_kernels import Between, Cache

ROUNDING = 2**-8 if ON_GPU else 2**-7  # of bfloat16, of a value; the interpreter rounds to zero


def between() -> None:
    """Each kernel in memory that held NaN, at the first, at a middle and at the last position, several times."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    batches = (1, 3) if ON_GPU else (2,)  # the interpreter takes its time
    for early, batch, (heads, kv_heads, cached) in product(
        early_or_not(), batches, ((4, 2, 128), (16, 1, 64), (16, 16, 512))
    ):
        _attends(early, batch, heads, kv_heads, cached)
    for early, rows, width in product(early_or_not(), (1, 3), (96, 4096 if ON_GPU else 256)):
        _adds(early, rows, width)
        gate_up = random(rows, 2 * width)
        gate, up = gate_up.double().chunk(2, 1)
        kernels = Between(Cache(random(1, 1, 64, 64), random(1, 1, 64, 64)), early)
        assert_near(kernels.activate(gate_up), functional.silu(gate) * up, 1.0)
    if ON_GPU:
        _tokens()


def early_or_not() -> tuple[bool, ...]:
    """What this place can run."""
    return (False, True) if ON_GPU and launch.gpu(0).capability >= ahead.LEAST_CAPABILITY else (False,)


def random(*shape: int) -> Tensor:
    """bfloat16, where the kernels are."""
    return torch.randn(shape).to(DEVICE, torch.bfloat16)


def assert_near(got: Tensor, want: Tensor, scale: float) -> None:
    """Within the rounding of bfloat16, of the value and of what it was computed from, which is about `scale`."""
    assert ((got.double() - want).abs() <= ROUNDING * (want.abs() + scale)).all()


def _adds(early: bool, rows: int, width: int) -> None:
    kernels = Between(Cache(random(1, 1, 64, 64), random(1, 1, 64, 64)), early)
    table, norm, more = random(7, width) / 256, random(width), random(rows, width) / 256  # so that epsilon counts
    token = torch.arange(rows, device=DEVICE) * 3
    for x, added, chosen in ((table[token], more, None), (table, None, token)):
        total, normed = kernels.add_norm(x, norm, added, chosen)
        assert_near(total, table[token].double() + (0.0 if added is None else added.double()), 0.0)
        rms = total.double().square().mean(1, keepdim=True).add(gpu_decode_kernels.EPSILON).sqrt()
        assert_near(normed, total.double() / rms * norm.double(), 0.0)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of the last dimension, in float64."""
    a, b = x.double().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _attends(early: bool, batch: int, heads: int, kv_heads: int, cached: int) -> None:
    width = 64
    values = random(batch, kv_heads, cached, width) + 4  # so that the sum of the weights shows
    cache = Cache(random(batch, kv_heads, cached, width), values)
    kernels = Between(cache, early)
    cos, sin = random(cached, width // 2), random(cached, width // 2)
    position = torch.zeros(1, dtype=torch.long, device=DEVICE)
    for where in (0, cached // 2 + 5, cached - 1):
        position.fill_(where)
        qkv = random(batch, (heads + 2 * kv_heads) * width)
        qkv[:, : heads * width] /= 4  # rounding a score changes the sum little,
        qkv[:, -kv_heads * width :] *= 16  # and what the new position adds shows in it
        kernels.parts.fill_(float("nan"))
        want_keys, want_values = cache.keys.double(), cache.values.clone()
        got = kernels.attend(qkv, cache, position, cos, sin)
        q, k, v = qkv.view(batch, -1, width).split([heads, kv_heads, kv_heads], 1)
        want_keys[:, :, where] = turned(k, cos[where].double(), sin[where].double())
        want_values[:, :, where] = v
        assert_near(cache.keys, want_keys, 2**-10)
        assert torch.equal(cache.values, want_values)
        rows = turned(q, cos[where].double(), sin[where].double()).to(torch.bfloat16).double()
        rows = rows.view(batch, kv_heads, -1, width)
        want = functional.scaled_dot_product_attention(rows, cache.keys.double(), cache.values.double())
        assert_near(got, want.reshape(batch, -1), 8.0)  # the weights of the sum are off by as much as the scores
        assert not kernels.counters.any()


def _tokens() -> None:
    """A model that decodes in a graph gives the same tokens and cache whether its kernels begin early or not."""
    device = torch.device(DEVICE)
    shape = gpu_decode.TINY
    weights = gpu_decode.Weights(
        gpu_decode.layers(shape, True, device), gpu_decode.linear(shape.vocabulary, shape.width, False, device)
    )
    found = []
    for early in early_or_not():
        torch.manual_seed(1)
        decoder = gpu_decode.Decoder(shape, 3, weights, device, early)

        def step(decoder: gpu_decode.Decoder = decoder) -> Tensor:
            decoder.step()
            return decoder.token

        step()  # compiles
        replay = captured(step)
        tokens = [replay().clone() for _ in range(2 * shape.cached)]
        found.append([*tokens, *(tensor for cache in decoder.caches for tensor in cache)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
