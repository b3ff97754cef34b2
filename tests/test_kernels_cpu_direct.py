"""The short way of ptq_kernels.matmul: when it is taken, what it must notice, and that it changes no result.

Oracle: the operator, and a count of the calls that reach it.
"""

import gc
from collections.abc import Callable
from typing import Any

import ptq_kernels
import pytest
import torch
from counted_operator import OPERATOR, counted_operator
from cpu_libraries import current_libraries
from packed_weights import Case, random_case, random_rows
from ptq_kernels import direct, torch_op
from ptq_kernels.cpu import library, torch_core
from ptq_kernels.layouts import PackedWeight
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CASE = random_case(48, 64, 32, symmetric=False)


@pytest.fixture(scope="module", autouse=True)
def libraries(tmp_path_factory: pytest.TempPathFactory):
    for _ in current_libraries(tmp_path_factory):
        if library.best() is None:
            pytest.skip("no C++ library can be used here")
        yield


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call that reaches the operator."""
    return counted_operator(monkeypatch)


class Layer:
    """A prepared weight that has been served once."""

    def __init__(self, case: Case = CASE, bias: torch.Tensor | None = None) -> None:
        self.case, self.weight, self.bias = case, ptq_kernels.prepare(*case.tensors, **case.sized), bias
        self.tensors = [self.weight.qweight, *case.tensors[1:], bias]
        self(random_rows(1, 64, torch.float32))

    def __call__(self, x: torch.Tensor, **change: Any) -> torch.Tensor:
        return ptq_kernels.matmul(x, *self.tensors, **{**self.case.scheme, "layout": self.weight.layout, **change})

    def want(self, x: torch.Tensor) -> torch.Tensor:
        return OPERATOR(x, *self.tensors, 4, 32, self.weight.layout, "auto")


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 48), torch.linspace(-1, 1, 48).bfloat16()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_second_call_is_short_and_equal(operator: list[int], dtype: torch.dtype, bias: torch.Tensor | None) -> None:
    layer = Layer(bias=bias)
    operator.clear()
    for shape in ((64,), (1, 64), (2, 3, 64), (40, 64)):
        x = random_rows(40, 64, dtype)[: torch.Size(shape).numel() // 64].reshape(shape)
        y = layer(x)
        assert (y.shape, y.dtype) == ((*shape[:-1], 48), dtype)
        assert torch.equal(y, layer.want(x))
    assert not operator
    layer.tensors[0][:300].zero_()  # contents are read anew
    assert torch.equal(layer(x), layer.want(x))
    assert not operator


def dual_numbers() -> Any:
    return forward_ad.dual_level()


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_dual_numbers_see_the_operator(operator: list[int]) -> None:
    layer, x = Layer(), random_rows(3, 64, torch.float32)
    operator.clear()
    with dual_numbers():
        y = layer(x)
    assert len(operator) == 1
    assert torch.equal(y, layer(x))
    assert len(operator) == 1


@pytest.mark.parametrize("mode", [Functions, Dispatched])
def test_modes_see_the_short_way(operator: list[int], mode: Callable[[], Any]) -> None:
    layer, x = Layer(), random_rows(3, 64, torch.float32)
    operator.clear()
    with mode() as watching:
        y = layer(x)
    assert not operator
    assert torch_op.strips in watching.seen
    assert torch.equal(y, layer(x))


def test_the_profiler_sees_the_short_way(operator: list[int]) -> None:
    layer, x = Layer(), random_rows(3, 64, torch.float32)
    operator.clear()
    with torch.profiler.profile() as profile:
        layer(x)
    assert "ptq_kernels::strips" in {event.key for event in profile.key_averages()}
    assert not operator


def test_transforms_and_tracers_see_the_operator(operator: list[int]) -> None:
    layer, x = Layer(), random_rows(3, 64, torch.float32)
    operator.clear()
    torch.func.vmap(lambda v: (layer(x), v)[1])(torch.ones(2))
    assert len(operator) == 1
    traced = torch.jit.trace(lambda v: layer(v), x, check_trace=False)
    assert len(operator) == 2
    assert "ptq_kernels::matmul" in str(traced.graph)


def test_gradients_go_through_the_operator(operator: list[int]) -> None:
    layer, x = Layer(bias=torch.ones(48, requires_grad=True)), random_rows(3, 64, torch.float32)
    operator.clear()
    assert layer(x).requires_grad
    assert len(operator) == 1
    with torch.no_grad():
        layer(x)
    assert len(operator) == 1
    plain = Layer()
    assert plain(x.requires_grad_()).requires_grad


def test_what_x_may_be_otherwise(operator: list[int]) -> None:
    layer, x = Layer(), random_rows(6, 64, torch.float32)
    operator.clear()
    strided = x.T.contiguous().T
    negative = torch.complex(torch.zeros_like(x), x).conj().imag
    assert negative.is_neg()
    for each in (strided, negative, torch.nn.Parameter(x, requires_grad=False)):
        assert torch.equal(layer(each), layer.want(each))
    assert len(operator) == 3
    for wrong, message in (
        (torch.tensor(1.0), r"must have shape \[\.\.\., K\]"),
        (x.double(), "x must be one of"),
        (torch.ones(2, 96), r"x must have shape \[..., 64\], .* got \[2, 96\]"),
        (x.to("meta"), "x must be on the device of qweight"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            layer(wrong)


def test_what_has_changed_is_checked_again(operator: list[int]) -> None:
    x = random_rows(3, 64, torch.float32)
    bias = torch.ones(48)
    for change in ("qweight", "scales", "zeros", "bias"):
        layer = Layer(bias=bias.clone())
        operator.clear()
        index = ["qweight", "scales", "zeros", "bias"].index(change)
        layer.tensors[index] = layer.tensors[index].clone()
        assert torch.equal(layer(x), layer.want(x)), change
        assert len(operator) == 1, change
    with pytest.raises(ValueError, match="impl must be 'auto' or one of"):
        layer(x, impl="fast")
    with pytest.raises(ValueError, match="bits must be one of"):
        layer(x, bits=5)
    layer.tensors[1] = layer.tensors[1][:16]
    with pytest.raises(ValueError, match="zeros must have the shape of scales"):
        layer(x)


def test_the_data_of_a_tensor_may_change(operator: list[int]) -> None:
    layer, x = Layer(bias=torch.ones(48)), random_rows(3, 64, torch.float32)
    operator.clear()
    layer.tensors[0].data = layer.tensors[0].roll(64)
    layer.tensors[3].data = torch.arange(48.0)
    assert torch.equal(layer(x), layer.want(x))
    for index, wrong in ((0, layer.tensors[0][64:]), (0, torch.stack([layer.tensors[0]] * 2, -1)[..., 0])):
        kept = layer.tensors[index].data
        layer.tensors[index].data = wrong
        with pytest.raises(RuntimeError, match="x, qweight and bias must fit each other"):
            layer(x)
        layer.tensors[index].data = kept
    for wrong in (torch.ones(47), torch.ones(6, 8)):
        layer.tensors[3].data = wrong
        with pytest.raises(RuntimeError, match="must fit each other|bias must be contiguous"):
            layer(x)
    assert not operator
    layer.tensors[3].data = torch.arange(96.0)[::2]  # which the checked way copies
    assert torch.equal(layer(x), layer.want(x))
    assert operator


def test_another_library_is_another_product(operator: list[int]) -> None:
    layer, x = Layer(), random_rows(3, 64, torch.float32)
    operator.clear()
    library.forget()
    layer(x)
    assert len(operator) == 1
    for name in ("reference", "cpu-torch"):  # which have no short way
        layer(x, impl=name)
        layer(x, impl=name)
    assert len(operator) == 5


def test_a_weight_with_an_order_has_no_short_way(operator: list[int]) -> None:
    """Of layout "strips": the library does not gather."""
    layer, x = Layer(), random_rows(3, 64, torch.float32)
    want, perm = layer(x), torch.arange(64).roll(5)
    operator.clear()
    for _ in range(2):
        assert torch.equal(layer(x[:, perm.argsort()].contiguous(), perm=perm), want)
    assert len(operator) == 2


def test_nothing_is_kept_alive() -> None:
    gc.collect()
    before = len(direct._ready)
    layer = Layer()
    assert len(direct._ready) == before + 1
    del layer
    gc.collect()
    assert len(direct._ready) == before


def test_a_tensor_that_is_gone_is_not_none(operator: list[int]) -> None:
    layer, x = Layer(bias=torch.ones(48)), random_rows(3, 64, torch.float32)
    layer.tensors[3] = layer.bias = None
    assert torch.equal(layer(x), layer.want(x))
    layer = Layer(random_case(48, 64, 32, symmetric=False)._replace(zeros=CASE.zeros.clone()))
    layer.tensors[2], layer.case = None, CASE
    with pytest.raises(ValueError, match="qweight of a 4-bit weight with in_features = 64 must have shape"):
        layer(x)


@pytest.mark.parametrize("kind", ["strided bias", "strided weight"])
def test_copies_are_not_remembered(operator: list[int], kind: str) -> None:
    """What is not contiguous is copied for every call: a remembered copy would be stale after a change."""
    layer, x = Layer(bias=torch.ones(48)), random_rows(3, 64, torch.float32)
    index = 3 if kind == "strided bias" else 0
    layer.tensors[index] = torch.stack([layer.tensors[index]] * 2, -1)[..., 0]
    operator.clear()
    assert torch.equal(layer(x), layer.want(x))
    layer(x)
    assert len(operator) == 2


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 48)])
def test_a_compiled_graph_takes_the_short_way_where_it_needs_no_gradient(
    operator: list[int], bias: torch.Tensor | None
) -> None:
    layer, seen = Layer(bias=bias), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append({node.target for node in graph.graph.nodes if node.op == "call_function"})
        return graph

    for dtype, grad, short in (
        (torch.bfloat16, False, True),
        (torch.bfloat16, True, False),
        (torch.float32, False, False),
    ):
        torch._dynamo.reset()
        x = random_rows(3, 64, dtype)
        with torch.set_grad_enabled(grad):
            y = torch.compile(lambda v: layer(v.T.contiguous().T), backend=backend, fullgraph=True)(x)
        assert torch.equal(y, layer.want(x))
        assert (torch_op.strips in seen[-1]) == short


def test_the_operator_wants_what_was_checked() -> None:
    layer, x = Layer(), random_rows(6, 64, torch.bfloat16)
    rest = (layer.tensors[0], layer.tensors[0], 48, 32, 4, 0, True, 0)
    for wrong, message in (
        (x.T.contiguous().T, "x must be contiguous"),
        (x[:, :32].contiguous(), "must fit each other"),
        (x[:, :0], "must be contiguous|must fit each other"),
        (x.double(), "x must be a float tensor"),
        (x[0, 0], "x must be a float tensor"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch_op.strips(wrong, *rest)
    assert torch_op.strips(x[:0], *rest).shape == (0, 48)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (0, 3, 64), (2, 0, 3, 64), (2, 3, 0, 64)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_no_rows(shape: tuple[int, ...], stride: int) -> None:
    """Oracle: shape and strides of the empty tensor that torch makes; it calls every such x contiguous."""
    layer = Layer(bias=torch.ones(48))
    x = torch.empty(*shape[:-1], 64 * stride)[..., ::stride]
    operands = (layer.tensors[0], layer.tensors[3], 48, 32, 4, 0, True, 0)
    want = torch.empty(*shape[:-1], 48)
    for found in (layer(x), layer(x.bfloat16()), torch_op.strips(x, *operands)):
        assert (found.shape, found.stride()) == (want.shape, want.stride())


def test_torch_may_refuse_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def aoti_torch_library_init_impl(self, *arguments: Any) -> int:
            return 1

    monkeypatch.setattr(torch_core, "_core", Core)
    with pytest.raises(OSError, match="torch must take some::strips, it returned 1; use another version"):
        torch_core.Kernel("some", "strips", None)


def test_rows_elsewhere_ask_nothing_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a product on a GPU with impl="triton", which no CPU has."""

    def asked(_impl: str) -> bool:
        raise AssertionError("the implementation was looked up for the CPU")

    monkeypatch.setattr(direct.dispatch, "is_best", asked)
    case = random_case(48, 64, 32)
    weight = PackedWeight(*case.tensors, 4, 32, 64)
    direct.remember(torch.empty(1, 64, device="meta"), weight, None, (4, 32, weight.layout, "triton", None))
