"""Times forms of the kernels that no table has, one thing changed at a time, to learn what a GPU likes; writes JSON.

Run:    python kernels/bench/gpu_variants.py out.json [--seconds 200] [--rows 16 64 128] [--without KIND ...] [--tiny]
Each variant is timed with every number of splits that fits. "early 0" begins after the kernel before has ended, as all
kernels did before programmatic dependent launch. First come numbers of chunks in which a weight is dequantized, and
preferences for shared memory. What wins here belongs into the table of tiles (ptq_kernels/triton/configs.json), where
`ptq tune` chooses.
"""

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from triton.errors import TritonError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_linear import GROUP, SHAPES
from gpu_tune import leave_out, option_without, timer
from ptq_kernels import tiles
from ptq_kernels.triton import ahead, configs, dense, enqueue, recipes, tune
from ptq_kernels.triton.configs import Gpu, Plan, Problem, Tile

MOST_CHUNK_BYTES = 256 * 2**20
CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT


class Variant(NamedTuple):
    """A tile, and how early its kernel begins."""

    tile: Tile
    early: int  # bytes of each row of tiles asked for before the kernel before has ended; 0: late

    @property
    def name(self) -> str:
        """All of it."""
        t = self.tile
        return f"{t.name} warps {t.warps} stages {t.stages} registers {t.max_registers} early {self.early}"


def variants(gpu: Gpu, problem: Problem) -> list[Variant]:
    """The tiles of the table; of the first, other stages and beginnings; tiles that the table lacks."""
    rows = problem.rows
    usual = ahead.BYTES if recipes.begins_early(gpu) else 0
    tiles = configs.candidates(gpu, problem)
    found = [Variant(tile, usual) for tile in tiles]
    found += [Variant(tile, 0) for tile in tiles]
    first = tiles[0]
    if first.kind == "slim":
        others = [tile._replace(stages=count) for tile in tiles for count in (2, 3, 4) if count != tile.stages]
        others += [tile._replace(max_registers=most) for tile in tiles for most in (80, 96, 128) if tile.block_n == 32]
        return list(dict.fromkeys([*found, *(Variant(tile, usual) for tile in others)]))
    found += [Variant(first, early) for early in (4096, 131072) if usual]
    others = [first._replace(stages=stages) for stages in (2, 3, 5, 6)]
    others += [tile._replace(stages=count) for tile in tiles if tile.kind == "raised" for count in (2, 4, 5)]
    if rows <= 16:
        narrow = first._replace(block_n=64)
        others += [narrow._replace(stages=stages, max_registers=None) for stages in (4, 6, 8)]
        others += [first._replace(max_registers=None), first._replace(block_n=256, warps=8, stages=3)]
    else:
        folded = first._replace(block_m=64, block_n=256, warps=8, stages=3, max_registers=128, kind="folded")
        others += [folded._replace(stages=stages) for stages in (2, 4)]
        others += [folded._replace(max_registers=None, stages=stages) for stages in (3, 4, 5)]
        others += [folded._replace(block_k=64, stages=stages) for stages in (4, 6)]
        others += [folded._replace(block_n=128, warps=4, max_registers=168)]
        others += [folded._replace(block_m=128, max_registers=None, stages=stages) for stages in (2, 4)]
        others += [folded._replace(block_m=256, block_n=128, max_registers=None, stages=stages) for stages in (2, 3)]
    for tile in [tile for tile in tiles if tile.kind == "pipelined"]:
        stages = (tile.stages - 2, tile.stages - 1, tile.stages + 1)
        others += [tile._replace(stages=count) for count in stages if count >= 2]
        others += [tile._replace(block_k=64, stages=tile.stages + 2)] if tile.block_k == 128 else []
        others += [tile._replace(block_n=64)] if tile.block_n == 128 and tile.warps == 4 else []
    return list(dict.fromkeys([*found, *(Variant(tile, usual) for tile in others)]))


def timings(gpu: Gpu, clock: tune.Timer, problem: Problem, without: list[str]) -> Iterator[dict[str, Any]]:
    """A record for each variant, but of some kinds of tiles, and number of splits."""
    for variant in [each for each in variants(gpu, problem) if each.tile.kind not in without]:
        record = {"n": problem.n, "k": problem.k, "m": problem.rows, "variant": variant.name}
        for splits in tune.SPLITS:
            if not configs.fits(variant.tile, problem, splits):
                continue
            found = record | timed(clock, Plan(variant.tile, splits, variant.early), problem)
            yield found
            if "refused" in found:
                break


