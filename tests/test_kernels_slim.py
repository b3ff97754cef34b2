"""Slim kernels, which no interpreter knows: their compiled PTX in an emulator of Hopper (ptx_machine).

Rows of x beyond M are in no memory that a slim kernel writes: the emulator reads NaN there.
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
from packed_weights import Case, dense_float64, random_case, random_rows, worst_error

pytest.importorskip("triton", reason="the kernels are written in Triton")

from ptq_kernels.triton import ahead, configs, launch
from ptq_kernels.triton.configs import Plan

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compilation needs Triton without its interpreter"
)

BF16, FP16 = torch.bfloat16, torch.float16


class Product(NamedTuple):
    """A product and how it is computed."""

    tile: str
    rows: int
    shape: tuple[int, int, int]  # N, K, group size
    dtype: torch.dtype = BF16
    symmetric: bool = True
    bias: bool = False
    early: int = 0
    scales: torch.dtype | None = None  # None: that of the rows


PRODUCTS = [
    Product("8x16x1024", 1, (24, 2048, 128)),
    Product("8x16x1024", 8, (130, 1024, 1024), FP16, False, True),
    Product("8x32x1024", 3, (40, 5120, 128), BF16, False, True, ahead.BYTES),
    Product("8x32x1024", 8, (72, 3072, 256), FP16, True, False, 0, torch.float32),
    Product("8x32x2048", 7, (33, 4096, 128), FP16, False, False, ahead.BYTES),
    Product("8x64x1024", 2, (1, 3072, 3072), BF16, False, True, 2048),
    Product("8x64x1024", 19, (72, 1024, 512), BF16, True, True),
    Product("8x32x512", 4, (70, 1536, 128), BF16, True, False, 0, torch.float32),
    Product("8x64x512", 5, (136, 2560, 256), FP16, False, True),
    Product("16x32x512", 11, (40, 2560, 128), BF16, False, False, ahead.BYTES),
    Product("16x64x512", 17, (130, 1536, 1536), FP16, True, True),
]


def weight_of(product: Product) -> Case:
    """A random one."""
    n, k, group = product.shape
    return random_case(n, k, group, 4, product.symmetric, product.scales or product.dtype)


def bias_of(product: Product) -> torch.Tensor | None:
    """One for each weight row."""
    return torch.linspace(-1, 1, product.shape[0]).to(product.dtype) if product.bias else None


def multiply(product: Product, x: torch.Tensor, case: Case) -> torch.Tensor:
    """The result, in memory that held NaN."""
    tile = next(t for t in configs.tiles(90) if t.name == f"{product.tile} slim")
    with launch.forced(Plan(tile, 1, product.early)):
        return launch._matmul(x, tile_cases.tiled(case, "tile_sm90"), bias_of(product), 0)


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: f"{p.tile}-{p.rows}-{p.shape[0]}x{p.shape[1]}")
def test_every_tile_is_right(emulator: Emulator, product: Product) -> None:
    """Oracle: float64, within the rounding of the sum. Every tile of the table; ragged rows, rings that turn."""
    case, x = weight_of(product), random_rows(product.rows, product.shape[1], product.dtype)
    emulator.seed = PRODUCTS.index(product)
    emulator.lazy = emulator.seed % 3 != 1
    y = multiply(product, x, case)
    assert worst_error(y, x, case, bias_of(product), tile_cases.tile_rounding("slim", product.dtype)) <= 1


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_what_tensor_cores_cut_off_is_little(emulator: Emulator, dtype: torch.dtype) -> None:
    """Oracle: products that are 0 with rows that are all positive, of which a raised weight's sums are large."""
    product = Product("8x32x1024", 8, (64, 2048, 128), dtype)
    case, x = tile_cases.cancelling(*product.shape, product.rows, dtype)
    assert tile_cases.cut_off(multiply(product, x, case), x, case) <= 1


def test_every_slim_tile_is_tested() -> None:
    found = {(t.rows, t.span, t.name) for t in configs.tiles(90) if t.kind == "slim"}
    assert found == {(int(p.tile.split("x")[0]), 128, f"{p.tile} slim") for p in PRODUCTS}


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_rows_of_the_identity_read_the_weight(emulator: Emulator, dtype: torch.dtype) -> None:
    """Exact: each weight is a product of an integer and a power of two, and raised ones are integers."""
    product = Product("8x64x512", 64, (72, 512, 128), dtype, False)
    case = weight_of(product)
    case = case._replace(scales=torch.sign(case.scales))
    for first in (0, 448):
        y = multiply(product, torch.eye(512, dtype=dtype)[first : first + 64], case)
        assert torch.equal(y.T.double(), dense_float64(case)[:, first : first + 64])


def test_the_same_bits_whatever_the_order(emulator: Emulator) -> None:
    """Warps, programs and copies in other orders."""
    product = Product("8x32x1024", 5, (64, 5120, 128))
    case, x = weight_of(product), random_rows(5, 5120, BF16)
    results = []
    for emulator.seed, emulator.lazy in ((1, True), (2, True), (3, False)):
        results.append(multiply(product, x, case))
    assert all(torch.equal(results[0], y) for y in results[1:])


CHANGES = {  # of the text of a compiled kernel, each of which makes it wrong
    "a wait for fewer copies": (r"cp.async.wait_group\s+1;", "cp.async.wait_group 2;"),
    "no barrier before the sum": (r"bar\.sync\s+0;(?!.*bar\.sync)", ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_emulator_finds_what_would_be_wrong(emulator: Emulator, monkeypatch, change: str) -> None:
    """Of a kernel of which it finds nothing else."""
    product = Product("8x32x1024", 8, (32, 5120, 128))
    case, x = weight_of(product), random_rows(8, 5120, BF16)
    multiply(product, x, case)
    old, new = CHANGES[change]

    def changed(text: str) -> ptx_machine.Program:
        other = re.sub(old, new, text, flags=re.DOTALL)
        assert other != text
        return ptx_machine.parse(other)

    monkeypatch.setattr(emulated_launches, "_parsed", changed)
    with pytest.raises(ptx_machine.HazardError):
        multiply(product, x, case)
