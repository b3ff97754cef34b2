"""The launch path, with a driver that records what a GPU would be given (recorded_launches.py)."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tile_cases
import torch
from packed_weights import random_case, random_rows
from ptq_kernels.layouts import PackedWeight
from recorded_launches import Launched, recorded

triton = pytest.importorskip("triton", reason="the kernels are written in Triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compilation needs Triton without its interpreter"
)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Every launch, in order."""
    yield from recorded(monkeypatch, tmp_path)


def run(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, stream: int = 0) -> torch.Tensor:
    from ptq_kernels.triton import launch

    return launch._matmul(x, weight, bias, stream)


def test_the_short_way_hands_over_what_triton_would(launches: list[Launched]) -> None:
    """Oracle: the first launch, which is Triton's own; the second goes past it. No column of y is left out."""
    from ptq_kernels.triton import workspace

    weight = tile_cases.tiled(random_case(130, 4096, 128, symmetric=False, dtype=torch.bfloat16), "tile_sm90")
    x = random_rows(5, 4096, torch.bfloat16)
    results = [run(x, weight), run(x, weight, stream=7)]
    first, second = launches
    assert first.signature == second.signature
    assert (first.stream, second.stream) == (0, 7)
    assert first.grid == second.grid
    assert first.grid[0] * first.arguments["BN"] >= 130
    for launched, y, stream in zip(launches, results, (0, 7), strict=True):
        parts, counters = workspace.get(x.device, stream)
        tensors = {"x_ptr": x, "w_ptr": weight.qweight, "y_ptr": y, "parts_ptr": parts, "counters_ptr": counters}
        assert launched.addresses == {"b_ptr": x.data_ptr()} | {n: tensor.data_ptr() for n, tensor in tensors.items()}
    assert first.values == second.values
    assert [first.values[name] for name in "MNK"] == [5, 130, 4096]
    assert first.handed[:2] == second.handed[:2]
    assert second.handed[2:] == (None, None, None)  # no hook was set
    assert first.signature["M"] == "i32"  # a new number of rows compiles nothing


def test_every_number_of_rows_of_a_bucket_runs_one_compiled_kernel(launches: list[Launched]) -> None:
    from ptq_kernels.triton import tiled

    weight = tile_cases.tiled(random_case(64, 256, 128, dtype=torch.bfloat16), "tile_sm90")
    for rows in (1, 2, 16):
        run(random_rows(rows, 256, torch.bfloat16), weight)
    memory = torch.zeros(256 + 8, dtype=torch.bfloat16)
    misaligned = memory[1 : 1 + 256].view(1, 256)
    run(misaligned, weight)
    assert launches[-1].addresses["x_ptr"] % 16 == 0  # a copy: the kernel takes alignment for granted
    assert len(launches) == 4
    (cache,) = tiled.tiled_kernel.device_caches.values()
    assert len(cache[0]) == 1


@pytest.mark.parametrize(("capability", "early"), [(90, True), (80, False)])
def test_a_plan_that_begins_early(
    launches: list[Launched], monkeypatch: pytest.MonkeyPatch, capability: int, early: bool
) -> None:
    """Twice, past Triton the second time; only from compute capability 9.0 on, and only where the plan says so."""
    from ptq_kernels.triton import ahead, configs, launch

    monkeypatch.setattr(launch, "_INTERPRETED_GPU", configs.Gpu(capability, 132))
    weight = tile_cases.tiled(random_case(128, 512, 128, dtype=torch.bfloat16), "tile_sm90")
    x = random_rows(3, 512, torch.bfloat16)
    usual = configs.plan(configs.Gpu(90, 132), configs.Problem(4, 128, 3, 128, 512))
    for plan in (usual, usual._replace(early=ahead.BYTES)):
        with launch.forced(plan):
            for _ in range(2):
                run(x, weight)
    assert [each.dependent for each in launches] == [False, False, early, early]
    assert [each.arguments["AHEAD"] for each in launches] == [0, 0, *[ahead.BYTES * early] * 2]


