"""Rows that make up for each other's errors. Oracles: least squares over all rows still to come, and dense traces."""

import pytest
import torch
from torch import Tensor

from ptq.gptq import outputs
from ptq.gptq.outputs import add_moments, output_loss, row_blocks, settled, solve_by_parts


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "BLOCK", 12)
    monkeypatch.setattr(outputs, "PART", 5)


def problem(n: int, k: int = 6, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A weight, the Hessian of its inputs and the diagonal blocks of G for correlated outputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator).double() + 2
    gradients = torch.randn(tokens, n, generator=generator).double() @ mix
    X = torch.randn(tokens, k, generator=generator).double()
    blocks = [torch.zeros(rows.stop - rows.start, rows.stop - rows.start).double() for rows in row_blocks(n)]
    for part in gradients.split(150):
        add_moments(blocks, part)
    return torch.randn(n, k, generator=generator).double(), X.t() @ X / tokens, [settled(b, tokens) for b in blocks]


def dense(blocks: list[Tensor]) -> Tensor:
    return torch.block_diag(*blocks)


def rounded(target: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.round(target * 2) / 2
    return values, values


@pytest.mark.parametrize("n", [3, 12, 17, 24, 31])
def test_each_part_aims_at_what_is_best_given_the_errors_before_it(n: int) -> None:
    """Which is the least-squares solution of all rows of its block that are still to come, solved anew each time."""
    W, _, moments = problem(n)
    G, Q, solved = dense(moments), torch.zeros_like(W), torch.zeros(n, dtype=torch.bool)
    for rows, values in solve_by_parts(W, moments, rounded):
        expected = W.clone()
        if solved.any():
            D = (W - Q)[solved]
            expected[~solved] += torch.linalg.solve(G[~solved][:, ~solved], G[~solved][:, solved] @ D)
        # rows of one part are blind to each other: all were to be solved when it was
        torch.testing.assert_close(values, rounded(expected[rows])[0])
        Q[rows], solved[rows] = values, True
    assert bool(solved.all())


def test_outputs_that_do_not_meet_again_keep_their_targets() -> None:
    W, _, _ = problem(17)
    for G in (torch.eye(12), torch.zeros(12, 12)):
        moments = [G.double(), G.double()[:5, :5]]
        for rows, target in solve_by_parts(W, moments, lambda target: (torch.zeros_like(target), target.clone())):
            assert torch.equal(target, W[rows])


@pytest.mark.parametrize("seed", range(4))
def test_less_is_lost_at_the_end_than_by_rows_alone(seed: int) -> None:
    W, H, moments = problem(24, seed=seed)
    Q = torch.zeros_like(W)
    for rows, values in solve_by_parts(W, moments, rounded):
        Q[rows] = values
    D = W - Q
    loss = output_loss(D, H, moments)
    assert loss == pytest.approx(float(torch.trace(dense(moments) @ D @ H @ D.t())), rel=1e-10)
    assert loss < 0.7 * output_loss(W - rounded(W)[0], H, moments)


def test_moments_are_drawn_towards_the_identity_by_their_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(40, 17, generator=generator).double()
    blocks = [torch.zeros(12, 12).double(), torch.zeros(5, 5).double()]
    add_moments(blocks, gradients)
    for block, rows in zip(blocks, (slice(0, 12), slice(12, 17)), strict=True):
        mean = gradients[:, rows].t() @ gradients[:, rows] / 40
        share = outputs.DAMPING + outputs.NOISE * len(mean) / 40
        expected = mean + share * mean.diagonal().mean() * torch.eye(len(mean)).double()
        torch.testing.assert_close(settled(block, 40), expected)
    assert not settled(torch.zeros(3, 3), 0).any()


@pytest.mark.parametrize("size", [1e-18, 1e-20, 1e-22])
def test_gradients_too_small_to_be_squared_count_as_none_or_have_a_factor(size: float) -> None:
    """As behind an expert whose share is next to nothing; one output alone then leaves nothing to add to the others."""
    gradients = torch.zeros(4, 12)
    gradients[0, 0] = size
    blocks = [torch.zeros(12, 12)]
    add_moments(blocks, gradients)
    W = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    for rows, target in solve_by_parts(W, [settled(blocks[0], 4)], lambda target: (target.round(), target.clone())):
        torch.testing.assert_close(target, W[rows])
