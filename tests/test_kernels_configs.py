"""Which kernel form runs: the table, the rule, the user's file, the workspace, and the launch of compiled kernels."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tile_cases
import torch
from packed_weights import random_case, random_rows
from ptq_kernels import tiles

pytest.importorskip("triton", reason="the kernels are written in Triton")

from ptq_kernels.triton import ahead, configs, launch, recipes, tune, w4a16, workspace
from ptq_kernels.triton.configs import Gpu, Plan, Problem
from triton.runtime.errors import OutOfResources

H200, A100, ADA, BLACKWELL = Gpu(90, 132), Gpu(80, 108), Gpu(89, 128), Gpu(120, 170)
LLAMA = [(4096, 4096), (1024, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]


@pytest.fixture(autouse=True)
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PTQ_KERNELS_CONFIGS", str(tmp_path / "tuned" / "configs.json"))
    launch.forget()
    yield
    launch.forget()


@pytest.mark.parametrize("gpu", [H200, A100, ADA, BLACKWELL, Gpu(90, 78)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("span", tiles.SPANS)
def test_every_problem_has_a_plan_that_fits(gpu: Gpu, bits: int, span: int) -> None:
    """Invariants: the tile serves the problem, each split has work, parts fit the workspace, steps fit the group."""
    for rows in (1, 16, 17, 64, 65, 200, 511):
        for n, k in [*LLAMA, (1, 32), (64, 96), (300000, 128), (72, 50000)]:
            problem = Problem(bits, span, rows, n, k)
            tile, splits, _ = configs.plan(gpu, problem)
            assert (tile.bits, tile.span) == (bits, span)
            assert span % (tile.block_k // (4 if tile.kind == "folded" else 2)) == 0
            assert splits == 1 or configs.fits(tile, problem, splits)
            assert tile.block_m <= max(rows, 16) * 2 or gpu.order == 90


@pytest.mark.parametrize("processors", [132, 114, 78])
def test_only_exact_tiles_unless_tuned(processors: int) -> None:
    """None of the others was ever timed. A grid, for the rule takes the first tile that fills a GPU."""
    for bits, span, rows in itertools.product((4, 8), tiles.SPANS, configs.BUCKETS):
        for n, k in itertools.product(range(1024, 32768, 1792), range(1024, 32768, 3328)):
            assert configs.plan(Gpu(90, processors), Problem(bits, span, rows, n, k)).tile.kind == "exact"


def test_plans_fill_the_gpu_once() -> None:
    """4096 x 4096 has 32 tiles of 128 rows: for one wave of 132 multiprocessors they must be split."""
    for n, k in LLAMA:
        tile, splits, _ = configs.plan(H200, Problem(4, 128, 1, n, k))
        programs = -(-n // tile.block_n) * splits
        assert programs >= 64
        assert splits == 1 or programs <= 132 * tile.resident


def test_the_rule_where_the_table_is_silent() -> None:
    unknown = Gpu(90, 100)
    tile, splits, _ = configs.plan(unknown, Problem(4, 128, 1, 4096, 4096))
    assert splits == configs.splits_by_rule(unknown, tile, Problem(4, 128, 16, 4096, 4096)) == 8  # of 512 columns
    assert configs.plan(unknown, Problem(4, 128, 64, 4096, 4096)).splits == 4  # the traffic of the parts


def test_table_says_where_it_comes_from() -> None:
    table = json.loads(configs.SHIPPED.read_text())
    assert table["provenance"]
    for entry in table["shapes"]:
        assert entry["provenance"]
        problem = Problem(entry["bits"], entry["span"], entry["rows"], entry["n"][1], entry["k"][0])
        assert configs.plan(Gpu(entry["capability"], entry["processors"]), problem).splits >= 1


def test_buckets() -> None:
    assert [configs.bucket(rows) for rows in (1, 8, 9, 16, 17, 65, 512, 9999)] == [8, 8, 16, 16, 32, 128, 512, 2048]


def test_user_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PTQ_KERNELS_CONFIGS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert configs.user_file() == tmp_path / "ptq_kernels" / "configs.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert configs.user_file() == Path.home() / ".cache" / "ptq_kernels" / "configs.json"


def test_tuning_writes_what_plan_reads() -> None:
    """Oracle: a timer that likes three splits best."""
    problems = [Problem(4, 128, rows, 4096, 4096) for rows in (9, 64)]

    def timer(plan: Plan, problem: Problem) -> float:
        return 10.0 + abs(plan.splits - 3)

    best = tune.tune(H200, problems, timer, "a test")
    assert {problem.rows for problem in best} == {16, 64}
    assert all(plan[1:] == (3, 0) for plan, _ in best.values())  # beginning early gains nothing
    assert configs.plan(H200, problems[0]).splits == 3
    assert configs.plan(A100, problems[0]).splits != 3
    tune.tune(H200, problems[:1], lambda plan, problem: float(plan.splits) - (plan.early > 0) / 2, "again")
    assert configs.plan(H200, problems[0])[1:] == (1, ahead.BYTES)  # replaced, and it is faster to begin early
    assert configs.plan(H200, problems[1]).splits == 3  # kept
    entries = json.loads(configs.user_file().read_text())["shapes"]
    assert [entry["provenance"] for entry in entries] == ["again", "a test"]


@pytest.mark.parametrize(("k", "slim"), [(4096, True), (4096, False), (1536, True), (4000, True)])
def test_slim_tiles_serve_few_rows_where_they_were_faster(k: int, slim: bool) -> None:
    """Oracle: a timer by which slim tiles are, or are not, faster than what was tuned for more rows just before."""
    few, more = (Problem(4, 128, rows, 4096, k, recipes.explicit(H200, k)) for rows in (1, 9))
    before = configs.plan(H200, few)
    assert before == configs.plan(H200, more)

    def timer(plan: Plan, problem: Problem) -> float:
        return (1.0 if slim else 4.0) if plan.tile.name.startswith("8x") else 2.0 + abs(plan.splits - 3)

    best = tune.tune(H200, [few, more], timer, "a test")
    assert configs.plan(H200, more).splits == 3
    expected = slim and k != 4000  # which no step divides
    assert (configs.plan(H200, few).tile.kind == "slim") == expected
    assert (configs.plan(H200, few) == configs.plan(H200, more)) != expected
    assert [problem.rows for problem in best] == [16, 8]
    assert len(json.loads(configs.user_file().read_text())["shapes"]) == 1 + expected
    assert configs.plan(H200, few._replace(explicit=False)).tile.kind != "slim"
    if expected:  # an entry that is no longer true is dropped
        tune.tune(H200, [few], lambda plan, _: float(plan.tile.kind == "slim"), "again")
        assert configs.plan(H200, few) == configs.plan(H200, more)


def test_many_rows_have_a_kernel_only_where_it_was_faster() -> None:
    """Oracle: a kernel takes 10 us for 64 rows and in proportion, the dequantized weight 200 us; and no other shape."""
    problems = [Problem(4, 128, m, 512, k) for k in (1024, 2048) for m in (128, 256, 512, 1024, 2048)]

    def timer(plan: Plan | None, problem: Problem) -> float:
        faster = problem.k == 1024
        return (200.0 if faster else 90.0) if plan is None else 10.0 * problem.rows / 64 + plan.splits

    tune.tune(H200, problems, timer, "a test")
    assert configs.dequantize_from(H200) == 513  # 512 rows: 2 x 81 us beside 290
    weights = [tile_cases.tiled(random_case(512, k, 128), "tile_sm90") for k in (1024, 2048, 512)]
    x = [torch.empty(0, dtype=torch.float16)] * 3
    assert [launch.layer_of(x, w, None).most_rows for x, w in zip(x, weights, strict=True)] == [1025, 513, 513]
    assert configs.listed(H200, problems[3])
    assert not configs.listed(H200, problems[4])
    tune.tune(H200, problems[3:4], lambda plan, _: 1.0 if plan is None else 2.0, "again", threshold=False)
    assert not configs.listed(H200, problems[3])  # an entry that is no longer true is dropped
    assert configs.dequantize_from(H200) == 513


def test_plans_that_fail_are_passed_over() -> None:
    """What Triton raises for a launch or a tile that cannot be; only those that do not fit pass in silence."""
    problem = Problem(4, 128, 16, 4096, 4096)

    def timer(plan: Plan, _: Problem) -> float:
        if plan.splits == 2:
            raise RuntimeError("no room for such a cluster")
        if plan.splits == 3:
            raise OutOfResources(300000, 232448, "shared memory")
        return float(plan.splits)

    with pytest.warns(UserWarning, match="2 splits, is passed over: no room for such a cluster"):
        ((plan, _),) = tune.tune(H200, [problem], timer, "a test").values()
    assert plan.splits == 1

    def fails(plan: Plan, _: Problem) -> float:
        raise RuntimeError("no")

    with (
        pytest.warns(UserWarning, match="passed over: no"),
        pytest.raises(RuntimeError, match="must run on Gpu.* to be timed, none does"),
    ):
        tune.tune(H200, [problem], fails, "a test")


def test_a_tuned_pipelined_tile_serves_only_what_it_can() -> None:
    """Oracle: a timer that likes pipelined tiles. The copy engine wants rows of whole 16 bytes, the kernel a Hopper
    GPU, and scales in the dtype of x.
    """
    problems = [Problem(4, 128, 256, 512, k, recipes.explicit(H200, k)) for k in (1024, 1020)]
    best = tune.tune(H200, problems, lambda plan, _: 1.0 + (plan is None or plan.tile.kind != "pipelined"), "a test")
    assert [plan.tile.kind == "pipelined" for plan, _ in best.values()] == [True, False]
    assert configs.plan(H200, problems[0]).tile.kind == "pipelined"
    assert configs.plan(H200, problems[0]._replace(explicit=False)).tile.kind != "pipelined"
    assert [recipes.explicit(gpu, 1024) for gpu in (H200, A100, ADA, BLACKWELL)] == [True, False, False, False]
    bf16, fp32 = torch.bfloat16, torch.float32
    for scales, k, group, pipelined in ((bf16, 1024, 128, True), (fp32, 1024, 128, False), (bf16, 1020, 1020, False)):
        weight = tile_cases.tiled(random_case(512, k, group, dtype=scales), "tile_sm90")
        layer = launch.layer_of(torch.empty(0, dtype=bf16), weight, None)
        assert layer.explicit == (pipelined and not w4a16.interpreted())


def test_room_for_parts() -> None:
    """Parts of 512 x 8192 float32 values are the whole workspace, but those of a pipelined tile need none. Its splits
    are a cluster; a step of 64 columns each they must have.
    """
    tile = next(t for t in configs.tiles(90) if t.name == "128x256x64 pipelined")
    for kind, k, fitting in (
        ("exact", 8192, [1]), ("pipelined", 8192, [1, 2, 4, 8]), ("pipelined", 449, [1, 2, 4, 8]),
        ("pipelined", 448, [1, 2, 4]), ("pipelined", 64, [1]),
    ):  # fmt: skip
        problem = Problem(4, 128, 512, 8192, k, True)
        assert [s for s in range(1, 20) if configs.fits(tile._replace(kind=kind), problem, s)] == fitting


@pytest.mark.parametrize(("dense", "rows"), [(5.0, 65), (25.0, 257), (100.0, 513)])
def test_tuning_finds_from_where_to_dequantize(dense: float, rows: int) -> None:
    """Oracle: a kernel that takes 10, 20, 40 us for 128, 256, 512 rows; and plans that do not fit the GPU."""
    problems = [Problem(4, 128, m, n, 4096) for m in (64, 128, 256, 512) for n in (1024, 4096)]

    def timer(plan: Plan | None, problem: Problem) -> float:
        if plan is None:
            return dense
        if plan.splits > 1:
            raise OutOfResources(300000, 232448, "shared memory")
        return 10.0 * problem.rows / 128

    best = tune.tune(H200, problems, timer, "a test")
    assert all(plan.splits == 1 for plan, _ in best.values())
    assert configs.dequantize_from(H200) == rows
    assert configs.dequantize_from(A100) == 257  # as shipped


def test_a_forced_plan_serves_any_rows_and_none_dequantizes() -> None:
    """What `tune` times is what it asks for, whatever the tables say."""
    weight, x = tile_cases.tiled(random_case(128, 256, 128), "tile_sm90"), random_rows(1, 256, torch.float16)
    plan = configs.plan(H200, Problem(4, 128, 512, 128, 256))
    for forced, most in ((plan, 2049), (None, 0)):
        with launch.forced(forced):
            assert launch.layer_of(x, weight, None).most_rows == most
    assert launch.layer_of(x, weight, None).most_rows == 512


def test_few_rows_are_timed_as_one_row_and_as_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a clock that says 100 us and one for each row; and every launch takes the plan that is timed."""
    timed = []

    def clock(calls: list[Any]) -> list[float]:
        x, weight, _ = calls[0].args
        timed.append((len(x), launch.layer_of(x, weight, None).plan(configs.bucket(len(x)))))
        return [1.0, 100.0 + len(x), 999.0]

    monkeypatch.setattr(tune, "graph_times", clock)
    monkeypatch.setattr(tune, "_L2_BYTES", 0)
    timer = tune.GraphTimer(torch.device("cpu"), torch.bfloat16, 128)
    plan = Plan(configs.tiles(90)[0], 1)
    for rows, sizes in ((8, [1, 8]), (3, [1, 8]), (9, [9]), (64, [64])):
        found = timer(plan, Problem(4, 128, rows, 64, 128))
        assert found == 100.0 + sum(sizes) / len(sizes)
        assert timed == [(size, plan) for size in sizes]
        timed.clear()


