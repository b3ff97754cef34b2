"""Which tile, how many splits: a table (configs.json, and a file that `tune` fills), and a rule where it is silent."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ptq_kernels.triton.workspace import COUNTERS, PART_BYTES

SHIPPED = Path(__file__).with_name("configs.json")
BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # numbers of rows are rounded up to one of these
FEW = 8  # rows that slim tiles are for; where none was timed to be faster they take the plan of the next bucket
CLUSTERS = (2, 4, 8)  # sizes of one that shares a tile (clusters.py); more than 8 programs not every GPU takes
USUAL_ROWS = 512  # up to so many every weight may have a kernel; for more only one that was timed with it
_SMALL = 64  # rows of the largest bucket that one tile covers
_WELL_FILLED = 0.7  # of the GPU: the first tile of the table that does is taken
FORMAT = 2


class Tile(NamedTuple):
    """One compiled form of the kernel."""

    rows: int  # the largest bucket it serves
    bits: int
    span: int  # columns that share a scale: 128, 64 or 32
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    max_registers: int | None  # a limit for the compiler; None: its own choice
    resident: int  # programs that fit a multiprocessor, by registers and shared memory
    kind: str = "exact"  # the kernel: "exact", "raised" (tiled.py), "folded" (wide.py), "pipelined", "slim" (theirs)

    @property
    def name(self) -> str:
        """What tells it from the other tiles for the same rows, bits and span."""
        sizes = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return sizes if self.kind == "exact" else f"{sizes} {self.kind}"

    @property
    def explicit(self) -> bool:
        """Whether its kernel is written in Gluon, for Hopper, which Triton's interpreter does not know."""
        return self.kind in ("pipelined", "slim")


class Gpu(NamedTuple):
    """What decides which configuration is fast."""

    capability: int  # 90 for 9.0
    processors: int

    @property
    def order(self) -> int:
        """Which tiles of the table: 90 for Hopper's wgmma, 80 for mma.sync."""
        return 90 if self.capability // 10 == 9 else 80


class Problem(NamedTuple):
    """One product, as far as the choice depends on it."""

    bits: int
    span: int
    rows: int  # M, or a bucket
    n: int
    k: int
    explicit: bool = False  # whether kernels written in Gluon may serve it, see recipes.explicit


class Plan(NamedTuple):
    """A tile, over how many programs the columns are split, and whether the kernel begins early (ahead.py)."""

    tile: Tile
    splits: int
    early: int = 0  # bytes of each row of weight tiles to ask for before the kernel before ends; 0: it begins after


def bucket(rows: int) -> int:
    """The bucket of a number of rows; more than the largest bucket gives the largest."""
    return next((size for size in BUCKETS if rows <= size), BUCKETS[-1])


@cache
def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"tiles": {}, "shapes": [], "dequantize_from": {}}
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if table.get("format") != FORMAT:
        raise ValueError(
            f"a table of kernel configurations must have format {FORMAT}, {path} has {table.get('format')!r}; delete "
            "it and tune again"
        )
    return table


def readable(path: Path) -> None:
    """ValueError, as `plan` would raise it, if there is a file in a format that is not this one's."""
    _read.cache_clear()
    _read(path)


def user_file() -> Path:
    """Where `tune` writes: $PTQ_KERNELS_CONFIGS, or ptq_kernels/configs.json in the user's cache folder."""
    if chosen := os.environ.get("PTQ_KERNELS_CONFIGS"):
        return Path(chosen)
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "ptq_kernels" / "configs.json"


def forget() -> None:
    """Read the files again at the next use; launchers that exist keep their plans."""
    _read.cache_clear()


def tiles(order: int) -> list[Tile]:
    """Every tile of the shipped table for an order."""
    return [Tile(**entry) for entry in _read(SHIPPED)["tiles"][str(order)]]


def candidates(gpu: Gpu, problem: Problem) -> list[Tile]:
    """The tiles that can serve a problem, those made for its number of rows."""
    same = [t for t in tiles(gpu.order) if (t.bits, t.span) == (problem.bits, problem.span)]
    same = [t for t in same if problem.explicit or not t.explicit]
    same = [t for t in same if t.kind != "slim" or problem.k % t.block_k == 0]
    rows = min((t.rows for t in same if t.rows >= problem.rows), default=max(t.rows for t in same))
    return [t for t in same if t.rows == rows]


