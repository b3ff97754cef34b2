"""Scales and codes of block formats.

Oracles: the gguf package's own rounding where it has one, brute force over one K-quant block, the loss computed anew
in float64, and the inequality that a solver with the Hessian must meet.
"""

import gguf
import pytest
import torch
from gguf import quants

from ptq.config import GPTQConfig
from ptq.errors import FormatError, NumericsError
from ptq.gguf import rounding, solver
from ptq.gguf.block import BlockFormats, solve_linears
from ptq.gguf.blocks import KINDS, encode, values
from ptq.gguf.rounding import nearest, round_blocks
from ptq.gguf.solver import solve_blocks
from ptq.gptq.solver import factorize


def problem(n: int = 24, k: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs with a few strong channels."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(k) + 0.1 * torch.randn(k, k, generator=generator)
    X = torch.randn(1024, k, generator=generator) @ mix * torch.exp(0.7 * torch.randn(k, generator=generator))
    return 0.02 * torch.randn(n, k, generator=generator), X.t() @ X / len(X)


@pytest.mark.parametrize("scale", [1.0, 5e-4])  # of 0.02: with the second, steps are float16's subnormal numbers
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_rounding_is_closer_than_the_gguf_package(kind, scale):
    weight = problem()[0] * scale
    theirs = quants.dequantize(quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind]),
                               gguf.GGMLQuantizationType[kind])  # fmt: skip
    ours = values(round_blocks(kind, weight, torch.ones(256)))
    assert (ours - weight).square().sum() < (torch.from_numpy(theirs) - weight).square().sum()


# Mean squared error of rounding a standard normal with steps of the best uniform quantizer of that many bits (Max 1960:
# 0.0115 for 16 levels), of which a search over groups with their own scale must stay below.
@pytest.mark.parametrize(("kind", "most"), [("Q4_K", 0.0115), ("Q5_K", 0.00349), ("Q6_K", 0.00104)])
def test_k_quants_beat_the_best_uniform_quantizer_of_their_bits(kind, most):
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    error = values(round_blocks(kind, weight, torch.ones(512))) - weight
    assert error.square().mean() < most


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("scale", [5e-3, 5e-4, 5e7])
def test_k_quants_of_small_and_large_weights_are_as_close_as_usual(kind, scale):
    """Block scales down to float16's least and up to its largest, times the small factors."""
    weight, _ = problem()

    def share(w: torch.Tensor) -> float:
        return float((values(round_blocks(kind, w, torch.ones(256))) - w).norm() / w.norm())

    # measured: 1.08 for Q6_K with the least scale, whose factors are then below 20
    assert share(weight * scale) < 1.1 * share(weight)
    assert rounding.raised_groups(kind, weight * scale) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_groups_too_small_for_a_scale_are_counted(kind):
    """The steps of one group are far below 2**-24; another is zero and needs none."""
    group = KINDS[kind].group
    weight = 1e-3 * torch.tensor([1.0, -1.0]).repeat(1, 128)
    weight[0, :group], weight[0, group : 2 * group] = 1e-6 * weight[0, :group], 0
    assert rounding.raised_groups(kind, weight) == 1


# The largest float16 number times what a code, or a small factor and a code, multiplies it by.
MOST = {"Q4_0": 8, "Q4_1": 1, "Q5_0": 16, "Q5_1": 1, "Q8_0": 128, "Q4_K": 63, "Q5_K": 63, "Q6_K": 127 * 32}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_larger_than_scales_reach_are_refused_by_name(kind):
    weight = torch.zeros(2, 256)
    weight[1, 3] = -65504.0 * MOST[kind]
    assert values(round_blocks(kind, weight, torch.ones(256)))[1, 3] == pytest.approx(float(weight[1, 3]), rel=0.05)
    weight[1, 3] *= 1.001
    with pytest.raises(NumericsError, match=rf"up_proj must be small enough for {kind}, .*; its largest weight is"):
        round_blocks(kind, weight, torch.ones(256), "up_proj")


@pytest.mark.parametrize("kind", KINDS)
def test_importance_moves_the_error_to_where_it_costs_little(kind):
    weight, _ = problem()
    importance = torch.where(torch.arange(256) % 8 == 0, 100.0, 1.0)

    def cost(worth: torch.Tensor) -> torch.Tensor:
        return ((values(round_blocks(kind, weight, worth)) - weight).square() * importance).sum()

    assert cost(importance) < cost(torch.ones(256))


