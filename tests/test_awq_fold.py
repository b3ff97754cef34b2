"""Folding channel scales, and AWQ on a block. Oracle: the block before, whose float output must not move."""

import copy

import oracles
import pytest
import torch
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from ptq.awq import apply_fold, find_folds
from ptq.awq import block as awq_block
from ptq.awq.fold import UNCHANGED, difference
from ptq.awq.solver import tie
from ptq.block import quantize_block
from ptq.calibration.capture import input_hooks, trace_groups
from ptq.config import AWQConfig, RunConfig
from ptq.errors import NumericsError
from ptq.formats.codec import Scheme
from ptq.grid import min_max_grid, nearest_codes, values
from ptq.models.structure import linears, weight_of
from ptq.task import BlockTask

K = 24


class OffsetNorm(nn.Module):
    """A norm that multiplies by ``1 + weight``."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return rms_norm(x, x.shape[-1:]) * (1 + self.weight)


class AfterNorm(nn.Module):
    """Two Linears that read a norm; ``leak`` adds the norm's output to the result as well."""

    def __init__(self, norm, leak=False):
        super().__init__()
        self.norm, self.a, self.b, self.leak = norm, nn.Linear(K, 16), nn.Linear(K, 16), leak

    def forward(self, x):
        y = self.norm(x)
        return self.a(y) * self.b(y) + (y[..., :16] if self.leak else 0)


class Chain(nn.Module):
    """Two Linears, something between them."""

    def __init__(self, between, width=16, doubled=False):
        super().__init__()
        self.first, self.second = nn.Linear(K, width), nn.Linear(width, 8)
        self.between, self.doubled = between, doubled

    def forward(self, x):
        y = self.first(x)
        return self.second(self.between(y)) + (y.sum() if self.doubled else 0)


class Gated(nn.Module):
    """``silu(gate) * up`` of one fused producer with a bias; up is the last half, or the first."""

    def __init__(self, up_first=False):
        super().__init__()
        self.gate_up, self.down, self.up_first = nn.Linear(K, 32), nn.Linear(16, K), up_first

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(gate * silu(up) if self.up_first else silu(gate) * up)


class Attention(nn.Module):
    """Four query heads over two value heads of six; q, k, v apart, one after another, or head by head."""

    def __init__(self, layout="apart", values=2):
        super().__init__()
        self.head_dim, self.values, self.layout = 6, values, layout
        width = 6 * values
        sizes = {"apart": {"q": 24, "k": width, "v": width}, "fused": {"qkv": 24 + 2 * width}, "heads": {"qkv": 72}}
        for name, size in sizes[layout].items():
            self.add_module(name, nn.Linear(K, size))
        self.o = nn.Linear(24, K)

    def split(self, x):
        if self.layout == "apart":
            return self.q(x), self.k(x), self.v(x)
        if self.layout == "fused":
            return self.qkv(x).split([24, 6 * self.values, 6 * self.values], -1)
        return self.qkv(x).unflatten(-1, (4, 3, 6)).unbind(-2)

    def forward(self, x):
        q, k, v = (part.reshape(*x.shape[:-1], -1, 6).transpose(-2, -3) for part in self.split(x))
        k, v = (part.repeat_interleave(4 // part.shape[-3], -3) for part in (k, v))
        return self.o(scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))


class Conv1D(nn.Module):
    """A Linear with its weight the other way round, as GPT-2 has them."""

    def __init__(self, n, k):
        super().__init__()
        self.nf = n
        self.weight, self.bias = nn.Parameter(torch.empty(k, n)), nn.Parameter(torch.empty(n))

    def forward(self, x):
        return x @ self.weight + self.bias


class Odd(AfterNorm):
    """A submodule with a vector called weight that returns no tensor."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(K))

        def forward(self, x):
            return x * self.weight, None

    def __init__(self):
        super().__init__(nn.RMSNorm(K))
        self.pair = self.Pair()

    def forward(self, x):
        return super().forward(self.pair(x)[0])


def transposed_chain():
    chain = Chain(nn.ReLU())
    chain.first, chain.second = Conv1D(16, K), Conv1D(8, 16)
    return chain


def prepared(block):
    """The block with every parameter random, biases included, an input, and what find_folds needs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() > 1 else 1))
    x = oracles.correlated_inputs(30, K).float().reshape(2, 15, K)
    with torch.no_grad():
        groups = trace_groups(dict(linears(block)), [lambda: block(x)])

    @torch.no_grad()
    def probe(module):
        return module(x)

    return block, groups, probe


