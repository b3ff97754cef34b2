"""Sums that float16 cannot hold, by the reference and on the CPU; tiles_interpreted.py has the same for Triton.

Oracle: float64, rounded to the dtype as IEEE 754 says. Exact: sums of multiples of 32, of which float16 holds every one
up to 65504, and 65536 rounds to infinity.
"""

import math

import ptq_kernels
import pytest
import torch
from packed_weights import Case, dense_float64


@pytest.mark.parametrize("impl", ["reference", "cpu", "cpu-torch"])
@pytest.mark.parametrize("rows", [2, 70])
def test_a_float16_sum_beyond_the_range_is_infinite_with_its_sign(impl: str, rows: int) -> None:
    codes = torch.full((64, 1024), 12, dtype=torch.uint8)
    codes[1], codes[2, :512], codes[3, :4] = 4, 8, 8
    case = Case(codes, ptq_kernels.pack(codes, 4), torch.full((64, 8), 16.0), None, 4, 128)
    x = torch.ones(rows, 1024, dtype=torch.float16)
    x[1, 4:] = 0
    prepared = ptq_kernels.prepare(*case.tensors, impl=impl, **case.sized)
    y = ptq_kernels.matmul(x, *prepared[:3], layout=prepared.layout, impl=impl, **case.scheme)
    want = (x.double() @ dense_float64(case).T).half()
    assert want[0, :4].tolist() == [math.inf, -math.inf, 32768, 65280]
    assert torch.equal(y, want)
    wide = ptq_kernels.matmul(x.bfloat16(), *prepared[:3], layout=prepared.layout, impl=impl, **case.scheme)
    assert torch.isfinite(wide).all()
    assert wide[0, 0] == 65536
