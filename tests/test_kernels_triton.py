"""The Triton kernel without a GPU (interpreter, ahead-of-time compilation) and, where there is one, on it."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import ptq_kernels
import pytest
import torch
from packed_weights import dense_float64, random_case, random_rows, worst_error
from pairwise import pairwise

triton = pytest.importorskip("triton", reason="the Triton kernel needs triton")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def test_arithmetic_in_the_interpreter() -> None:
    assert "triton on cpu, 3 bits" in interpret(0, 1)  # 3 bits are fused as well


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_every_case_in_the_interpreter(part: int) -> None:
    interpret(part, 8, "every")


def interpret(*arguments: object) -> str:
    """Run the program triton_interpreted.py, which asserts; what it prints."""
    program = Path(__file__).with_name("triton_interpreted.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, program, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


OPTION_LISTS = [[(0, 1), "abc", (True, False)], [range(8), range(9), (0, 1), (0, 1), range(4)]]


@pytest.mark.parametrize("options", OPTION_LISTS)
def test_every_two_values_meet(options) -> None:
    """Of the tables that choose the fast cases. Oracle: every two options, every two of their values."""
    rows = pairwise(options)
    for i, j in itertools.combinations(range(len(options)), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(options[i], options[j]))
    assert len(rows) < 3 * len(options[-2]) * len(options[-1]) + 72  # far below their product


class Form(NamedTuple):
    """One specialisation of the kernel."""

    bits: int
    group_size: int
    dtype: str
    zeros: bool
    rows: int


FORMS = [
    Form(bits, group, dtype, zeros, rows)
    for bits, group, dtype, zeros in (
        (4, 128, "bf16", True),
        (4, 128, "fp16", False),
        (3, 128, "bf16", True),
        (2, 64, "bf16", True),
        (8, 32, "fp16", True),
        (4, 12, "bf16", False),
        (4, 128, "fp32", True),
        (4, 12, "fp32", True),
    )
    for rows in (1, 32)
]


def compile_form(form: Form, capability: int):
    from ptq_kernels.triton import w4a16
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = w4a16.w4a16_kernel
    constants = {
        "BITS": form.bits,
        "GROUP": form.group_size,
        "BLOCK_M": w4a16.block_m(form.rows, DTYPES[form.dtype]),
        "BLOCK_N": w4a16.BLOCK_N,
        "BLOCK_K": w4a16.block_k(form.group_size, DTYPES[form.dtype]),
        "HAS_ZEROS": form.zeros,
        "HAS_BIAS": True,
        "FLOAT32_DOT": False,
    }
    floats = "*" + form.dtype
    pointers = {"x_ptr": floats, "q_ptr": "*i32", "s_ptr": "*fp32", "z_ptr": "*u8", "b_ptr": floats, "y_ptr": floats}
    signature = {p: "constexpr" if p in constants else pointers.get(p, "i32") for p in kernel.arg_names}
    aligned = {*pointers, "N", "K", "words"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(kernel.arg_names) if p in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": w4a16.NUM_WARPS, "num_stages": w4a16.NUM_STAGES, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(
    ("form", "capability"),
    [  # always one capability of each form, in turns
        pytest.param(
            form,
            capability,
            marks=() if (i // 2 + i + capability // 10) % 2 else pytest.mark.slow,
            id=f"{'-'.join(map(str, form))}-{capability}",
        )
        for i, form in enumerate(FORMS)
        for capability in (80, 90)
    ],
)
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compilation needs Triton without its interpreter"
)
def test_compiles_ahead_of_time(form: Form, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = compile_form(form, capability)
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= 99 * 1024  # of the smallest GPUs with bfloat16 tensor cores (8.6, 8.9)
    if form.dtype != "fp32":
        assert "mma.sync" in kernel.asm["ptx"]
    assert "wgmma" not in kernel.asm["ptx"]  # asynchronous: see w4a16.py
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this triton wheel brings no cuobjdump, so registers and machine code are not checked")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    assert re.search(r"STACK:(\d+)", usage).group(1) == "0"  # no spills
    code = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(STL|LDL)\b", code)  # no local memory either
    assert ("HMMA" in code) == (form.dtype != "fp32")


@pytest.mark.parametrize("group", [1, 5, 16, 17, 20, 32, 37, 40, 48, 96, 128, 4096])
def test_steps_are_legal_for_every_group(group: int) -> None:
    """A power of two that the tensor cores take, and exact where 16 or 32 divides the group."""
    from ptq_kernels.triton import w4a16

    for dtype, most in ((torch.bfloat16, 32), (torch.float16, 32), (torch.float32, 16)):
        step = w4a16.block_k(group, dtype)
        assert step in (16, 32)
        assert step <= most
        assert group % step == 0 or group % 16


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 16, 17, 65])
def test_exact_on_a_gpu_where_arithmetic_is_exact(bits: int, rows: int) -> None:
    """Small integers and power-of-two scales: every partial sum is an integer below 2**24, so any order is exact."""
    case = random_case(200, 256, 64, bits, symmetric=False)
    case = case._replace(scales=torch.sign(case.scales))
    x = torch.randint(-4, 5, (rows, 256), generator=torch.Generator().manual_seed(rows)).float()
    for dtype in DTYPES.values():
        tensors = [t.cuda() for t in (x.to(dtype), *case.tensors)]
        y = ptq_kernels.matmul(*tensors, impl="triton", **case.scheme)
        assert torch.equal(y.cpu(), (x.double() @ dense_float64(case).T).float().to(dtype))


@needs_gpu
@pytest.mark.parametrize(("n", "k", "group"), [(200, 256, 64), (33, 60, 12), (17, 37, 37), (64, 80, 40)])
def test_matches_float64_on_a_gpu(n: int, k: int, group: int) -> None:
    for dtype in DTYPES.values():
        case, x = random_case(n, k, group, symmetric=False, dtype=dtype), random_rows(19, k, dtype)
        y = ptq_kernels.matmul(*(t.cuda() for t in (x, *case.tensors)), impl="triton", **case.scheme)
        assert worst_error(y.cpu(), x, case, None, 0.0) <= 1