def test_each_kind_of_tile_has_a_kernel_of_its_own(launches: list[Launched]) -> None:
    """Oracle: what its launch is given is what the other kernels would be."""
    from ptq_kernels.triton import configs, launch

    weight = tile_cases.tiled(random_case(300, 512, 128, dtype=torch.bfloat16), "tile_sm90")
    x = random_rows(70, 512, torch.bfloat16)
    tiles = [t for t in configs.tiles(90) if (t.bits, t.span) == (4, 128) and t.rows in (16, 512) and t.kind != "slim"]
    for tile in tiles:
        with launch.forced(configs.Plan(tile, 2)):
            run(x, weight)
    kernels = {
        "exact": "tiled_kernel",
        "raised": "tiled_kernel",
        "folded": "wide_kernel",
        "pipelined": "pipelined_kernel",
    }
    assert {tile.kind for tile in tiles} == set(kernels)
    for tile, launched in zip(tiles, launches, strict=True):
        alone = tile.kind == "exact"
        outputs = -(-300 // tile.block_n) * -(-70 // tile.block_m)
        assert launched.grid == ((outputs, 2, 1) if alone else (outputs, 1, 1))  # of clusters
        warps, cluster, shared = launched.handed[1]
        assert (warps, cluster) == (tile.warps, 1 if alone else 2)
        assert alone or shared >= 4 * tile.block_n * tile.block_m + 16
        assert launched.addresses["w_ptr"] == weight.qweight.data_ptr()
        assert launched.kernel == kernels[tile.kind]
        assert launched.values.get("SPLIT", True) is True
        assert launched.values["SIZE"] == cluster
        assert launched.values.get("RAISED", False) == (tile.kind == "raised")


def test_slim_tiles(launches: list[Launched]) -> None:
    """Eight rows a program and no workspace; what they cannot do is refused."""
    from ptq_kernels.triton import ahead, configs, launch

    weight = tile_cases.tiled(random_case(300, 2048, 128, dtype=torch.bfloat16), "tile_sm90")
    tiles = [t for t in configs.tiles(90) if t.kind == "slim"]
    for i, tile in enumerate(tiles):
        with launch.forced(configs.Plan(tile, 1, ahead.BYTES * (i % 2))):
            run(random_rows(9, 2048, torch.bfloat16), weight)
    for i, (tile, launched) in enumerate(zip(tiles, launches, strict=True)):
        programs = -(-300 // tile.block_n) * (16 // tile.block_m)
        assert (launched.kernel, launched.grid) == ("slim_kernel", (programs, 1, 1))
        assert launched.handed[1][:2] == (tile.warps, 1)
        assert set(launched.addresses) == {"x_ptr", "w_ptr", "b_ptr", "y_ptr"}
        assert launched.dependent == bool(i % 2)
    tile = next(tile for tile in tiles if tile.block_k == 1024)
    for splits, k in ((2, 2048), (1, 1536)):
        other = tile_cases.tiled(random_case(64, k, 128, dtype=torch.bfloat16), "tile_sm90")
        with (
            launch.forced(configs.Plan(tile, splits)),
            pytest.raises(ValueError, match=f"steps of 1024 columns must.*found {splits} splits and {k} columns"),
        ):
            run(random_rows(3, k, torch.bfloat16), other)


def test_pipelined_tiles_begin_early(launches: list[Launched]) -> None:
    from ptq_kernels.triton import ahead, configs, launch

    weight = tile_cases.tiled(random_case(128, 512, 128, dtype=torch.bfloat16), "tile_sm90")
    tile = next(t for t in configs.tiles(90) if t.kind == "pipelined" and t.span == 128)
    for splits, early in ((1, ahead.BYTES), (2, ahead.BYTES), (2, 0)):
        with launch.forced(configs.Plan(tile, splits, early)):
            run(random_rows(3, 512, torch.bfloat16), weight)
    assert [each.dependent for each in launches] == [True, True, False]
    assert [each.arguments["AHEAD"] for each in launches] == [ahead.BYTES, ahead.BYTES, 0]


def test_clusters_are_refused(launches: list[Launched]) -> None:
    """Of sizes that are none, without work for each, and where Triton's launcher is given something else."""
    from ptq_kernels.triton import clusters, configs, launch

    weight = tile_cases.tiled(random_case(128, 512, 128, dtype=torch.bfloat16), "tile_sm90")
    tile = next(t for t in configs.tiles(90) if t.kind == "pipelined" and t.span == 128 and t.block_k == 128)
    for splits in (3, 8):  # 4 steps
        with (
            launch.forced(configs.Plan(tile, splits)),
            pytest.raises(ValueError, match=f"must be split into 2, 4, 8 programs.*found {splits} splits of 4 steps"),
        ):
            run(random_rows(3, 512, torch.bfloat16), weight)
    metadata = SimpleNamespace(num_warps=4, shared=1000)
    other = SimpleNamespace(metadata=metadata, packed_metadata=(4, 1, 1000, "more"))
    with pytest.raises(RuntimeError, match=r"must be launched with.*this Triton has \(4, 1, 1000, 'more'\)"):
        clusters.join(other, 2, 16, 16)
    with pytest.raises(RuntimeError, match="receives 65552 bytes of shared memory must have over 49152.*it has 1000"):
        clusters.join(SimpleNamespace(metadata=metadata, packed_metadata=(4, 1, 1000)), 2, 64, 256)
    scratch = SimpleNamespace(num_warps=4, shared=1000, global_scratch_size=0, profile_scratch_size=64)
    with pytest.raises(RuntimeError, match="must have no scratch memory, it has .*'profile_scratch_size': 64"):
        clusters.join(SimpleNamespace(metadata=scratch, packed_metadata=(4, 1, 1000)), 2, 16, 16)
    for columns, shared in ((16, 1040), (8, 1000)):
        known = SimpleNamespace(metadata=metadata, packed_metadata=(4, 1, 1000))
        for _ in range(2):  # a kernel may serve several layers
            clusters.join(known, 2, 16, columns)
        assert known.packed_metadata == (4, 2, shared)


def test_what_the_copy_engine_is_told(launches: list[Launched]) -> None:
    """Oracle: the sizes. x and its descriptor are new in every call, that of a weight is kept; a launch past Triton's
    own code gives the same as one by it.
    """
    from ptq_kernels.triton import configs, launch

    case = random_case(300, 520, 520, dtype=torch.bfloat16)
    weights = [tile_cases.tiled(case, "tile_sm90") for _ in range(2)]
    tile = next(t for t in configs.tiles(90) if t.kind == "pipelined" and (t.rows, t.span) == (512, 128))
    rows = [random_rows(count, 520, torch.bfloat16) for count in (70, 70, 100)]
    with launch.forced(configs.Plan(tile, 1)):
        for x, weight in zip(rows, (*weights, weights[0]), strict=True):
            run(x, weight)
    for x, weight, launched in zip(rows, (*weights, weights[0]), launches, strict=True):
        described, words = launched.arguments["x_desc"], launched.arguments["q_desc"]
        assert (described.base.data_ptr(), list(described.shape), list(described.strides)) == (
            x.data_ptr(), list(x.shape), [520, 1]
        )  # fmt: skip
        assert described.block_shape == [tile.block_m, tile.block_k]
        assert (words.base.data_ptr(), words.shape, words.strides) == (weight.qweight.data_ptr(), [6, 5120], [5120, 1])
        assert words.block_shape == [tile.block_n // 64, 8 * tile.block_k]
        assert words.base.dtype == torch.int32
    first, _, third = launches
    assert first.arguments["q_desc"] is third.arguments["q_desc"]


def test_a_bias_of_another_dtype_is_another_kernel(launches: list[Launched]) -> None:
    """The compiled kernel reads the bias in one dtype; layers of one shape may differ in it."""
    weight = tile_cases.tiled(random_case(64, 256, 128, dtype=torch.bfloat16), "tile_sm90")
    x = random_rows(1, 256, torch.bfloat16)
    for _ in range(2):
        for dtype in (torch.bfloat16, torch.float32):
            run(x, weight, torch.ones(64, dtype=dtype))
    assert [each.signature["b_ptr"] for each in launches] == ["*bf16", "*fp32"] * 2


@pytest.mark.parametrize("k", [1, 32])
def test_sizes_of_one_compile(launches: list[Launched], k: int) -> None:
    """Triton compiles an argument that is 1 in, as a constant, which is another type inside the kernel."""
    from ptq_kernels.triton import launch

    weight = tile_cases.tiled(random_case(1, k, k, symmetric=False), "tile_sm90")
    x = random_rows(1, k, torch.bfloat16)
    run(x, weight)
    assert [name for name in "NK" if launches[0].signature[name] == "constexpr"] == (["N", "K"] if k == 1 else ["N"])
    assert len(list(launch.layer_of(x, weight, None).dense.chunks(weight.qweight, 1, 0))) == 1
    run(x, PackedWeight(*random_case(1, k, k, bits=3).tensors, 3, k, k))
    assert len(launches) == 3


def test_what_is_not_compiled_is_refused_during_a_capture(
    launches: list[Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ptq_kernels.triton import workspace

    weight = tile_cases.tiled(random_case(64, 256, 128, dtype=torch.bfloat16), "tile_sm90")
    run(random_rows(1, 256, torch.bfloat16), weight)
    monkeypatch.setattr(workspace, "capturing", lambda device: True)
    run(random_rows(1, 256, torch.bfloat16), weight, stream=3)
    with pytest.raises(RuntimeError, match="kernel for 40 rows of a 64 x 256 weight must be compiled before a CUDA"):
        run(random_rows(40, 256, torch.bfloat16), weight)
    assert len(launches) == 2


def test_hooks_of_triton_are_called_for_every_launch(launches: list[Launched], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the first launch, which is Triton's own, hands over the hooks; the launcher calls them."""
    runtime = triton.knobs.runtime
    weight = tile_cases.tiled(random_case(64, 256, 128, dtype=torch.bfloat16), "tile_sm90")
    x = random_rows(1, 256, torch.bfloat16)

    def hook(_metadata: object) -> None: ...

    for name in ("launch_enter_hook", "launch_exit_hook"):
        getattr(runtime, name).add(hook)
        try:
            run(x, weight)
            run(x, weight)
        finally:
            getattr(runtime, name).remove(hook)
        first, second = (each.handed for each in launches[-2:])
        assert second[:2] == first[:2]
        assert second[3:] == (runtime.launch_enter_hook, runtime.launch_exit_hook) == first[3:]
        assert second[2].get()["name"] == "tiled_kernel"
    monkeypatch.setattr(runtime, "launch_enter_hook", hook)  # one function, as before there were chains
    run(x, weight)
    assert launches[-1].handed[3] is hook
    monkeypatch.setattr(runtime, "launch_enter_hook", None)
    run(x, weight)
    assert launches[-1].handed[2:] == (None, None, None)


def test_this_triton_is_launched_straight() -> None:
    from ptq_kernels.triton import enqueue

    enqueue.straight.cache_clear()
    assert enqueue.straight()


@pytest.mark.parametrize("wants", ["another order", "another attribute", "no hooks"])
def test_another_triton_launches_itself(launches: list[Launched], monkeypatch: pytest.MonkeyPatch, wants: str) -> None:
    """A Triton whose compiled kernels hand their launcher something else is called the public way."""
    from ptq_kernels.triton import enqueue
    from triton.compiler import CompiledKernel

    public, taken = CompiledKernel.__getitem__, []

    def other(kernel: Any, grid: tuple[int, int, int]) -> Any:
        taken.append(grid)
        if not isinstance(kernel, SimpleNamespace):
            return public(kernel, grid)
        if wants == "another attribute":
            return kernel.attributes
        return lambda *arguments, stream: kernel.run(stream, *grid, *arguments)

    monkeypatch.setattr(CompiledKernel, "__getitem__", other)
    if wants == "no hooks":
        monkeypatch.delattr(triton, "knobs")
    enqueue.straight.cache_clear()
    try:
        assert not enqueue.straight()
        weight = tile_cases.tiled(random_case(64, 256, 128, dtype=torch.bfloat16), "tile_sm90")
        x = random_rows(1, 256, torch.bfloat16)
        for _ in range(2):
            run(x, weight)
    finally:
        enqueue.straight.cache_clear()
    first, second = launches
    assert taken[-1] == second.grid
    assert (first.grid, first.stream, first.values) == (second.grid, second.stream, second.values)
    assert first.addresses["x_ptr"] == second.addresses["x_ptr"] == x.data_ptr()


def test_the_stream_is_that_of_the_current_device(launches: list[Launched], monkeypatch: pytest.MonkeyPatch) -> None:
    from ptq_kernels.triton import launch

    assert launch.current_stream(-1) == 0  # the interpreter's
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert [launch.current_stream(index) for index in (0, 1, 2)] == [None, 1, None]
