"""The short way of ptq_kernels.matmul: when it is taken, what it must notice, and that it changes no result.

Oracle: the operator, and a count of the calls that reach it.
"""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import ptq_kernels
import pytest
import torch
from cpu_libraries import current_libraries
from packed_weights import Case, random_case, random_rows
from ptq_kernels import direct, torch_op
from ptq_kernels.cpu import library
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OPERATOR = torch_op.matmul
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
    calls: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return OPERATOR(*arguments)

    monkeypatch.setattr(torch_op, "matmul", counted)
    return calls


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
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("watcher", [dual_numbers, Functions, Dispatched, torch.profiler.profile])
def test_whoever_watches_sees_the_operator(
    operator: list[int], watcher: Callable[[], AbstractContextManager[object]]
) -> None:
    layer, x = Layer(), random_rows(3, 64, torch.float32)
    operator.clear()
    with watcher():
        y = layer(x)
    assert len(operator) == 1
    assert torch.equal(y, layer(x))
    assert len(operator) == 1


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
        layer(x)  # remembered: nothing watched
        layer(x)
    assert len(operator) == 2
    plain = Layer()
    assert plain(x.requires_grad_()).requires_grad


def test_what_x_may_be_otherwise(operator: list[int]) -> None:
    layer, x = Layer(), random_rows(6, 64, torch.float32)
    operator.clear()
    strided = x.T.contiguous().T
    negative = torch.complex(torch.zeros_like(x), x).conj().imag
    assert negative.is_neg()
    for each in (strided, negative, x[:0], torch.nn.Parameter(x, requires_grad=False)):
        assert torch.equal(layer(each), layer.want(each))
    assert len(operator) == 4
    for wrong, message in (
        (torch.tensor(1.0), r"must have shape \[\.\.\., K\]"),
        (x.double(), "x must be one of"),
        (torch.ones(2, 96), r"scales must have shape \[N, 3\]"),
        (x.to("meta"), "x must be on the device of qweight"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            layer(wrong)


def test_what_has_changed_is_checked_again(operator: list[int]) -> None:
    x = random_rows(3, 64, torch.float32)
    bias = torch.ones(48)
    for change in ("qweight", "scales", "zeros", "bias", "data", "bias data"):
        layer = Layer(bias=bias.clone())
        operator.clear()
        if change == "data":
            layer.tensors[0].data = layer.tensors[0].clone()
        elif change == "bias data":
            layer.tensors[3].data = bias * 2
        else:
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