def test_plans_to_tune_all_fit() -> None:
    problem = Problem(4, 128, 16, 4096, 4096)
    found = tune.plans(H200, problem)
    assert {plan.splits for plan in found} >= {1, 2, 4, 8, 16}
    few = tune.plans(H200, problem._replace(rows=1, explicit=True))
    assert {plan.tile for plan in few} == {tile for tile in configs.tiles(90) if tile.rows == configs.FEW}
    assert all(configs.fits(plan.tile, problem, plan.splits) for plan in found)


def test_a_file_of_another_format_is_refused() -> None:
    path = configs.user_file()
    path.parent.mkdir(parents=True)
    path.write_text('{"format": 0}')
    with pytest.raises(ValueError, match="must have format 2, .* has 0; delete it and tune again"):
        configs.plan(H200, Problem(4, 128, 1, 64, 64))


def test_nothing_is_timed_for_a_file_that_could_not_be_read() -> None:
    path = configs.user_file()
    path.parent.mkdir(parents=True)
    path.write_text('{"format": 1, "tiles": {}, "shapes": [], "dequantize_from": {}}')
    with pytest.raises(ValueError, match="must have format 2, .* has 1; delete it and tune again"):
        tune.tune(H200, [Problem(4, 128, 1, 4096, 4096)], lambda plan, problem: pytest.fail("timed"), "a test")


