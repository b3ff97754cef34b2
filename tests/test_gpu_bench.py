"""The GPU bench, tried without one: a peer that fails is text in the result, and nothing stops."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHES = ROOT / "kernels" / "bench"
QUICK = ROOT / "tests" / "quick_interpreter.py"
BENCH = BENCHES / "gpu_linear.py"


def run(*command: object, code: int = 0) -> str:
    """A command that must end with `code`; what it printed."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("peer", "source", "text"),
    [
        ("humming", "raise RuntimeError('no such GPU')", "RuntimeError: no such GPU"),
        ("marlin", "", "ImportError: the folder marlin must hold libmarlin.so"),
    ],
)
def test_a_peer_that_fails_is_recorded_for_each_shape(peer: str, source: str, text: str, tmp_path: Path) -> None:
    (tmp_path / peer).mkdir()
    (tmp_path / peer / "__init__.py").write_text(source, encoding="utf-8")
    output = tmp_path / "out.json"
    run(sys.executable, BENCH, output, "--tiny", "--peer", peer, "--peers", tmp_path)
    records = json.loads(output.read_text(encoding="utf-8"))["records"]
    assert [(r["failed"], r["n"], r["k"]) for r in records] == [(peer, 256, 256), (peer, 128, 512)]
    assert all(r["error"].startswith(text) for r in records)


FAILING = """
import sys
sys.path.insert(0, {benches!r})
import gpu_linear, torch
real = gpu_linear.ours

def ours(weight):
    product, size = real(weight)
    return lambda x: product(x) if len(x) != 4 else torch.full((4, weight.codes.shape[0]), float("nan")), size

gpu_linear.ours = ours
sys.argv = ["gpu_linear", {output!r}, "--tiny"]
sys.exit(gpu_linear.main())
"""


