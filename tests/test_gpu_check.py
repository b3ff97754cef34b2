"""What scripts/gpu_check decides, how it ends what takes too long, and the plans that its stages force: on a CPU."""

import itertools
import json
import sys
from argparse import Namespace
from importlib import util
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
import torch
from ptq_kernels.layouts import PackedWeight

pytest.importorskip("triton", reason="the kernels are written in Triton")

import gpu_plans
from ptq_kernels.triton import configs, launch, w4a16
from ptq_kernels.triton.configs import Gpu, Plan, Problem

ROOT = Path(__file__).resolve().parent.parent
H200 = Gpu(90, 132)
KINDS = ["raised", "folded", "pipelined", "slim", "early"]


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    loader = SourceFileLoader("gpu_check", str(ROOT / "scripts" / "gpu_check"))
    module = util.module_from_spec(util.spec_from_loader("gpu_check", loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def as_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a launch asks on an H200, whose table the CPU follows; `configs.plan` is restored."""
    monkeypatch.setenv("PTQ_KERNELS_CONFIGS", str(tmp_path / "configs.json"))
    monkeypatch.setattr(w4a16, "interpreted", lambda: False)
    monkeypatch.setattr(configs, "plan", configs.plan)
    launch.forget()
    yield
    launch.forget()


def assert_launched(plan: Plan, n: int, k: int) -> None:
    """No refusal of a weight in groups of 128, with bfloat16 scales and rows; the numbers themselves need no memory."""
    weight = PackedWeight(
        torch.empty(0), torch.empty(n, k // 128, dtype=torch.bfloat16, device="meta"), None, 4, 128, k
    )
    layer = launch._Layer(torch.empty(0, dtype=torch.bfloat16), weight._replace(layout="tile_sm90"), False)
    assert layer.explicit
    launch._Launch(plan, layer)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(("early", "pipelined"), [*itertools.product((False, True), repeat=2)])
def test_every_plan_that_is_repeated_can_run(early: bool, pipelined: bool) -> None:
    """Oracle: what fits by the rules of configs, and what a launch refuses, asked for an H200."""
    gpu_plans.plan_otherwise(early, pipelined)
    found = []
    for n, k, rows, _ in gpu_plans.REPEATED:
        problem = Problem(4, 128, rows, n, k, explicit=True)
        plans = gpu_plans.repeated(H200, problem)
        for plan in plans:
            assert configs.fits(plan.tile, problem, plan.splits), plan
            assert_launched(plan, n, k)
        assert plans[0].tile.kind in (("pipelined", "slim") if pipelined else ("exact",))
        assert (plans[0].early > 0) == early
        assert plans[0].splits > 1 or plans[0].tile.kind == "slim"
        found += plans
    assert {plan.tile.kind for plan in found} == {*KINDS[:-1], "exact"} - ({"exact"} if pipelined else set())
    for kind in KINDS[:-1]:  # in every form that it has
        same = [plan for plan in found if plan.tile.kind == kind]
        assert {plan.early > 0 for plan in same} == {False, True}
        assert any(plan.splits > 1 for plan in same) == (kind != "slim")


@pytest.mark.usefixtures("as_on_a_gpu")
def test_one_plan_of_each_kind_for_the_large_weight() -> None:
    n, k, rows = gpu_plans.LARGE
    assert n * k // 2 >= 2**31
    for explicit, kinds in ((True, KINDS[:-1]), (False, ["raised", "folded"])):
        problem = Problem(4, 128, rows, n, k, explicit)
        plans = gpu_plans.one_of_each(H200, problem)
        assert sorted(plan.tile.kind for plan in plans) == sorted(kinds)
        for plan in plans:
            assert configs.fits(plan.tile, problem, plan.splits)
            assert_launched(plan, n, k)


def text(kind: str, early: int = 0) -> str:
    """How a stage that forces a plan ends, when that is wrong."""
    plan = Plan(next(tile for tile in configs.tiles(90) if tile.kind == kind), 1, early)
    try:
        with gpu_plans.naming(plan):
            raise AssertionError(3.5)
    except AssertionError as error:
        return "\n".join([str(error), *error.__notes__])


@pytest.mark.parametrize(
    ("name", "status", "output", "expected"),
    [
        ("slim", "failed (1)", "", "slim"),
        ("raised", "out of time", "", "raised"),
        ("folded", "skipped: no time was left", "", ""),
        ("graph", "failed (1)", "", ""),
        ("between", "out of time", "", ""),
        ("pipelined", "failed (1)", "", "pipelined"),
        ("pipelined cases 2", "failed (1)", "", "pipelined slim"),
        ("pipelined chain", "out of time, and it could not be killed", "", "pipelined slim"),
        ("early graph", "failed (-9)", "", "early"),
        ("both chain", "failed (1)", "", "pipelined slim early"),
        ("every 3", "failed (1)", text("raised"), "raised"),
        ("every 3", "failed (1)", text("slim", 32768), "slim early"),
        ("every 3", "failed (1)", text("slim") + "x" * 4000 + text("folded"), "folded"),
        ("every 3", "failed (-11)", "Segmentation fault", "raised folded pipelined slim early"),
        ("every 3", "out of time", "", ""),
        ("clusters 1", "failed (1)", "", "raised folded pipelined early"),
        ("clusters 1", "out of time, and it could not be killed", "", ""),
        ("repeat", "failed (1)", text("exact"), ""),
        ("early repeat", "failed (1)", text("exact", 32768), "early"),
        ("pipelined repeat", "failed (1)", text("folded"), "folded"),
        ("pipelined repeat", "failed (1)", "", "raised folded pipelined slim early"),
        ("pipelined repeat", "out of time", "", ""),
        ("large", "failed (1)", text("pipelined"), "pipelined"),
        ("memcheck", "failed (9)", "========= Invalid __global__ read" + "x" * 9000, "raised folded"),
        ("early memcheck", "failed (1)", "AssertionError", ""),
        ("early memcheck", "out of time", "", ""),
        ("pipelined memcheck", "failed (9)", "=========     at slim_kernel+0x10", "pipelined slim"),
        ("pipelined memcheck", "skipped: the sanitizer does not support this device", "", ""),
    ],
)
def test_what_a_check_vetoes(gpu_check: ModuleType, name: str, status: str, output: str, expected: str) -> None:
    """Oracle: the kinds that each stage runs, written out here; a text as a stage prints it."""
    assert gpu_check.vetoes(name, status, output) == expected.split()


def outcomes(gpu_check: ModuleType, **found: str) -> dict[str, str]:
    """Which kinds are timed after checks that ended so and said nothing."""
    names = {name.replace("_", " "): status for name, status in found.items()}
    checks = {n: {"status": status, "vetoes": gpu_check.vetoes(n, status, "")} for n, status in names.items()}
    return gpu_check.timed(checks)


def test_which_kinds_are_timed(gpu_check: ModuleType) -> None:
    def yes(**found: str) -> str:
        return " ".join(kind for kind, said in outcomes(gpu_check, **found).items() if said == "yes")

    late = "skipped: no time was left"
    assert yes() == " ".join(KINDS)  # no check was asked for
    assert yes(graph="passed", layouts="passed") == ""
    assert yes(slim="passed", early_chain="passed") == "slim early"
    # the second command of docs/performance.md, of which not everything was done in time
    second = {
        "every_0": "passed",
        "every_1": "out of time",
        "slim": late,
        "clusters_0": late,
        "pipelined_chain": "passed",
    }
    assert yes(**second) == " ".join(KINDS)
    assert yes(every_0="out of time", clusters_0="passed") == "raised folded pipelined early"
    said = outcomes(gpu_check, every_0="passed", pipelined_chain="failed (1)", early_graph="out of time")
    assert said == {
        "raised": "yes",
        "folded": "yes",
        "pipelined": "no, pipelined chain: failed (1)",
        "slim": "no, pipelined chain: failed (1)",
        "early": "no, early graph: out of time",
    }
    assert outcomes(gpu_check, raised="passed")["slim"] == "no, none of its checks passed"


def test_what_is_vetoed_is_not_measured(gpu_check: ModuleType) -> None:
    options = Namespace(dry_run=False, peers=None)
    every = {stage.name: stage.command for stage in gpu_check.measurements(options, Path("work"), [])}
    fewer = {stage.name: stage.command for stage in gpu_check.measurements(options, Path("work"), ["slim", "early"])}
    assert every.keys() - fewer.keys() == {"early decode"}
    assert every["tuned decode"][-2:] == ["--early", "between"]
    assert "--early" not in fewer["tuned decode"]
    assert {name for name, command in fewer.items() if command != every[name]} == {
        "tuned decode", "tune", "limits", "variants",
    }  # fmt: skip
    for name in ("tune", "limits", "variants"):
        at = fewer[name].index("--without")
        assert fewer[name][at + 1 : at + 3] == ["slim", "early"]
        assert "--without" not in every[name]


def test_the_repeats_begin_first_and_have_time(gpu_check: ModuleType) -> None:
    stages = gpu_check.checks(Namespace(dry_run=True), Path("work"))
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    assert [(stage.name, stage.limit) for stage in stages if "repeat" in stage.name] == [
        (name, 250) for name in names[:3]
    ]  # fmt: skip


@pytest.fixture
def runner(gpu_check: ModuleType, tmp_path: Path):
    (tmp_path / "work").mkdir()
    found = gpu_check.Runner(Namespace(folder=tmp_path, dry_run=True), tmp_path / "work")
    yield found
    found.log.close()


FAILING = """
import gpu_plans
from ptq_kernels.triton import configs
plan = configs.Plan(next(tile for tile in configs.tiles(90) if tile.kind == "slim"), 1, 32768)
with gpu_plans.naming(plan):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


def test_a_check_that_fails_names_its_plan(gpu_check: ModuleType, runner, tmp_path: Path) -> None:
    """An error that says nothing of it itself, in a process, and what the report has of that."""
    runner.run("checks", gpu_check.Stage("every 0", [sys.executable, "-c", FAILING], 100))
    found = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))["checks"]["every 0"]
    assert found["status"] == "failed (1)"
    assert "kind='slim'), splits=1, early=32768" in found["output"]
    assert found["vetoes"] == ["slim", "early"]


