"""What the short way of ptq_kernels.matmul to a launch must notice of tensors, which may change without being others.

Oracle: a count of the calls that reach the operator, and the messages of its checks.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from counted_operator import counted_operator
from recorded_launches import Launched
from served_layer import NAMES, K, Layer, N, launches_of, rows

pytest.importorskip("triton", reason="the kernels are written in Triton")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Every launch, in order."""
    yield from launches_of(monkeypatch, tmp_path)


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call that reaches the operator."""
    return counted_operator(monkeypatch)


def dead_wrapper(x: torch.Tensor) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    torch.func.grad(lambda v: (kept.append(v), v.float().sum())[1])(x)
    return kept[0]


ODD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows apart": lambda x: torch.stack([x, x], -1)[..., 0],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.view(-1)])[1:].view(x.shape),
    "negative": lambda x: torch._neg_view(x),
    "a parameter": lambda x: torch.nn.Parameter(x, False),
    "of zeros": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "functional": torch._to_functional_tensor,
    "of a transform that ended": dead_wrapper,
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_rows_go_through_the_operator(launches: list[Launched], operator: list[int], kind: str) -> None:
    layer, x = Layer(), ODD[kind](rows())
    operator.clear()
    launches.clear()
    for _ in range(2):
        assert layer(x).shape == (1, N)
    assert len(operator) == 2
    assert all(address and not address % 16 for each in launches for address in each.addresses.values())
    layer(rows())
    assert len(operator) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.tensor(1.0).bfloat16(), r"must have shape \[\.\.\., K\]"),
        (torch.ones(2, K).double(), "x must be one of"),
        (torch.ones(2, K // 2).bfloat16(), r"x must have shape \[\.\.\., 256\], .* got \[2, 128\]"),
        (torch.ones(2, K, device="meta").bfloat16(), "x must be on the device of qweight"),
    ],
)
def test_wrong_rows_are_refused_as_before(launches: list[Launched], wrong: torch.Tensor, message: str) -> None:
    layer = Layer()
    with pytest.raises((ValueError, TypeError), match=message):
        layer(wrong)
    assert len(launches) == 1


@pytest.mark.parametrize("index", range(5))
def test_another_tensor_is_checked_again(launches: list[Launched], operator: list[int], index: int) -> None:
    layer, x = Layer(torch.ones(N), torch.arange(K).int()), rows()
    operator.clear()
    other = layer.tensors[index]
    layer.tensors[index] = other.clone()
    layer(x)
    assert len(operator) == 1
    layer(x)
    assert len(operator) == 1
    del layer.tensors[index]
    layer.tensors.insert(index, None)
    if index > 2:  # a bias or an order less; a dead reference is not "none"
        layer(x)
        assert len(operator) == 2
        assert launches[-1].signature["HAS_BIAS"] == "constexpr"
        assert launches[-1].values["HAS_BIAS"] == (index != 3)


CHANGED: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = [
    ("qweight", lambda t: t[:-64], "qweight of a 4-bit weight .* must have shape"),
    ("qweight", lambda t: t.view(1, -1), "qweight of a 4-bit weight .* must have shape"),
    ("qweight", lambda t: t.view(torch.int8), "qweight of layout 'tile_sm90' must be torch.uint8"),
    ("scales", lambda t: t.float(), "qweight of a 4-bit weight .* must have shape"),
    ("bias", lambda t: t[:-1], r"bias must have shape \[64\]"),
    ("bias", lambda t: t.view(8, 8), r"bias must have shape \[64\]"),
    ("bias", lambda t: t.double(), "bias must be one of"),
]


@pytest.mark.parametrize("change", range(len(CHANGED)))
def test_other_data_of_the_same_tensor_is_checked(launches: list[Launched], change: int) -> None:
    name, changed, message = CHANGED[change]
    layer = Layer(torch.ones(N))
    tensor = layer.tensors[NAMES.index(name)]
    tensor.data = changed(tensor)
    with pytest.raises((ValueError, TypeError), match=message):
        layer(rows())
    assert len(launches) == 1


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor.new_zeros(1), tensor])[1:]


@pytest.mark.parametrize("index", [0, 3])
@pytest.mark.parametrize("copied", [misaligned, lambda tensor: torch.stack([tensor, tensor], -1)[..., 0]])
def test_data_that_must_be_copied_goes_through_the_operator(
    launches: list[Launched], operator: list[int], index: int, copied: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """The same tensor with other data that fits, but which the kernel cannot read where it is."""
    layer = Layer(torch.ones(N))
    operator.clear()
    layer.tensors[index].data = copied(layer.tensors[index])
    for _ in range(2):
        layer(rows())
    assert len(operator) == 2
    address = launches[-1].addresses["w_ptr" if index == 0 else "b_ptr"]
    assert not address % 16
    assert address != layer.tensors[index].data_ptr()


def test_data_that_fits_is_read_where_it_is(launches: list[Launched], operator: list[int]) -> None:
    layer = Layer(torch.ones(N))
    operator.clear()
    for index in (0, 3):
        layer.tensors[index].data = layer.tensors[index].clone()
    layer(rows())
    assert not operator
    pointers = [launches[-1].addresses[name] for name in ("w_ptr", "b_ptr")]
    assert pointers == [layer.tensors[index].data_ptr() for index in (0, 3)]


def test_a_negative_bias_goes_through_the_operator(launches: list[Launched], operator: list[int]) -> None:
    """It is the negative of what lies in memory."""
    layer = Layer(torch._neg_view(torch.ones(N)))
    operator.clear()
    layer(rows())
    assert len(operator) == 1
    layer = Layer(torch.ones(N))
    layer.tensors[3].data = torch._neg_view(torch.ones(N))
    operator.clear()
    layer(rows())
    assert len(operator) == 1


@pytest.mark.parametrize("moved", ["x", "qweight", "bias"])
def test_another_device_goes_through_the_operator(
    launches: list[Launched], operator: list[int], monkeypatch: pytest.MonkeyPatch, moved: str
) -> None:
    """With two GPUs; here a tensor says that it is on another one."""
    from ptq_kernels.triton import launch

    layer, x = Layer(torch.ones(N)), rows()
    elsewhere = x if moved == "x" else layer.tensors[NAMES.index(moved)]
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 1 if tensor is elsewhere else -1)
    monkeypatch.setattr(launch, "current_stream", lambda index: 0)
    operator.clear()
    layer(x)
    assert len(operator) == 1


@pytest.mark.parametrize("index", [0, 3])
def test_functional_tensors_are_not_remembered(launches: list[Launched], operator: list[int], index: int) -> None:
    """Their address is 0: the dispatcher unpacks them."""
    layer = Layer(torch.ones(N))
    layer.tensors[index] = torch._to_functional_tensor(layer.tensors[index])
    operator.clear()
    for _ in range(2):
        layer(rows())
    assert len(operator) == 2
    assert all(launches[-1].addresses.values())
