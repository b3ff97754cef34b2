"""Runs products with fragment-order weights in Triton's interpreter and prints the worst error; a program, because the
interpreter must be chosen before Triton is imported. Arguments: which part of how many, and "every" for all cases.
"""

import contextlib
import itertools
import math
import os
import sys
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"
os.environ["PTQ_KERNELS_CONFIGS"] = os.devnull + ".json"  # no table of this machine's user

import order_cases
import ptq_kernels
import tile_cases
import torch
from packed_weights import UNIT, Case, dense_float64, random_case, random_rows, worst_error
from pairwise import pairwise
from ptq_kernels import layouts, tiles
from ptq_kernels.triton import configs, launch, workspace
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


def boundaries(layout: str) -> None:
    """The last number of rows of each way to multiply, and the first of the next: every row is there, and right."""
    case = random_case(40, 64, 64, dtype=torch.bfloat16)
    weight = tile_cases.tiled(case, layout)
    for most in (*configs.BUCKETS, configs.dequantize_from(configs.Gpu(launch.ORDERS[layout], 132)) - 1):
        for rows in (most, most + 1):
            x = random_rows(rows, 64, torch.bfloat16)
            assert worst_error(tile_cases.multiply(x, weight), x, case, None, UNIT[torch.bfloat16]) <= 1, rows


def rows_of_any_kind(layout: str) -> None:
    """No rows; rows that lie apart, or where no multiple of 16 bytes is: as contiguous rows, bit for bit."""
    case = random_case(40, 72, 72, symmetric=False, dtype=torch.bfloat16)
    for name in (layout, "canonical"):
        weight = tile_cases.tiled(case, name)
        assert tile_cases.multiply(torch.empty(2, 0, 72, dtype=torch.bfloat16), weight).shape == (2, 0, 40)
        x = random_rows(6, 72, torch.bfloat16)
        want = tile_cases.multiply(x, weight)
        memory = torch.full((6 * 72 + 1,), torch.nan, dtype=torch.bfloat16)
        memory[1:] = x.view(-1)
        for rows in (x.T.contiguous().T, memory[1:].view(6, 72), torch.stack([x, x], 1)[:, 0]):
            assert torch.equal(tile_cases.multiply(rows, weight), want)


def dense(layout: str) -> None:
    """Many rows, and float32 rows, through the dequantized weight in several chunks; and the gradient."""
    from ptq_kernels.triton import dequant

    dequant.CHUNK_BYTES = 2 * 128 * 200  # two chunks of 128 rows
    for bits, symmetric in ((4, True), (8, False)):
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


def dequantizer(layout: str, every: bool) -> None:
    """The dense weight, bit for bit; bfloat16 within one unit, because the interpreter truncates to it."""
    options = ((4, 8), tile_cases.SHAPES, (True, False))
    kinds = [*itertools.product(*options)] if every else pairwise(options)
    for i, (bits, (n, k, group), symmetric) in enumerate(kinds):
        case = random_case(n, k, group, bits, symmetric, tile_cases.SCALES[i % 3])
        weight = tile_cases.tiled(case, layout)
        want = dense_float64(case).float()  # the product of an integer of 8 bits and a float32 scale, rounded once
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            made = launch._layer(torch.empty(1, k, dtype=dtype), weight, None)
            found = torch.cat([rows.clone() for _, rows in made.chunks(weight.qweight, dtype)])
            if dtype == torch.bfloat16:
                assert ((found.float() - want).abs() <= 2 * UNIT[dtype] * want.abs()).all(), (bits, n, k, group)
            else:
                assert torch.equal(found, want.to(dtype)), (bits, n, k, group, dtype)


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


def overflow(layout: str) -> None:
    """A float16 sum beyond 65504 is infinite with its sign, split or not, by the kernel or by dequantizing.

    Exact: sums of multiples of 32, of which float16 holds every one up to 65504, and 65536 rounds to infinity.
    """
    codes = torch.full((64, 1024), 12, dtype=torch.uint8)
    codes[1], codes[2, :512], codes[3, :4] = 4, 8, 8
    case = Case(codes, ptq_kernels.pack(codes, 4), torch.full((64, 8), 16.0), None, 4, 128)
    for name, rows in ((layout, 2), (layout, 514), ("canonical", 2)):
        weight, x = tile_cases.tiled(case, name), torch.ones(rows, 1024, dtype=torch.float16)
        x[1, 4:] = 0
        y = tile_cases.multiply(x, weight)
        want = (x.double() @ dense_float64(case).T).half()
        assert want[0, :4].tolist() == [math.inf, -math.inf, 32768, 65280]
        assert torch.equal(y, want), (name, rows)


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
        boundaries(tiles.NAMES[part])
        rows_of_any_kind(tiles.NAMES[part])
        dense(tiles.NAMES[part])
        dequantizer(tiles.NAMES[part], "every" in sys.argv[3:])
        warm(tiles.NAMES[part])
        overflow(tiles.NAMES[part])
    print("cases:", len(specs[part::parts]), "worst error, of what rounding allows:", worst)
    print(ptq_kernels.chosen())


if __name__ == "__main__":
    main()
