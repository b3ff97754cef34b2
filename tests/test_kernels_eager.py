"""The short way of ptq_kernels.matmul to a launch: when it is taken, who gets the operator, that it changes nothing.

The driver records what a GPU would be given (recorded_launches.py); the tensors are on the CPU, which stands for it.
Oracle: what the operator hands over, and a count of the calls that reach the operator.
"""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tile_cases
import torch
from counted_operator import OPERATOR, counted_operator
from ptq_kernels import direct
from recorded_launches import Launched
from served_layer import K, Layer, N, launches_of, rows
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the kernels are written in Triton")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Every launch, in order."""
    yield from launches_of(monkeypatch, tmp_path)


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call that reaches the operator."""
    return counted_operator(monkeypatch)


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
    for tensor in (x, layer.tensors[3]):
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
