"""What is true of every way through the product with fragment-order weights, in Triton's interpreter and on a GPU.

Every function takes a layout and a device, and asserts.
"""

import itertools
import math
from unittest.mock import patch

import ptq_kernels
import tile_cases
import torch
from packed_weights import UNIT, Case, dense_float64, random_case, random_rows, worst_error
from pairwise import pairwise
from ptq_kernels.triton import configs, dense, launch

# N, K, group size of weights by the columns that share a scale
SHAPES_OF_SPAN = {
    128: [(300, 512, 128), (65, 60, 60), (200, 200, 200), (40, 512, 256)],
    64: [(130, 256, 64), (72, 384, 192)],
    32: [(70, 160, 32), (96, 192, 96)],
}


def boundaries(layout: str, device: str) -> None:
    """The last number of rows of each way to multiply, and the first of the next: every row is there, and right."""
    case = random_case(40, 64, 64, dtype=torch.bfloat16)
    weight = tile_cases.tiled(case, layout)
    for most in (*configs.BUCKETS, configs.dequantize_from(configs.Gpu(launch.ORDERS[layout], 132)) - 1):
        for rows in (most, most + 1):
            x = random_rows(rows, 64, torch.bfloat16)
            y = tile_cases.multiply(x, weight, None, device)
            assert worst_error(y, x, case, None, UNIT[torch.bfloat16]) <= 1, rows


def rows_of_any_kind(layout: str, device: str) -> None:
    """No rows; rows that lie apart, or where no multiple of 16 bytes is: as contiguous rows, bit for bit."""
    case = random_case(40, 72, 72, symmetric=False, dtype=torch.bfloat16)
    for name in (layout, "canonical"):
        weight = tile_cases.on_device(tile_cases.tiled(case, name), device)
        assert tile_cases.multiply(torch.empty(2, 0, 72, dtype=torch.bfloat16), weight, None, device).shape == (
            2,
            0,
            40,
        )
        x = random_rows(6, 72, torch.bfloat16).to(device)
        want = tile_cases.multiply(x, weight, None, device)
        memory = torch.full((6 * 72 + 1,), torch.nan, dtype=torch.bfloat16, device=device)
        memory[1:] = x.view(-1)
        for rows in (x.T.contiguous().T, memory[1:].view(6, 72), torch.stack([x, x], 1)[:, 0]):
            assert torch.equal(tile_cases.multiply(rows, weight, None, device), want)


@patch.object(dense, "chunk_rows", lambda *_: 128)  # two chunks
def dequantized(layout: str, device: str) -> None:
    """Many rows, and float32 rows, through the dequantized weight in several chunks; and the gradient."""
    for bits, symmetric in ((4, True), (8, False)):
        case = random_case(150, 200, 200, bits, symmetric, torch.float16)
        weight = tile_cases.on_device(tile_cases.tiled(case, layout), device)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            rows = 5 if dtype == torch.float32 else 515
            x, bias = random_rows(rows, 200, dtype), torch.linspace(-1, 1, 150)
            y = tile_cases.multiply(x, weight, bias, device)
            assert worst_error(y, x, case, bias, 2 * UNIT[dtype]) <= 1, (bits, dtype)  # bias in bfloat16 as well
            x = x[:7].to(device).requires_grad_()
            y = ptq_kernels.matmul(x, *weight[:3], bits=bits, group_size=200, layout=layout, impl="triton")
            upstream = random_rows(x.shape[0], 150, dtype)
            (grad,) = torch.autograd.grad(y, x, upstream.to(device))
            want = upstream.double() @ dense_float64(case)
            # weights and each chunk's sum are rounded to the dtype, relative to the sum of magnitudes
            allowed = 4 * UNIT[dtype] * (upstream.double().abs() @ dense_float64(case).abs()) + 1e-6
            assert ((grad.cpu().double() - want).abs() <= allowed).all(), (bits, dtype)


def dequantizer(layout: str, device: str, every: bool = False) -> None:
    """The dense weight, bit for bit; bfloat16 within one unit, because the interpreter truncates to it."""
    options = ((4, 8), tile_cases.SHAPES, (True, False))
    kinds = [*itertools.product(*options)] if every else pairwise(options)
    stream = launch.current_stream(torch.empty(0, device=device).get_device())
    assert stream is not None
    for i, (bits, (n, k, group), symmetric) in enumerate(kinds):
        case = random_case(n, k, group, bits, symmetric, tile_cases.SCALES[i % 3])
        weight = tile_cases.on_device(tile_cases.tiled(case, layout), device)
        want = dense_float64(case).float()  # the product of an integer of 8 bits and a float32 scale, rounded once
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            made = launch.layer_of(torch.empty(1, k, dtype=dtype, device=device), weight, None)
            found = torch.cat([rows.clone() for _, rows in made.dense.chunks(weight.qweight, 1, stream)]).cpu()
            if dtype == torch.bfloat16:
                assert ((found.float() - want).abs() <= 2 * UNIT[dtype] * want.abs()).all(), (bits, n, k, group)
            else:
                assert torch.equal(found, want.to(dtype)), (bits, n, k, group, dtype)


