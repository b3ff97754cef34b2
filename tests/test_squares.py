"""Products with matrices that lie elsewhere. Oracle: the plain product."""

import pytest
import torch

from ptq import squares
from ptq.squares import add_product, times

FAR = torch.device("cpu", 1)  # a name that differs is all a second device needs here


class Elsewhere(torch.Tensor):
    """Says that it lies on another device; only copies and sums may touch it there."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            return FAR
        if function == torch.Tensor.to and args[1] != FAR:
            return args[0].as_subclass(torch.Tensor)
        assert function not in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.addmm_)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.fixture(autouse=True)
def panels(monkeypatch):
    monkeypatch.setattr(squares, "PANEL", 4)


def test_times():
    D, H = torch.randn(3, 10).double(), torch.randn(10, 10).double()
    found = times(D, H.as_subclass(Elsewhere))
    assert found.device.index is None
    torch.testing.assert_close(found, D @ H)


def test_add_product():
    left, right, H = torch.randn(7, 10).double(), torch.randn(7, 10).double(), torch.randn(10, 10).double()
    expected = H + 0.5 * left.t() @ right
    add_product(H.as_subclass(Elsewhere), left, right, 0.5)
    torch.testing.assert_close(H, expected)
