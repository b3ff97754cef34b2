"""Coordinate descent and the correction for drifted inputs. Oracles: the float64 objective, and least squares."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from ptq.calibration.capture import collect, collect_drift, trace_groups
from ptq.config import GPTQConfig
from ptq.errors import NumericsError, UnsupportedModelError
from ptq.formats.codec import Scheme
from ptq.gptq import solver
from ptq.gptq.descent import descend
from ptq.gptq.solver import correction, factorize, gptq_solve
from ptq.grid import Grid, min_max_grid, values
from ptq.grid_search import search_grid
from ptq.loss import quadratic_loss
from ptq.plain import quantize_linears
from ptq.rtn import rtn_solve


def problem(seed: int, n: int = 12, k: int = 32, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, k, generator=generator).double() @ torch.randn(k, k, generator=generator).double()
    return torch.randn(n, k, generator=generator).double(), X.t() @ X / tokens


def naive_descent(W: Tensor, codes: Tensor, Hd: Tensor, order: Tensor, grid: Grid, sweeps: int) -> Tensor:
    """Every code in turn at the best of all its values, found by trying them all."""
    codes = codes.clone()
    for _ in range(sweeps):
        for k in order.tolist():
            group = k // grid.group_size
            losses = []
            for code in range(grid.top + 1):
                tried = codes.clone()
                tried[:, k] = code
                D = W - values(tried, grid)
                losses.append(((D @ Hd) * D).sum(-1))
            codes[:, k] = torch.stack(losses).argmin(0).to(torch.uint8)
            assert group < grid.scales.shape[1]
    return codes


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_descent_equals_trying_every_code(bits: int, symmetric: bool, block_size: int) -> None:
    W, H = problem(0)
    factor = factorize(H)
    grid = search_grid(W, H.diagonal() + factor.lam, Scheme(bits, 16, symmetric))
    start = gptq_solve(W, factor, grid).codes
    Hd = H + factor.lam * torch.eye(len(H), dtype=H.dtype)
    found = descend(W, start, H, factor, grid, sweeps=2, block_size=block_size)
    assert torch.equal(found.codes, naive_descent(W, start, Hd, factor.order_K, grid, 2))
    assert found.loss == pytest.approx(quadratic_loss(W - values(found.codes, grid), H), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_descent_never_raises_the_damped_loss(seed: int) -> None:
    W, H = problem(seed)
    factor = factorize(H)
    grid = min_max_grid(W, Scheme(3, 8, True))
    Hd = H + factor.lam * torch.eye(len(H), dtype=H.dtype)
    codes = gptq_solve(W, factor, grid).codes
    found = [descend(W, codes, H, factor, grid, sweeps=sweeps).codes for sweeps in range(4)]
    losses = [quadratic_loss(W - values(each, grid), Hd) for each in found]
    assert losses[0] == quadratic_loss(W - values(codes, grid), Hd)
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert losses[1] < losses[0]


def test_one_row_comes_back_contiguous() -> None:
    W, H = problem(1, n=1)
    factor = factorize(H)
    grid = min_max_grid(W, Scheme(4, 16, True))
    assert descend(W, gptq_solve(W, factor, grid).codes, H, factor, grid).codes.stride() == (32, 1)


def drifted(seed: int, tokens: int = 400, k: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X_float = torch.randn(tokens, k, generator=generator).double() @ torch.randn(k, k, generator=generator).double()
    mix = 0.1 * torch.randn(k, k, generator=generator).double()
    return X_float, X_float + X_float @ mix + 0.05 * torch.randn(tokens, k, generator=generator).double()


def test_full_correction_is_the_least_squares_target() -> None:
    X_float, X = drifted(0)
    W = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).double()
    H, C = X.t() @ X / len(X), (X_float - X).t() @ X / len(X)
    factor = factorize(H, damping=1e-12)
    target = W + W @ correction(C, factor, 1.0)
    expected = torch.linalg.lstsq(X, X_float @ W.t()).solution.t()
    # damping 1e-12 times the condition number of H (some 1e4) is what separates the two
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [3, 1024])
def test_correcting_a_product_is_multiplying_by_a_correction(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(solver, "ROWS", rows)
    W, H = problem(4)
    C = torch.randn(H.shape, generator=torch.Generator().manual_seed(5)).double()
    factor = factorize(H)
    expected = 0.5 * W @ C @ torch.linalg.inv(H + factor.lam * torch.eye(len(H)).double())
    product = W @ C
    assert correction(product, factor, 0.5) is product
    torch.testing.assert_close(product, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(W @ correction(C, factor, 0.5), expected, rtol=1e-8, atol=1e-10)


def test_rows_in_chunks_get_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 and away from ties a product's rows do not depend on how many are multiplied at once."""
    found = []
    for weights in (1 << 24, 5 * 32):
        monkeypatch.setattr("ptq.gptq.block.CHUNK_WEIGHTS", weights)
        monkeypatch.setattr("ptq.task.CHUNK_WEIGHTS", weights)
        module, batches = seeded()
        rows = quantize_linears(module, batches, bits=3, group_size=16)
        found.append(([row["relative_loss"] for row in rows.values()], [m.dequantize() for m in module.children()]))
    (losses, values_), (chunked_losses, chunked) = found
    assert all(torch.equal(a, b) for a, b in zip(values_, chunked, strict=True))
    assert chunked_losses == pytest.approx(losses)


