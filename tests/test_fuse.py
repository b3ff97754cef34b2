"""Fused linears: the same numbers as the linears they replace, in fewer products."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional

from ptq.formats.codec import QuantizedWeight
from ptq.nn import FusedLinear, QuantLinear, fuse_linears


def quant_linear(
    n: int, k: int, *, seed: int, symmetric: bool = True, bias: bool = False, bits: int = 4
) -> QuantLinear:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.rand(n, k // 32, generator=generator).bfloat16().float() * 0.05
    scales = scales.bfloat16().float()
    zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(0, 2**bits, scales.shape, dtype=torch.uint8, generator=generator)
    values = torch.rand(n, generator=generator) if bias else None
    return QuantLinear.from_quantized(QuantizedWeight(codes, scales, zeros, bits, 32, symmetric), values)


class Block(nn.Module):
    """One query a position; the layers that share an input bear the names of a Llama."""

    def __init__(self, **kind: bool) -> None:
        super().__init__()
        self.attention, self.mlp = nn.Module(), nn.Module()
        for i, (name, n) in enumerate((("q_proj", 64), ("k_proj", 32), ("v_proj", 32), ("o_proj", 64))):
            setattr(self.attention, name, quant_linear(n, 64 if name != "o_proj" else 128, seed=i, **kind))
        for i, (name, n, k) in enumerate((("gate_proj", 96, 64), ("up_proj", 96, 64), ("down_proj", 64, 96))):
            setattr(self.mlp, name, quant_linear(n, k, seed=10 + i, **kind))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, m = self.attention, self.mlp
        x = x + a.o_proj(torch.cat([a.q_proj(x), a.k_proj(x), a.v_proj(x)], dim=-1))
        return x + m.down_proj(functional.silu(m.gate_proj(x)) * m.up_proj(x))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prepared", [True, False])
def test_logits_are_the_same_bits(symmetric: bool, bias: bool, prepared: bool) -> None:
    block = Block(symmetric=symmetric, bias=bias)
    for linear in block.modules():
        if isinstance(linear, QuantLinear):
            linear.impl = "auto" if prepared else "reference"
            if prepared:
                linear.prepare_()
    fused = copy.deepcopy(block)
    assert fuse_linears(fused) == ["attention.q_proj+k_proj+v_proj", "mlp.gate_proj+up_proj"]
    assert sum(isinstance(m, QuantLinear) for m in fused.modules()) == 4
    for rows in (1, 5):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
        assert torch.equal(fused(x), block(x))
    assert torch.equal(fused.attention.k_proj.weight, block.attention.k_proj.weight)
    assert (fused.mlp.up_proj.in_features, fused.mlp.up_proj.out_features) == (64, 96)


def test_one_product_for_the_group_and_nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block()
    fuse_linears(block)
    calls = []
    forward = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: calls.append(self) or forward(self, x))
    block(torch.randn(2, 64))
    assert len(calls) == 4  # q k v, o, gate up, down
    assert not block.attention.q_proj.group.open


def test_an_input_changed_in_place_is_another_one() -> None:
    block = Block()
    alone = copy.deepcopy(block.attention)
    fuse_linears(block)
    x = torch.randn(2, 64)
    block.attention.q_proj(x)
    x.add_(1)
    assert torch.equal(block.attention.k_proj(x), alone.k_proj(x))
    with torch.inference_mode():  # where torch keeps no versions
        x = torch.randn(2, 64)
        assert torch.equal(block.attention.q_proj(x), alone.q_proj(x))
        assert torch.equal(block.attention.k_proj(x), alone.k_proj(x))


def test_a_part_made_without_gradients_is_not_handed_to_who_wants_them() -> None:
    block, x = Block(), torch.randn(2, 64, requires_grad=True)
    fuse_linears(block)
    with torch.no_grad():
        block.attention.q_proj(x)
    assert block.attention.k_proj(x).requires_grad


def test_threads_do_not_take_each_others_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them in turns, a member each: two products, each thread's own."""
    block = Block(bias=True)
    alone = copy.deepcopy(block.attention)
    fuse_linears(block)
    calls = []
    forward = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: calls.append(self) or forward(self, x))
    together = threading.Barrier(2, timeout=60)

    def work(x: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for name in ("q_proj", "k_proj", "v_proj"):
            together.wait()
            found.append(getattr(block.attention, name)(x))
        return found

    inputs = [torch.randn(2, 64), torch.randn(2, 64)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, inputs))
    assert len(calls) == 2
    monkeypatch.undo()
    for x, found in zip(inputs, results, strict=True):
        for name, y in zip(("q_proj", "k_proj", "v_proj"), found, strict=True):
            assert torch.equal(y, getattr(alone, name)(x))
    assert torch.equal(block.attention.k_proj.bias, alone.k_proj.bias)
    assert not block.attention.q_proj.group.open


def test_out_of_turn_is_right_too() -> None:
    block = Block()
    alone = copy.deepcopy(block.attention)
    fuse_linears(block)
    for seed, name in enumerate(("v_proj", "k_proj", "q_proj", "k_proj", "k_proj", "q_proj", "v_proj")):
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(getattr(block.attention, name)(x), getattr(alone, name)(x))


def test_what_differs_is_left_alone() -> None:
    block = Block()
    block.attention.k_proj = quant_linear(32, 64, seed=1, bits=8)
    block.mlp.up_proj = nn.Linear(64, 96)
    assert fuse_linears(block) == []
    assert not any(isinstance(m, FusedLinear) for m in block.modules())


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    block = Block()
    x = torch.randn(3, 64)
    want = block(x)
    fuse_linears(block)
    assert torch.equal(torch.compile(block, fullgraph=True, backend="eager")(x), want)