def dequantize_from(gpu: Gpu) -> int:
    """The number of rows from which dequantising and cuBLAS is faster than the kernel."""
    for path in (user_file(), SHIPPED):
        table = _read(path)["dequantize_from"]
        if found := table.get(f"{gpu.capability}/{gpu.processors}", table.get(str(gpu.order))):
            return int(found)
    raise ValueError(f"{SHIPPED} must name the rows to dequantize from for order {gpu.order}, it does not; restore it")


def fits(tile: Tile, problem: Problem, splits: int) -> bool:
    """Whether so many splits have work for each, and room in the workspace; of a pipelined tile, are a cluster.

    A slim tile is never split, and its steps are whole.
    """
    steps = -(-problem.k // tile.block_k)
    if tile.kind == "slim":
        return splits == 1 and problem.k % tile.block_k == 0
    if splits == 1:
        return True
    if tile.kind == "pipelined":
        return splits in CLUSTERS and splits <= steps
    if -(-steps // splits) * (splits - 1) >= steps:
        return False
    outputs = -(-problem.n // tile.block_n) * -(-problem.rows // tile.block_m)
    return 4 * splits * problem.rows * problem.n <= PART_BYTES and outputs <= COUNTERS


def splits_by_rule(gpu: Gpu, tile: Tile, problem: Problem) -> int:
    """As many splits as fill the GPU once, while parts stay long and their traffic small beside the weight's."""
    outputs = -(-problem.n // tile.block_n) * -(-problem.rows // tile.block_m)
    shortest = 256 if outputs * 8 < gpu.processors else 512  # columns of a part
    # bytes of parts written and read: 8 * splits * M * N, beside about N * K * bits / 8 of the weight
    traffic = 1.0 if problem.rows <= _SMALL else 2.0
    best = 1
    for splits in range(2, max(problem.k // shortest, 1) + 1):
        if not fits(tile, problem, splits) or outputs * splits > gpu.processors * tile.resident:
            continue
        if 64 * splits * problem.rows <= traffic * problem.k * problem.bits:
            best = splits
    return best


def _filled(gpu: Gpu, problem: Problem, plan: Plan) -> float:
    """The part of the places for programs that one wave of a plan takes."""
    outputs = -(-problem.n // plan.tile.block_n) * -(-problem.rows // plan.tile.block_m)
    return min(outputs * plan.splits / (gpu.processors * plan.tile.resident), 1.0)


def _listed(path: Path, gpu: Gpu, problem: Problem) -> Plan | None:
    for entry in _read(path)["shapes"]:
        (least_n, most_n), (least_k, most_k) = entry["n"], entry["k"]
        same_gpu = (entry["capability"], entry["processors"]) == gpu
        same_kind = (entry["bits"], entry["span"], entry["rows"]) == (problem.bits, problem.span, problem.rows)
        if not (same_gpu and same_kind and least_n <= problem.n <= most_n and least_k <= problem.k <= most_k):
            continue
        for tile in candidates(gpu, problem):
            if tile.name == entry["tile"] and fits(tile, problem, entry["splits"]):
                return Plan(tile, entry["splits"], entry.get("early", 0))
    return None


def listed(gpu: Gpu, problem: Problem) -> Plan | None:
    """What the user's table says of a problem, or the shipped one; `problem.rows` is a bucket."""
    return _listed(user_file(), gpu, problem) or _listed(SHIPPED, gpu, problem)


def plan(gpu: Gpu, problem: Problem) -> Plan:
    """The user's table, then the shipped one, then the rule; `problem.rows` is rounded up to its bucket."""
    problem = problem._replace(rows=bucket(problem.rows))
    if found_in_table := listed(gpu, problem):
        return found_in_table
    if problem.rows == FEW:
        return plan(gpu, problem._replace(rows=BUCKETS[1]))
    # none of the other kinds was ever timed: only `tune` chooses them
    exact = [tile for tile in candidates(gpu, problem) if tile.kind == "exact"]
    found = [Plan(tile, splits_by_rule(gpu, tile, problem)) for tile in exact]
    filled = [_filled(gpu, problem, each) for each in found]
    most = min(max(filled), _WELL_FILLED)
    return next(each for each, fill in zip(found, filled, strict=True) if fill >= most)


def recorded_instructions(order: int, tile: Tile, dtype: str, asymmetric: bool) -> float:
    """The most instructions a weight of the tile's main loop that were counted when the table was made."""
    key = f"{order} {tile.bits} {tile.span} {tile.name} {dtype} {'asym' if asymmetric else 'sym'}"
    return float(_read(SHIPPED)["instructions"].get(key, 0.0))