def test_a_product_that_is_wrong_costs_its_own_cell_only(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    output = tmp_path / "out.json"
    run(
        "env",
        "TRITON_INTERPRET=1",
        sys.executable,
        "-c",
        FAILING.format(benches=str(BENCHES), output=str(output)),
        code=1,
    )
    records = json.loads(output.read_text(encoding="utf-8"))["records"]
    failed = [(r["failed"], r["m"]) for r in records if "failed" in r]
    assert failed == [("ptq", 4), ("ptq", 4)]
    assert all("off by [nan, nan]" in r["error"] for r in records if "failed" in r)
    measured = {(r["kernel"], r["n"], r["m"]) for r in records if "kernel" in r}
    assert measured == {(kernel, n, m) for kernel in ("bf16", "ptq") for n in (256, 128) for m in (1, 4, 16)} - {
        ("ptq", 256, 4),
        ("ptq", 128, 4),
    } | {("bf16 again", 256, 1), ("bf16 again", 128, 1)}


@pytest.mark.parametrize(
    ("bench", "records"), [("gpu_decode.py", 6), ("gpu_tune.py", 14), ("gpu_variants.py", 200), ("gpu_limits.py", 9)]
)
def test_the_other_benches_run_in_little(bench: str, records: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    output = tmp_path / "out.json"
    own = f"PTQ_KERNELS_CONFIGS={tmp_path / 'configs.json'}"
    run("env", "TRITON_INTERPRET=1", own, sys.executable, QUICK, BENCHES / bench, output, "--tiny")
    found = json.loads(output.read_text(encoding="utf-8"))["records"]
    assert len(found) >= records  # as many as the tables had tiles for, when this was written
    assert not [record for record in found if "refused" in record]


def test_counters_of_a_profiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stand-in that writes what Nsight Compute writes: what precedes the table, names, units, a row a kernel."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(BENCHES))
    import gpu_limits
    from ptq_kernels.triton.configs import Gpu

    tool = tmp_path / "ncu"
    monkeypatch.setattr(gpu_limits, "profiler", lambda: str(tool))
    header = '"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread","dram__bytes_read.sum","other"'
    kernels = "".join(f'"{i}","tiled_kernel","{7 + i}.5","128","8,912,896","1"\n' for i in range(3))
    text = f'==PROF== Connected\n{header}\n"","","ns","register/thread","byte",""\n{kernels}==PROF== Disconnected\n'
    (tmp_path / "text").write_text(text)
    script = '#!/bin/sh\nwhile [ "$1" != --log-file ]; do shift; done\n'
    tool.write_text(f'{script}cp {tmp_path / "text"} "$2"\n')
    tool.chmod(0o755)
    found = gpu_limits.counters(Gpu(90, 132), 20)
    names = ("gpu__time_duration.sum", "launch__registers_per_thread", "dram__bytes_read.sum")
    assert [tuple(record["counters"].items()) for record in found] == [
        tuple(zip(names, (7.5 + i, 128.0, 8912896.0), strict=True)) for i in range(3)
    ]
    assert [(r["n"], r["m"], r["tile"]) for r in found[:2]] == [(4096, 8, "16x128x128"), (4096, 8, "8x16x1024 slim")]
    tool.write_text("#!/bin/sh\necho no permission\n")
    assert "0 kernels of 24: no permission" in gpu_limits.counters(Gpu(90, 132), 20)[0]["counters"]


def test_a_preference_for_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what a stand-in for the driver is told, for the one kernel that is compiled; and its refusal."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("compilation needs Triton without its interpreter")
    monkeypatch.syspath_prepend(str(BENCHES))
    import gpu_variants
    import tile_cases
    from packed_weights import random_case, random_rows
    from ptq_kernels.triton import launch
    from recorded_launches import recorded

    told: list[tuple[int, int, int]] = []

    class Library:
        answer = 0

        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:  # noqa: N802  (its name)
            told.append((function.value, attribute, value))
            return self.answer

    monkeypatch.setattr(gpu_variants.ctypes, "CDLL", Library)
    weight = tile_cases.tiled(random_case(64, 256, 128, dtype=torch.bfloat16), "tile_sm90")
    for launches in recorded(monkeypatch, tmp_path):
        with gpu_variants.most_shared():
            for rows in (1, 2):
                launch._matmul(random_rows(rows, 256, torch.bfloat16), weight, None, 0)
            assert told == [(launches[0].handed[0], 9, 100)]
            Library.answer = 1
            with pytest.raises(RuntimeError, match="must take a preferred part of shared memory, it returned 1"):
                launch._matmul(random_rows(40, 256, torch.bfloat16), weight, None, 0)
            Library.answer = 0
        assert told[2:] == [(launches[0].handed[0], 9, -1)]  # Triton keeps what it compiled: as it was


def test_what_the_attention_of_the_decoding_bench_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(BENCHES))
    from gpu_decode_kernels import Between, Cache

    def cache(positions: int) -> Cache:
        return Cache(torch.zeros(1, 1, positions, 64), torch.zeros(1, 1, positions, 64))

    with pytest.raises(ValueError, match="the cache must have a multiple of 64 positions, it has 100"):
        Between(cache(100), early=False)
    rows = torch.zeros(1, (17 + 2) * 64)
    with pytest.raises(ValueError, match="a head of k must serve at most 16 heads of q, it serves 17"):
        Between(cache(128), early=False).attend(rows, cache(128), torch.zeros(1), torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize(
    ("without", "rows", "others"),
    [
        ([], ["16", "128"], {"raised", "slim", "folded", "pipelined", "early"}),
        (["folded", "early"], ["16", "128"], {"raised", "slim", "pipelined"}),
        (["raised", "folded", "pipelined", "slim", "early"], ["8", "128"], set()),
    ],
)
def test_kinds_whose_checks_failed_are_no_variants(without, rows, others, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    own = f"PTQ_KERNELS_CONFIGS={tmp_path / 'configs.json'}"
    command = ["env", "TRITON_INTERPRET=1", own, sys.executable, QUICK, BENCHES / "gpu_variants.py"]
    run(*command, tmp_path / "out.json", "--tiny", "--rows", *rows, *(["--without", *without] if without else []))
    names = {record["variant"] for record in json.loads((tmp_path / "out.json").read_text())["records"]}
    found = {kind for kind in ("raised", "folded", "pipelined", "slim") if any(f" {kind} " in name for name in names)}
    found |= {"early"} if any(re.search("early [1-9]", name) for name in names) else set()
    assert found == others


def test_kinds_whose_checks_failed_are_not_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a clock that likes best what is left out. Nor does a plan begin early that some table has."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(BENCHES))
    monkeypatch.setenv("PTQ_KERNELS_CONFIGS", str(tmp_path / "configs.json"))
    import gpu_tune
    from ptq_kernels.triton import configs, launch, recipes, tune

    monkeypatch.setattr(configs, "tiles", configs.tiles)
    monkeypatch.setattr(recipes, "begins_early", recipes.begins_early)
    launch.forget()
    gpu_tune.leave_out(["slim", "early"])
    timed = []

    def clock(plan: Any, problem: Any) -> float:
        timed.append(plan)
        return 1.0 if plan is None else 3.0 - (plan.tile.kind == "slim") - (plan.early > 0)

    problems = [configs.Problem(4, 128, rows, 4096, 4096, True) for rows in (8, 16, 128)]
    best = tune.tune(gpu_tune.H200, problems, clock, "a test")
    assert len(best) == 3
    assert {plan.tile.kind for plan in timed if plan} == {"exact", "raised", "folded", "pipelined"}
    assert not any(plan.early for plan in timed if plan)
    assert not recipes.begins_early(gpu_tune.H200)  # which a launch asks, whatever its plan says
    launch.forget()


def test_gpu_check_runs_the_stages_it_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    check = (sys.executable, ROOT / "scripts" / "gpu_check", tmp_path, "--dry-run", "--commit", "abc")
    said = run(*check, "--only", "between", "layouts", "large", "memcheck", "tinygemm")
    report = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
    assert {name: stage["status"] for name, stage in report["checks"].items()} == dict.fromkeys(
        ("between", "layouts", "large", "memcheck"), "passed"
    )
    assert list(report["measurements"]) == ["tinygemm"]
    assert report["commit"] == "abc"
    assert "layouts          passed" in said
    assert "has no stage that begins with nothing" in run(*check, "--only", "nothing", code=2)


@pytest.mark.slow
def test_every_stage_of_gpu_check_in_little(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run(sys.executable, ROOT / "scripts" / "gpu_check", tmp_path, "--dry-run")
