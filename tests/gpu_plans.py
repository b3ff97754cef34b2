"""Which plans the stages of tiles_on_gpu.py force on products. They are chosen without a GPU, so tests read them."""

from collections.abc import Iterator
from contextlib import contextmanager

from ptq_kernels.triton import ahead, configs, w4a16
from ptq_kernels.triton.configs import Gpu, Plan, Problem, Tile

REPEATED = [(4096, 4096, 5, 1000), (1024, 4096, 16, 1000), (4096, 14336, 64, 1000), (4096, 4096, 200, 1000)]  # N K M
LARGE = (33 * 4096, 32768, 3)  # N, K, M: 2**31 bytes of codes, and more


def plan_otherwise(early: bool, pipelined: bool) -> None:
    """From now on every plan."""
    usual = configs.plan

    def other(gpu: Gpu, problem: Problem) -> Plan:
        found = usual(gpu, problem)
        problem = problem._replace(rows=configs.bucket(problem.rows))
        chosen = _rounding_tiles(gpu, problem) if pipelined else []
        if chosen:
            tile = chosen[problem.n // 64 % len(chosen)]  # one or another
            found = Plan(tile, configs.splits_by_rule(gpu, tile, problem))
        return found._replace(early=ahead.BYTES) if early else found

    configs.plan = other


def _rounding_tiles(gpu: Gpu, problem: Problem) -> list[Tile]:
    """The pipelined and slim tiles that can serve a problem.

    The interpreter knows neither: there the folded ones, which round weights as pipelined ones do.
    """
    if w4a16.interpreted():
        same = [t for t in configs.tiles(gpu.order) if (t.bits, t.span) == (problem.bits, problem.span)]
        return [tile for tile in same if tile.kind == "folded"]
    return [tile for tile in serving(gpu, problem) if tile.explicit]


def serving(gpu: Gpu, problem: Problem) -> list[Tile]:
    """The tiles that can serve a problem: of few rows those for a few more, too."""
    more = problem._replace(rows=max(problem.rows, configs.FEW + 1))
    return list(dict.fromkeys([*configs.candidates(gpu, problem), *configs.candidates(gpu, more)]))


def repeated(gpu: Gpu, problem: Problem) -> list[Plan]:
    """The plan in force, split if it can be, and every tile that is not exact, in turns so split and so early."""
    usual = configs.plan(gpu, problem)
    splits = max(usual.splits, 2)
    found = [usual._replace(splits=splits) if configs.fits(usual.tile, problem, splits) else usual]
    others = [tile for tile in serving(gpu, problem) if tile.kind != "exact"]
    for i, tile in enumerate(
        others, problem.rows
    ):  # so that a kind with a tile for 5 rows and one for 16 has both turns
        sizes = (configs.CLUSTERS[i % 3], 2, 1)
        splits = next(size for size in sizes if configs.fits(tile, problem, size))
        found.append(Plan(tile, splits, (0, ahead.BYTES)[i % 2]))
    return found


def one_of_each(gpu: Gpu, problem: Problem) -> list[Plan]:
    """A plan for each kind of tile that is not exact, split if it can be; those for more rows serve few as well."""
    same = [t for t in configs.tiles(gpu.order) if (t.bits, t.span) == (problem.bits, problem.span)]
    found: dict[str, Plan] = {}
    for tile in same:
        splits = next((size for size in (2, 1) if configs.fits(tile, problem, size)), None)
        if splits and tile.kind != "exact" and (problem.explicit or not tile.explicit):
            found.setdefault(tile.kind, Plan(tile, splits))
    return list(found.values())


@contextmanager
def naming(plan: Plan) -> Iterator[None]:
    """Whatever goes wrong inside, the plan is printed with it; scripts/gpu_check looks for that."""
    try:
        yield
    except Exception as error:
        error.add_note(str(plan))
        raise
