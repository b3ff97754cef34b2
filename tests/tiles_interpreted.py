"""Runs products with fragment-order weights in Triton's interpreter and prints the worst error; a program, because the
interpreter must be chosen before Triton is imported. Arguments: which part of how many, and "every" for all cases.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
os.environ["PTQ_KERNELS_CONFIGS"] = os.devnull + ".json"  # no table of this machine's user

import ptq_kernels
import tile_cases
import torch
from packed_weights import UNIT, dense_float64, random_case, random_rows, worst_error
from ptq_kernels import tiles
from ptq_kernels.triton import configs, launch, workspace


def split(layout: str) -> None:
    """Several splits, two launches in a row: the counters are 0 again, the bits are the same, whatever is in memory."""
    case, x = random_case(136, 2048, 128, symmetric=False, dtype=torch.bfloat16), random_rows(5, 2048, torch.bfloat16)
    weight = tile_cases.tiled(case, layout)
    order = launch.ORDERS[layout]
    usual = configs.plan(configs.Gpu(order, 132), configs.Problem(4, 128, 5, 136, 2048))
    results = []
    for splits in (1, 3, 8, 8):
        workspace.get(x.device, 0).parts.fill_(float("nan"))
        with launch.forced(usual._replace(splits=splits)):
            results.append(tile_cases.multiply(x, weight, torch.ones(136)))
        assert not workspace.get(x.device, 0).counters.any()
        assert worst_error(results[-1], x, case, torch.ones(136), 0.0) <= 1, splits
    assert torch.equal(results[2], results[3])


def dense(layout: str) -> None:
    """Many rows, and float32 rows, through the dequantized weight in several chunks; and the gradient."""
    from ptq_kernels.triton import dequant

    dequant.CHUNK_BYTES = 2 * 128 * 200  # two chunks of 128 rows
    for bits, symmetric in ((4, True), (4, False), (8, True), (8, False)):
        case = random_case(150, 200, 200, bits, symmetric, torch.float16)
        weight = tile_cases.tiled(case, layout)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            rows = 5 if dtype == torch.float32 else 515
            x, bias = random_rows(rows, 200, dtype), torch.linspace(-1, 1, 150)
            y = tile_cases.multiply(x, weight, bias)
            assert worst_error(y, x, case, bias, 2 * UNIT[dtype]) <= 1, (bits, dtype)  # bias in bfloat16 as well
            x = x[:7].clone().requires_grad_()
            y = ptq_kernels.matmul(x, *weight[:3], bits=bits, group_size=200, layout=layout, impl="triton")
            upstream = random_rows(x.shape[0], 150, dtype)
            (grad,) = torch.autograd.grad(y, x, upstream)
            want = upstream.double() @ dense_float64(case)
            # weights and each chunk's sum are rounded to the dtype, relative to the sum of magnitudes
            allowed = 4 * UNIT[dtype] * (upstream.double().abs() @ dense_float64(case).abs()) + 1e-6
            assert ((grad.double() - want).abs() <= allowed).all(), (bits, dtype)


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
        split(tiles.NAMES[part])
        dense(tiles.NAMES[part])
    print("cases:", len(specs[part::parts]), "worst error, of what rounding allows:", worst)
    print(ptq_kernels.chosen())


if __name__ == "__main__":
    main()
