"""The backward pass through a packed weight. Oracle: autograd on the dequantized weight in float64."""

import pytest
import torch

from ptq.formats.codec import QuantizedWeight
from ptq.nn import QuantLinear


def packed_layer(bits, symmetric, permuted):
    n, k, size = 48, 64, 16
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), generator=draw, dtype=torch.uint8)
    zeros = torch.full((n, k // size), 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(0, 2**bits, zeros.shape, generator=draw, dtype=torch.uint8)
    scales = torch.rand((n, k // size), generator=draw) + 0.5
    order = torch.arange(k)[torch.randperm(k, generator=draw)] // size if permuted else None
    return QuantLinear.from_quantized(QuantizedWeight(codes, scales, zeros, bits, size, symmetric), None, g_idx=order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(("bits", "symmetric", "permuted"), [(2, True, False), (3, False, True), (4, True, True),
                                                             (4, False, False), (8, True, False)])  # fmt: skip
def test_the_gradient_is_that_of_the_dequantized_weight(bits, symmetric, permuted, prepared, dtype):
    """Against autograd in float64. Bound: sums of N float32 products, in any order, err by N * 2**-24 of the sum of
    their magnitudes; in bfloat16 weight and result are each rounded, by 2**-8 of their size at most."""
    layer = packed_layer(bits, symmetric, permuted)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 64, generator=draw).to(dtype)
    grad = torch.randn(2, 5, 48, generator=draw).to(dtype)
    weight = layer.dequantize(torch.float32).double()
    if prepared:
        layer.prepare_()
    packed, dense = x.clone().requires_grad_(), x.double().requires_grad_()
    layer(packed).backward(grad)
    torch.nn.functional.linear(dense, weight).backward(grad.double())
    error = 48 * 2.0**-24 + (0 if dtype == torch.float32 else 2 * 2.0**-8)
    bound = error * (grad.double().abs() @ weight.abs())
    assert packed.grad.dtype == dtype
    assert bool(((packed.grad.double() - dense.grad).abs() <= bound).all())
