"""Codecs. Oracle: the inverse, the transpose identity between layouts, and tables of what each format can hold."""

import pytest
import torch
from format_examples import random_weight, same
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.errors import ConfigError, FormatError
from ptq.formats import CODECS, Scheme
from ptq.formats.bitpack import pack_stream
from ptq.formats.capability import CAPABILITIES, problem

KINDS = [(codec, bits, symmetric) for codec, c in CAPABILITIES.items() for bits, symmetric in sorted(c.widths)]


def scheme_of(quantized, group_size=None) -> Scheme:
    return Scheme(quantized.bits, group_size or quantized.group_size, quantized.symmetric)


@pytest.mark.parametrize(("codec", "bits", "symmetric"), KINDS)
@pytest.mark.parametrize("group_size", [-1, 32, 16])
def test_round_trip_and_specs(codec, bits, symmetric, group_size):
    quantized = random_weight(96, 64, bits, group_size, symmetric=symmetric)
    dtype = CODECS[codec].scales_dtype(torch.bfloat16)
    tensors = CODECS[codec].encode("a.b", quantized, dtype)
    scheme = scheme_of(quantized, group_size)
    assert same(CODECS[codec].decode("a.b", tensors, scheme), quantized)
    specs = CODECS[codec].tensor_specs("a.b", 96, 64, scheme, dtype)
    assert specs == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert set(tensors) <= set(CODECS[codec].tensor_names("a.b", scheme))
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 70),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 40),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
)
def test_compressed_tensors_holds_any_shape(n, groups, group_size, bits, symmetric):
    quantized = random_weight(n, groups * group_size, bits, group_size, symmetric=symmetric, seed=n)
    tensors = CODECS["compressed-tensors"].encode("m", quantized, torch.bfloat16)
    assert same(CODECS["compressed-tensors"].decode("m", tensors, scheme_of(quantized)), quantized)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(octets=st.integers(1, 9), groups=st.integers(1, 5), group_size=st.integers(1, 40), symmetric=st.booleans())
def test_awq_holds_any_columns(octets, groups, group_size, symmetric):
    quantized = random_weight(8 * octets, groups * group_size, 4, group_size, symmetric=symmetric, seed=octets)
    tensors = CODECS["awq"].encode("m", quantized, torch.float16)
    assert same(CODECS["awq"].decode("m", tensors, scheme_of(quantized)), quantized)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_compressed_tensors_transposed(bits):
    quantized = random_weight(64, 96, bits, 32, symmetric=False)
    gptq = CODECS["gptq_v2"].encode("m", quantized, torch.float16)
    packed = CODECS["compressed-tensors"].encode("m", quantized, torch.float16)
    assert torch.equal(gptq["m.qweight"].t(), packed["m.weight_packed"])
    assert torch.equal(gptq["m.qzeros"].t(), packed["m.weight_zero_point"])
    assert torch.equal(gptq["m.scales"].t(), packed["m.weight_scale"])


def test_scales_dtypes():
    assert {name: codec.scales_dtype(torch.bfloat16) for name, codec in CODECS.items()} == {
        "gptq": torch.float16,
        "gptq_v2": torch.float16,
        "awq": torch.float16,
        "compressed-tensors": torch.bfloat16,
    }


def test_what_each_format_can_hold():
    held = {
        name: [
            (bits, symmetric)
            for bits in range(1, 9)
            for symmetric in (True, False)
            if problem(name, Scheme(bits, 128, symmetric), (128, 128)) is None
        ]
        for name in CODECS
    }
    both = [(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)]
    assert held == {
        "gptq": [(2, True), (3, True), (4, True), (8, True)],
        "gptq_v2": [kind for kind in both if kind[0] in (2, 3, 4, 8)],
        "awq": [(4, True), (4, False)],
        "compressed-tensors": both,
    }


S4, A4 = Scheme(4, 32, True), Scheme(4, 32, False)


