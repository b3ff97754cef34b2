"""QuantLinear: what it holds, what moves and conversions do to it, and its state dict."""

import copy

import pytest
import torch
from packed_weights import dense_float64, random_case, random_rows, worst_error
from torch import nn

from ptq.errors import FormatError
from ptq.formats.codec import QuantizedWeight, Scheme
from ptq.nn import QuantLinear


def weight_of(case) -> QuantizedWeight:
    zeros = torch.full(case.scales.shape, 2 ** (case.bits - 1), dtype=torch.uint8) if case.zeros is None else case.zeros
    return QuantizedWeight(case.codes, case.scales.float(), zeros, case.bits, case.group_size, case.zeros is None)


def layer_of(case, bias: torch.Tensor | None = None, **options) -> QuantLinear:
    return QuantLinear.from_quantized(weight_of(case), bias, **options)


BIAS = torch.linspace(-1, 1, 48)
CASE = random_case(48, 64, 32, symmetric=False, dtype=torch.float16)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("prepared", [True, False])
def test_round_trip_and_forward(bits: int, symmetric: bool, prepared: bool) -> None:
    case = random_case(48, 64, 32, bits, symmetric)
    layer = layer_of(case, BIAS)
    if prepared:
        layer.prepare_()
    for got, want in zip(layer.quantized(), weight_of(case), strict=True):
        assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want
    assert torch.equal(layer.dequantize(torch.float32), dense_float64(case).float())
    assert (layer.zeros is None) == symmetric
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = random_rows(3, 64, dtype)
        y = layer(x)
        assert y.dtype == dtype
        # bfloat16 rows: the weight (and for the int4 operator its scale and offset) rounded to bfloat16; float16 rows
        # may be rounded to bfloat16 themselves
        rounded = 0.0 if dtype == torch.float32 else 3 * 2.0**-8
        assert worst_error(y, x, case, BIAS.to(dtype), rounded) <= 1


@pytest.mark.parametrize(
    "convert",
    [
        *(lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half().bfloat16()),
        *(lambda m: m.type(torch.bfloat16), lambda m: m.type("torch.BFloat16Tensor")),
    ],
)
@pytest.mark.parametrize("prepared", [True, False])
def test_conversion_leaves_the_scales_alone(convert, prepared: bool) -> None:
    model = nn.Sequential(layer_of(CASE, BIAS, scales_dtype=torch.float16))
    if prepared:
        model[0].prepare_()
    layout = model[0].layout
    layer = convert(model)[0]
    assert layer.scales.dtype == torch.float16
    assert torch.equal(layer.scales, CASE.scales)
    assert layer.bias.dtype == torch.bfloat16
    assert layer.layout == layout
    assert layer(random_rows(2, 64, torch.bfloat16)).dtype == torch.bfloat16


def test_moving_a_prepared_layer_makes_it_canonical() -> None:
    layer = layer_of(CASE, BIAS).prepare_()
    moved = layer.to("meta")
    assert (moved.layout, moved.qweight.dtype, moved.qweight.shape) == ("canonical", torch.int32, (48, 8))
    assert {t.device.type for t in (moved.qweight, moved.scales, moved.zeros, moved.bias)} == {"meta"}


@pytest.mark.parametrize("chosen", [{}, {"impl": "cpu"}, {"activation": "int8"}], ids=str)
def test_a_layer_on_another_device_is_prepared_there(chosen: dict[str, str]) -> None:
    """A made-up move that says "elsewhere" when asked, and copies. Oracle: a layer prepared there."""
    layer = layer_of(CASE, BIAS).prepare_()
    for name, value in chosen.items():
        setattr(layer, name, value)
    layer._apply(lambda tensor: tensor.clone() if tensor.numel() else tensor.to("meta"))
    assert (layer.layout == "canonical") is bool(chosen)
    layer.impl, layer.activation = "auto", None
    x, want = random_rows(3, 64, torch.float32), layer_of(CASE, BIAS)
    assert torch.equal(layer(x), (want if chosen else want.prepare_())(x))


def test_a_move_that_fails_leaves_the_layer_as_it_was() -> None:
    """As for want of memory on a GPU, on the way. Oracle: the product before it."""
    layer, x = layer_of(CASE, BIAS), random_rows(3, 64, torch.float32)
    want, dtype = layer(x), layer.scales.dtype
    moved = []

    def fail(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tensor)
        if len(moved) > 1:
            raise torch.OutOfMemoryError("no room")
        return tensor

    with pytest.raises(torch.OutOfMemoryError):
        layer._apply(fail)
    assert len(moved) > 1
    assert torch.equal(layer(x), want)
    assert layer.state_dict()["scales"].dtype == dtype


