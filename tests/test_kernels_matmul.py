"""ptq_kernels.matmul, reference and CPU, against float64; tracing; gradients; the record of choices."""

import logging
import subprocess
import sys

import ptq_kernels
import pytest
import torch
import torch._dynamo.testing
from packed_weights import UNIT, Case, dense_float64, random_case, random_rows, worst_error
from ptq_kernels import dispatch

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(48, 64, 32), (33, 60, 12), (17, 37, 37), (5, 20, 5), (64, 192, 96)]  # N, K, group size


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_matches_float64(impl: str, bits: int, symmetric: bool) -> None:
    for n, k, group in SHAPES:
        for dtype in FLOATS:
            case = random_case(n, k, group, bits, symmetric, dtype)
            for bias in (None, torch.linspace(-3, 3, n).to(dtype)):
                x = random_rows(5, k, dtype)
                y = ptq_kernels.matmul(x, *case.tensors, bias, impl=impl, **case.scheme)
                assert y.dtype == dtype
                rounded = UNIT[dtype] if impl == "cpu" and dtype == torch.bfloat16 else 0.0  # a bfloat16 weight
                assert worst_error(y, x, case, bias, rounded) <= 1, (n, k, group, dtype)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 16, 17, 64, 65, 200])
@pytest.mark.parametrize(("n", "k", "group"), [(64, 128, 128), (208, 256, 64), (80, 96, 32), (50, 72, 24), (1, 64, 32)])
def test_cpu_for_any_number_of_rows_and_layout(rows: int, n: int, k: int, group: int) -> None:
    case = random_case(n, k, group, 4, symmetric=rows % 2 == 0)
    prepared = ptq_kernels.prepare(*case.tensors, **case.sized)
    for dtype in (torch.bfloat16, torch.float32):
        x, bias = random_rows(rows, k, dtype), torch.linspace(-1, 1, n)
        for qweight, layout in ((case.qweight, "canonical"), (prepared.qweight, prepared.layout)):
            y = ptq_kernels.matmul(x, qweight, *case.tensors[1:], bias, layout=layout, **case.scheme)
            assert y.shape == (rows, n)
            assert y.dtype == dtype
            rounded = UNIT[dtype] * (1 + UNIT[dtype]) if dtype == torch.bfloat16 else 0.0
            assert rows == 0 or worst_error(y, x, case, bias, rounded) <= 1