@pytest.mark.parametrize(
    ("codec", "schemes", "shape", "message"),
    [
        ("gptq", {"a": A4}, (64, 64), "gptq cannot hold 4-bit asym.*hold it: gptq_v2, awq, compressed-tensors$"),
        ("gptq_v2", {"a": Scheme(5, 32, True)}, (64, 64), "cannot hold 5-bit.*hold it: compressed-tensors$"),
        ("awq", {"a": Scheme(8, 32, True)}, (64, 64), "cannot hold 8-bit.*: gptq, gptq_v2, compressed-tensors$"),
        ("compressed-tensors", {"a": Scheme(1, 32, True)}, (64, 64), "leave it in float or change its bits"),
        ("gptq", {"a": S4}, (40, 64), "out_features to be a multiple of 32, found 40; .*: awq, compressed-tensors$"),
        ("gptq", {"a": Scheme(4, -1, True)}, (64, 40), "in_features to be a multiple of 32, found 40"),
        ("awq", {"a": S4}, (36, 64), "out_features to be a multiple of 8, found 36; .*: compressed-tensors$"),
        ("gptq", {"a": Scheme(4, 48, True)}, (64, 64), "group_size must be -1 or divide in_features 64, found 48"),
        ("gptq", {"a": Scheme(4, 0, True)}, (64, 64), "group_size must be -1 or divide in_features 64, found 0"),
        ("awq", {"a": S4, "b": S4, "c": A4}, (64, 64), "one scheme for all modules; c is 4-bit asymmetric"),
        ("gptq", {"a": None}, (64, 64), "at least one quantized Linear, found none among 1"),
    ],
)
def test_check_refuses_before_work(codec, schemes, shape, message):
    with pytest.raises(ConfigError, match=message):
        CODECS[codec].check(schemes, dict.fromkeys(schemes, shape))


def test_check_accepts_mixed_and_float_modules():
    schemes = {"a": S4, "b": Scheme(8, -1, True), "head": None}
    for codec in ("gptq", "gptq_v2", "compressed-tensors"):
        CODECS[codec].check(schemes, dict.fromkeys(schemes, (64, 64)))
    CODECS["awq"].check({"a": A4, "head": None}, {"a": (8, 64), "head": (7, 64)})


def broken(quantized, **changes):
    return quantized._replace(**changes)


def scales_with(quantized, value):
    scales = quantized.scales.clone()
    scales[3, 1] = value
    return quantized._replace(scales=scales)


@pytest.mark.parametrize("codec", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: scales_with(q, float("nan")), "finite, non-zero and exact .*row 3, group 1: nan"),
        (lambda q: scales_with(q, float("inf")), "row 3, group 1: inf"),
        (lambda q: scales_with(q, 0.0), "row 3, group 1: 0.0"),
        (lambda q: scales_with(q, 0.1), "1 of 128 are not, the first at row 3, group 1: 0.1"),
        (lambda q: scales_with(q, 1e6), "row 3, group 1: 1000000.0"),
        (lambda q: broken(q, zeros=q.zeros + 1), "zeros of a 4-bit symmetric weight must be within 8..8, found 9..9"),
        (lambda q: broken(q, scales=q.scales[:, :1]), r"need scales and zeros \[64, 64/32\], found \[64, 1\]"),
        (lambda q: broken(q, group_size=48), r"need scales and zeros \[64, 64/48\]"),
        (lambda q: broken(q, codes=q.codes + 16), "4-bit codes must be 0..15, found"),
    ],
)
def test_encode_refuses_what_it_would_have_to_change(codec, change, message):
    quantized = change(random_weight(64, 64, 4, 32, symmetric=True))
    with pytest.raises(FormatError, match=message):
        CODECS[codec].encode("m", quantized, torch.float16)


def test_encode_refuses_unsupported_and_wide_zeros():
    with pytest.raises(FormatError, match="gptq cannot hold 4-bit asymmetric.*call the codec's check"):
        CODECS["gptq"].encode("m", random_weight(64, 64, 4, 32, symmetric=False), torch.float16)
    quantized = random_weight(64, 64, 4, 32, symmetric=False)
    with pytest.raises(FormatError, match="asymmetric weight must be within 0..15, found 16..31"):
        CODECS["awq"].encode("m", quantized._replace(zeros=quantized.zeros | 16), torch.float16)


def damaged(codec, symmetric=True, **changes):
    """Tensors of a 4-bit g32 [64, 64] weight with some replaced, or removed where the change is None."""
    tensors = CODECS[codec].encode("m", random_weight(64, 64, 4, 32, symmetric=symmetric), torch.float16)
    for suffix, change in changes.items():
        value = tensors.pop(f"m.{suffix}")
        if change is not None:
            tensors[f"m.{suffix}"] = change(value)
    return tensors


def permuted(order):
    return order.flip(0)


def not_finite(scales):
    return scales.fill_(float("nan"))