@pytest.mark.parametrize("prepared", [True, False])
def test_a_layer_that_went_through_meta_is_prepared_when_it_is_loaded(prepared: bool) -> None:
    """As FSDP starts models; what was never prepared stays as it is."""
    layer = layer_of(CASE)
    if prepared:
        layer.prepare_()
    x = random_rows(3, 64, torch.float32)
    empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    assert empty.layout == "canonical"
    empty.load_state_dict(layer.state_dict())
    assert empty.layout == layer.layout
    assert torch.equal(empty(x), layer(x))


def test_prepare_is_idempotent_and_keeps_one_copy() -> None:
    layer = layer_of(CASE)
    once = layer.prepare_().qweight
    assert layer.prepare_().qweight is once
    assert {name for name, _ in layer.named_buffers()} == {"qweight", "scales", "zeros"}


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("into_prepared", [True, False])
@pytest.mark.parametrize("from_prepared", [True, False])
def test_state_dict_is_canonical_and_loads(from_prepared: bool, into_prepared: bool, assign: bool) -> None:
    source, target = layer_of(CASE, BIAS), layer_of(random_case(48, 64, 32, 4, symmetric=False), BIAS + 1)
    plain = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    if from_prepared:
        source.prepare_()
    if into_prepared:
        target.prepare_()
    state = source.state_dict()
    assert list(state) == ["bias", "qweight", "scales", "zeros"]
    assert all(torch.equal(state[name], plain[name]) for name in plain)
    target.load_state_dict(state, assign=assign)
    assert (target.layout == "canonical") is not into_prepared  # what was fast stays fast
    x = random_rows(3, 64, torch.float32)
    want = layer_of(CASE, BIAS)
    assert torch.equal(target(x), (want.prepare_() if into_prepared else want)(x))
    assert all(torch.equal(target.state_dict()[name], plain[name]) for name in plain)


def test_empty_layer_is_filled_from_a_state_dict() -> None:
    layer = QuantLinear.empty(64, 48, Scheme(4, 32, False), bias=True, dtype=torch.float32)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    assert layer(torch.empty(5, 64, device="meta")).shape == (5, 48)
    layer.load_state_dict(layer_of(CASE, BIAS).state_dict(), assign=True)
    x = random_rows(3, 64, torch.float32)
    assert torch.equal(layer(x), layer_of(CASE, BIAS)(x))
    rows = QuantLinear.empty(60, 8, Scheme(3, -1, True), bias=False, dtype=torch.float32, device="cpu")
    assert (rows.group_size, rows.zeros, rows.bias, rows.qweight.shape) == (60, None, None, (8, 6))
    assert layer.to_empty(device="cpu").scales.dtype == torch.float32


def test_copies_are_independent() -> None:
    layer = layer_of(CASE, BIAS).prepare_()
    other = copy.deepcopy(layer)
    x = random_rows(3, 64, torch.float32)
    want = layer(x)
    layer.scales.zero_()
    assert torch.equal(other(x), want)


def test_weight_is_a_read_only_view_of_values() -> None:
    layer = layer_of(CASE, BIAS.bfloat16(), scales_dtype=torch.float16)
    assert torch.equal(layer.weight, dense_float64(CASE).float().bfloat16())
    assert layer_of(CASE, scales_dtype=torch.float16).weight.dtype == torch.float16
    assert "weight" not in layer.state_dict()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    for value in (torch.zeros(1), nn.Parameter(torch.zeros(1)), None):
        with pytest.raises(
            AttributeError, match=f"must stay packed, found a {type(value).__name__} .*load a state dict"
        ):
            layer.weight = value
    layer.bias = nn.Parameter(torch.zeros(48))  # as before


def test_gradients_reach_the_input_and_a_trainable_bias() -> None:
    layer = layer_of(CASE, BIAS.clone().requires_grad_())
    x = random_rows(3, 64, torch.float32).requires_grad_()
    layer(x).sum().backward()
    want = dense_float64(CASE).sum(0).float().expand(3, 64)
    torch.testing.assert_close(
        x.grad, want, rtol=0, atol=1e-5
    )  # 48 float32 terms below 1: 48 * 48 * 2**-24 at worst 1.4e-4
    assert torch.equal(layer.bias.grad, torch.full((48,), 3.0))
    assert not layer_of(CASE, BIAS).bias.requires_grad