@pytest.mark.parametrize("bits", [3, 8])
def test_several_chunks_equal_one(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from ptq_kernels.cpu import chunked

    case, x = random_case(100, 96, 32, bits, symmetric=False), random_rows(4, 96, torch.float32)
    whole = ptq_kernels.matmul(x, *case.tensors, impl="cpu", **case.scheme)
    monkeypatch.setattr(chunked, "_CHUNK", 1)  # 16 rows at a time, the last 4
    assert worst_error(ptq_kernels.matmul(x, *case.tensors, impl="cpu", **case.scheme), x, case, None, 0.0) <= 1
    assert worst_error(whole, x, case, None, 0.0) <= 1


@pytest.mark.parametrize("has_units", [True, False])
def test_bfloat16_rows_take_the_fastest_product(has_units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without units for bfloat16 a float32 product, which does not round the weight."""
    from ptq_kernels.cpu import chunked

    monkeypatch.setattr(chunked, "has_units", lambda _: has_units)
    taken: list[torch.dtype] = []
    linear = chunked.functional.linear
    monkeypatch.setattr(chunked.functional, "linear", lambda x, *rest: (taken.append(x.dtype), linear(x, *rest))[1])
    case, x = random_case(48, 96, 32, 3), random_rows(5, 96, torch.bfloat16)
    y = ptq_kernels.matmul(x, *case.tensors, impl="cpu", **case.scheme)
    assert set(taken) == {torch.bfloat16 if has_units else torch.float32}
    assert y.dtype == torch.bfloat16
    assert worst_error(y, x, case, None, UNIT[torch.bfloat16] * (1 + UNIT[torch.bfloat16]) if has_units else 0.0) <= 1


def test_leading_dimensions_and_strides() -> None:
    case = random_case(48, 64, 32)
    x = random_rows(64, 6, torch.float32).T.view(2, 3, 64)
    y = ptq_kernels.matmul(x, *case.tensors, **case.scheme)
    assert y.shape == (2, 3, 48)
    assert worst_error(y.view(6, 48), x.reshape(6, 64), case, None, 0.0) <= 1
    assert ptq_kernels.matmul(x[0, 0], *case.tensors, **case.scheme).shape == (48,)
    assert ptq_kernels.matmul(x[:0], *case.tensors, **case.scheme).shape == (0, 3, 48)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantize_rounds_the_exact_weight_once(bits: int, symmetric: bool) -> None:
    for dtype in FLOATS:
        case = random_case(17, 60, 20, bits, symmetric)
        dense = ptq_kernels.dequantize(*case.tensors, dtype=dtype, **case.sized)
        assert torch.equal(dense, dense_float64(case).float().to(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("prepared", [True, False])
def test_zeros_far_above_the_codes(bits: int, prepared: bool) -> None:
    case = random_case(48, 64, 32, bits, symmetric=False)
    case = case._replace(zeros=torch.arange(96, dtype=torch.uint8).view(48, 2) + 160)
    qweight, layout = case.qweight, "canonical"
    if prepared:
        ready = ptq_kernels.prepare(*case.tensors, **case.sized)
        qweight, layout = ready.qweight, ready.layout
    x = random_rows(3, 64, torch.float32)
    y = ptq_kernels.matmul(x, qweight, case.scales, case.zeros, layout=layout, **case.scheme)
    assert worst_error(y, x, case, None, 0.0) <= 1


def test_a_dense_weight_is_no_integers() -> None:
    case = random_case(16, 64, 32)
    with pytest.raises(TypeError, match=r"dtype must be a floating-point one, got torch.int8; unpack gives the codes"):
        ptq_kernels.dequantize(*case.tensors, dtype=torch.int8, **case.sized)


def test_bfloat16_rows_against_float16_scales_keep_the_scales() -> None:
    case = random_case(32, 64, 32, dtype=torch.float16)
    case = case._replace(scales=torch.full_like(case.scales, 1.0009765625))  # 1 + 2**-10: not a bfloat16
    dense = ptq_kernels.dequantize(*case.tensors, **case.sized)
    assert torch.equal(dense.double(), dense_float64(case))


def layer(case: Case):
    def forward(x: torch.Tensor) -> torch.Tensor:
        return ptq_kernels.matmul(x, *case.tensors, **case.scheme)

    return forward


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_whole_and_once_for_any_number_of_rows(backend: str) -> None:
    torch._dynamo.reset()
    case = random_case(48, 64, 32, symmetric=False)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(layer(case), fullgraph=True, backend=counter, dynamic=True)
    for rows in (3, 7, 65, 300):  # none a size of the weight: torch would take equal sizes for the same
        x = random_rows(rows, 64, torch.bfloat16)
        assert torch.equal(compiled(x), layer(case)(x))
    assert counter.frame_count == 1


def test_exports_with_dynamic_rows() -> None:
    case = random_case(48, 64, 32)

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return layer(case)(x)

    x = random_rows(3, 64, torch.float32)
    exported = torch.export.export(Layer(), (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=1)},))
    wide = random_rows(11, 64, torch.float32)
    assert torch.equal(exported.module()(wide), layer(case)(wide))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_operators_pass_torch_opcheck(impl: str, symmetric: bool) -> None:
    case = random_case(32, 64, 32, symmetric=symmetric)
    x = random_rows(4, 64, torch.float32).requires_grad_()
    bias = torch.ones(32, requires_grad=True)
    arguments = (x, *case.tensors, bias, 4, 32, "canonical", impl)
    torch.library.opcheck(torch.ops.ptq_kernels.matmul.default, arguments)
    arguments = (torch.ones(4, 32), *case.tensors, 4, 32, 64, "canonical")
    torch.library.opcheck(torch.ops.ptq_kernels.matmul_grad_input.default, arguments)


@pytest.mark.parametrize("bits", [3, 4])
def test_gradient_is_that_of_the_dequantized_weight(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from ptq_kernels import reference

    monkeypatch.setattr(reference, "_BACKWARD_VALUES", 1000)  # several chunks of rows
    case = random_case(48, 64, 32, bits, symmetric=False)
    prepared = ptq_kernels.prepare(*case.tensors, **case.sized)
    upstream = random_rows(6, 48, torch.float32).view(2, 3, 48)
    x = random_rows(6, 64, torch.float32).view(2, 3, 64).requires_grad_()
    bias = torch.zeros(48, requires_grad=True)
    for qweight, layout in ((case.qweight, "canonical"), (prepared.qweight, prepared.layout)):
        y = ptq_kernels.matmul(x, qweight, *case.tensors[1:], bias, layout=layout, **case.scheme)
        grad_x, grad_bias = torch.autograd.grad(y, (x, bias), upstream)
        x64, bias64 = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
        want = torch.autograd.grad(x64 @ dense_float64(case).T + bias64, (x64, bias64), upstream.double())
        # 48 terms of magnitude about 1 in float32: 48 * 2**-24 * 48 is 1.4e-4 at worst
        torch.testing.assert_close(grad_x.double(), want[0], rtol=0, atol=1.4e-4)
        torch.testing.assert_close(grad_bias.double(), want[1], rtol=0, atol=1e-5)


def test_gradient_through_a_compiled_graph_and_of_no_rows() -> None:
    torch._dynamo.reset()
    case, x = random_case(48, 64, 32), random_rows(3, 64, torch.float32).requires_grad_()
    compiled = torch.compile(layer(case), fullgraph=True, backend="aot_eager")
    (traced,) = torch.autograd.grad(compiled(x).sum(), x)
    (eager,) = torch.autograd.grad(layer(case)(x).sum(), x)
    assert torch.equal(traced, eager)
    none = x.detach()[:0].requires_grad_()
    assert torch.autograd.grad(layer(case)(none).sum(), none)[0].shape == (0, 64)


def test_choice_is_recorded_and_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dispatch, "_chosen", {})
    case, x = random_case(48, 64, 32), random_rows(3, 64, torch.float32)
    with caplog.at_level(logging.INFO, logger="ptq_kernels"):
        for _ in range(3):
            layer(case)(x)
    assert ptq_kernels.chosen() == {"cpu on cpu, 4 bits, layout canonical": "chunked dequantize-matmul"}
    assert len(caplog.records) == 1


def test_explicit_implementation_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    case, x = random_case(48, 64, 32), random_rows(3, 64, torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="impl='triton' cannot run here: .*use impl='auto'"):
        ptq_kernels.matmul(x, *case.tensors, impl="triton", **case.scheme)
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run here: it needs CPU tensors, got meta"):
        dispatch.choose("cpu", torch.device("meta"))


def test_without_triton_cuda_falls_back_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch._triton_missing.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it now fails
    assert dispatch.choose("auto", torch.device("cuda")) == "reference"
    with pytest.raises(RuntimeError, match="triton cannot be imported"):
        dispatch.choose("triton", torch.device("cuda"))
    dispatch._triton_missing.cache_clear()


def test_import_needs_neither_triton_nor_cuda() -> None:
    code = "import sys, torch, ptq_kernels; print('triton' in sys.modules, torch.cuda.is_initialized())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert run.stdout.split() == ["False", "False"]


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