def timed(clock: tune.Timer, plan: Plan, problem: Problem) -> dict[str, Any]:
    """Part of a record: how long a plan takes, or why this Triton cannot compile it."""
    try:
        return {"splits": plan.splits, "microseconds": clock(plan, problem)}
    except (TritonError, RuntimeError) as error:
        return {"splits": plan.splits, "refused": f"{type(error).__name__}: {error}"[:200]}


def chunks(clock: tune.Timer, n: int, k: int) -> Iterator[dict[str, Any]]:
    """A record for each number of chunks in which a weight is dequantized for many rows, and for that of the rule."""
    for rows in (512, 2048):
        for count in (0, 1, 2, 4, 7, 8):
            size = tiles.padded(-(-n // max(count, 1)))
            if size * k * 2 > MOST_CHUNK_BYTES:
                continue
            with patch.object(dense, "chunk_rows", lambda *_, size=size: size) if count else nullcontext():
                microseconds = clock(None, Problem(4, GROUP, rows, n, k))
            name = f"dequantized in {count} chunks" if count else "dequantized"
            yield {"n": n, "k": k, "m": rows, "variant": name, "microseconds": microseconds}


@contextmanager
def most_shared() -> Iterator[None]:
    """Every kernel that is compiled inside asks for as much shared memory as a multiprocessor has, whatever it needs.

    Those that ask for different amounts may have to wait for each other, and one that begins early should not. After it
    they ask for what they need again: Triton keeps what it compiled.
    """
    usual, asked = enqueue.Compiled.__init__, []

    def asking(made: enqueue.Compiled, kernel: Any, constants: tuple[Any, ...]) -> None:
        usual(made, kernel, constants)
        kernel._init_handles()
        prefer(kernel.function, 100)
        asked.append(kernel.function)

    try:
        with patch.object(enqueue.Compiled, "__init__", asking):
            yield
    finally:
        for function in asked:
            prefer(function, -1)


def prefer(function: int, percent: int) -> None:
    """Tell the driver which part of a multiprocessor's memory should be shared memory; -1: what the kernel needs."""
    code = ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(ctypes.c_void_p(function), CARVEOUT, percent)
    if code:
        raise RuntimeError(f"the driver must take a preferred part of shared memory, it returned {code}")


def preferences(gpu: Gpu, clock: tune.Timer, n: int, k: int) -> Iterator[dict[str, Any]]:
    """Two records for each first tile of a kind for few rows, early where it can be: as it is, with `most_shared`."""
    problem = Problem(4, GROUP, configs.FEW, n, k, recipes.explicit(gpu, k))
    more = configs.candidates(gpu, problem._replace(rows=configs.FEW + 1))
    first = {tile.kind: tile for tile in reversed([*configs.candidates(gpu, problem), *more])}
    early = ahead.BYTES if recipes.begins_early(gpu) else 0
    for tile in first.values():
        plan = Plan(tile, configs.splits_by_rule(gpu, tile, problem), early)
        for name, asking in (("", nullcontext), (", most shared memory", most_shared)):
            with asking():
                found = timed(clock, plan, problem)
            yield {"n": n, "k": k, "m": configs.FEW, "variant": Variant(tile, early).name + name} | found


def main() -> None:
    """Parse the command line, time, write after every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=200.0, help="nothing further is begun after that")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 8, 128, 64, 256, 512])
    option_without(parser)
    parser.add_argument("--tiny", action="store_true", help="a made-up clock, on any machine, to try the bench itself")
    options = parser.parse_args()
    leave_out(options.without)
    end = time.monotonic() + options.seconds
    gpu, clock = timer(options.tiny)
    records: list[dict[str, Any]] = []
    shapes = SHAPES[:1] if options.tiny else [(4096, 4096), (28672, 4096), (4096, 14336), (6144, 4096)]
    for n, k in shapes:
        if time.monotonic() > end:
            break
        records += chunks(clock, n, k)
        records += preferences(gpu, clock, n, k)
        options.output.write_text(json.dumps({"records": records}, indent=1))
    for rows in options.rows[:2] if options.tiny else options.rows:
        for n, k in shapes:
            if time.monotonic() > end:
                break
            records += timings(gpu, clock, Problem(4, GROUP, rows, n, k, recipes.explicit(gpu, k)), options.without)
            options.output.write_text(json.dumps({"records": records}, indent=1))
            timed = [r for r in records if (r["n"], r["k"], r["m"]) == (n, k, rows) and "microseconds" in r]
            for record in sorted(timed, key=lambda r: r["microseconds"])[:6]:
                print(record, flush=True)


if __name__ == "__main__":
    main()
