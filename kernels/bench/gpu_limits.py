"""What a GPU allows, and what keeps the kernels from it; writes JSON.

Run:    python kernels/bench/gpu_limits.py out.json [--seconds 100] [--without KIND ...] [--tiny]
First floors: the time of a launch that does nothing, and of one that only reads a packed weight, by some numbers of
programs, timed as gpu_linear.py times products; and the time to dequantize a weight, as for 2048 rows. Then, where
Nsight Compute (ncu) is there and may read the hardware's counters, what it says of products by the plan that is in
force and by the first tile of every other kind.
"""

import argparse
import contextlib
import csv
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_timing
from gpu_linear import GROUP, SHAPES
from gpu_tune import leave_out, option_without, timer
from ptq_kernels.triton import configs, launch, recipes, tune
from ptq_kernels.triton.configs import Gpu, Plan, Problem

PROGRAMS = (1, 2, 4, 8)  # on a multiprocessor
KILL_SECONDS = 10  # for a process that was killed to end
BLOCK = 2048  # words that a program reads at a time
PROFILED = [(4096, 4096, 8), (28672, 4096, 8), (4096, 4096, 16), (28672, 4096, 16), (4096, 4096, 64),
            (28672, 4096, 64), (28672, 4096, 128), (28672, 4096, 256)]  # fmt: skip
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats", "InstructionStats",
            "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis")  # fmt: skip
TELLING = re.compile(
    r"gpu__time_duration\.|dram__(bytes_read|throughput)|lts__(throughput|t_sectors_op_read)|l1tex__(throughput|data_b)"
    r"|sm__(throughput|warps_active|inst_executed_pipe|cycles_elapsed)|launch__(registers|shared_mem|waves|occupancy)"
    r"|smsp__(inst_executed|issue_active|average_warps_issue_stalled\w+_per_issue_active|average_warp_latency)"
)


@triton.jit
def nothing_kernel(out_ptr):
    """Begin and end."""


@triton.jit
def read_kernel(words_ptr, out_ptr, steps, BLOCK: tl.constexpr):
    """Read so many blocks of words, the next one always under way, and store what all of them come to."""
    words_ptrs = words_ptr + tl.program_id(0).to(tl.int64) * steps * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), tl.int32)
    block = tl.load(words_ptrs)
    for i in range(1, steps):
        ahead = tl.load(words_ptrs + i * BLOCK)
        found ^= block
        block = ahead
    tl.store(out_ptr + tl.program_id(0), tl.xor_sum(found ^ block, 0))


def _launch(kernel: Any, grid: int, tensors: tuple[Tensor, ...], *rest: int) -> Tensor:
    kernel[(grid,)](*tensors, *rest, num_warps=8)
    return tensors[-1]


