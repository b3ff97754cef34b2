"""QuantLinear with columns in another order than the input's, as GPTQ files with act-order need it.

Oracle: the float64 weight with the group of each column looked up in g_idx, and a float64 product.
"""

import copy

import order_cases
import pytest
import torch
from packed_weights import Case, random_case, random_rows
from torch import nn

from ptq.errors import FormatError
from ptq.formats.codec import QuantizedWeight, Scheme
from ptq.nn import QuantLinear, fuse_linears

G_IDX = order_cases.scattered(64, 32)


def layer_of(case: Case, g_idx: torch.Tensor | None = G_IDX, bias: torch.Tensor | None = None) -> QuantLinear:
    zeros = torch.full(case.scales.shape, 2 ** (case.bits - 1), dtype=torch.uint8) if case.zeros is None else case.zeros
    quantized = QuantizedWeight(case.codes, case.scales, zeros, case.bits, case.group_size, case.zeros is None)
    return QuantLinear.from_quantized(quantized, bias, g_idx=g_idx)


def case_of(n: int = 48) -> Case:
    return random_case(n, 64, 32, symmetric=False)


@pytest.mark.parametrize("prepared", [True, False])
def test_forward_and_dense_weight(prepared: bool) -> None:
    case, bias = case_of(), torch.linspace(-1, 1, 48)
    layer = layer_of(case, bias=bias)
    if prepared:
        layer.prepare_()
    dense = order_cases.dense(case, G_IDX)
    assert torch.equal(layer.dequantize(), dense.float())
    x = random_rows(5, 64, torch.float32)
    # 64 products below 8 in float32, and the weight in another order: 64 * 64 * 8 * 2**-24 at worst
    torch.testing.assert_close(layer(x).double(), x.double() @ dense.T + bias, rtol=0, atol=2e-3)
    assert "permuted" in repr(layer)


def test_contiguous_groups_need_no_permutation() -> None:
    layer = layer_of(case_of(), torch.arange(64) // 32)
    assert layer.perm is None
    assert "perm" not in layer.state_dict()
    assert "permuted" not in repr(layer)


@pytest.mark.parametrize("from_prepared", [True, False])
def test_state_dict_round_trip_is_exact(from_prepared: bool) -> None:
    source = layer_of(case_of())
    plain = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    assert set(plain) == {"qweight", "scales", "zeros", "perm"}
    if from_prepared:
        source.prepare_()
    state = source.state_dict()
    assert all(torch.equal(state[name], plain[name]) for name in plain)
    target = QuantLinear.empty(64, 48, Scheme(4, 32, False), False, torch.float32, permuted=True)
    target.load_state_dict(state, assign=True)
    x = random_rows(3, 64, torch.float32)
    assert torch.equal(target(x), layer_of(case_of())(x))
    for got, want in zip(target.quantized()[:3], source.quantized()[:3], strict=True):
        assert torch.equal(got, want)
    plainly = QuantLinear.empty(64, 48, Scheme(4, 32, False), False, torch.float32)
    with pytest.raises(RuntimeError, match="Unexpected key.*perm"):
        plainly.load_state_dict(state, assign=True)


def test_conversions_copies_and_compilation() -> None:
    torch._dynamo.reset()
    layer = layer_of(case_of()).prepare_()
    x = random_rows(3, 64, torch.float32)
    want = layer(x)
    converted = copy.deepcopy(nn.Sequential(layer)).half()[0]
    assert converted.perm.dtype == torch.int32
    assert torch.equal(converted(x), want)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want)


def test_linears_with_one_order_are_fused_and_others_are_not() -> None:
    parent = nn.Module()
    for i, name in enumerate(("gate_proj", "up_proj")):
        setattr(parent, name, layer_of(case_of(32 + 16 * i)))
    alone = copy.deepcopy(parent)
    assert fuse_linears(parent) == ["gate_proj+up_proj"]
    x = random_rows(2, 64, torch.float32)
    assert torch.equal(parent.gate_proj(x), alone.gate_proj(x))
    assert torch.equal(parent.up_proj(x), alone.up_proj(x))
    alone.up_proj = layer_of(case_of(), G_IDX.flip(0))
    assert fuse_linears(alone) == []


def test_groups_of_unequal_size_are_refused() -> None:
    with pytest.raises(FormatError, match=r"32 columns in each of 2 groups, group 0 has 33 .*groups of unequal size"):
        layer_of(case_of(), (torch.arange(64) >= 33).long())


@pytest.mark.parametrize("wrong", [torch.zeros(64), torch.arange(1, 65), torch.arange(-1, 63)], ids=["0", "64", "-1"])
def test_a_perm_that_is_none_is_refused(wrong: torch.Tensor) -> None:
    layer = layer_of(case_of())
    before = layer.dequantize()
    with pytest.raises(FormatError, match="layer.perm must hold every column from 0 to 63 once, found others; load"):
        nn.ModuleDict({"layer": layer}).load_state_dict({"layer.perm": wrong.int()}, strict=False)
    with pytest.raises(FormatError, match="layer.perm must be torch.int32, found torch.float32"):
        nn.ModuleDict({"layer": layer}).load_state_dict({"layer.perm": wrong.float()}, strict=False)
    assert torch.equal(layer.dequantize(), before)
