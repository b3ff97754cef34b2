"""Conversions between layouts where tensors have no memory, or where torch makes new ones without.

Oracle: the same conversion of real tensors, in a process that is still alive.
"""

from collections.abc import Callable

import ptq_kernels
import pytest
import torch
from packed_weights import Case, random_case, random_rows
from ptq_kernels import layouts
from ptq_kernels.layouts import PackedWeight
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ptq.formats.codec import QuantizedWeight
from ptq.nn import QuantLinear

CASE = random_case(64, 96, 24, symmetric=False, dtype=torch.float16)  # strips pad these groups
WIDE = random_case(64, 64, 32, symmetric=False, dtype=torch.float16)


def fitting(name: str) -> tuple[Case, PackedWeight]:
    """A canonical weight that fits a layout; skips where this machine has none of it."""
    case = CASE if name == "strips" else WIDE
    weight = PackedWeight(*case.tensors, case.bits, case.group_size, case.codes.shape[1])
    if reason := layouts.get(name).refuse(weight):
        pytest.skip(reason)
    return case, weight


def on_meta(weight: PackedWeight) -> PackedWeight:
    assert weight.zeros is not None
    return weight._replace(
        qweight=weight.qweight.to("meta"), scales=weight.scales.to("meta"), zeros=weight.zeros.to("meta")
    )


@pytest.mark.parametrize("name", layouts.names())
def test_what_has_no_memory_gets_the_shape_of_the_result(name: str) -> None:
    _, weight = fitting(name)
    there = layouts.convert(weight, name)
    for start, end in ((weight, there), (there, weight)):
        if layouts.get(end.layout).refuse(on_meta(weight)) is None:  # some are for the CPU only
            found = layouts.convert(on_meta(start), end.layout).qweight
            assert (found.device.type, found.dtype, found.shape) == ("meta", end.qweight.dtype, end.qweight.shape)
        with FakeTensorMode(allow_non_fake_inputs=True):
            found = layouts.convert(start, end.layout).qweight
        assert (found.device, found.dtype, found.shape) == (start.qweight.device, end.qweight.dtype, end.qweight.shape)


@pytest.mark.parametrize("name", layouts.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_default_device_is_not_asked(name: str, dtype: torch.dtype) -> None:
    case, weight = fitting(name)
    x = random_rows(3, weight.in_features, dtype)

    def product() -> list[Tensor]:
        there = layouts.convert(weight, name)
        y = ptq_kernels.matmul(x, *there[:3], layout=name, **case.scheme)
        return [there.qweight, layouts.convert(there, "canonical").qweight, y]

    want = product()
    with torch.device("meta"):
        found = product()
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))


def layer(prepared: bool = True) -> QuantLinear:
    assert CASE.zeros is not None
    quantized = QuantizedWeight(CASE.codes, CASE.scales.float(), CASE.zeros, CASE.bits, CASE.group_size, False)
    made = QuantLinear.from_quantized(quantized, torch.linspace(-1, 1, 64), torch.float16)
    return made.prepare_() if prepared else made


READ: dict[str, Callable[[QuantLinear], Tensor]] = {
    "state dict": lambda m: m.state_dict()["qweight"],
    "weight": lambda m: m.weight,
    "codes": lambda m: m.quantized().codes,
    "loaded": lambda m: (m.load_state_dict(m.state_dict()), m.qweight)[1],
    "prepared": lambda m: (m._canonicalize_(), m.prepare_().qweight)[1],
}


@pytest.mark.parametrize("what", READ)
def test_a_layer_may_be_read_where_new_tensors_go_to_meta(what: str) -> None:
    want, made = READ[what](layer()), layer()
    with torch.device("meta"):
        found = READ[what](made)
    assert torch.equal(found, want)


def test_a_layer_on_meta_has_shapes() -> None:
    want, made = layer(), layer()
    for name, buffer in made._buffers.items():
        made._buffers[name] = None if buffer is None else buffer.to("meta")
    made.bias = None
    state = made.state_dict()
    assert {name: each.shape for name, each in state.items()} == {
        name: each.shape for name, each in want.state_dict().items() if name != "bias"
    }
    assert all(each.is_meta for each in (*state.values(), made.weight, made.quantized().codes))
    assert made.weight.shape == want.weight.shape
    assert made.to("meta").to_empty(device="cpu").layout == made.layout
    moved = layer().to("meta")
    assert (moved.layout, moved.qweight.shape) == ("canonical", state["qweight"].shape)


class Reads(nn.Module):
    """As models do that convert an input to the dtype of a Linear's weight."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.inner.weight
        return self.inner(x.to(weight.dtype)) + x @ weight.T.to(x.dtype)


TRACED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "export": lambda m, x: torch.export.export(m, (x,)).module()(x),
    "strict export": lambda m, x: torch.export.export(m, (x,), strict=True).module()(x),
    "compile": lambda m, x: torch.compile(m, fullgraph=True, backend="aot_eager")(x),
    "grad": lambda m, x: torch.func.grad(lambda v: m(v).sum())(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (x,))[1],
    "vmap": lambda m, x: torch.func.vmap(m)(x),
}


@pytest.mark.parametrize("how", TRACED)
@pytest.mark.parametrize("prepared", [True, False])
def test_the_weight_may_be_read_where_a_module_is_traced(how: str, prepared: bool) -> None:
    module, x = Reads(layer(prepared).requires_grad_(False)), random_rows(3, 96, torch.float32)
    weight = module.inner.dequantize(torch.float32).double()
    y = 2 * x.double() @ weight.T
    want = {"grad": 2 * weight.sum(0).expand(3, 96), "jvp": y}.get(how, y + torch.linspace(-1, 1, 64).double())
    found = TRACED[how](module, x)
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()