def floors(gpu: Gpu, device: torch.device, shapes: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """A record for a launch that does nothing, and for each shape and number of programs that read its weight."""
    for count in PROGRAMS:
        out = torch.empty(gpu.processors * count, dtype=torch.int32, device=device)
        times = gpu_timing.timed([partial(_launch, nothing_kernel, len(out), (out,))], 0.1)
        yield {"floor": "nothing", "programs": len(out), "microseconds": times.median}
    for n, k in shapes:
        words = n * k // 8 + n * k // GROUP // 2  # 4 bits a weight, 16 a group
        for count in PROGRAMS:
            out = torch.empty(gpu.processors * count, dtype=torch.int32, device=device)
            steps = -(-words // (len(out) * BLOCK))  # of each program: a few words more than there are
            size = steps * BLOCK * len(out)
            weights = [
                torch.randint(-(2**31), 2**31, (size,), dtype=torch.int32, device=device)
                for _ in range(gpu_timing.copies(4 * words))
            ]
            calls = [partial(_launch, read_kernel, len(out), (weight, out), steps, BLOCK) for weight in weights]
            times = gpu_timing.timed(calls, 0.1)
            found = {"floor": "read", "n": n, "k": k, "programs": len(out), "microseconds": times.median}
            yield found | {"bytes": 4 * size, "bytes_per_second": 4e6 * size / times.median}


def dequantizing(device: torch.device, shapes: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """A record for each shape: what products of many rows wait for."""
    clock = tune.GraphTimer(device, torch.bfloat16, GROUP)
    for n, k in shapes:
        weights = clock.weights(4, n, k)
        layer = launch.layer_of(torch.empty(0, k, dtype=clock.dtype, device=device), weights[0], None)

        def dense(qweight: Tensor, layer: Any = layer) -> Tensor:
            stream = launch.current_stream(qweight.get_device())
            return [rows for _, rows in layer.dense.chunks(qweight, 2048, stream)][-1]

        times = gpu_timing.timed([partial(dense, weight.qweight) for weight in weights], 0.1)
        found = {"floor": "dequantize", "n": n, "k": k, "microseconds": times.median}
        yield found | {"written_bytes_per_second": 2e6 * n * k / times.median}


def plans(gpu: Gpu) -> list[tuple[Problem, Plan]]:
    """The plan in force of each profiled product, and one with the first tile of each other kind that fills the GPU."""
    found = []
    for n, k, rows in PROFILED:
        problem = Problem(4, GROUP, rows, n, k, recipes.explicit(gpu, k))
        usual = configs.plan(gpu, problem)
        chosen = {usual.tile.kind: usual}
        for tile in configs.candidates(gpu, problem):
            programs = -(-n // tile.block_n) * -(-rows // tile.block_m)
            most = gpu.processors * tile.resident
            splits = [s for s in tune.SPLITS if configs.fits(tile, problem, s) and (s == 1 or programs * s <= most)]
            chosen.setdefault(tile.kind, Plan(tile, splits[-1]))
        found += [(problem, plan) for plan in chosen.values()]
    return found


def launch_all(clock: tune.GraphTimer, chosen: list[tuple[Problem, Plan]]) -> None:
    """For a profiler that only watches from cudaProfilerStart to cudaProfilerStop: each product is one kernel."""
    for problem, plan in chosen:
        weight = clock.weights(problem.bits, problem.n, problem.k)[0]
        x = torch.randn(problem.rows, problem.k, dtype=clock.dtype, device=clock.device)
        with launch.forced(plan):
            for watched in (False, True):
                torch.cuda.synchronize()
                if watched:
                    torch.cuda.profiler.start()
                launch.matmul(x, weight, None)
                torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def parsed(text: str) -> list[dict[str, float]]:
    """The telling metrics of each kernel, from the raw page of ncu as CSV: names, units, then a row a kernel."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    found = []
    for row in rows[1:]:  # the first has the units
        values = {name: value.replace(",", "") for name, value in row.items() if name and TELLING.match(name)}
        found.append({name: float(value) for name, value in values.items() if re.fullmatch(r"-?[\d.]+", value)})
    return found


def profiler() -> str | None:
    """Nsight Compute's command, where its installers put it."""
    usual = sorted(glob.glob("/opt/nvidia/nsight-compute/*/ncu"), reverse=True)
    return shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin") or next(iter(usual), None)


def counters(gpu: Gpu, seconds: float, *same: str) -> list[dict[str, Any]]:
    """A record for each of `plans`, or one that says why there are none; options that the launches have, too."""
    tool = profiler()
    if tool is None:
        return [{"counters": "none: Nsight Compute (ncu) is not on this machine"}]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        sections = [word for section in SECTIONS for word in ("--section", section)]
        # clocks stay as they are; by default caches are emptied before each of a kernel's runs
        command = [tool, "--profile-from-start", "off", "--clock-control", "none", *sections, "--page", "raw", "--csv"]
        command += ["--print-units", "base", "--log-file", str(log), sys.executable, __file__, "-", "--launch", *same]
        # A group of its own, as what it profiles would go on using the GPU; in this session, all of which ends with us.
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, process_group=0, **pipes)
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=KILL_SECONDS)
            said = f"not done after {seconds:.0f} s"
        found = parsed(log.read_text(encoding="utf-8")) if log.exists() else []
        said += log.read_text(encoding="utf-8")[-500:] if log.exists() and not found else ""
    chosen = plans(gpu)
    if len(found) > len(chosen) or not found:
        return [{"counters": f"none: {len(found)} kernels of {len(chosen)}: {said[-1500:]}"}]
    return [
        {"n": p.n, "k": p.k, "m": p.rows, "tile": plan.tile.name, "splits": plan.splits, "counters": values}
        for (p, plan), values in zip(chosen, found, strict=False)
    ]


def main() -> None:
    """Parse the command line, time, profile, write after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=100.0, help="for the profiler")
    option_without(parser)
    parser.add_argument("--launch", action="store_true", help="only launch what is to be profiled")
    parser.add_argument("--tiny", action="store_true", help="a small shape, on any machine, to try the bench itself")
    options = parser.parse_args()
    leave_out(options.without)
    gpu, clock = timer(options.tiny)
    if options.launch:
        launch_all(clock, plans(gpu))
        return
    device = torch.device("cpu" if options.tiny else "cuda")
    records: list[dict[str, Any]] = []
    shapes = [(64, 256)] if options.tiny else SHAPES
    small = gpu._replace(processors=2) if options.tiny else gpu
    parts: list[Callable[[], Any]] = [
        lambda: floors(small, device, shapes),
        lambda: dequantizing(device, shapes),
        lambda: counters(gpu, options.seconds, *(["--without", *options.without] if options.without else [])),
    ]
    for part in parts:
        start = time.monotonic()
        records += part()
        options.output.write_text(json.dumps({"records": records}, indent=1))
        print(f"{len(records)} records after {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
