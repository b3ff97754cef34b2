"""GPTQ on several grids. Oracle: the plain solver on each grid alone, in float64."""

import pytest
import torch
from torch import Tensor

from ptq.formats.codec import Scheme
from ptq.gptq import candidates
from ptq.gptq.candidates import factors, solve_candidates
from ptq.gptq.solver import Factor, factorize, gptq_solve
from ptq.grid import Grid, round_scales, values
from ptq.grid_search import search_grid


def problem(scheme: Scheme) -> tuple[Tensor, Tensor, Factor, Grid]:
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(300, 32, generator=generator).double() @ torch.randn(32, 32, generator=generator).double()
    W, H = torch.randn(20, 32, generator=generator).double(), X.t() @ X / len(X)
    factor = factorize(H)
    return W, H, factor, search_grid(W, H.diagonal() + factor.lam, scheme, scale_dtype=torch.float16)


def row_losses(W: Tensor, H: Tensor, codes: Tensor, grid: Grid) -> Tensor:
    D = W - values(codes, grid)
    return ((D @ H) * D).sum(-1)


@pytest.mark.parametrize("scheme", [Scheme(3, 8, True), Scheme(4, 16, False)], ids=str)
@pytest.mark.parametrize("count", [2, 7])
def test_each_row_keeps_the_cheapest_of_all_multiples(scheme: Scheme, count: int) -> None:
    W, H, factor, grid = problem(scheme)
    codes, found = solve_candidates(W, factor, grid, count, scale_dtype=torch.float16)
    alone = []
    for multiple in factors(count):
        tried = grid._replace(scales=round_scales(grid.scales * multiple, torch.float16))
        alone.append((row_losses(W, H, gptq_solve(W, factor, tried).codes, tried), tried.scales))
    least, chosen = torch.stack([losses for losses, _ in alone]).min(0)
    torch.testing.assert_close(row_losses(W, H, codes, found), least, rtol=1e-9, atol=1e-12)
    assert torch.equal(found.scales, torch.stack([s for _, s in alone])[chosen, torch.arange(len(W))])
    assert len(chosen.unique()) > 1, "a problem in which every row chooses alike shows nothing"
    assert torch.equal(found.zeros, grid.zeros)


def test_one_candidate_is_the_plain_solver() -> None:
    W, _, factor, grid = problem(Scheme(4, 16, True))
    codes, found = solve_candidates(W, factor, grid, 1, scale_dtype=torch.float16)
    assert torch.equal(codes, gptq_solve(W, factor, grid).codes)
    assert found is grid


def test_rows_in_chunks_come_out_as_together(monkeypatch: pytest.MonkeyPatch) -> None:
    W, _, factor, grid = problem(Scheme(3, 16, True))
    whole = solve_candidates(W, factor, grid, 5, scale_dtype=torch.float16)
    monkeypatch.setattr(candidates, "CHUNK_WEIGHTS", 5 * 32 * 3)  # three rows at a time
    parts = solve_candidates(W, factor, grid, 5, scale_dtype=torch.float16)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1].scales, parts[1].scales)


@pytest.mark.parametrize("count", range(1, 12))
def test_the_scales_themselves_are_always_tried(count: int) -> None:
    assert len(factors(count)) == count
    assert factors(count).count(1.0) == 1