def test_an_incomplete_table_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "SHIPPED", configs.user_file())
    with pytest.raises(ValueError, match="must name the rows to dequantize from for order 90"):
        configs.dequantize_from(H200)


def test_tuning_refuses_a_group_that_no_tile_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="group_size must be a multiple of 32, got 48"):
        tune.tune_device([(64, 96)], device="cuda:0", group_size=48)
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3; nothing to tune"):
        tune.tune_device([(64, 96)], device="cuda:0", bits=3, group_size=32)


def test_each_stream_has_a_workspace_and_a_capture_takes_the_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_of_stream", {})
    monkeypatch.setattr(workspace, "_spare", {})
    device = torch.device("cpu")
    first = workspace.get(device, 0)
    assert workspace.get(device, 0) is first
    assert not first.counters.any()
    spare = workspace._spare[device]
    monkeypatch.setattr(workspace, "capturing", lambda device: True)
    assert workspace.get(device, 2) is spare
    with pytest.raises(RuntimeError, match="graph on stream 3 of cpu needs a workspace of its own, none is spare"):
        workspace.get(device, 3)
    monkeypatch.setattr(workspace, "capturing", lambda device: False)
    other = workspace.get(device, 4)  # made on the spot, and a new spare: nothing is captured
    assert workspace.get(device, 0) is first
    monkeypatch.setattr(workspace, "capturing", lambda device: True)
    assert all(workspace.get(device, 3) is not taken for taken in (first, spare, other))


def test_a_layout_of_another_gpu_uses_that_ones_tiles() -> None:
    weight = tile_cases.tiled(random_case(256, 256, 128), "tile_sm80")
    layer = launch._Layer(random_rows(1, 256, torch.float16), weight, False)
    assert layer.gpu == H200
    assert layer.plan(5).tile in configs.tiles(80)
