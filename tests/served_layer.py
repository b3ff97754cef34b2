"""A weight in fragment order that has been served once, on a driver that records (recorded_launches.py)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ptq_kernels
import pytest
import tile_cases
import torch
from counted_operator import OPERATOR
from packed_weights import Case, random_case, random_rows
from recorded_launches import Launched, recorded

N, K = 64, 256
NAMES = ["qweight", "scales", "zeros", "bias", "perm"]


def launches_of(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[list[Launched]]:
    """Every launch, in order, as on a GPU that takes CPU tensors."""
    from ptq_kernels.triton import w4a16

    if w4a16.interpreted():
        pytest.skip("compilation needs Triton without its interpreter")
    monkeypatch.setattr(w4a16, "refuse", lambda device: None)
    yield from recorded(monkeypatch, folder)


def rows(count: int = 1, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return random_rows(count, K, dtype)


class Layer:
    """A weight in fragment order that has been served once."""

    def __init__(self, bias: torch.Tensor | None = None, perm: torch.Tensor | None = None) -> None:
        self.case: Case = random_case(N, K, 128, symmetric=False, dtype=torch.bfloat16)
        weight = tile_cases.tiled(self.case, "tile_sm90")
        self.tensors = [weight.qweight, weight.scales, weight.zeros, bias, perm]
        self(rows())

    def __call__(self, x: torch.Tensor, **change: Any) -> torch.Tensor:
        named = {**self.case.scheme, "layout": "tile_sm90", "impl": "triton", "perm": self.tensors[4], **change}
        return ptq_kernels.matmul(x, *self.tensors[:4], **named)

    def by_operator(self, x: torch.Tensor) -> torch.Tensor:
        return OPERATOR(x, *self.tensors[:4], 4, 128, "tile_sm90", "triton", self.tensors[4])