def other_tiles(layout: str, device: str, kind: str, every: bool = False) -> None:
    """Every tile of a kind that only `tune` chooses, whole and split: right, within the rounding of weights or none.

    More weight rows and rows of x than a tile has, ragged sizes, groups that a step straddles, scales of other dtypes.
    """
    bf16, fp16 = torch.bfloat16, torch.float16
    dtypes = ((bf16, bf16), (fp16, fp16), (bf16, fp16), (fp16, torch.float32))
    if kind == "pipelined":
        dtypes = ((bf16, bf16), (fp16, fp16)) * 2  # it takes no others
    chosen = [tile for tile in configs.tiles(launch.ORDERS[layout]) if tile.kind == kind]
    shapes = {
        span: [s for s in SHAPES_OF_SPAN[span] if kind != "pipelined" or s[1] % 8 == 0] for span in SHAPES_OF_SPAN
    }
    matched = [(tile, shape) for tile in chosen for shape in shapes[tile.span]]
    if kind == "slim":  # whole steps
        matched = [
            (tile, (n, steps * tile.block_k, groups * 128))
            for tile in chosen
            for n, steps, groups in ((130, 3, 1), (72, 1, 4), (1, 5, 2), (257, 2, 1))
        ]
    options = [*itertools.product((True, False), (1, 3), dtypes)]
    for i, (tile, (n, k, group)) in enumerate(matched):
        for symmetric, splits, (dtype, scales) in options if every else [options[5 * i % 16]]:
            case = random_case(n, k, group, tile.bits, symmetric, scales)
            x, bias = random_rows(tile.block_m + 6, k, dtype), torch.linspace(-1, 1, n).to(dtype)
            steps = -(-k // tile.block_k)
            most = {"pipelined": 2, "slim": 1}.get(kind, steps)
            plan = configs.Plan(tile, min(splits, steps, most))
            with launch.forced(plan):
                y = tile_cases.multiply(x, tile_cases.tiled(case, layout), bias, device)
            error = worst_error(y, x, case, bias, tile_cases.tile_rounding(tile.kind, dtype))
            assert error <= 1, (plan, n, k, group, symmetric, dtype, scales, error)
    for tile in chosen if kind in ("raised", "slim") else ():
        case, x = tile_cases.cancelling(72, 2 * tile.block_k, tile.span, tile.block_m, fp16)
        with launch.forced(configs.Plan(tile, 1)):
            y = tile_cases.multiply(x, tile_cases.tiled(case, layout), None, device)
        assert tile_cases.cut_off(y, x, case) <= 1, tile


def overflow(layout: str, device: str) -> None:
    """A float16 sum beyond 65504 is infinite with its sign, split or not, by the kernel or by dequantizing.

    Exact: sums of multiples of 32, of which float16 holds every one up to 65504, and 65536 rounds to infinity.
    """
    codes = torch.full((64, 1024), 12, dtype=torch.uint8)
    codes[1], codes[2, :512], codes[3, :4] = 4, 8, 8
    case = Case(codes, ptq_kernels.pack(codes, 4), torch.full((64, 8), 16.0), None, 4, 128)
    for name, rows in ((layout, 2), (layout, 514), ("canonical", 2)):
        weight, x = tile_cases.tiled(case, name), torch.ones(rows, 1024, dtype=torch.float16)
        x[1, 4:] = 0
        y = tile_cases.multiply(x, weight, None, device)
        want = (x.double() @ dense_float64(case).T).half()
        assert want[0, :4].tolist() == [math.inf, -math.inf, 32768, 65280]
        assert torch.equal(y, want), (name, rows)


def everything(layout: str, device: str, every: bool = False) -> None:
    """All of them; on a GPU the tiles that are not exact, which must be compiled, have processes of their own."""
    for path in (boundaries, rows_of_any_kind, dequantized, overflow):
        path(layout, device)
    if device == "cpu":
        for kind in ("folded", "raised"):
            other_tiles(layout, device, kind, every)
    dequantizer(layout, device, every)
