"""Times every tile and number of splits on this GPU, beside what the shipped table chooses, and writes JSON.

Run:    python kernels/bench/gpu_tune.py out.json [--seconds 100] [--without KIND ...] [--tiny]
The best ones go into the user's table (`ptq_kernels.triton.configs.user_file`), whose text is in the result too.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_linear import GROUP, SHAPES
from ptq_kernels.triton import configs, launch, recipes, tune
from ptq_kernels.triton.configs import Gpu, Plan, Problem

ROWS = ((16, 8), (128, 256), (64,), (512, 1024, 2048))  # the most telling first
LARGEST_SMALL = 64  # rows for which a weight is never dequantized
H200 = Gpu(90, 132)
KINDS = ("raised", "folded", "pipelined", "slim", "early")  # of tiles that are not exact; and to begin early


def timer(tiny: bool) -> tuple[Gpu, tune.Timer]:
    """This GPU and its clock; to try the bench itself, an H200 on which fewer splits are faster."""
    if tiny:
        return H200, lambda plan, problem: 1.0 if plan is None else float(plan.splits)
    return launch.gpu(0), tune.GraphTimer(torch.device("cuda:0"), torch.bfloat16, GROUP)


def option_without(parser: argparse.ArgumentParser) -> None:
    """``--without KIND ...``, for `leave_out`."""
    parser.add_argument("--without", nargs="+", choices=KINDS, default=[], help="whose checks failed, to be left out")


def leave_out(kinds: list[str]) -> None:
    """From now on no such tiles are there to be chosen, and without "early" no kernel begins early."""
    usual = configs.tiles
    configs.tiles = lambda order: [tile for tile in usual(order) if tile.kind not in kinds]
    if "early" in kinds:
        recipes.begins_early = lambda gpu: False


def described(plan: Plan) -> dict[str, Any]:
    """What tells a plan from another."""
    return {"tile": plan.tile.name, "splits": plan.splits, "early": plan.early}


def main() -> None:
    """Parse the command line, tune, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=100.0, help="nothing further is begun after that")
    option_without(parser)
    parser.add_argument("--tiny", action="store_true", help="a made-up clock, on any machine, to try the bench itself")
    options = parser.parse_args()
    leave_out(options.without)
    end = time.monotonic() + options.seconds
    gpu, clock = timer(options.tiny)
    name = "a made-up clock" if options.tiny else f"timed on {torch.cuda.get_device_name(0)}, torch {torch.__version__}"
    records: list[dict[str, Any]] = []
    shapes = SHAPES[:2] if options.tiny else SHAPES[:-1]  # without the head, which takes longest and has few plans
    best: dict[Problem, tuple[Plan, float]] = {}
    dense: dict[Problem, float] = {}
    for rows in ROWS:
        for shape in shapes:  # one by one, so that what there is survives a time limit
            if time.monotonic() > end:
                break
            problems = [Problem(4, GROUP, m, *shape, recipes.explicit(gpu, shape[1])) for m in rows]
            shipped = {problem: configs.plan(gpu, problem) for problem in problems}
            found = tune.tune(gpu, problems, clock, name, threshold=False)
            for problem, (plan, microseconds) in found.items():
                dense[problem] = clock(None, problem)
                records.append(
                    {
                        "n": problem.n,
                        "k": problem.k,
                        "m": problem.rows,
                        "shipped": described(shipped[problem]),
                        "shipped_microseconds": clock(shipped[problem], problem),
                        "best": described(plan),
                        "best_microseconds": microseconds,
                        "dequantized_microseconds": dense[problem],
                    }
                )
            best |= found
            tune.settle(gpu, best, {problem: us for problem, us in dense.items() if problem.rows > LARGEST_SMALL})
            table = json.loads(configs.user_file().read_text(encoding="utf-8"))
            options.output.write_text(json.dumps({"records": records, "table": table}, indent=1))


if __name__ == "__main__":
    main()
