"""The operator of `ptq_kernels.matmul`, and a count of the calls that reach it: none on the short way."""

from typing import Any

import pytest
import torch
from ptq_kernels import torch_op, transforms

OPERATOR = torch_op.matmul


def counted_operator(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call from now on."""
    calls: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return OPERATOR(*arguments)

    monkeypatch.setattr(torch_op, "matmul", counted)
    monkeypatch.setattr(transforms._Product, "forward", staticmethod(counted))  # which holds the operator itself
    return calls
