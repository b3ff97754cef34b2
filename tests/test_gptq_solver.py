"""The GPTQ solver and its use on a block.

Oracle: tests/oracles.py, the same algorithm with an explicit inverse Hessian in float64.
"""

import oracles
import pytest
import torch
from torch import nn

from ptq.block import quantize_block
from ptq.calibration.capture import InputStats
from ptq.config import RunConfig
from ptq.errors import NumericsError
from ptq.formats.codec import Scheme
from ptq.gptq import block as gptq_block
from ptq.gptq import factorize, gptq_solve
from ptq.gptq.solver import require_no_rescue
from ptq.grid import Grid, min_max_grid, nearest_codes, values
from ptq.grid_search import search_grid
from ptq.loss import quadratic_loss, rounding_loss
from ptq.task import BlockTask

N, K, T = 4, 24, 60
ORDERS = ["static", "none"]


@pytest.fixture
def x():
    return oracles.correlated_inputs(T, K)


@pytest.fixture(name="H")
def hessian(x):
    return oracles.second_moment([x])


@pytest.fixture(name="W")
def weight():
    return oracles.random_weight(N, K)


def damped(H, factor):
    return H + factor.lam * torch.eye(len(H), dtype=H.dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group_size", [4, 12, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_equal_those_of_the_explicit_inverse(bits, symmetric, group_size, order, W, H, x):
    grid = min_max_grid(W, Scheme(bits, group_size, symmetric))
    factor = factorize(H, activation_order=order)
    found = gptq_solve(W, factor, grid)
    visited = torch.argsort(H.diagonal(), descending=True).tolist() if order == "static" else range(K)
    naive = oracles.obs(W, damped(H, factor), visited, grid.scales, grid.zeros, grid.top)
    assert found.codes.dtype == torch.uint8
    assert torch.equal(found.codes.long(), naive.codes)
    # sum e^2 == trace(D Hd D^T), and without the damping's share the error of the outputs themselves; float64
    D = W - oracles.dequantize(found.codes, grid.scales, grid.zeros)
    assert naive.squared == pytest.approx(quadratic_loss(D, damped(H, factor)), rel=1e-9)
    assert found.loss == pytest.approx(oracles.output_error(x, D), rel=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_correlation_gptq_is_rounding(order, dtype, W):
    W = W.to(dtype)
    W[0, :4] = torch.tensor([0.5, 1.5, -0.5, 0.25])
    grid = Grid(torch.full((N, 3), 0.5, dtype=dtype), torch.full((N, 3), 8.0, dtype=dtype), 4, 8, True)  # ties occur
    found = gptq_solve(W, factorize(torch.eye(K, dtype=dtype), activation_order=order), grid)
    assert torch.equal(found.codes, nearest_codes(W, grid))
    # N * K squares of the dtype
    exact = float((W - values(found.codes, grid)).double().square().sum())
    assert found.loss == pytest.approx(exact, rel=N * K * torch.finfo(dtype).eps)


@pytest.mark.parametrize("order", ORDERS)
def test_block_size_is_speed_only(order, W, H):
    grid, factor = min_max_grid(W, Scheme(3, 8, False)), factorize(H, activation_order=order)
    whole, *others = [gptq_solve(W, factor, grid, block_size=size) for size in (128, 1, 7, K)]
    for other in others:
        assert torch.equal(other.codes, whole.codes)
        assert other.loss == pytest.approx(whole.loss, rel=1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_the_factor_is_that_of_the_inverse(order, H):
    factor = factorize(H, damping=0.02, activation_order=order)
    assert factor.lam == pytest.approx(0.02 * float(H.diagonal().mean()), rel=1e-14)
    assert (factor.damping, factor.dead, factor.rescues) == (0.02, 0, ())
    inverse = torch.linalg.inv(damped(H, factor))[factor.order_K][:, factor.order_K]
    # cond(Hd) is below K / damping = 1200, times float64's 1e-16
    torch.testing.assert_close(factor.U_KK.T @ factor.U_KK, inverse, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(factor.U_KK, torch.linalg.cholesky(inverse, upper=True), rtol=1e-11, atol=1e-11)
    assert bool((factor.U_KK.tril(-1) == 0).all())


def test_static_order_visits_the_strongest_input_first(H):
    strengths = H.diagonal()[factorize(H).order_K]
    assert bool((strengths[:-1] >= strengths[1:]).all())
    assert factorize(H, activation_order="none").order_K.tolist() == list(range(K))


@pytest.mark.parametrize("order", ORDERS)
def test_dead_inputs_are_plainly_rounded(order, W, x):
    x[:, [3, 7, 8]] = 0
    H = oracles.second_moment([x])
    grid, factor = min_max_grid(W, Scheme(4, 8, True)), factorize(H, activation_order=order)
    found = gptq_solve(W, factor, grid)
    assert factor.dead == 3
    assert torch.equal(found.codes[:, [3, 7, 8]], nearest_codes(W, grid)[:, [3, 7, 8]])
    naive = oracles.obs(W, damped(H, factor), factor.order_K.tolist(), grid.scales, grid.zeros, grid.top)
    assert torch.equal(found.codes.long(), naive.codes)
    if order == "static":
        assert sorted(factor.order_K[-3:].tolist()) == [3, 7, 8]


def test_inputs_that_never_fire_at_all_leave_rounding(W):
    grid, factor = min_max_grid(W, Scheme(4, 8, True)), factorize(torch.zeros(K, K, dtype=torch.float64))
    found = gptq_solve(W, factor, grid)
    assert torch.equal(found.codes, nearest_codes(W, grid))
    assert (factor.dead, factor.rescues) == (K, ())
    assert found.loss == pytest.approx(0, abs=1e-12)


def pair(off, size=4, dtype=torch.float32):
    """Ones on the diagonal, pairs coupled by ``off``: eigenvalues ``1 - off`` and ``1 + off``."""
    return torch.block_diag(*[torch.tensor([[1.0, off], [off, 1.0]], dtype=dtype)] * (size // 2))


@pytest.mark.parametrize(
    ("H", "damping", "rescues", "final"),
    [
        pytest.param(pair(0.5), 0.01, (), 0.01, id="sound"),
        # 1 + 1e-9 is 1 in float32, and all ones is singular; float64 tells them apart
        pytest.param(torch.ones(4, 4), 1e-9, ("float64",), 1e-9, id="float64"),
        # eigenvalue -0.5: positive once more than half of the mean is added
        pytest.param(pair(1.5), 0.2, ("float64", "damping 0.6"), 0.6, id="damping"),
        pytest.param(pair(1.5, dtype=torch.float64), 0.2, ("damping 0.6",), 0.6, id="damping-in-float64"),
        # eigenvalue -2: no damping up to 1 helps
        pytest.param(pair(3.0), 0.5, ("float64", "damping 1", "float64", "diagonal"), 1.0, id="diagonal"),
        pytest.param(-pair(0.5, dtype=torch.float64), 0.5, ("damping 1", "diagonal"), 1.0, id="negative"),
    ],
)
def test_the_rescue_ladder(H, damping, rescues, final):
    factor = factorize(H, damping=damping, activation_order="none")
    assert factor.rescues == rescues
    assert factor.damping == pytest.approx(final)
    assert bool(torch.isfinite(factor.U_KK).all())
    W = oracles.random_weight(3, 4).to(H.dtype)
    grid = min_max_grid(W, Scheme(4, 4, True))
    codes = gptq_solve(W, factor, grid).codes
    if "diagonal" in rescues:
        assert torch.equal(codes, nearest_codes(W, grid))
    else:
        assert factor.U_KK.dtype == H.dtype
        inverse = torch.linalg.inv(damped(H.double(), factor))
        # float32 digits of a factor that was computed in float64 where the matrix is nearly singular
        torch.testing.assert_close((factor.U_KK.double().T @ factor.U_KK.double()), inverse, rtol=1e-4, atol=1e-4)
    if rescues:
        with pytest.raises(NumericsError, match=f"the Hessian of a.b must .* needed {rescues[0]}.*: give more"):
            require_no_rescue(factor, "a.b")
    else:
        require_no_rescue(factor, "a.b")


def test_a_ladder_from_no_damping_at_all_climbs_by_threes():
    factor = factorize(pair(1.5, dtype=torch.float64), damping=0.0)
    # 3e-6 * 3**11 is the first above the 0.5 that pair(1.5) lacks
    assert factor.rescues == tuple(f"damping {3e-6 * 3**step:.3g}" for step in range(12))
    assert factor.damping == pytest.approx(3e-6 * 3**11)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_everything_must_be_finite(bad, W, H):
    broken = H.clone()
    broken[2, 3] = bad
    with pytest.raises(NumericsError, match=f"the Hessian must be finite; 1 of {K * K} values"):
        factorize(broken)
    grid, factor = min_max_grid(W, Scheme(4, 8, True)), factorize(H)
    W[1, 1] = bad
    with pytest.raises(NumericsError, match=f"weight must be finite; 1 of {N * K} values"):
        gptq_solve(W, factor, grid)


def test_stacked_weights_are_solved_as_if_alone(H):
    factor, scheme = factorize(H), Scheme(3, 8, False)
    parts = [oracles.random_weight(rows, K, seed=rows) for rows in (2, 5, 3)]
    stacked = gptq_solve(torch.cat(parts), factor, min_max_grid(torch.cat(parts), scheme))
    alone = [gptq_solve(w, factor, min_max_grid(w, scheme)) for w in parts]
    assert torch.equal(stacked.codes, torch.cat([each.codes for each in alone]))
    assert stacked.loss == pytest.approx(sum(each.loss for each in alone), rel=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_what_each_part_gains(bits, symmetric, H):
    """On correlated inputs solving beats rounding, and scales from the Hessian beat those of the range."""
    W, scheme = oracles.random_weight(32, K), Scheme(bits, 8, symmetric)
    factor, plain = factorize(H), min_max_grid(W, scheme)
    weighted = search_grid(W, H.diagonal() + factor.lam, scheme)
    solved = [gptq_solve(W, factor, grid).loss for grid in (weighted, plain)]
    assert solved[0] < solved[1] < rounding_loss(W, H, plain)


def test_float32_is_as_good_as_float64(W, H):
    scheme = Scheme(4, 8, True)
    exact = gptq_solve(W, factorize(H), min_max_grid(W, scheme))
    grid = min_max_grid(W.float(), scheme)
    single = gptq_solve(W.float(), factorize(H.float()), grid)
    # the inputs and the weight are not near any tie, so the codes agree, and the loss to float32 times cond(Hd) < 1200
    assert torch.equal(single.codes, exact.codes)
    assert single.loss == pytest.approx(exact.loss, rel=1200 * 2.0**-23)
    assert torch.equal(values(single.codes, grid), values(exact.codes, grid))


def run_block(x, layer, name="block", **options):
    """The one Linear of a block, quantized."""
    task = BlockTask(name, {"0": Scheme(3, 8, True)}, RunConfig("m", "o", "gptq", **options), torch.float16)
    return quantize_block(nn.Sequential(layer), [lambda: layer(x)], task)["0"]


def linear(W):
    layer = nn.Linear(K, len(W))
    layer.weight.data.copy_(W)
    return layer.requires_grad_(False)


def test_a_block_reports_the_losses_of_its_outputs(W, x):
    layer = linear(W)
    quantized, row = run_block(x.float(), layer, strict=True)
    energy = oracles.output_error(x, W)
    rounded = values(nearest_codes(W, min_max_grid(W, Scheme(3, 8, True))), min_max_grid(W, Scheme(3, 8, True)))
    # float32 matrices of at most 24 x 60 terms; the loss is some 1e-2 of the energy, the damping's share less than it
    assert row["relative_loss"] == pytest.approx(
        oracles.output_error(x, W - quantized.dequantize().double()) / energy, rel=1e-3
    )
    assert row["relative_rounding_loss"] == pytest.approx(oracles.output_error(x, W - rounded) / energy, rel=1e-3)
    assert row["loss_to_rounding"] == row["relative_loss"] / row["relative_rounding_loss"] < 1
    assert (row["solver"], row["tokens"], row["dead_inputs"], row["rescues"]) == ("gptq", T, 0, [])
    assert torch.equal(layer.weight, quantized.dequantize())


def test_strict_names_the_linear_whose_hessian_needed_a_rescue(W, x, monkeypatch):
    H = torch.block_diag(*[pair(3.0)] * 6)
    monkeypatch.setattr(gptq_block, "collect", lambda *_args, **_kw: [InputStats(H, torch.ones(K), T)])
    for name, found in (("block", "block.0"), ("", "0")):
        with pytest.raises(NumericsError, match=f"strict: the Hessian of {found} must be positive definite"):
            run_block(x.float(), linear(W), name, strict=True)


def test_the_loss_after_the_last_rescue_is_not_that_of_the_diagonal(W, x, monkeypatch):
    H = torch.block_diag(*[pair(3.0)] * 6)
    monkeypatch.setattr(gptq_block, "collect", lambda *_args, **_kw: [InputStats(H, torch.ones(K), T)])
    W = W.abs()  # so that the energy under this indefinite H is positive
    quantized, row = run_block(x.float(), linear(W))
    assert "diagonal" in row["rescues"]
    loss = quadratic_loss(W - quantized.dequantize().double(), H.double()) / quadratic_loss(W, H.double())
    assert row["relative_loss"] == pytest.approx(loss, rel=1e-4)  # float32
