"""Activation "int8": the C++ products against float64 with the same rounding of x; what that costs; refusals."""

from pathlib import Path

import ptq_kernels
import pytest
import tiny_models
import torch
from cpu_libraries import current_libraries
from packed_weights import UNIT, Case, dense_float64, random_case, random_rows
from ptq_kernels import dispatch, reference
from ptq_kernels.cpu import library

import ptq
from ptq.formats.codec import QuantizedWeight, Scheme
from ptq.nn import QuantLinear
from ptq.nn.fuse import fuse_linears
from ptq.runtime import quant_linears

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (1, 2, 3, 4, 5, 13, 16, 17, 64, 65, 200)
SHAPES = [  # N, K, group size: whole, ragged N, padded groups, tiles of 32 and 64 values, per channel, several pieces
    *((64, 128, 32), (100, 256, 128), (33, 480, 96), (1, 64, 64), (17, 60, 60), (35, 1000, 1000), (80, 1536, 512)),
]


@pytest.fixture(scope="module", autouse=True)
def libraries(tmp_path_factory: pytest.TempPathFactory):
    yield from current_libraries(tmp_path_factory)


@pytest.fixture(params=library.WITH_INT8)
def isa(request: pytest.FixtureRequest) -> str:
    if reason := library.refuse(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def with_int8() -> None:
    if (best := library.best()) is None or best.name not in library.WITH_INT8:
        pytest.skip("no library with 8-bit products can be used here")


def prepared(case: Case, impl: str = "cpu") -> ptq_kernels.Prepared:
    return ptq_kernels.prepare(*case.tensors, impl=impl, activation="int8", **case.sized)


def product(x: torch.Tensor, case: Case, weight: ptq_kernels.Prepared, bias: torch.Tensor | None = None):
    """x times a prepared weight, with x rounded to bytes."""
    rest = (weight.qweight, *case.tensors[1:], bias)
    return ptq_kernels.matmul(x, *rest, layout=weight.layout, impl=weight.impl, activation="int8", **case.scheme)


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Oracle: the documented rounding, row by row: float64 integers and scales. The inverse is a float32."""
    values, scales = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape[0], 1, dtype=torch.float64)
    for i, row in enumerate(x.float()):
        most = row.abs().max()
        inverse = torch.tensor([127.0]).div(most.view(1))
        values[i], scales[i] = (row * inverse).round().double(), most.view(1).div(torch.tensor([127.0])).double()
    return values, scales


def worst(y: torch.Tensor, x: torch.Tensor, case: Case, bias: torch.Tensor | None) -> float:
    """The largest error of y in units of what rounding allows: at most 1 passes.

    Sums within a group are integers. float32 rounds each of them once when it becomes a float, and once when it is
    scaled and added (groups may be scaled in pieces of 256 values), then the sum by the scale of the row and with the
    bias; y rounds once more.
    """
    values, scales = rounded(x)
    dense = dense_float64(case)
    want = values @ dense.T * scales
    pieces = case.codes.shape[1] / min(case.group_size, 256) + 1
    allowed = (2 * pieces + 4) * UNIT[torch.float32] * (values.abs() @ dense.abs().T * scales)
    offset = torch.zeros(want.shape[1], dtype=torch.float64) if bias is None else bias.double()
    allowed += 2 * UNIT[y.dtype] * (want.abs() + offset.abs()) + 1e-30
    return float(((y.double() - want - offset).abs() / allowed).max())


@pytest.mark.parametrize("bits", [4, 8, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_matches_float64_with_the_same_rounding(isa: str, symmetric: bool, bits: int) -> None:
    for index, (n, k, group) in enumerate(SHAPES):
        case = random_case(n, k, group, bits, symmetric, FLOATS[index % 3])
        weight = prepared(case, f"cpu-{isa}")
        for m in ROWS if bits == 4 else ROWS[::2]:
            dtype = FLOATS[(m + index) % 3]
            x = random_rows(m, k, dtype)
            for bias in (None, torch.linspace(-1, 1, n).to(FLOATS[m % 3])):
                y = product(x, case, weight, bias)
                assert (y.shape, y.dtype) == ((m, n), dtype)
                assert worst(y, x, case, bias) <= 1, (n, k, group, m, dtype)


def test_the_specification_is_the_documented_rounding() -> None:
    case = random_case(48, 64, 32, symmetric=False)
    x = random_rows(9, 64, torch.float32)
    values, scales = reference.quantize_rows(x)
    for got, want in zip((values, scales), rounded(x), strict=True):
        assert torch.equal(got.double(), want)
    bias = torch.linspace(-1, 1, 48)
    y = ptq_kernels.matmul(x, *case.tensors, bias, impl="reference", activation="int8", **case.scheme)
    # a float32 product: K more roundings than the integer sums have
    want = values.double() @ dense_float64(case).T * scales.double() + bias.double()
    torch.testing.assert_close(y.double(), want, rtol=0, atol=64 * 2.0**-24 * 64 * 2)


@pytest.mark.parametrize("rows", [1, 16])
def test_what_the_rounding_costs(with_int8: None, rows: int) -> None:
    """Each value of x is off by a uniform error of at most half a step: with random weights the result is off by as
    much, relatively, as x: step / sqrt(12) over the standard deviation of x, about 1 % for normal rows of 4096.
    """
    case = random_case(256, 4096, 128, symmetric=False)
    x = random_rows(rows, 4096, torch.float32)
    y, full = product(x, case, prepared(case)).double(), x.double() @ dense_float64(case).T
    expected = float(x.abs().max()) / 127 / 12**0.5
    # 256 columns: their mean square spreads by sqrt(2 / 256), 9 %, times three
    assert 0.5 * expected < float((y - full).norm() / full.norm()) < 1.3 * expected < 0.015
    x[:, 7] = 100.0  # one value far above the rest: half a step of 100 / 127 for every weight is the bound
    y, full = product(x, case, prepared(case)).double(), x.double() @ dense_float64(case).T
    allowed = 1.001 * 100 / 254 * dense_float64(case).abs().sum(1)
    assert ((y - full).abs() <= allowed).all()


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_rows_that_are_not_finite_or_nothing(isa: str, rows: int) -> None:
    case = random_case(48, 128, 32, symmetric=False)
    weight, bias = prepared(case, f"cpu-{isa}"), torch.linspace(-1, 1, 48)
    for dtype in FLOATS:
        x = random_rows(rows, 128, dtype)
        clean, middle = product(x, case, weight, bias), rows // 2
        others = torch.arange(rows) != middle
        for value in (float("nan"), float("inf"), -float("inf")):
            x[middle, 77] = value
            y = product(x, case, weight, bias)
            assert y[middle].isnan().all()
            assert torch.equal(y[others], clean[others])
            assert reference.matmul_int8(x, case_weight(case), bias)[middle].isnan().all()
        for value in (0.0, 1e-40):
            x[middle] = value
            assert torch.equal(product(x, case, weight, bias)[middle], bias.to(dtype))
            assert torch.equal(reference.matmul_int8(x, case_weight(case), bias)[middle], bias.to(dtype))


def case_weight(case: Case) -> ptq_kernels.layouts.PackedWeight:
    return ptq_kernels.layouts.PackedWeight(*case.tensors, case.bits, case.group_size, case.codes.shape[1])


def test_threads_change_nothing(isa: str) -> None:
    case = random_case(300, 256, 64, symmetric=False)
    weight, before = prepared(case, f"cpu-{isa}"), torch.get_num_threads()
    try:
        for m in (1, 4, 33, 200):
            x, results = random_rows(m, 256, torch.bfloat16), []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(product(x, case, weight))
            assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


def test_it_is_off_by_default_and_named_where_it_ran(with_int8: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_chosen", {})
    case, x = random_case(48, 64, 32), random_rows(3, 64, torch.float32)
    weight = prepared(case)
    plain = ptq_kernels.matmul(x, weight.qweight, *case.tensors[1:], layout=weight.layout, impl="cpu", **case.scheme)
    assert worst(plain, x, case, None) > 1
    assert worst(product(x, case, weight), x, case, None) <= 1
    assert [*ptq_kernels.chosen()] == [
        "cpu on cpu, 4 bits, layout strips",
        "cpu on cpu, 4 bits, layout strips, int8 activations",
    ]


REFUSED = {
    "name": (ValueError, "activation must be None or 'int8', got 'int4'; None", {"activation": "int4"}),
    "layout": (RuntimeError, "impl='auto': it needs the weight in layout 'strips', this one is 'canonical'", {}),
    "another": (RuntimeError, "impl='cpu-torch': 'cpu-torch' has no such product, 'cpu' and", {"impl": "cpu-torch"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    error, message, change = REFUSED[name]
    case, x = random_case(32, 64, 32), random_rows(2, 64, torch.float32)
    with pytest.raises(error, match=message):
        ptq_kernels.matmul(x, *case.tensors, **{**case.scheme, "activation": "int8", **change})
    with pytest.raises(ValueError, match="activation must be None or 'int8', got 'byte'"):
        ptq_kernels.prepare(*case.tensors, activation="byte", **case.sized)


def test_groups_that_are_padded_too_much_are_the_reason_given(with_int8: None) -> None:
    layer = QuantLinear.empty(64, 32, Scheme(4, 16, True), False, torch.float32, "cpu")
    layer.activation = "int8"
    with pytest.raises(RuntimeError, match=r"layout 'strips', which cannot hold .* too much for this group_size of 16"):
        layer.prepare_()


def test_a_library_without_such_instructions_says_what_it_needs() -> None:
    case = random_case(32, 64, 32)
    with pytest.raises(RuntimeError, match=r"AVX512-VNNI and a C\+\+ library of .*the one for avx2 has no such"):
        prepared(case, "cpu-avx2")
    plain = ptq_kernels.prepare(*case.tensors, impl="cpu-avx2", **case.sized)
    with pytest.raises(RuntimeError, match=r"activation='int8' cannot run here with impl='cpu-avx2': .* leave it out"):
        product(random_rows(1, 64, torch.float32), case, plain)


def test_without_any_library_it_says_so(with_int8: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(32, 64, 32)
    weight = prepared(case)
    with monkeypatch.context() as patch:
        patch.setattr(library, "best", lambda: None)
        with pytest.raises(RuntimeError, match=r"a C\+\+ library of .*, there is none; or leave it out"):
            product(random_rows(1, 64, torch.float32), case, weight)


def test_groups_whose_integer_sums_would_not_fit_are_refused(with_int8: None) -> None:
    case = random_case(1, 2**16 + 32, 2**16 + 32, 8)
    with pytest.raises(RuntimeError, match="need group_size <= 65536 at 8 bits, this is 65568"):
        prepared(case)
    case = random_case(2, 2**16, 2**16, 8, symmetric=False)
    case = case._replace(codes=torch.full_like(case.codes, 255), zeros=torch.zeros_like(case.zeros))
    case = case._replace(qweight=ptq_kernels.pack(case.codes, 8))
    x = torch.ones(1, 2**16)
    for m in (1, 16):  # the largest sum there is: 2**16 * 255 * 127, just below 2**31
        assert worst(product(x.expand(m, -1).contiguous(), case, prepared(case)), x.expand(m, -1), case, None) <= 1


def layer_of(case: Case) -> QuantLinear:
    zeros = torch.full(case.scales.shape, 8, dtype=torch.uint8) if case.zeros is None else case.zeros
    weight = QuantizedWeight(case.codes, case.scales.float(), zeros, 4, case.group_size, case.zeros is None)
    layer = QuantLinear.from_quantized(weight)
    layer.activation = "int8"
    return layer


def test_a_layer_takes_it_along(with_int8: None) -> None:
    case = random_case(48, 64, 32, symmetric=False)
    layer, x = layer_of(case).prepare_(), random_rows(5, 64, torch.bfloat16)
    assert worst(layer(x), x, case, None) <= 1
    parent = torch.nn.Module()
    for name in ("gate_proj", "up_proj"):
        parent.add_module(name, layer_of(case).prepare_())
    assert fuse_linears(parent) == ["gate_proj+up_proj"]
    assert worst(parent.gate_proj(x), x, case, None) <= 1
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_gradients_take_the_rounding_for_the_identity(with_int8: None) -> None:
    case = random_case(48, 64, 32, symmetric=False)
    layer, x = layer_of(case).prepare_(), random_rows(5, 64, torch.float32).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    layer.activation = None
    (plain,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(grad, plain)


def test_columns_in_another_order(with_int8: None) -> None:
    """Sorting the columns of a row changes neither its scale nor its bytes."""
    case, x = random_case(48, 128, 32, symmetric=False), random_rows(5, 128, torch.float32)
    g_idx = torch.arange(128) % 4
    weight = ptq_kernels.prepare(*case.tensors, g_idx=g_idx, activation="int8", **case.sized)
    rest, scheme = (weight.qweight, *case.tensors[1:]), {**case.scheme, "layout": weight.layout}
    order = torch.argsort(g_idx, stable=True)
    by_group = case._replace(codes=case.codes[:, order])
    for _ in range(2):
        y = ptq_kernels.matmul(x, *rest, perm=weight.perm, activation="int8", **scheme)
        assert worst(y, x[:, order], by_group, None) <= 1


def test_a_loaded_model_takes_it(with_int8: None, tmp_path: Path) -> None:
    parent = tiny_models.save(tiny_models.build("llama"), tmp_path / "parent")
    batch = tiny_models.tokens(2, 8)
    plain = ptq.load(parent, device="cpu", head_bits=8)
    rounded_rows = ptq.load(parent, device="cpu", head_bits=8, activation="int8")
    assert [linear.activation for linear in quant_linears(plain)] == [None]
    assert [linear.activation for linear in quant_linears(rounded_rows)] == ["int8"]
    # The error of a row is its largest value / 127 / sqrt(12), and that value is at most sqrt(64) times the root mean
    # square of 64 inputs: 1.8 % of the logits.
    logits = tiny_models.logits(plain, batch)
    difference = tiny_models.distance(logits, tiny_models.logits(rounded_rows, batch))
    assert 0 < difference < 0.018 * float(logits.square().mean().sqrt())
    with pytest.raises(RuntimeError, match="lm_head cannot be prepared: activation='int8' cannot .* impl='cpu-avx2'"):
        ptq.load(parent, device="cpu", head_bits=8, impl="cpu-avx2", activation="int8")