@pytest.mark.parametrize(
    ("codec", "changes", "message"),
    [
        ("gptq", {"qweight": None}, "tensor m.qweight is missing; the checkpoint has"),
        ("gptq", {"qweight": torch.Tensor.long}, r"m.qweight: expected torch.int32 with 2 axes, found torch.int64 "),
        ("gptq", {"qweight": lambda t: t[0]}, r"with 2 axes, found torch.int32 \[64\]"),
        ("gptq", {"qweight": lambda t: t[:5]}, "group_size 32 must divide in_features, found 40"),
        ("gptq", {"qweight": lambda t: t[:0]}, "group_size 32 must divide in_features, found 0"),
        ("gptq", {"qzeros": lambda t: t[:1]}, r"m.qzeros: expected shape \[2, 8\], found \[1, 8\]"),
        ("gptq", {"scales": lambda t: t.t()}, r"m.scales: expected shape \[2, 64\], found \[64, 2\]"),
        ("gptq", {"scales": torch.Tensor.int}, "expected torch.float16 or torch.bfloat16 or torch.float32"),
        ("gptq", {"scales": not_finite}, "m.scales: scales must be finite"),
        ("gptq", {"g_idx": permuted}, "m.g_idx: column 0 must belong to group 0, found 1. Act-order .* not read"),
        ("gptq", {"g_idx": lambda t: t[1:]}, r"m.g_idx: expected shape \[64\], found \[63\]"),
        ("gptq", {"qzeros": lambda t: t + 0x11111111}, r"gptq stores 7 for every zero .*found \[8\].*ambiguous"),
        ("awq", {"qzeros": None}, "tensor m.qzeros is missing"),
        ("awq", {"qzeros": lambda t: t[:, :4]}, r"m.qzeros: expected shape \[2, 8\], found \[2, 4\]"),
        ("awq", {"qzeros": torch.zeros_like}, "4-bit symmetric weight must be within 8..8, found 0..0"),
        ("compressed-tensors", {"weight_shape": None}, "tensor m.weight_shape is missing"),
        ("compressed-tensors", {"weight_shape": lambda t: t[:1]}, r"m.weight_shape: expected shape \[2\], found \[1\]"),
        ("compressed-tensors", {"weight_packed": lambda t: t[:, :4]}, r"expected shape \[64, 8\], found \[64, 4\]"),
    ],
)
def test_decode_names_the_damage(codec, changes, message):
    with pytest.raises(FormatError, match=message):
        CODECS[codec].decode("m", damaged(codec, **changes), S4)


def test_decode_refuses_asymmetric_damage():
    tensors = damaged("compressed-tensors", symmetric=False, weight_zero_point=lambda t: t.to(torch.int8))
    with pytest.raises(FormatError, match=r"m.weight_zero_point: expected torch.int32 with 2 axes, found torch.int8"):
        CODECS["compressed-tensors"].decode("m", tensors, A4)
    tensors = damaged("compressed-tensors") | {"m.weight_g_idx": torch.arange(64).int() % 2}
    with pytest.raises(FormatError, match="m.weight_g_idx: column 1 must belong to group 0, found 1"):
        CODECS["compressed-tensors"].decode("m", tensors, S4)


def test_three_bit_rows_that_end_inside_a_code_are_refused():
    tensors = CODECS["gptq"].encode("m", random_weight(32, 64, 3, 32, symmetric=True), torch.float16)
    tensors["m.qweight"] = tensors["m.qweight"][:4]
    with pytest.raises(FormatError, match=r"m.qweight: expected shape \[3, 32\], found \[4, 32\]"):
        CODECS["gptq"].decode("m", tensors, Scheme(3, 32, True))


def test_gptq_v1_zeros_are_read_field_by_field_or_refused():
    quantized = random_weight(64, 64, 4, 32, symmetric=False)
    quantized = quantized._replace(zeros=quantized.zeros.clamp(min=1))
    tensors = CODECS["gptq_v2"].encode("m", quantized, torch.float16)
    tensors["m.qzeros"] = pack_stream((quantized.zeros - 1).t(), 4)
    assert same(CODECS["gptq"].decode("m", tensors, A4), quantized)
    quantized.zeros[0, 0] = 0  # wraps to 15 in the stored field
    tensors["m.qzeros"] = pack_stream(((quantized.zeros.int() - 1) % 16).to(torch.uint8).t(), 4)
    with pytest.raises(FormatError, match="a stored zero of 15 is ambiguous in gptq .* use a gptq_v2 checkpoint"):
        CODECS["gptq"].decode("m", tensors, A4)


def test_gptq_without_g_idx_is_in_order():
    quantized = random_weight(64, 64, 4, 32, symmetric=True)
    tensors = CODECS["gptq"].encode("m", quantized, torch.float16)
    del tensors["m.g_idx"]
    assert same(CODECS["gptq"].decode("m", tensors, S4), quantized)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_any_float_dtype_are_read(dtype):
    tensors = damaged("gptq", scales=lambda t: t.to(dtype))
    decoded = CODECS["gptq"].decode("m", tensors, S4)
    assert same(decoded, random_weight(64, 64, 4, 32, symmetric=True))  # its scales are exact in bf16
