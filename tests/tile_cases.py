"""Products with weights in fragment order: the cases, and one case checked against float64 on any device.

In Triton's interpreter these are the tests of the arithmetic; on a GPU the same cases are the tests of the kernels.
"""

import itertools
from typing import NamedTuple

import ptq_kernels
import torch
from packed_weights import UNIT, Case, dense_float64, random_case, random_rows, worst_error
from pairwise import pairwise
from ptq_kernels import layouts, tiles
from ptq_kernels.layouts import PackedWeight
from torch import Tensor

ROWS = (1, 2, 3, 16, 17, 64, 65, 200)
# N, K, group size: whole tiles; ragged N; K padded; groups of 64, 32, 96, 192, 256; one group a row, of an odd length
SHAPES = [
    (128, 256, 128),
    (130, 256, 64),
    (70, 160, 32),
    (65, 60, 60),
    (200, 200, 200),
    (64, 512, 256),
    (96, 192, 96),
    (72, 384, 192),
    (1, 32, 32),
]
DTYPES = (torch.bfloat16, torch.float16)
SCALES = (torch.bfloat16, torch.float16, torch.float32)
# What raised tiles lose at most, relative to the sum of magnitudes: tensor cores cut what they add off at about the
# last bit of the sum so far, every 16 columns and always towards 0, and what is subtracted loses other bits.
CUT = 2.0**-16
OPTIONS = (tiles.NAMES, (4, 8), SHAPES, DTYPES, (True, False), ROWS, SCALES, (True, False))  # the fields of a Spec


class Spec(NamedTuple):
    layout: str
    bits: int
    shape: tuple[int, int, int]
    dtype: torch.dtype
    symmetric: bool
    rows: int
    scales: torch.dtype
    bias: bool

    @property
    def name(self) -> str:
        n, k, group = self.shape
        kind = "sym" if self.symmetric else "asym"
        return f"{self.layout}-{self.bits}-{n}x{k}g{group}-{str(self.dtype)[6:]}-{kind}-{self.rows}"


def every_spec() -> list[Spec]:
    """Everything with everything, but with one dtype of scales each: a kernel converts them when it loads them."""
    product = itertools.product(*OPTIONS[:-2])
    return [Spec(*values, SCALES[i % 3], bias) for i, values in enumerate(product) for bias in (True, False)]


def few_specs() -> list[Spec]:
    """Every two values of two different options meet in one of them."""
    return [Spec(*values) for values in pairwise(OPTIONS)]


def native_specs(layout: str) -> list[Spec]:
    """Every bits, shape, dtype of rows and symmetry of one layout, each with two of four numbers of rows."""
    found = []
    for i, (bits, shape, dtype, symmetric) in enumerate(itertools.product((4, 8), SHAPES, DTYPES, (True, False))):
        for rows in ((1, 65), (17, 200))[(i + i // 2 + i // 4) % 2]:
            found.append(Spec(layout, bits, shape, dtype, symmetric, rows, SCALES[i % 3], i % 5 < 2))
    return found


def on_device(weight: PackedWeight, device: str) -> PackedWeight:
    """The same weight there."""
    names = ("qweight", "scales", "zeros")
    return weight._replace(**{name: None if (t := getattr(weight, name)) is None else t.to(device) for name in names})


def tiled(case: Case, layout: str) -> PackedWeight:
    weight = PackedWeight(*case.tensors, case.bits, case.group_size, case.codes.shape[1])
    return layouts.convert(weight, layout)


def multiply(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, device: str = "cpu") -> Tensor:
    """`ptq_kernels.matmul` on a device, back on the CPU."""
    tensors = [t if t is None else t.to(device) for t in (x, *weight[:3], bias)]
    y = ptq_kernels.matmul(
        *tensors, bits=weight.bits, group_size=weight.group_size, layout=weight.layout, impl="triton"
    )
    return y.cpu()


def tile_rounding(kind: str, dtype: torch.dtype) -> float:
    """What a tile rounds a weight by, relative.

    Raised and slim ones round none, but subtract 136 or, of float16, 72 times the sum of x from a sum in float32.
    """
    return {"exact": 0.0, "raised": CUT, "slim": CUT}.get(kind, UNIT[dtype])


def cancelling(n: int, k: int, group: int, rows: int, dtype: torch.dtype) -> tuple[Case, Tensor]:
    """Positive rows and weights whose product is 0, term by term: what is found instead is what was cut off."""
    case = random_case(n, k, group, 4, dtype=dtype)
    codes = case.codes.clamp(min=1)
    codes[:, 1::2] = 16 - codes[:, ::2]
    x = random_rows(rows, k, dtype).abs()
    x[:, 1::2] = x[:, ::2]
    return case._replace(codes=codes, qweight=ptq_kernels.pack(codes, 4)), x


def cut_off(y: Tensor, x: Tensor, case: Case) -> float:
    """Of `cancelling`: the largest error, in units of what may be cut off; at most 1 is right."""
    return float((y.double().abs() / (CUT * (x.double() @ dense_float64(case).abs().T))).max())


def weight_rounding(weight: PackedWeight, rows: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """What a weight is rounded by, relative, on the way that so many rows take: folded tiles and cuBLAS round it."""
    from ptq_kernels.triton import configs, launch

    if weight.layout not in launch.ORDERS:
        return 0.0
    layer = launch.layer_of(torch.empty(0, dtype=dtype, device=device), on_device(weight, device), None)
    kind = "dense" if rows >= layer.most_rows else layer.plan(configs.bucket(rows)).tile.kind
    return tile_rounding(kind, dtype)


def check(spec: Spec, device: str = "cpu") -> float:
    """The error of a random product in units of what rounding allows; at most 1 is right."""
    n, k, group = spec.shape
    case = random_case(n, k, group, spec.bits, spec.symmetric, spec.scales)
    x = random_rows(spec.rows, k, spec.dtype)
    bias = torch.linspace(-1, 1, n).to(spec.dtype) if spec.bias else None
    weight = tiled(case, spec.layout)
    y = multiply(x, weight, bias, device)
    assert y.dtype == spec.dtype
    return worst_error(y, x, case, bias, weight_rounding(weight, spec.rows, spec.dtype, device))


def exact(spec: Spec, device: str = "cpu") -> bool:
    """Small integers and scales of a power of two: every partial sum is an integer below 2**24, any order is exact.

    The interpreter truncates where a GPU rounds to bfloat16, so there the results are kept below 256.
    """
    n, k, group = spec.shape
    case = random_case(n, k, group, spec.bits, spec.symmetric)
    case = case._replace(scales=torch.sign(case.scales).to(spec.scales))
    x = torch.randint(-3, 4, (spec.rows, k), generator=torch.Generator().manual_seed(spec.rows))
    if device == "cpu":
        every = -(-k // (16 if spec.bits == 4 else 1))  # at most 16 terms of 15, or one of 255
        x = x.sign() * (torch.arange(k) % every == torch.arange(spec.rows)[:, None] % every)
    x = x.to(spec.dtype)
    want = (x.double() @ dense_float64(case).T).float().to(spec.dtype)
    return torch.equal(multiply(x, tiled(case, spec.layout), None, device), want)
