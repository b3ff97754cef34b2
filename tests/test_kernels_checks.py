"""Every refusal of ptq_kernels.matmul: requirement, finding, remedy."""

import numpy as np
import ptq_kernels
import pytest
import torch
from packed_weights import random_case

CASE = random_case(16, 64, 32, symmetric=False)
X = torch.ones(2, 64)
WRONG = {
    "scalar": (ValueError, r"shape \[\.\.\., K\], got a scalar", {"x": torch.tensor(1.0)}),
    "x as a list": (TypeError, "x must be a torch.Tensor, got a list; convert", {"x": [[1.0] * 64]}),
    "x of numpy": (TypeError, "x must be a torch.Tensor, got a ndarray; convert", {"x": X.numpy()}),
    "no x": (TypeError, "x must be a torch.Tensor, got a NoneType; convert", {"x": None}),
    "sparse x": (ValueError, "x must be dense, got one of layout torch.sparse_coo; convert", {"x": X.to_sparse()}),
    "group as text": (TypeError, "group_size must be an int, got '32'; count", {"group_size": "32"}),
    "no group": (TypeError, "group_size must be an int, got None; count", {"group_size": None}),
    "scales that learn": (
        ValueError,
        r"scales must not require a gradient, .* pass scales.detach\(\)",
        {"scales": CASE.scales.clone().requires_grad_()},
    ),
    "bits": (ValueError, r"bits must be one of .* got 5; requantize", {"bits": 5}),
    "bits as a float": (ValueError, r"bits must be one of .* got 4.0; requantize", {"bits": 4.0}),
    "group as a float": (TypeError, r"group_size must be an int, got 32.0; count", {"group_size": 32.0}),
    "no columns": (
        ValueError,
        "in_features must be at least 1, got 0; leave",
        {"x": X[:, :0], "scales": CASE.scales[:, :0], "zeros": None},
    ),
    "no rows": (
        ValueError,
        "scales must have a row for each output, got none; leave",
        {"qweight": CASE.qweight[:0], "scales": CASE.scales[:0], "zeros": CASE.zeros[:0]},
    ),
    "group": (ValueError, r"x must have shape \[..., 96\], 2 groups of 48 .* correct group_size", {"group_size": 48}),
    "group unresolved": (ValueError, "must divide in_features = 64, got -1; resolve -1", {"group_size": -1}),
    "scales dtype": (TypeError, r"scales must be one of .* got torch.float64", {"scales": CASE.scales.double()}),
    "scales rank": (ValueError, r"scales must have shape \[N, 2\]", {"scales": CASE.scales.view(-1)}),
    "scales groups": (ValueError, r"scales \[2, 16\] have them, got \[2, 64\].*transpose", {"scales": CASE.scales.T}),
    "zeros dtype": (TypeError, "zeros must be torch.uint8 or None, got torch.int8", {"zeros": CASE.zeros.char()}),
    "zeros shape": (ValueError, r"zeros must have the shape of scales, \[16, 2\]", {"zeros": CASE.zeros[:8]}),
    "qweight dtype": (TypeError, "must be torch.int32, got torch.uint8", {"qweight": CASE.codes}),
    "qweight width": (ValueError, r"shape \[16, 8\] .* got \[16, 7\]; check bits", {"qweight": CASE.qweight[:, :7]}),
    "qweight rows": (ValueError, r"shape \[16, 8\] .* got \[15, 8\]", {"qweight": CASE.qweight[:15]}),
    "columns of x": (ValueError, r"x must have shape \[..., 64\], .* got \[2, 96\]; pass", {"x": torch.ones(2, 96)}),
    "x dtype": (TypeError, r"x must be one of .* got torch.float64; convert", {"x": X.double()}),
    "bias dtype": (TypeError, "bias must be one of .* got torch.int64", {"bias": torch.ones(16, dtype=torch.int64)}),
    "bias shape": (ValueError, r"bias must have shape \[16\].*got \[15\]", {"bias": torch.ones(15)}),
    "layout": (ValueError, "layout must be one of .*'canonical'.* got 'rows'; convert", {"layout": "rows"}),
    "impl": (ValueError, "impl must be 'auto' or one of .* got 'fast'; use 'auto'", {"impl": "fast"}),
    "impl as a list": (ValueError, r"impl must be 'auto' or one of .* got \[\]; use 'auto'", {"impl": []}),
    "activation": (ValueError, r"activation must be None or 'int8', got \[\]; None", {"activation": []}),
    "device of scales": (
        ValueError,
        r"scales must be on the device of qweight, cpu.*\.to",
        {"scales": CASE.scales.to("meta")},
    ),
    "device of zeros": (ValueError, "zeros must be on the device of qweight, cpu", {"zeros": CASE.zeros.to("meta")}),
    "device of x": (ValueError, "x must be on the device of qweight, cpu, got meta", {"x": X.to("meta")}),
    "device of bias": (ValueError, "bias must be on the device of qweight", {"bias": torch.ones(16, device="meta")}),
}


@pytest.mark.parametrize("name", WRONG)
def test_refuses(name: str) -> None:
    error, message, change = WRONG[name]
    arguments = {"x": X, "qweight": CASE.qweight, "scales": CASE.scales, "zeros": CASE.zeros, **CASE.scheme, **change}
    with pytest.raises(error, match=message):
        ptq_kernels.matmul(**arguments)


def test_weight_functions_check_too() -> None:
    arguments = {**CASE.sized, "group_size": 48}
    for function in (ptq_kernels.dequantize, ptq_kernels.prepare):
        with pytest.raises(ValueError, match="must divide in_features"):
            function(*CASE.tensors, **arguments)
    with pytest.raises(ValueError, match="must divide in_features"):
        ptq_kernels.canonical(*CASE.tensors, layout="canonical", **arguments)


def test_what_dequantize_alone_takes() -> None:
    with pytest.raises(TypeError, match="in_features must be an int, got 64.0; count"):
        ptq_kernels.dequantize(*CASE.tensors, **{**CASE.sized, "in_features": 64.0})
    with pytest.raises(TypeError, match="dtype must be a floating-point one, got None; unpack"):
        ptq_kernels.dequantize(*CASE.tensors, **CASE.sized, dtype=None)


def test_scales_that_learn_elsewhere_may_multiply_where_nothing_is_learned() -> None:
    scales = CASE.scales.clone().requires_grad_()
    for _ in range(2):  # the second call of a served weight takes the short way
        with torch.no_grad():
            found = ptq_kernels.matmul(X, CASE.qweight, scales, CASE.zeros, **CASE.scheme)
        assert torch.equal(found, ptq_kernels.matmul(X, CASE.qweight, CASE.scales, CASE.zeros, **CASE.scheme))
        with pytest.raises(ValueError, match="scales must not require a gradient"):
            ptq_kernels.matmul(X, CASE.qweight, scales, CASE.zeros, **CASE.scheme)


def test_integers_of_numpy_count_as_integers():
    """As they come out of arithmetic on shapes."""
    given = {"bits": np.int64(CASE.bits), "group_size": np.int64(CASE.group_size)}
    plain = {"bits": CASE.bits, "group_size": CASE.group_size}
    found, expected = (
        ptq_kernels.matmul(X, CASE.qweight, CASE.scales, CASE.zeros, impl="reference", **sizes)
        for sizes in (given, plain)
    )
    assert torch.equal(found, expected)