def ended(process: int) -> bool:
    """Or about to be: nobody may have asked for its exit status."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_stage_that_takes_too_long_ends_with_all_it_began(gpu_check: ModuleType, runner, tmp_path: Path) -> None:
    """Also with a process of a group of its own, as a profiler has (kernels/bench/gpu_limits.py)."""
    command = ["bash", "-c", f"set -m; sleep 60 & echo $! > {tmp_path / 'child'}; wait"]  # -m: a group for each job
    runner.run("checks", gpu_check.Stage("raised", command, 3))
    assert runner.report["checks"]["raised"]["status"] == "out of time"
    assert ended(int((tmp_path / "child").read_text()))


def test_nobody_waits_for_what_cannot_be_killed(gpu_check: ModuleType, runner, monkeypatch) -> None:
    """A stand-in for a kernel that never ends: nothing kills it."""
    monkeypatch.setattr(gpu_check, "kill", lambda session: None)
    monkeypatch.setattr(gpu_check, "KILL_SECONDS", 0.2)
    runner.run("checks", gpu_check.Stage("early chain", ["sleep", "5"], 0.2))
    found = runner.report["checks"]["early chain"]
    assert found["status"] == "out of time, and it could not be killed"
    assert found["seconds"] < 4
    assert found["vetoes"] == ["early"]


def test_a_profiler_that_takes_too_long_ends_with_what_it_profiles(tmp_path: Path, monkeypatch) -> None:
    """Of a stand-in with a child, which would go on using the GPU while other things are timed."""
    monkeypatch.syspath_prepend(str(ROOT / "kernels" / "bench"))
    import gpu_limits

    tool, child = tmp_path / "ncu", tmp_path / "child"
    monkeypatch.setattr(gpu_limits, "profiler", lambda: str(tool))
    tool.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {child}\nwait\n")
    tool.chmod(0o755)
    assert gpu_limits.counters(H200, 2)[0]["counters"].endswith("0 kernels of 24: not done after 2 s")
    assert ended(int(child.read_text()))
