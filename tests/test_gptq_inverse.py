"""The blocked inverse factor. Oracle: LAPACK's inverse and Cholesky in float64, and matrices without a factor."""

import oracles
import pytest
import torch

from ptq.gptq import inverse
from ptq.gptq.inverse import invert_to_factor, multiply_by_inverse

# Panels and tiles that divide a matrix, that do not, and that hold all of it.
TILES = [(4, 8), (5, 7), (3, 5), (256, 1024)]
K = 33


@pytest.fixture(name="H")
def matrix() -> torch.Tensor:
    H = oracles.second_moment([oracles.correlated_inputs(200, K)])
    H.diagonal().add_(0.01 * H.diagonal().mean())
    return H


@pytest.mark.parametrize(("panel", "rows"), TILES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_factor_of_the_inverse(monkeypatch, H, panel, rows, dtype):
    monkeypatch.setattr(inverse, "PANEL", panel)
    monkeypatch.setattr(inverse, "ROWS", rows)
    U = H.to(dtype, copy=True)
    assert invert_to_factor(U)
    expected = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(U.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert torch.equal(U, U.triu())


@pytest.mark.parametrize(("panel", "rows"), TILES)
def test_multiplying_by_the_inverse(monkeypatch, H, panel, rows):
    monkeypatch.setattr(inverse, "PANEL", panel)
    monkeypatch.setattr(inverse, "ROWS", rows)
    X = oracles.random_weight(6, K)
    U, found = H.clone(), X.clone()
    assert invert_to_factor(U)
    multiply_by_inverse(found, U)
    torch.testing.assert_close(found, X @ torch.linalg.inv(H), rtol=1e-8, atol=1e-10)


def test_only_the_upper_triangle_is_read(H):
    U, other = H.clone(), H.triu()
    assert invert_to_factor(U)
    assert invert_to_factor(other)
    assert torch.equal(U, other)


@pytest.mark.parametrize("column", [0, K - 1])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_no_factor(monkeypatch, H, column, value):
    monkeypatch.setattr(inverse, "PANEL", 8)
    H[column, column] = value
    assert not invert_to_factor(H)