def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    layer = layer_of(CASE, BIAS).prepare_()
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), random_rows(3, 64, torch.bfloat16)
    assert torch.equal(compiled(x), layer(x))


def test_repr_says_what_it_is() -> None:
    layer = layer_of(random_case(48, 64, 32))
    assert repr(layer) == (
        "QuantLinear(in_features=64, out_features=48, bits=4, group_size=32, symmetric=True, bias=False, "
        "layout=canonical)"
    )


def test_scales_that_require_a_gradient_make_a_layer_that_runs() -> None:
    weight = weight_of(CASE)
    layer = QuantLinear.from_quantized(weight._replace(scales=nn.Parameter(weight.scales)))
    x = random_rows(3, 64, torch.float32)
    assert torch.equal(layer(x), layer_of(CASE)(x))


def test_inexact_scales_are_refused() -> None:
    case = random_case(8, 64, 32)
    with pytest.raises(FormatError, match=r"exact in torch.bfloat16, \d+ of 16 are not; keep them in float32"):
        layer_of(case, scales_dtype=torch.bfloat16)
    narrow = QuantLinear.empty(64, 8, Scheme(4, 32, True), False, torch.float32, "cpu", scales_dtype=torch.float16)
    with pytest.raises(FormatError, match="scales must be exact in torch.float16, .*scales_dtype=torch.float32"):
        narrow.load_state_dict(layer_of(case).state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": torch.full((48, 2), torch.nan)}, "scales must be finite, 96 of 96 are NaN or infinite; check the"),
        ({"scales": torch.full((48, 2), -torch.inf)}, "scales must be finite, 96 of 96 are NaN or infinite; check"),
        ({"scales": torch.ones(48, 4)}, r"scales must have shape \[48, 2\], .* groups? of 32 columns, found \[48, 4\]"),
        ({"group_size": 48}, "group_size must divide the 64 columns of the codes, found 48"),
        ({"group_size": 16}, r"scales must have shape \[48, 4\], .* found \[48, 2\]; correct group_size"),
        ({"zeros": torch.full((48, 2), 200, dtype=torch.uint8)}, "zeros of 4 bits must be below 16, .* found 200"),
        ({"zeros": torch.full((48, 2), 8)}, r"zeros must be torch.uint8 .* found torch.int64 \[48, 2\]"),
        (
            {"zeros": torch.full((48, 1), 8, dtype=torch.uint8), "symmetric": True},
            r"have the shape of scales, \[48, 2\], found torch.uint8 \[48, 1\]; of a symmetric weight all",
        ),
        ({"bits": 5}, r"bits must be one of \(2, 3, 4, 8\), found 5"),
        ({"codes": torch.zeros(48, 64)}, r"codes must be uint8 of shape \[N, K\], found torch.float32 \[48, 64\]"),
        ({"symmetric": True}, "zeros of a symmetric weight of 4 bits must all be 8, .*with symmetric=False"),
    ],
)
def test_what_a_layer_could_not_hold_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        QuantLinear.from_quantized(weight_of(CASE)._replace(**change))


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_state_dict_with_scales_that_are_none_is_refused(number: float) -> None:
    layer = layer_of(CASE)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["scales"][3, 1] = number
    with pytest.raises(FormatError, match="^scales must be finite, 1 of 96 are NaN or infinite; check"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("prepared", [True, False])
def test_a_state_dict_may_stand_in_for_one_call(prepared: bool) -> None:
    layer, other = (
        layer_of(CASE, BIAS),
        layer_of(random_case(48, 64, 32, 4, symmetric=False, dtype=torch.float16), BIAS),
    )
    x, want = random_rows(3, 64, torch.float32), other(random_rows(3, 64, torch.float32))
    if prepared:
        layer.prepare_()
    before = layer(x)
    torch.testing.assert_close(torch.func.functional_call(layer, other.prepare_().state_dict(), (x,)), want)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("shape", [(0, 8), (64, 0)])
def test_a_layer_needs_inputs_and_outputs(shape: tuple[int, int]) -> None:
    with pytest.raises(FormatError, match=f"must have inputs and outputs, found {shape[0]} and {shape[1]}; leave it"):
        QuantLinear.empty(*shape, Scheme(4, -1, True), bias=False, dtype=torch.float32)


def test_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(FormatError, match="must divide in_features = 64, found 48"):
        QuantLinear.empty(64, 8, Scheme(4, 48, True), bias=False, dtype=torch.float32)
