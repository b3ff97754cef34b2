"""Pipelined kernels, which no interpreter knows: their compiled PTX in an emulator of Hopper (ptx_machine).

It runs products and copies as late as the hardware may, or at once, warps in any order, and raises where a result
depends on that. Every launch goes through the launcher, to a driver that emulates.
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
from packed_weights import UNIT, dense_float64, random_case, random_rows, worst_error
from representative import representative

pytest.importorskip("triton", reason="the kernels are written in Triton")

from ptq_kernels.triton import ahead, configs, launch, workspace
from ptq_kernels.triton.configs import Plan, Tile

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compilation needs Triton without its interpreter"
)


def tile(span: int, name: str) -> Tile:
    """Of the shipped table."""
    return next(t for t in configs.tiles(90) if (t.span, t.name) == (span, f"{name} pipelined"))


class Product(NamedTuple):
    """A product and how it is computed."""

    span: int
    tile: str
    rows: int
    shape: tuple[int, int, int]  # N, K, group size
    dtype: torch.dtype = torch.bfloat16
    symmetric: bool = True
    splits: int = 1
    bias: bool = False
    early: int = 0


BF16, FP16 = torch.bfloat16, torch.float16
PRODUCTS = [
    Product(128, "16x128x128", 1, (128, 1024, 128)),
    Product(128, "16x128x128", 17, (136, 768, 256), FP16, False, 2, True),
    Product(128, "32x128x128", 20, (130, 1024, 128), BF16, False, 2),
    Product(128, "64x128x128", 65, (200, 200, 200), FP16, True, 1, True),
    Product(128, "64x256x128", 3, (300, 1024, 128), BF16, False, 1, False, ahead.BYTES),
    Product(128, "128x256x64", 130, (260, 640, 128), BF16, True, 2, True),
    Product(128, "256x128x128", 257, (72, 512, 512), FP16, False),
    Product(128, "128x128x64", 5, (1, 456, 456), BF16, True),
    Product(64, "16x128x128", 2, (128, 576, 192), BF16, False, 1, True),
    Product(64, "32x128x128", 33, (72, 384, 64), FP16, True, 2),
    Product(64, "64x128x128", 64, (130, 448, 64), BF16, False, 2),
    Product(64, "64x256x128", 10, (130, 256, 64), FP16, False),
    Product(64, "128x256x64", 100, (400, 704, 64), FP16, False, 2),
    Product(64, "256x128x128", 40, (128, 384, 64), BF16, False, 1, True, ahead.BYTES),
    Product(64, "128x128x64", 129, (64, 384, 192), BF16, True, 4),
    Product(32, "16x128x64", 16, (70, 672, 96), BF16, False, 1, False, ahead.BYTES),
    Product(32, "32x128x64", 31, (129, 608, 32), FP16, False, 8, True),
    Product(32, "64x128x64", 70, (96, 352, 32), BF16, True, 1, True),
    Product(32, "64x256x64", 1, (257, 640, 32), FP16, True, 2),
    Product(32, "128x256x64", 128, (130, 576, 96), BF16, False, 1),
    Product(32, "256x128x64", 20, (136, 416, 32), FP16, False, 2),
    Product(32, "128x128x64", 1, (128, 352, 32), BF16, False, 1, True),
]


def multiply(product: Product, x: torch.Tensor, case: object) -> torch.Tensor:
    """The result, in memory that held NaN, by a launch with NaN in the workspace."""
    weight = tile_cases.tiled(case, "tile_sm90")
    bias = torch.linspace(-1, 1, product.shape[0]).to(product.dtype) if product.bias else None
    space = workspace.get(x.device, 0)
    space.parts.fill_(float("nan"))
    with launch.forced(Plan(tile(product.span, product.tile), product.splits, product.early)):
        y = launch._matmul(x, weight, bias, 0)
    assert not space.counters.any()
    return y


@pytest.mark.parametrize(
    "product",
    representative(PRODUCTS, lambda p: {p.tile, p.span, (p.span, p.symmetric)}),
    ids=lambda p: f"{p.span}-{p.tile}-{p.rows}-{p.shape[0]}x{p.shape[1]}",
)
def test_every_tile_is_right(emulator: Emulator, product: Product) -> None:
    """Oracle: float64, within the rounding of a weight. Every tile of the table; ragged sizes, rings that turn."""
    n, k, group = product.shape
    case = random_case(n, k, group, 4, product.symmetric, product.dtype)
    x = random_rows(product.rows, k, product.dtype)
    emulator.seed = PRODUCTS.index(product)
    y = multiply(product, x, case)
    bias = torch.linspace(-1, 1, n).to(product.dtype) if product.bias else None
    assert worst_error(y, x, case, bias, UNIT[product.dtype]) <= 1


def test_every_pipelined_tile_is_tested() -> None:
    found = {(t.span, t.name) for t in configs.tiles(90) if t.kind == "pipelined"}
    assert found == {(p.span, f"{p.tile} pipelined") for p in PRODUCTS}


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_rows_of_the_identity_read_the_weight(emulator: Emulator, dtype: torch.dtype) -> None:
    """Exact: each weight is a product of an integer and a power of two."""
    case = random_case(192, 256, 128, 4, symmetric=False, dtype=dtype)
    case = case._replace(scales=torch.sign(case.scales))
    product = Product(128, "64x128x128", 256, (192, 256, 128), dtype, False)
    y = multiply(product, torch.eye(256, dtype=dtype), case)
    assert torch.equal(y.T.double(), dense_float64(case))


CHANGES = {  # of the text of a compiled kernel, each of which makes it wrong
    "parts for a program that is not ready": (r"barrier.cluster.arrive.*?barrier.cluster.wait.acquire.aligned;", ""),
    "no wait for the parts": (r"again: mbarrier.try_wait.*?bra.uni again;", ""),
    "no barrier for the parts": (r"@p mbarrier.init.*?expect_tx\S+ _, \[a\], %r\d+;", ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_emulator_finds_what_would_be_wrong(emulator: Emulator, monkeypatch, change: str) -> None:
    """Of a split kernel of which it finds nothing else."""
    product = Product(128, "64x256x128", 9, (256, 512, 128), splits=2)
    x, case = random_rows(9, 512, BF16), random_case(256, 512, 128, 4, True, BF16)
    multiply(product, x, case)
    old, new = CHANGES[change]

    def changed(text: str) -> ptx_machine.Program:
        other = re.sub(old, new, text, count=1, flags=re.DOTALL)
        assert other != text
        return ptx_machine.parse(other)

    monkeypatch.setattr(emulated_launches, "_parsed", changed)
    with pytest.raises(ptx_machine.MachineError):
        multiply(product, x, case)


@pytest.mark.parametrize("name", ["128x256x64", "16x128x128"])
def test_the_same_bits_whatever_the_order(emulator: Emulator, name: str) -> None:
    """Warps, programs and copies in other orders, products at once and as late as may be: split, four steps a stage."""
    product = Product(128, name, 9, (128, 1280, 128), splits=2)
    case = random_case(128, 1280, 128, 4, True, BF16)
    x = random_rows(9, 1280, BF16)
    results = []
    for emulator.seed, emulator.lazy in ((1, True), (2, True), (3, False)):
        results.append(multiply(product, x, case))
    assert all(torch.equal(results[0], y) for y in results[1:])