@pytest.mark.parametrize("kind", KINDS)
def test_only_ratios_of_importance_count(kind):
    """Inputs of a thousandth have a millionth of the importance; a power of two changes no digit."""
    weight, hessian = problem()
    usual, small = (round_blocks(kind, weight, hessian.diagonal() * unit) for unit in (1.0, 2.0**-40))
    assert torch.equal(encode(usual), encode(small))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_nearest_ones(kind):
    """Brute force: no other code of any weight is closer."""
    weight, _ = problem(4)
    blocks = round_blocks(kind, weight, torch.ones(256))
    assert torch.equal(blocks.codes, nearest(blocks, weight))
    error = (values(blocks) - weight).abs()
    for move in (-1, 1):
        moved = blocks.codes.to(torch.int16) + move
        allowed = (moved >= 0) & (moved < 2 ** KINDS[kind].bits)
        codes = moved.clamp(0, 2 ** KINDS[kind].bits - 1).to(torch.uint8)
        other = (values(blocks._replace(codes=codes)) - weight).abs()
        # ties may fall either way: float32 rounding of values below 0.1
        assert bool((error <= other + 1e-8)[allowed].all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e4])
def test_odd_weights_stay_finite_and_read_back(kind, scale):
    """All zero, too small for a float16 step, and large; also a row of one sign."""
    weight = scale * torch.randn(3, 256, generator=torch.Generator().manual_seed(2))
    weight[1] = weight[1].abs()
    blocks = round_blocks(kind, weight, torch.ones(256))
    found = values(blocks)
    assert bool(torch.isfinite(found).all())
    read = quants.dequantize(encode(blocks).numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(read), found)
    # within a quarter of the range, or of float16's least scale
    assert (found - weight).abs().max() <= max(weight.abs().max() / 4, 2.0**-24)


@pytest.mark.parametrize("kind", KINDS)
def test_the_hessian_makes_codes_better_than_rounding(kind):
    weight, hessian = problem()
    found = solve_blocks(kind, weight, hessian, factorize(hessian))
    error = (weight - values(found.blocks)).double()
    exact = float((error @ hessian.double() * error).sum())
    # float32 sums of 24 x 256 products
    assert found.loss == pytest.approx(exact, rel=1e-3)
    plain = values(round_blocks(kind, weight, torch.ones(256))) - weight
    assert found.rounding == pytest.approx(float((plain @ hessian * plain).sum()), rel=1e-3)
    assert found.loss < 0.6 * found.rounding  # measured: 0.3


def test_rounding_is_kept_where_it_is_better(monkeypatch):
    weight, hessian = problem()
    monkeypatch.setattr(solver, "_codes", lambda chunk, *_: torch.zeros(chunk.shape, dtype=torch.uint8))
    found = solve_blocks("Q4_0", weight, hessian, factorize(hessian))
    assert found.loss == found.rounding
    assert torch.equal(found.blocks.codes, round_blocks("Q4_0", weight, torch.ones(256)).codes)


def test_chunks_of_rows_change_nothing(monkeypatch):
    weight, hessian = problem()
    factor = factorize(hessian)
    whole = solve_blocks("Q4_K", weight, hessian, factor)
    for module in (solver, rounding):
        monkeypatch.setattr(module, "CHUNK_WEIGHTS", 256 * 10)
    parts = solve_blocks("Q4_K", weight, hessian, factor)
    # matrix products of other shapes may round differently and so flip a tie; nearly all codes are the same
    assert (whole.blocks.codes == parts.blocks.codes).float().mean() > 0.99
    assert parts.loss == pytest.approx(whole.loss, rel=0.01)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K"])
def test_bad_weights_are_refused(kind):
    with pytest.raises(NumericsError, match="weight must be finite"):
        round_blocks(kind, torch.full((1, 256), float("nan")), torch.ones(256))
    with pytest.raises(FormatError, match=f"{kind} needs rows"):
        round_blocks(kind, torch.ones(1, 40), torch.ones(40))


def test_inputs_too_small_to_be_squared_are_on_record():
    """And an error under strict, before anything is changed."""
    for strict in (True, False):
        model = torch.nn.Sequential(torch.nn.Linear(256, 8, bias=False))
        X, before = 1e-25 * torch.randn(64, 256, generator=torch.Generator().manual_seed(1)), model[0].weight.clone()
        task = BlockFormats("", {"0": "Q4_K"}, GPTQConfig(), strict)
        if strict:
            with pytest.raises(NumericsError, match="strict: the inputs of 0 must be large enough for float32"):
                solve_linears(model, [lambda model=model, X=X: model(X)], task)
            assert torch.equal(model[0].weight, before)
        else:
            rescues = solve_linears(model, [lambda model=model, X=X: model(X)], task)["0"].rescues
            assert rescues == ("inputs too small to be squared",)
