"""The short way of ptq_kernels.matmul to a launch: when it is taken, what it must notice, and that it changes nothing.

The driver records what a GPU would be given (recorded_launches.py); the tensors are on the CPU, which stands for it.
Oracle: what the operator hands over, and a count of the calls that reach the operator.
"""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ptq_kernels
import pytest
import tile_cases
import torch
from packed_weights import Case, random_case, random_rows
from ptq_kernels import direct, torch_op
from recorded_launches import Launched, recorded
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the kernels are written in Triton")
OPERATOR = torch_op.matmul
N, K = 64, 256
NAMES = ["qweight", "scales", "zeros", "bias", "perm"]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Every launch, in order."""
    from ptq_kernels.triton import w4a16

    if w4a16.interpreted():
        pytest.skip("compilation needs Triton without its interpreter")
    monkeypatch.setattr(w4a16, "refuse", lambda device: None)
    yield from recorded(monkeypatch, tmp_path)


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call that reaches the operator."""
    calls: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return OPERATOR(*arguments)

    monkeypatch.setattr(torch_op, "matmul", counted)
    return calls


def rows(count: int = 1, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return random_rows(count, K, dtype)


class Layer:
    """A weight in fragment order that has been served once."""

    def __init__(self, bias: torch.Tensor | None = None, perm: torch.Tensor | None = None) -> None:
        self.case: Case = random_case(N, K, 128, symmetric=False, dtype=torch.bfloat16)
        weight = tile_cases.tiled(self.case, "tile_sm90")
        self.tensors = [weight.qweight, weight.scales, weight.zeros, bias, perm]
        self(rows())

    def __call__(self, x: torch.Tensor, **change: Any) -> torch.Tensor:
        named = {**self.case.scheme, "layout": "tile_sm90", "impl": "triton", "perm": self.tensors[4], **change}
        return ptq_kernels.matmul(x, *self.tensors[:4], **named)

    def by_operator(self, x: torch.Tensor) -> torch.Tensor:
        return OPERATOR(x, *self.tensors[:4], 4, 128, "tile_sm90", "triton", self.tensors[4])


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, N), torch.nn.Parameter(torch.ones(N).bfloat16(), False)])
@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (40, K)])
def test_the_short_way_launches_what_the_operator_does(
    launches: list[Launched], operator: list[int], shape: tuple[int, ...], bias: torch.Tensor | None
) -> None:
    layer, x = Layer(bias), rows(40)[: torch.Size(shape).numel() // K].reshape(shape)
    layer(x)
    operator.clear()
    launches.clear()
    y, want = layer(x), layer.by_operator(x)
    assert not operator
    assert (y.shape, y.dtype, y.device) == (want.shape, want.dtype, want.device)
    short, long = launches
    assert short.addresses == long.addresses | {"y_ptr": y.data_ptr()}
    assert short.addresses["y_ptr"] != long.addresses["y_ptr"] == want.data_ptr()
    assert short._replace(arguments=short.values) == long._replace(arguments=long.values)
    assert short.values["M"] == x.numel() // K


def test_rows_of_an_act_order_weight_are_gathered(
    launches: list[Launched], operator: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ptq_kernels.triton import launch

    layer, x, gathered = Layer(perm=torch.arange(K).flip(0).int()), rows(3).view(3, 1, K), []
    operator.clear()
    called = launch._Launch.__call__

    def watched(self: Any, sizes: tuple[int, int, int], x: torch.Tensor, *rest: Any) -> None:
        gathered.append(x)
        called(self, sizes, x, *rest)

    monkeypatch.setattr(launch._Launch, "__call__", watched)
    assert layer(x).shape == (3, 1, N)
    assert not operator
    assert torch.equal(gathered[0], x.flip(-1))
    layer.tensors[4].data = torch.arange(K // 2).int()
    with pytest.raises(ValueError, match=r"perm must have shape \[256\]"):
        layer(x)


def test_a_new_number_of_rows_compiles_on_the_short_way(launches: list[Launched], operator: list[int]) -> None:
    layer = Layer()
    operator.clear()
    for count in (1, 16, 17, 500):
        layer(rows(count))
    assert not operator
    assert [each.values["M"] for each in launches[1:]] == [1, 16, 17, 500]
    assert len({each.values["BM"] for each in launches}) > 1


def test_many_rows_and_float32_are_dequantized_for_by_the_operator(
    launches: list[Launched], operator: list[int]
) -> None:
    from ptq_kernels.triton import launch

    layer = Layer()
    operator.clear()
    most = launch.layer_of(rows(), tile_cases.tiled(layer.case, "tile_sm90"), None).most_rows
    for x in (rows(most), rows(0), rows(1, torch.float32)):
        assert layer(x).shape == (len(x), N)
    assert len(operator) == 3
    layer(rows())
    assert len(operator) == 3


class Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


WATCHING: dict[str, Callable[[], Any]] = {
    "functions": Functions,
    "dispatch": Dispatched,
    "profiler": torch.profiler.profile,
    "dual numbers": forward_ad.dual_level,
}


@pytest.mark.parametrize("watching", WATCHING)
def test_who_watches_gets_the_operator(launches: list[Launched], operator: list[int], watching: str) -> None:
    layer, x = Layer(), rows()
    operator.clear()
    with WATCHING[watching]() as watcher:
        layer(x)
    assert len(operator) == 1
    if watching == "profiler":
        assert "ptq_kernels::matmul" in {event.key for event in watcher.key_averages()}
    layer(x)
    assert len(operator) == 1
    assert launches[-1].addresses["x_ptr"] == x.data_ptr()


def test_transforms_tracers_and_fakes_get_the_operator(launches: list[Launched], operator: list[int]) -> None:
    layer, x = Layer(), rows(3)
    operator.clear()
    torch.func.vmap(lambda v: (layer(x), v)[1])(torch.ones(2))
    assert len(operator) == 1
    traced = torch.jit.trace(lambda v: layer(v), x, check_trace=False)
    assert len(operator) == 2
    assert "ptq_kernels::matmul" in str(traced.graph)
    count = len(launches)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == (3, N)
    assert len(operator) == 3
    assert len(launches) == count
    layer(x)
    assert len(operator) == 3


def test_what_a_mode_makes_is_not_taken_for_plain(launches: list[Launched], operator: list[int]) -> None:
    from ptq_kernels.triton import eager

    layer, x = Layer(), rows()
    direct._ready.clear()
    eager._plain_keys.cache_clear()
    operator.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(x)
    for _ in range(3):
        layer(x)
    assert len(operator) == 2


def test_a_compiled_graph_calls_the_operator(launches: list[Launched]) -> None:
    layer, x, graphs = Layer(), rows(3), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(lambda v: layer(v), fullgraph=True, backend=backend)(x)
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [OPERATOR]
    assert len(launches) == 2


def test_gradients_go_through_the_operator(launches: list[Launched], operator: list[int]) -> None:
    layer, x = Layer(torch.ones(N)), rows()
    for tensor in (x, layer.tensors[1], layer.tensors[3]):
        operator.clear()
        tensor.requires_grad_()
        assert layer(x).requires_grad
        assert layer(x).requires_grad
        assert len(operator) == 2
        for without in (torch.no_grad, torch.inference_mode):
            with without():
                assert not layer(x).requires_grad
        assert len(operator) == 2
        tensor.requires_grad_(False)
    with torch.inference_mode():
        y, inside = layer(x), x.clone()
        assert layer(inside).is_inference()
        assert y.is_inference()
    assert not layer(inside).is_inference()
    assert len(operator) == 2


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


def test_every_stream_has_its_workspace(
    launches: list[Launched], operator: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ptq_kernels.triton import launch, workspace

    layer = Layer()
    operator.clear()
    for stream in (7, 8, 7):
        monkeypatch.setattr(launch, "current_stream", lambda index, stream=stream: stream)
        layer(rows())
        parts, counters = workspace.get(torch.device("cpu"), stream)
        assert launches[-1].stream == stream
        found = [launches[-1].addresses[name] for name in ("parts_ptr", "counters_ptr")]
        assert found == [parts.data_ptr(), counters.data_ptr()]
    assert not operator
    assert launches[-1].addresses["parts_ptr"] != launches[-2].addresses["parts_ptr"]


def test_the_device_is_made_the_current_one_by_the_operator(
    launches: list[Launched], operator: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ptq_kernels.triton import launch

    layer, entered = Layer(), []
    operator.clear()

    def current(device: torch.device) -> Any:
        entered.append(device)
        monkeypatch.setattr(launch, "current_stream", lambda index: 5)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(launch, "current_stream", lambda index: None)  # another device is the current one
    layer(rows())
    assert len(operator) == 1
    assert entered == [torch.device("cpu")]
    assert launches[-1].stream == 5
    layer(rows())
    assert len(operator) == 1


def test_a_capture_takes_the_short_way_and_its_refusals(
    launches: list[Launched], operator: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ptq_kernels.triton import launch, workspace

    layer = Layer()
    operator.clear()
    monkeypatch.setattr(workspace, "capturing", lambda device: True)
    monkeypatch.setattr(launch, "current_stream", lambda index: 3)
    layer(rows())
    assert launches[-1].stream == 3
    with pytest.raises(RuntimeError, match="kernel for 40 rows of a 64 x 256 weight must be compiled before a CUDA"):
        layer(rows(40))
    monkeypatch.setattr(launch, "current_stream", lambda index: 4)
    with pytest.raises(RuntimeError, match="a CUDA graph on stream 4 of cpu needs a workspace of its own"):
        layer(rows())
    assert not operator
    assert len(launches) == 2


def test_other_plans_are_noticed(launches: list[Launched], operator: list[int]) -> None:
    from ptq_kernels.triton import launch

    layer = Layer()
    plan = launch.layer_of(rows(), tile_cases.tiled(layer.case, "tile_sm90"), None).plan(1)
    operator.clear()
    with launch.forced(plan._replace(splits=2)):
        layer(rows())
        layer(rows())
    assert len(operator) == 1
    layer(rows())
    layer(rows())
    assert len(operator) == 2
    assert [each.grid[1] for each in launches] == [plan.splits, 2, 2, plan.splits, plan.splits]
    launch.forget()
    layer(rows())
    assert len(operator) == 3


def test_other_implementations_are_not_launched(launches: list[Launched], operator: list[int]) -> None:
    layer = Layer()
    operator.clear()
    for impl in ("reference", "auto"):  # of a CPU tensor "auto" is another implementation
        for _ in range(2):
            layer(rows(), impl=impl)
    assert len(operator) == 4
    assert len(launches) == 1
    with pytest.raises(ValueError, match="impl must be 'auto' or one of"):
        layer(rows(), impl="fast")
    with pytest.raises(RuntimeError, match="activation='int8' cannot run here with impl='triton'"):
        layer(rows(), activation="int8")


def test_nothing_is_kept_alive(launches: list[Launched]) -> None:
    gc.collect()
    before = len(direct._ready)
    layer = Layer(torch.ones(N), torch.arange(K).int())
    assert len(direct._ready) == before + 1
    del layer
    gc.collect()
    assert len(direct._ready) == before
