"""Runs products with fragment-order weights in Triton's interpreter and prints the worst error; a program, because the
interpreter must be chosen before Triton is imported. Arguments: which part of how many, and "every" for all cases.
"""

import contextlib
import os
import sys
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"
os.environ["PTQ_KERNELS_CONFIGS"] = os.devnull + ".json"  # no table of this machine's user

import order_cases
import ptq_kernels
import tile_cases
import tile_paths
import torch
from packed_weights import random_case, random_rows, worst_error
from ptq_kernels import layouts, tiles
from ptq_kernels.triton import configs, launch, workspace
from quick_interpreter import quick
from watched_memory import watched


def split(layout: str, rows: int) -> None:
    """Several splits, two launches in a row: the counters are 0 again, the bits are the same, whatever is in memory."""
    case = random_case(136, 2048, 128, symmetric=False, dtype=torch.bfloat16)
    x = random_rows(rows, 2048, torch.bfloat16)
    weight = tile_cases.tiled(case, layout)
    order = launch.ORDERS[layout]
    usual = configs.plan(configs.Gpu(order, 132), configs.Problem(4, 128, rows, 136, 2048))
    results = []
    for splits in (1, 3, 8, 8):
        workspace.get(x.device, 0).parts.fill_(float("nan"))
        with launch.forced(usual._replace(splits=splits)):
            results.append(tile_cases.multiply(x, weight, torch.ones(136)))
        assert not workspace.get(x.device, 0).counters.any()
        assert worst_error(results[-1], x, case, torch.ones(136), 0.0) <= 1, splits
    assert torch.equal(results[2], results[3])


def warm(layout: str) -> None:
    """After a warm-up no product plans, reads a table or makes a workspace: a CUDA graph must contain none of it."""
    launch.forget()
    workspace._of_stream.clear()
    workspace._spare.clear()
    g_idx = order_cases.scattered(256, 128)
    case = random_case(64, 256, 128, symmetric=False, dtype=torch.bfloat16)
    prepared = ptq_kernels.prepare(*case.tensors, g_idx=g_idx, impl="reference", **case.sized)
    weight = layouts.convert(layouts.PackedWeight(*prepared[:3], 4, 128, 256, perm=prepared.perm), layout)
    named = {"layout": layout, "impl": "triton", "perm": weight.perm, **case.scheme}
    ptq_kernels.warmup(*weight[:3], in_features=256, dtype=torch.bfloat16, **named)

    def refused(*_arguments: object) -> None:
        raise AssertionError("this must have happened in the warm-up")

    with contextlib.ExitStack() as stack:
        for owner, name in ((configs, "_read"), (configs, "plan"), (launch, "_Layer"), (launch, "_Launch"),
                            (workspace, "_allocate")):  # fmt: skip
            stack.enter_context(patch.object(owner, name, refused))
        for rows in (1, 16, 17, 65, 130, 300, 520):
            x = random_rows(rows, 256, torch.bfloat16)
            y = ptq_kernels.matmul(x, *weight[:3], **named)
            error = (y.double() - x.double() @ order_cases.dense(case, g_idx).T).abs().max()
            assert error < 0.5, (rows, error)  # sums of 256 near 10, in bfloat16; the other tests bound it
        stack.enter_context(patch.object(workspace, "capturing", lambda device: True))
        once = launch._matmul(x[:3], weight, None, 7)  # the stream of a capture takes the spare workspace
        assert torch.equal(once, ptq_kernels.matmul(x[:3], *weight[:3], **named))
    launch.forget()


@quick()
@watched()
def main() -> None:
    part, parts = int(sys.argv[1]), int(sys.argv[2])
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    specs = tile_cases.every_spec() if "every" in sys.argv[3:] else tile_cases.few_specs()
    worst = 0.0
    for spec in specs[part::parts]:
        error = tile_cases.check(spec)
        assert error <= 1, (spec.name, error)  # NaN fails too
        worst = max(worst, error)
        if spec.rows < 17:
            assert tile_cases.exact(spec), spec.name
    if part < len(tiles.NAMES):
        split(tiles.NAMES[part], 5)
        split(tiles.NAMES[part], 70)
        warm(tiles.NAMES[part])
        tile_paths.everything(tiles.NAMES[part], "cpu", "every" in sys.argv[3:])
    print("cases:", len(specs[part::parts]), "worst error, of what rounding allows:", worst)
    print(ptq_kernels.chosen())


if __name__ == "__main__":
    main()
