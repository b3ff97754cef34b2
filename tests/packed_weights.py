"""Random packed weights, their float64 product, and how far a float32-accumulating kernel may be from it."""

from typing import NamedTuple

import ptq_kernels
import torch
from torch import Tensor

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}  # unit roundoff, half an ulp of 1


class Case(NamedTuple):
    codes: Tensor  # uint8 [N, K]
    qweight: Tensor
    scales: Tensor  # [N, G]
    zeros: Tensor | None
    bits: int
    group_size: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.qweight, self.scales, self.zeros

    @property
    def scheme(self) -> dict[str, int]:
        return {"bits": self.bits, "group_size": self.group_size}

    @property
    def sized(self) -> dict[str, int]:
        return {**self.scheme, "in_features": self.codes.shape[1]}


def random_case(
    n: int, k: int, group_size: int, bits: int = 4, symmetric: bool = True, dtype: torch.dtype = torch.float32
) -> Case:
    """Codes over the whole range and scales of both signs."""
    generator = torch.Generator().manual_seed(1000 * n + 10 * k + bits)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(n, k // group_size, generator=generator) + 0.5) * 2.0**-bits
    scales[torch.rand(scales.shape, generator=generator) < 0.5] *= -1
    zeros = torch.randint(0, 2**bits, scales.shape, dtype=torch.uint8, generator=generator)
    qweight = ptq_kernels.pack(codes, bits)
    return Case(codes, qweight, scales.to(dtype), None if symmetric else zeros, bits, group_size)


def random_rows(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m + k)).to(dtype)


def dense_float64(case: Case) -> Tensor:
    """The weight ``[N, K]``, element by element as the definition says."""
    k = torch.arange(case.codes.shape[1]) // case.group_size
    zeros = 2 ** (case.bits - 1) if case.zeros is None else case.zeros[:, k].double()
    return case.scales[:, k].double() * (case.codes.double() - zeros)


class Product(NamedTuple):
    """What a product must be, and what its rounding is relative to; both float64 ``[M, N]``."""

    want: Tensor
    magnitude: Tensor  # the sum of the magnitudes of what is added
    columns: int  # K


def product_float64(x: Tensor, case: Case) -> Product:
    """The product of rows with a weight.

    An implementation may form the weight as ``s (q - 8) + s (8 - z)``, so its magnitude counts as the sum of the parts.
    """
    k = torch.arange(case.codes.shape[1]) // case.group_size
    middle = 2 ** (case.bits - 1)
    zeros = torch.full_like(case.scales, middle) if case.zeros is None else case.zeros
    codes, zero = case.codes.double(), zeros[:, k].double()
    parts = case.scales[:, k].double().abs() * ((codes - middle).abs() + (zero - middle).abs() + (codes - zero).abs())
    return Product(x.double() @ dense_float64(case).T, x.double().abs() @ parts.T, x.shape[1])


def error_of(y: Tensor, product: Product, bias: Tensor | None, weight_unit: float) -> float:
    """The largest error of ``y`` in units of what rounding allows; NaN stays NaN. At most 1 passes.

    Allowed: K float32 additions in any order (K 2**-24 of the sum of magnitudes), weights rounded to ``weight_unit``
    before the product, and two roundings to the dtype of y (the product, then the sum with the bias).
    """
    want = product.want
    offset = torch.zeros(want.shape[1], dtype=torch.float64) if bias is None else bias.double()
    allowed = (weight_unit + (product.columns + 3) * 2.0**-24) * product.magnitude
    allowed += 2 * UNIT[y.dtype] * (want.abs() + offset.abs()) + allowed * 2 * UNIT[y.dtype]
    ratio = (y.double() - (want + offset)).abs() / allowed.clamp_min(1e-30)
    return float(ratio.max())


def worst_error(y: Tensor, x: Tensor, case: Case, bias: Tensor | None, weight_unit: float) -> float:
    """`error_of` one product of these rows; it computes the float64 product, which takes longest, each time."""
    return error_of(y, product_float64(x, case), bias, weight_unit)