AB = ("a", "b")
FOLDING = {
    "rms norm": (lambda: AfterNorm(nn.RMSNorm(K)), "norm", AB, 0),
    "layer norm with bias": (lambda: AfterNorm(nn.LayerNorm(K)), "norm", AB, 0),
    "1 + w norm": (lambda: AfterNorm(OffsetNorm(K)), "norm", AB, 0),
    "batch norm": (lambda: AfterNorm(nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(K).eval())), "norm.1", AB, 0),
    "identity": (lambda: Chain(nn.Identity()), "first", ("second",), 0),
    "relu": (lambda: Chain(nn.ReLU()), "first", ("second",), 0),
    "prelu": (lambda: Chain(nn.PReLU()), "first", ("second",), 0),
    "transposed": (transposed_chain, "first", ("second",), 0),
    "up of gate_up": (lambda: Gated(), "gate_up", ("down",), 16),
    "up first": (lambda: Gated(up_first=True), "gate_up", ("down",), 0),
    "v": (lambda: Attention(values=4), "v", ("o",), 0),
    "v of qkv": (lambda: Attention("fused", values=4), "qkv", ("o",), 48),
    "v of interleaved qkv": (lambda: Attention("heads", values=4), "qkv", ("o",), 12),
    "grouped-query v": (lambda: Attention(), "v", ("o",), 0),
    "grouped-query v of qkv": (lambda: Attention("fused"), "qkv", ("o",), 36),
    "beside a module without output": (Odd, "norm", AB, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDING)
def test_folds_are_found_and_keep_the_output(name):
    make, producer, consumers, first_row = FOLDING[name]
    block, groups, probe = prepared(make())
    state, expected = copy.deepcopy(block.state_dict()), probe(block)
    (fold,) = find_folds(block, groups, probe)
    assert (fold.producer, fold.consumers, int(fold.rows[0])) == (producer, consumers, first_row)
    assert fold.offset == (name == "1 + w norm")
    for key, value in block.state_dict().items():
        assert torch.equal(value, state[key])  # put back

    scales = torch.rand(len(fold.rows), generator=torch.Generator().manual_seed(5)) * 3 + 0.2
    scales = tie(scales, fold.rows)
    used = apply_fold(block, fold, scales)
    torch.testing.assert_close(used, scales, rtol=1e-5, atol=0)  # w / (w / s) in float32
    assert difference(probe(block), expected) < 1e-5  # float32 through two layers of at most 32 terms
    now, bias = block.state_dict(), f"{producer}.bias"
    assert {key.rpartition(".")[0] for key in now if not torch.equal(now[key], state[key])} == {producer, *consumers}
    if bias in state:  # of exactly the rows that are read
        assert (now[bias] != state[bias]).nonzero().flatten().tolist() == sorted(set(fold.rows.tolist()))


NOT_FOLDING = {
    "the norm is read by something else": lambda: AfterNorm(nn.RMSNorm(K), leak=True),
    "the producer is read by something else": lambda: Chain(nn.ReLU(), doubled=True),
    "gelu": lambda: Chain(nn.GELU()),
    "a norm in between": lambda: Chain(nn.RMSNorm(16, elementwise_affine=False)),
    "softmax": lambda: Chain(nn.Softmax(-1)),
}


@pytest.mark.parametrize("name", NOT_FOLDING)
def test_what_changes_the_output_is_no_fold(name):
    block, groups, probe = prepared(NOT_FOLDING[name]())
    state = copy.deepcopy(block.state_dict())
    assert find_folds(block, groups, probe) == []
    for key, value in block.state_dict().items():
        assert torch.equal(value, state[key])


def test_a_norm_with_an_excluded_reader_is_no_fold():
    block, _, probe = prepared(AfterNorm(nn.RMSNorm(K)))
    groups = trace_groups({"a": block.a}, [lambda: probe(block)])
    assert find_folds(block, groups, probe) == []


def test_untied_scales_change_grouped_query_attention():
    """Negative control: heads that share values must share scales."""
    block, groups, probe = prepared(Attention())
    (fold,) = find_folds(block, groups, probe)
    expected = probe(block)
    scales = torch.rand(24, generator=torch.Generator().manual_seed(5)) * 3 + 0.2
    assert not torch.equal(tie(scales, fold.rows), scales)
    with torch.no_grad():
        block.v.weight /= scales[:12, None]
        block.v.bias /= scales[:12]
        block.o.weight *= scales
    assert difference(probe(block), expected) > 100 * UNCHANGED


def test_a_block_that_answers_nan_folds_nothing():
    block, groups, probe = prepared(AfterNorm(nn.RMSNorm(K)))
    assert find_folds(block, groups, lambda module: probe(module) * float("nan")) == []


