"""Fills the user's table of configurations for this GPU by timing. Nothing here runs inside a forward pass."""

import contextlib
import json
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from ptq_kernels import bitstream, layouts, tiles
from ptq_kernels.layouts import PackedWeight
from ptq_kernels.triton import ahead, configs, launch, recipes
from ptq_kernels.triton.configs import Gpu, Plan, Problem

_L2_BYTES = 128 * 2**20  # copies of a weight are rotated through at least so much, so that no cache holds them
LEAST_CALLS = 20  # in a graph: what a replay costs besides them counts little
_SMALL = 64  # rows up to which the weight is never dequantized
SPLITS = (1, 2, 3, 4, 6, 8, 12, 14, 16, 24, 32)

# Microseconds of a product by a plan, or, without one, with the dequantized weight.
Timer = Callable[[Plan | None, Problem], float]


class NothingToTuneError(ValueError):
    """Weights that fragment-order tiles do not know."""


class GraphTimer:
    """Microseconds of a launch: a CUDA graph of launches over rotated copies of a random weight, the median replay.

    For `configs.FEW` rows it is the mean of that and of one row: the bucket serves one row most of all, in decoding,
    and a plan must be good at both.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, group_size: int, symmetric: bool = True) -> None:
        self.device, self.dtype, self.group_size, self.symmetric = device, dtype, group_size, symmetric
        self._made: dict[tuple[int, int, int], list[PackedWeight]] = {}

    def weights(self, bits: int, n: int, k: int) -> list[PackedWeight]:
        """Copies in the layout of the GPU; those of the last shape are kept."""
        if (bits, n, k) not in self._made:
            self._made.clear()
            words = torch.randint(-(2**31), 2**31, (n, bitstream.words(k, bits)), dtype=torch.int32, device=self.device)
            scales = torch.rand(n, k // self.group_size, device=self.device).to(self.dtype) * 0.01
            zeros = None if self.symmetric else torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)
            weight = PackedWeight(words, scales, zeros, bits, self.group_size, k)
            order = launch.gpu_of(self.device).order
            tiled = layouts.convert(weight, next(name for name, o in launch.ORDERS.items() if o == order))
            count = max(_L2_BYTES // tiled.qweight.numel() + 1, 2)
            copies = [tiled._replace(qweight=tiled.qweight.clone()) for _ in range(count)]
            self._made[bits, n, k] = copies
        return self._made[bits, n, k]

    def __call__(self, plan: Plan | None, problem: Problem) -> float:
        """Raise what Triton raises for a plan that does not fit the GPU."""
        weights = self.weights(problem.bits, problem.n, problem.k)
        found = []
        with launch.forced(plan):
            for rows in (1, configs.FEW) if configs.bucket(problem.rows) == configs.FEW else (problem.rows,):
                x = torch.randn(rows, problem.k, dtype=self.dtype, device=self.device)
                times = graph_times([partial(launch.matmul, x, weight, None) for weight in weights])
                found.append(statistics.median(times))
        return statistics.fmean(found)


def graph_times(calls: Sequence[Callable[[], Tensor]], replays: int = 20) -> list[float]:
    """Microseconds of one call, for each replay of one CUDA graph of the calls in turn, each at least once.

    All replays are queued behind each other, the first one not timed, so that the GPU does not wait for the CPU to
    launch them: the launch of a graph takes as long as a few small products.
    """
    calls = list(islice(cycle(calls), max(LEAST_CALLS, len(calls))))
    for call in calls[:2]:
        call()  # compiles, and makes the workspaces
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    for mark in marks:
        graph.replay()
        mark.record()
    marks[-1].synchronize()
    return [1e3 * start.elapsed_time(end) / len(calls) for start, end in pairwise(marks)]


def plans(gpu: Gpu, problem: Problem) -> list[Plan]:
    """Every tile with every number of splits that has work for each, room in the workspace, and at most two waves.

    For `configs.FEW` rows slim tiles only: the plan for more is what they are compared with.
    """
    problem = problem._replace(rows=configs.bucket(problem.rows))
    found = []
    for tile in configs.candidates(gpu, problem):
        if problem.rows == configs.FEW != tile.rows:
            continue
        outputs = -(-problem.n // tile.block_n) * -(-problem.rows // tile.block_m)
        waves = 2 * gpu.processors * tile.resident
        found += [
            Plan(tile, splits)
            for splits in SPLITS
            if configs.fits(tile, problem, splits) and (splits == 1 or outputs * splits <= waves)
        ]
    return found


def tune(
    gpu: Gpu, problems: Iterable[Problem], timer: Timer, provenance: str, *, threshold: bool = True
) -> dict[Problem, tuple[Plan, float]]:
    """Time every plan of every problem, write the best ones to `configs.user_file`, and return them with their times.

    Where kernels can begin early (ahead.py), the three best plans of a problem are timed so as well. Plans that the GPU
    or the compiler refuses are passed over. Of more than `configs.USUAL_ROWS` rows only plans are written that are
    faster than the dequantized weight, of `configs.FEW` rows only those that are faster than the plan for more. Where
    there are problems of 65 up to so many rows, the number of rows from which a weight is dequantized is written at the
    end, unless `threshold` is False. The file keeps its other entries. It is written after each problem, under a lock,
    and replaced at once, so that several processes may tune at the same time and readers never see half of it.

    Raises RuntimeError for a problem of which no plan can run.
    """
    configs.readable(configs.user_file())
    best: dict[Problem, tuple[Plan, float]] = {}
    dense: dict[Problem, float] = {}
    problems = [problem._replace(rows=configs.bucket(problem.rows)) for problem in problems]
    for problem in sorted(problems, key=lambda each: each.rows == configs.FEW):  # whose rival is tuned before
        timed = [pair for plan in plans(gpu, problem) if (pair := _timed(timer, plan, problem))]
        timed.sort(key=lambda pair: pair[0])
        early = [plan._replace(early=ahead.BYTES) for _, plan in timed[:3] if recipes.begins_early(gpu)]
        timed += [pair for plan in early if (pair := _timed(timer, plan, problem))]
        rival = _rival(gpu, problem, timer)
        timed += [rival] if rival else []
        if not timed:
            raise RuntimeError(f"a plan for {problem} must run on {gpu} to be timed, none does; see the warnings")
        microseconds, plan = min(timed, key=lambda pair: pair[0])
        best[problem] = (plan, microseconds)
        if problem.rows > _SMALL:
            dense[problem] = timer(None, problem)
        worse = (problem.rows > configs.USUAL_ROWS and dense[problem] <= microseconds) or rival == (microseconds, plan)
        _merge(configs.user_file(), _entry(gpu, problem, plan, microseconds, provenance), keep=not worse)
    if threshold:
        settle(gpu, best, dense)
    launch.forget()
    return best


def _rival(gpu: Gpu, problem: Problem, timer: Timer) -> tuple[float, Plan] | None:
    """Of few rows the plan for more, which needs no entry of its own to be taken."""
    if problem.rows != configs.FEW:
        return None
    configs.forget()  # what has just been tuned counts
    return _timed(timer, configs.plan(gpu, problem._replace(rows=configs.FEW + 1)), problem)


def _timed(timer: Timer, plan: Plan, problem: Problem) -> tuple[float, Plan] | None:
    """None, and a warning, for a plan that does not run; an error that leaves the GPU unusable is raised."""
    try:
        return timer(plan, problem), plan
    except OutOfResources:  # expected of large tiles on small GPUs
        return None
    except (TritonError, RuntimeError) as error:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        warnings.warn(f"{plan.tile.name}, {plan.splits} splits, is passed over: {error}", stacklevel=2)
        return None


def settle(gpu: Gpu, best: dict[Problem, tuple[Plan, float]], dense: dict[Problem, float]) -> None:
    """Write from how many rows on weights are dequantized, by the times of plans and of the dequantized weight."""
    usual = {problem: time for problem, time in dense.items() if problem.rows <= configs.USUAL_ROWS}
    if usual:
        _rewrite(configs.user_file(), {}, {f"{gpu.capability}/{gpu.processors}": _threshold(best, usual)})
        launch.forget()


def _threshold(best: dict[Problem, tuple[Plan, float]], dense: dict[Problem, float]) -> int:
    """From how many rows on all problems together are faster with the dequantized weight."""
    timed = [size for size in configs.BUCKETS if any(problem.rows == size for problem in dense)]
    rows = timed[-1] + 1
    for bucket in reversed(timed):
        same = [problem for problem in dense if problem.rows == bucket]
        if sum(dense[problem] for problem in same) >= sum(best[problem][1] for problem in same):
            break
        smaller = [size for size in timed if size < bucket] or configs.BUCKETS[: configs.BUCKETS.index(bucket)]
        rows = smaller[-1] + 1
    return rows


def _entry(gpu: Gpu, problem: Problem, plan: Plan, microseconds: float, provenance: str) -> dict[str, Any]:
    return {
        "capability": gpu.capability,
        "processors": gpu.processors,
        "bits": problem.bits,
        "span": problem.span,
        "rows": problem.rows,
        "n": [problem.n, problem.n],
        "k": [problem.k, problem.k],
        "tile": plan.tile.name,
        "splits": plan.splits,
        "early": plan.early,
        "microseconds": round(microseconds, 2),
        "provenance": provenance,
    }


def _merge(path: Path, entry: dict[str, Any], *, keep: bool) -> None:
    """Put an entry in the place of one for the same problem, or, not to be kept, only drop that one."""
    _rewrite(path, {_identity(entry): entry if keep else None}, {})


def _rewrite(
    path: Path, changed: dict[tuple[Any, ...], dict[str, Any] | None], dequantize_from: dict[str, int]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        empty: dict[str, Any] = {"format": configs.FORMAT, "tiles": {}, "dequantize_from": {}, "shapes": []}
        table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty
        kept = {_identity(entry): entry for entry in table["shapes"]} | changed
        table["shapes"] = [entry for entry in kept.values() if entry]
        table["dequantize_from"] |= dequantize_from
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(table, indent=1), encoding="utf-8")
        os.replace(unfinished, path)


def _identity(entry: dict[str, Any]) -> tuple[Any, ...]:
    return (*(entry[name] for name in ("capability", "processors", "bits", "span", "rows")), *entry["n"], *entry["k"])


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system gives it up with the process. Triton GPUs mean Linux."""
    import fcntl

    with path.open("w", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def tune_device(
    shapes: Iterable[tuple[int, int]],
    *,
    device: torch.device | str = "cuda",
    bits: int = 4,
    group_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    rows: Iterable[int] = configs.BUCKETS,
) -> dict[Problem, tuple[Plan, float]]:
    """Tune products with weights of shapes ``(N, K)`` on a GPU; about a second for each shape, bucket and plan.

    Raises NothingToTuneError for bits or a group size that fragment-order tiles do not know.
    """
    device = torch.device(device)
    device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
    shapes = list(shapes)
    if bits not in tiles.BITS:
        raise NothingToTuneError(f"bits must be {' or '.join(map(str, tiles.BITS))}, got {bits}; nothing to tune there")
    per_channel = all(k == group_size for _, k in shapes)
    span = tiles.SPANS[0] if per_channel else next((size for size in tiles.SPANS if group_size % size == 0), None)
    if span is None:
        raise NothingToTuneError(
            f"group_size must be a multiple of {tiles.SPANS[-1]}, got {group_size}; nothing to tune there"
        )
    name = torch.cuda.get_device_name(device)
    provenance = f"timed on {name}, torch {torch.__version__}"
    gpu = launch.gpu(device.index)
    problems = [Problem(bits, span, m, n, k, recipes.explicit(gpu, k)) for n, k in shapes for m in rows]
    return tune(gpu, problems, GraphTimer(device, dtype, group_size), provenance)
