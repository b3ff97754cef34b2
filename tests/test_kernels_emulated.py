"""The plain Triton kernels as the GPU would run them: their compiled PTX in an emulator of Hopper (ptx_machine).

Triton's interpreter runs their Python; this runs what the compiler makes of it, copies of Ampere's kind into a ring of
shared memory and Hopper's products, as late as the hardware may or at once, warps in any order.
"""

import os
import re
from typing import NamedTuple

import emulated_launches
import ptx_machine
import pytest
import tile_cases
import torch
from emulated_launches import Emulator
from packed_weights import Case, random_case, random_rows, worst_error
from representative import representative

pytest.importorskip("triton", reason="the kernels are written in Triton")

from ptq_kernels.triton import ahead, configs, launch, workspace
from ptq_kernels.triton.configs import Plan, Tile

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compilation needs Triton without its interpreter"
)

BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = {  # of weights by the columns that share a scale: N, K, group size; two to six steps
    128: [(130, 384, 128), (120, 640, 128), (72, 512, 256), (1, 456, 456), (100, 384, 384)],
    64: [(136, 320, 64), (100, 576, 192), (40, 384, 64), (128, 320, 64)],
    32: [(129, 352, 32), (70, 480, 96), (72, 288, 32), (1, 288, 96)],
}


class Product(NamedTuple):
    """A product and how it is computed."""

    plan: Plan
    rows: int
    shape: tuple[int, int, int]  # N, K, group size
    dtype: torch.dtype = BF16
    scales: torch.dtype = BF16
    symmetric: bool = True
    bias: bool = False

    @property
    def name(self) -> str:
        """What tells it from the others."""
        tile = self.plan.tile
        return f"{tile.bits}-{tile.span}-{tile.name}-{self.plan.splits}-{self.rows}x{self.shape[0]}"


def splits_of(tile: Tile, k: int, wanted: int) -> int:
    """As many splits, or the next fewer that all have work."""
    steps = -(-k // tile.block_k)
    return next(s for s in range(wanted, 0, -1) if -(-steps // s) * (s - 1) < steps)


def products() -> list[Product]:
    """Every tile of 4 bits and two of 8, once; all the rest varies."""
    tiles = [t._replace(rows=0) for t in configs.tiles(90) if t.bits == 4 and not t.explicit]
    tiles = list(dict.fromkeys(tiles))  # one may serve several numbers of rows
    eight = [t for t in configs.tiles(90) if t.bits == 8]
    tiles += [next(t for t in eight if t.kind == "exact"), next(t for t in reversed(eight) if t.kind == "folded")]
    found = []
    for i, tile in enumerate(tiles):
        dtype = (BF16, FP16)[i % 2]
        shape = SHAPES[tile.span][i % len(SHAPES[tile.span])]
        plan = Plan(
            tile,
            splits_of(tile, shape[1], (i % 3 + 1, (2, 4, 1)[i % 3])[tile.kind != "exact"]),
            (0, ahead.BYTES)[i // 2 % 2],
        )
        more = 1 if tile.block_m * plan.splits <= 64 else -1  # of large tiles and many splits no second one, for time
        rows = (1, tile.block_m + more, tile.block_m // 2, 7)[(i + i // 4) % 4]
        scales = torch.float32 if i % 7 == 3 else dtype
        found.append(Product(plan, rows, shape, dtype, scales, (i + i // 3) % 2 == 0, i % 5 < 2))
    return found


PRODUCTS = products()


def inputs(product: Product) -> tuple[torch.Tensor, Case, torch.Tensor | None]:
    """Rows, weight, bias."""
    n, k, group = product.shape
    case = random_case(n, k, group, product.plan.tile.bits, product.symmetric, product.scales)
    bias = torch.linspace(-1, 1, n).to(product.dtype) if product.bias else None
    return random_rows(product.rows, k, product.dtype), case, bias


def multiply(product: Product) -> torch.Tensor:
    """The result, in memory that held NaN, by a launch with NaN in the workspace."""
    x, case, bias = inputs(product)
    space = workspace.get(x.device, 0)
    space.parts.fill_(float("nan"))
    with launch.forced(product.plan):
        y = launch._matmul(x, tile_cases.tiled(case, "tile_sm90"), bias, 0)
    assert not space.counters.any()
    return y


def traits(product: Product) -> set[object]:
    """What compiles to another loop."""
    bits, kind, span = (tile := product.plan.tile).bits, tile.kind, tile.span
    return {(bits, kind, span), (bits, kind, tile.block_m), (kind, tile.block_n), (tile.block_m, tile.block_n)}


@pytest.mark.parametrize("product", representative(PRODUCTS, traits), ids=lambda p: p.name)
def test_every_tile_is_right(emulator: Emulator, product: Product) -> None:
    """Oracle: float64, within the rounding of the sum and what the tile rounds a weight by."""
    emulator.seed = PRODUCTS.index(product)
    emulator.lazy = emulator.seed % 4 != 1
    x, case, bias = inputs(product)
    unit = tile_cases.tile_rounding(product.plan.tile.kind, product.dtype)
    assert worst_error(multiply(product), x, case, bias, unit) <= 1


def one_of(kind: str, early: int = 0) -> Product:
    """A split product whose ring of copies turns."""
    span = 128 if kind == "raised" else 64
    tile = next(t for t in configs.tiles(90) if (t.bits, t.span, t.rows, t.kind) == (4, span, 16, kind))
    return Product(
        Plan(tile, {"exact": 2, "folded": 4, "raised": 8}[kind], early), 9, (72, 13 * span, span), symmetric=False
    )


@pytest.mark.parametrize("kind", ["exact", "folded", "raised"])
def test_the_same_bits_whatever_the_order(emulator: Emulator, kind: str) -> None:
    """Warps and programs in other orders, products and copies at once and as late as may be."""
    results = []
    for emulator.seed, emulator.lazy in ((1, True), (2, True), (3, False)):
        results.append(multiply(one_of(kind)))
    assert all(torch.equal(results[0], y) for y in results[1:])


CHANGES = {  # of the text of a compiled kernel, each of which makes it wrong
    "a wait for fewer copies": (r"cp.async.wait_group\s+[1-8];", "cp.async.wait_group 9;"),
    "no barrier after the wait": (r"(cp.async.wait_group\s+[1-9];)\s+bar.sync\s+0;", r"\1"),
    "no fence between copies and products": (r"fence.proxy.async.shared::cta;", ""),
    "no wait for products": (r"wgmma.wait_group.sync.aligned 0;", ""),
}


def test_the_emulator_finds_what_would_be_wrong(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a kernel of which it finds nothing else."""
    product = one_of("exact")
    multiply(product)
    for old, new in CHANGES.values():

        def changed(text: str, old=old, new=new) -> ptx_machine.Program:
            assert re.search(old, text)
            return ptx_machine.parse(re.sub(old, new, text))

        monkeypatch.setattr(emulated_launches, "_parsed", changed)
        with pytest.raises(ptx_machine.HazardError):
            multiply(product)