def test_no_drift_needs_no_correction() -> None:
    _, H = problem(2)
    assert not correction(torch.zeros_like(H), factorize(H), 1.0).any()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def seeded(seed: int = 3) -> tuple[Two, list[Tensor]]:
    torch.manual_seed(seed)
    module = Two()
    return module, [torch.randn(n, 32) @ torch.randn(32, 32) for n in (30, 50)]


def test_drift_is_the_moment_of_the_difference() -> None:
    module, batches = seeded()
    other, _ = seeded(4)
    runs = [lambda b=b: module(b) for b in batches]
    float_runs = [lambda b=b: other(b) for b in batches]
    stats, drift = collect_drift(module.second, other.second, 1, zip(runs, float_runs, strict=True), "second")
    X = torch.relu(module.first(torch.cat(batches))).double()
    X_float = torch.relu(other.first(torch.cat(batches))).double()
    assert drift is not None
    expected = (X_float - X).t() @ X / len(X)
    # float32 sums of 80 products, relative to the largest of them
    torch.testing.assert_close(drift.double(), expected, rtol=1e-4, atol=float(expected.abs().max()) * 1e-5)
    (plain,) = collect({"second": module.second}, trace_groups({"second": module.second}, runs[:1]), runs)
    assert torch.equal(stats.hessian, plain.hessian)
    assert stats.tokens == plain.tokens == 80


def test_unequal_rows_give_no_drift() -> None:
    module, batches = seeded()
    pairs = [(lambda: module(batches[0]), lambda: module(batches[1]))]
    stats, drift = collect_drift(module.first, module.first, 1, pairs, "first")
    assert drift is None
    assert stats.tokens == 30


def test_drift_errors_name_the_module() -> None:
    module, batches = seeded()
    with pytest.raises(UnsupportedModelError, match="nothing reached m.first"):
        collect_drift(module.first, module.first, 1, [], "m.first")
    bad = [(lambda: module(batches[0] * float("nan")), lambda: module(batches[0]))]
    with pytest.raises(NumericsError, match="the input of m.first"):
        collect_drift(module.first, module.first, 1, bad, "m.first")


@pytest.mark.parametrize("bits", [2, 3])
def test_both_refinements_lower_the_output_error(bits: int) -> None:
    """End to end on a two-layer network: mean squared output error on the calibration batches."""
    errors = []
    for options in (GPTQConfig(sweeps=0, correct_inputs=0.0), GPTQConfig(sweeps=2, correct_inputs=1.0)):
        total = 0.0
        for seed in range(4):
            module, batches = seeded(seed)
            expected = [module(b) for b in batches]
            quantize_linears(module, batches, bits=bits, group_size=16, gptq=options)
            total += sum(float((module(b) - y).square().sum()) for b, y in zip(batches, expected, strict=True))
        errors.append(total)
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_losses_are_those_of_the_target(strength: float) -> None:
    """As docs/architecture.md defines them. Oracle: target and errors in float64, from the inputs themselves."""
    module, batches = seeded()
    W, x = module.second.weight.detach().double(), torch.cat(batches)
    inputs_float = torch.relu(module.first(x)).detach().double()
    rows = quantize_linears(module, batches, bits=2, group_size=16, gptq=GPTQConfig(correct_inputs=strength))
    X = torch.relu(module.first(x)).detach().double()
    H, C = X.t() @ X / len(X), (inputs_float - X).t() @ X / len(X)
    lam = rows["second"]["damping"] * float(H.diagonal().mean())
    target = W + strength * W @ C @ torch.linalg.inv(H + lam * torch.eye(len(H)).double())
    energy = quadratic_loss(target, H)
    plain = rtn_solve(W, Scheme(2, 16, True)).dequantize().double()
    found = module.second.dequantize(torch.float32).double()
    # float32 Hessian, factor and correction: H has a condition number of some 1e3 with its damping
    assert rows["second"]["relative_loss"] == pytest.approx(quadratic_loss(target - found, H) / energy, rel=2e-3)
    rounding = quadratic_loss(target - plain, H) / energy
    assert rows["second"]["relative_rounding_loss"] == pytest.approx(rounding, rel=2e-3)
    if strength:  # nor is it the share of W's own energy
        assert abs(quadratic_loss(W - found, H) / quadratic_loss(W, H) / rows["second"]["relative_loss"] - 1) > 0.1
