"""Weights in fragment order: the layouts, the kernels in the interpreter and on a GPU, and the machine code."""

import os
import subprocess
import sys
from pathlib import Path

import ptq_kernels
import pytest
import tile_cases
import torch
from packed_weights import random_case, random_rows, worst_error
from ptq_kernels import dispatch, layouts, tiles
from ptq_kernels.layouts import PackedWeight

triton = pytest.importorskip("triton", reason="the kernels are written in Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def place(layout: str, bits: int, n: int, k: int) -> tuple[int, int]:
    """Oracle: (byte of the tile, bit) of code (n, k), from the table in tiles.py, digit by digit."""
    w, a, lh = n // 16, n // 8 % 2, n % 8
    if layout == "tile_sm90":
        j, r, ll, kk = k // 16, k // 8 % 2, k // 2 % 4, k % 2
        t = 32 * w + 4 * lh + ll
        return (16 * t + 4 * j, 16 * kk + 8 * r + 4 * a) if bits == 4 else (
            2048 * (j // 2) + 16 * t + 8 * (j % 2) + 4 * r, 16 * a + 8 * kk
        )  # fmt: skip
    jt, ll, r, eh, kk = k // 32, k // 8 % 4, k // 4 % 2, k // 2 % 2, k % 2
    t = 32 * w + 4 * lh + ll
    return (16 * t + 8 * jt + 4 * a, 16 * kk + 8 * r + 4 * eh) if bits == 4 else (
        2048 * jt + 16 * t + 8 * a + 4 * r, 16 * eh + 8 * kk
    )  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", tiles.NAMES)
def test_every_code_lies_where_the_table_says(layout: str, bits: int) -> None:
    case = random_case(128, 128, 64, bits, symmetric=False, dtype=torch.bfloat16)
    weight = tile_cases.tiled(case, layout)
    packed = weight.qweight[: tiles.tile_bytes(weight)].view(2, 2, -1).tolist()
    for n in range(128):
        for k in range(128):
            byte, bit = place(layout, bits, n % 64, k % 64)
            assert packed[n // 64][k // 64][byte + bit // 8] >> bit % 8 & (2**bits - 1) == case.codes[n, k]
    behind = weight.qweight[tiles.tile_bytes(weight) :]
    scales = behind[: 2 * 4 * 128].view(torch.bfloat16).view(4, 128)  # two groups, and two rows more
    assert torch.equal(scales[:2], case.scales.T)
    assert torch.equal(behind[2 * 4 * 128 :].view(4, 128)[:2], case.zeros.T)


@pytest.mark.parametrize("layout", tiles.NAMES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "group"), [*tile_cases.SHAPES, (1100, 96, 32), (64, 12, 12)])
def test_converts_back_bit_for_bit_and_pads_with_zero_scales(
    layout: str, bits: int, n: int, k: int, group: int
) -> None:
    for symmetric in (True, False):
        case = random_case(n, k, group, bits, symmetric)
        weight = tile_cases.tiled(case, layout)
        assert torch.equal(layouts.convert(weight, "canonical").qweight, case.qweight)
        assert weight.scales is case.scales
        rows, width = tiles.groups(weight), tiles.padded(n)
        start = tiles.tile_bytes(weight)
        scales = weight.qweight[start : start + 4 * rows * width].clone().view(torch.float32).view(rows, width)
        assert not scales[:, n:].any()
        assert not scales[k // group :].any()


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (random_case(64, 64, 32, bits=3), "for 4 and 8 bits, this weight has 3"),
        (random_case(64, 96, 48), "in_features or a multiple of 32, found 48"),
    ],
)
def test_what_does_not_fit_stays_canonical(case, reason: str) -> None:
    with pytest.raises(ValueError, match=f"cannot hold this weight: .*{reason}.*keep it canonical"):
        tile_cases.tiled(case, "tile_sm80")


def test_each_gpu_gets_its_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(64, 64, 64)
    weight = PackedWeight(*case.tensors, 4, 64, 64)

    class OnCuda:
        device = torch.device("cuda:0")

    weight = weight._replace(qweight=OnCuda())
    for major, order in ((8, "tile_sm80"), (9, "tile_sm90"), (12, "tile_sm80")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        assert dispatch.fastest_layout("triton", weight) == order


@pytest.mark.parametrize("part", [0, 1])
def test_arithmetic_in_the_interpreter(part: int) -> None:
    interpret(part, 2)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_every_case_in_the_interpreter(part: int) -> None:
    interpret(part, 8, "every")


def interpret(*arguments: object) -> None:
    """Run the program tiles_interpreted.py, which asserts."""
    program = Path(__file__).with_name("tiles_interpreted.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, program, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("layout", tiles.NAMES)
def test_other_implementations_read_the_layout_too(layout: str) -> None:
    case, x = random_case(96, 64, 32, symmetric=False), random_rows(3, 64, torch.float32)
    weight = tile_cases.tiled(case, layout)
    for impl in ("reference", "cpu"):
        y = ptq_kernels.matmul(x, *weight[:3], bits=4, group_size=32, layout=layout, impl=impl)
        assert worst_error(y, x, case, None, 0.0) <= 1
    x.requires_grad_()
    y = ptq_kernels.matmul(x, *weight[:3], bits=4, group_size=32, layout=layout, impl="cpu")
    dense = ptq_kernels.dequantize(*weight[:3], bits=4, group_size=32, in_features=64, layout=layout)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, dense.sum(0).expand(3, 64), rtol=0, atol=1e-5)  # 96 terms below 1, 2**-24 each


def test_a_gpu_below_the_requirement_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ptq_kernels.triton import w4a16

    w4a16._too_old.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"compute capability 8.0 or newer, cuda:3 has 7.5; use impl='auto'"):
        dispatch.choose("triton", torch.device("cuda:3"))
    assert dispatch.choose("auto", torch.device("cuda:3")) == "reference"
    w4a16._too_old.cache_clear()


@needs_gpu
@pytest.mark.parametrize("spec", tile_cases.few_specs(), ids=lambda spec: spec.name)
def test_matches_float64_on_a_gpu(spec: tile_cases.Spec) -> None:
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    try:
        assert tile_cases.check(spec, "cuda") <= 1
        assert tile_cases.exact(spec, "cuda")
    finally:
        torch.use_deterministic_algorithms(False)


@needs_gpu
def test_prepares_on_a_gpu_and_back() -> None:
    case = random_case(200, 256, 64)
    tensors = [t if t is None else t.cuda() for t in case.tensors]
    prepared = ptq_kernels.prepare(*tensors, **case.sized)
    assert prepared.layout == ("tile_sm90" if torch.cuda.get_device_capability()[0] == 9 else "tile_sm80")
    assert torch.equal(prepared.qweight.cpu(), tile_cases.tiled(case, prepared.layout).qweight)
    back = ptq_kernels.canonical(prepared.qweight, *tensors[1:], layout=prepared.layout, **case.sized)
    assert torch.equal(back.cpu(), case.qweight)
