"""Weights whose groups are not contiguous (act-order): sorted at load, x gathered at run time.

Oracle: float64, element by element, with the group of each column looked up in g_idx.
"""

import os
import subprocess
import sys
from pathlib import Path

import order_cases
import ptq_kernels
import pytest
import torch
from packed_weights import UNIT, random_case, random_rows
from ptq_kernels import layouts, order
from ptq_kernels.cpu import library
from ptq_kernels.layouts import PackedWeight

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SCATTERED = order_cases.scattered(60, 12)


@pytest.mark.parametrize("impl", ["reference", "cpu", "cpu-torch"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_matches_float64(impl: str, bits: int) -> None:
    for spec in order_cases.SPECS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            # what an implementation for bfloat16 rows may round a weight, its scale and its offset to
            rounded = 0.0 if impl == "reference" or dtype == torch.float32 else 3 * UNIT[torch.bfloat16]
            assert order_cases.worst(spec._replace(bits=bits, dtype=dtype), impl, rounded) <= 1, spec


def test_matches_float64_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    program = Path(__file__).with_name("order_cases.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr


def test_sorts_by_group_and_keeps_the_order_within() -> None:
    perm = ptq_kernels.group_order(torch.tensor([2, 0, 1, 0, 2, 1]), 2, 6)
    assert perm.dtype == torch.int32
    assert perm.tolist() == [1, 3, 2, 5, 0, 4]
    assert order.inverse(perm).tolist() == [4, 0, 2, 1, 5, 3]


@pytest.mark.parametrize("layout", ["canonical", "tile_sm90", "strips"])
def test_canonical_undoes_the_sort_bit_for_bit(layout: str) -> None:
    if layout == "strips" and library.best() is None:
        pytest.skip("no C++ library can be used here")
    case, g_idx = random_case(48, 256, 64, symmetric=False), order_cases.scattered(256, 64)
    prepared = ptq_kernels.prepare(*case.tensors, g_idx=g_idx, impl="reference", **case.sized)
    weight = layouts.convert(PackedWeight(*prepared[:3], 4, 64, 256, perm=prepared.perm), layout)
    back = ptq_kernels.canonical(*weight[:3], layout=layout, perm=prepared.perm, **case.sized)
    assert torch.equal(back, case.qweight)
    dense = ptq_kernels.dequantize(*weight[:3], layout=layout, perm=prepared.perm, **case.sized)
    assert torch.equal(dense, order_cases.dense(case, g_idx).float())  # rounded once


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradient_reaches_the_columns_of_x(impl: str) -> None:
    case = random_case(48, 60, 12, symmetric=False)
    prepared = ptq_kernels.prepare(*case.tensors, g_idx=SCATTERED, impl=impl, **case.sized)
    x = random_rows(3, 60, torch.float32).requires_grad_()
    y = ptq_kernels.matmul(x, *prepared[:3], layout=prepared.layout, perm=prepared.perm, impl=impl, **case.scheme)
    upstream = random_rows(3, 48, torch.float32)
    (grad,) = torch.autograd.grad(y, x, upstream)
    want = upstream.double() @ order_cases.dense(case, SCATTERED)
    torch.testing.assert_close(grad.double(), want, rtol=0, atol=1.4e-4)  # 48 terms below 1: 48 * 48 * 2**-24


def test_compiles_whole_and_passes_opcheck() -> None:
    torch._dynamo.reset()
    case = random_case(48, 60, 12, symmetric=False)
    prepared = ptq_kernels.prepare(*case.tensors, g_idx=SCATTERED, **case.sized)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return ptq_kernels.matmul(x, *prepared[:3], layout=prepared.layout, perm=prepared.perm, **case.scheme)

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        x = random_rows(rows, 60, torch.float32)
        assert torch.equal(compiled(x), forward(x))
    x = random_rows(4, 60, torch.float32).requires_grad_()
    arguments = (x, *prepared[:3], torch.ones(48), 4, 12, prepared.layout, "auto", prepared.perm)
    torch.library.opcheck(torch.ops.ptq_kernels.matmul.default, arguments)
    arguments = (torch.ones(4, 48), *prepared[:3], 4, 12, 60, prepared.layout, prepared.perm)
    torch.library.opcheck(torch.ops.ptq_kernels.matmul_grad_input.default, arguments)


UNEQUAL = torch.arange(60) // 13  # 13, 13, 13, 13, 8: what a group size that does not divide K leaves


@pytest.mark.parametrize(
    ("g_idx", "error", "message"),
    [
        (SCATTERED.float(), TypeError, "g_idx must be torch.int32 or torch.int64, got torch.float32"),
        (SCATTERED[:48], ValueError, r"g_idx must have shape \[60\], .*got \[48\]; check that it belongs"),
        (SCATTERED - 1, ValueError, "groups from 0 to 4, as scales do, got -1 to 3; check group_size = 12"),
        (SCATTERED + 1, ValueError, "groups from 0 to 4, as scales do, got 1 to 5"),
        (UNEQUAL, ValueError, r"12 columns in each of 5 groups, group 0 has 13 \(5 groups differ\); groups of unequal"),
    ],
)
def test_refuses_what_is_no_partition_in_equal_groups(g_idx, error, message: str) -> None:
    case = random_case(48, 60, 12)
    with pytest.raises(error, match=message):
        ptq_kernels.prepare(*case.tensors, g_idx=g_idx, **case.sized)


@pytest.mark.parametrize(
    ("perm", "error", "message"),
    [
        (torch.arange(60.0), TypeError, "perm must be torch.int32, torch.int64 or None, got torch.float32"),
        (torch.arange(59), ValueError, r"perm must have shape \[60\], .*got \[59\]; use what prepare returned"),
        (torch.arange(60, device="meta"), ValueError, "perm must be on the device of qweight, cpu, got meta"),
    ],
)
def test_refuses_a_perm_that_does_not_fit(perm, error, message: str) -> None:
    case = random_case(48, 60, 12)
    with pytest.raises(error, match=message):
        ptq_kernels.matmul(torch.ones(2, 60), *case.tensors, perm=perm, **case.scheme)


def test_the_inverse_of_no_permutation_shows_no_old_memory() -> None:
    assert set(order.inverse(torch.zeros(4096, dtype=torch.int32)).tolist()) <= {0, 4095}