@pytest.mark.parametrize("norm", [nn.RMSNorm, OffsetNorm])
def test_the_rounding_of_a_folded_norm_costs_nothing(norm):
    block, groups, probe = prepared(AfterNorm(norm(K)))
    expected = probe(block)
    with torch.no_grad():
        block.norm.weight[3] = -1.0 if norm is OffsetNorm else 0.0  # a gain of zero cannot be divided by
    expected = probe(block)
    (fold,) = find_folds(block, groups, probe)
    scales = torch.rand(K, generator=torch.Generator().manual_seed(5)) * 3 + 0.2
    used = apply_fold(block, fold, scales, torch.bfloat16)
    assert torch.equal(block.norm.weight.bfloat16().float(), block.norm.weight)
    # bfloat16 weights are off by 2**-8, and 1 + w by as much as that of a gain near zero
    assert not torch.allclose(used, scales, rtol=1e-4)
    assert difference(probe(block), expected) < 1e-5
    naive, _, probe = prepared(AfterNorm(norm(K)))
    expected = probe(naive)
    apply_fold(naive, fold, scales)
    with torch.no_grad():
        naive.norm.weight.copy_(naive.norm.weight.bfloat16().float())
    assert difference(probe(naive), expected) > 1e-4  # control: without making up for it, the rounding shows


def awq_task(block, probe, **options):
    config = RunConfig("m", "o", "awq", awq=AWQConfig(grid=4), **options)
    schemes = {path: Scheme(8, 8, True) for path, _ in linears(block)}
    return BlockTask("block", schemes, config, torch.float16, probe)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("name", FOLDING)
def test_a_quantized_block_keeps_its_output_at_8_bits(name, clip):
    """Norms, biases and codes must agree about the scales: otherwise the output is off by tens of percent."""
    block, _, probe = prepared(FOLDING[name][0]())
    expected = probe(block)
    task = awq_task(block, probe)
    task = task._replace(config=RunConfig("m", "o", "awq", awq=AWQConfig(grid=4, clip=clip)))
    results = quantize_block(block, [lambda: probe(block)], task)
    assert [name for name in results if results[name].row["fold"]] == list(FOLDING[name][2])
    assert all(result.row["rescues"] == [] for result in results.values())
    for path, result in results.items():
        assert torch.equal(result.quantized.dequantize(), weight_of(block.get_submodule(path)))
    # 8 bits: steps of 1/128 of the largest weight of a group, some percent where softmax or a product amplifies it
    assert difference(probe(block), expected) < 0.05


def test_without_a_probe_nothing_is_folded():
    block, _, probe = prepared(AfterNorm(nn.RMSNorm(K)))
    state = copy.deepcopy(block.norm.state_dict())
    results = quantize_block(block, [lambda: probe(block)], awq_task(block, None))
    assert [result.row["fold"] for result in results.values()] == [None, None]
    assert torch.equal(block.norm.weight, state["weight"])


def test_folds_that_fail_together_are_dropped(monkeypatch):
    monkeypatch.setattr(awq_block, "UNCHANGED", 0.0)
    block, _, probe = prepared(AfterNorm(nn.RMSNorm(K)))
    expected, gain = probe(block), block.norm.weight.detach().clone()
    results = quantize_block(block, [lambda: probe(block)], awq_task(block, probe))
    for result in results.values():
        assert result.row["fold"] is None
        (rescue,) = result.row["rescues"]
        assert rescue.startswith("folds dropped, output moved by ")
    assert torch.equal(block.norm.weight, gain)
    assert difference(probe(block), expected) < 0.05

    with pytest.raises(NumericsError, match="strict: folding .* float block block unchanged; .* moved by .*: set"):
        quantize_block(block, [lambda: probe(block)], awq_task(block, probe, strict=True))


def test_losses_in_the_report_are_those_of_the_outputs():
    block, _, probe = prepared(Chain(nn.GELU()))
    inputs: dict[str, torch.Tensor] = {}
    with input_hooks(dict(linears(block)), lambda path, x: inputs.update({path: x.double()})):
        probe(block)
    weights = {path: module.weight.detach().double().clone() for path, module in linears(block)}
    task = awq_task(block, probe)._replace(schemes={path: Scheme(3, 8, True) for path in weights})
    results = quantize_block(block, [lambda: probe(block)], task)
    for path, result in results.items():
        x, W = inputs[path].reshape(-1, weights[path].shape[1]), weights[path]
        energy = oracles.output_error(x, W)
        grid = min_max_grid(W.float(), Scheme(3, 8, True))
        rounded = values(nearest_codes(W.float(), grid), grid).double()
        # float32 matrices of at most 24 x 30 terms; the loss is some 1e-2 of the energy
        row = result.row
        assert row["relative_loss"] == pytest.approx(
            oracles.output_error(x, W - result.quantized.dequantize().double()) / energy, rel=1e-3
        )
        assert row["relative_rounding_loss"] == pytest.approx(oracles.output_error(x, W - rounded) / energy, rel=1e-3)
        assert row["loss_to_rounding"] == row["relative_loss"] / row["relative_rounding_loss"] < 1
