"""Block formats of GGUF.

Oracles: the decoder of the gguf package (another implementation), golden bytes put together by hand from llama.cpp's
struct definitions, and exact round trips.
"""

import hashlib

import gguf
import pytest
import torch
from gguf import quants

from ptq.errors import FormatError
from ptq.formats.codec import QuantizedWeight, Scheme
from ptq.gguf.blocks import KINDS, Blocks, decode, encode, row_bytes, stack_rows, values
from ptq.gguf.carry import carry, fits


def random_blocks(kind: str, n: int = 5, k: int = 768) -> Blocks:
    shape, generator = KINDS[kind], torch.Generator().manual_seed(0)

    def whole(low: int, high: int, columns: int) -> torch.Tensor:
        return torch.randint(low, high, (n, columns), generator=generator, dtype=torch.int16)

    codes = whole(0, 2**shape.bits, k).to(torch.uint8)
    scales, mins = (torch.randn(n, k // shape.columns, generator=generator).half() for _ in range(2))
    factors = min_factors = None
    if shape.columns == 256:
        signed = kind == "Q6_K"
        factors = whole(-128 if signed else 0, 128 if signed else 64, k // shape.group)
        min_factors = None if signed else whole(0, 64, k // shape.group)
    return Blocks(kind, codes, scales, mins if shape.minimum else None, factors, min_factors)


def same(one: Blocks, other: Blocks) -> bool:
    return one.kind == other.kind and all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(one[1:], other[1:], strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_gguf_package_reads_the_same_values(kind):
    blocks = random_blocks(kind)
    read = quants.dequantize(encode(blocks).numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(read), values(blocks))


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_back_every_field(kind):
    blocks = random_blocks(kind)
    assert same(decode(kind, encode(blocks)), blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_those_of_the_gguf_package(kind):
    assert (KINDS[kind].columns, KINDS[kind].nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


def ramp(kind: str, d: float, m: float | None = None, factors: list[int] | None = None,
         min_factors: list[int] | None = None) -> Blocks:  # fmt: skip
    shape = KINDS[kind]
    codes = (torch.arange(shape.columns) % 2**shape.bits).to(torch.uint8)[None]
    if kind == "Q8_0":
        codes = (torch.arange(32) + 112).to(torch.uint8)[None]  # -16 to 15

    def row(x: list[int] | None) -> torch.Tensor | None:
        return None if x is None else torch.tensor([x], dtype=torch.int16)

    mins = None if m is None else torch.tensor([[m]]).half()
    return Blocks(kind, codes, torch.tensor([[d]]).half(), mins, row(factors), row(min_factors))


RAMP = bytes(i * 17 for i in range(16))  # codes 0 to 15 in both nibbles
GOLDEN = {
    "Q4_0": (ramp("Q4_0", 0.5), b"\x00\x38" + RAMP),
    "Q4_0 negative": (ramp("Q4_0", -0.5), b"\x00\xb8" + RAMP),
    "Q4_1": (ramp("Q4_1", 0.5, -4.0), b"\x00\x38\x00\xc4" + RAMP),
    "Q5_0": (ramp("Q5_0", 0.5), b"\x00\x38\x00\x00\xff\xff" + RAMP),
    "Q5_1": (ramp("Q5_1", 0.5, -8.0), b"\x00\x38\x00\xc8\x00\x00\xff\xff" + RAMP),
    "Q8_0": (ramp("Q8_0", 0.5), b"\x00\x38" + bytes(i % 256 for i in range(-16, 16))),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_blocks_of_32_byte_by_byte(name):
    blocks, expected = GOLDEN[name]
    assert encode(blocks).numpy().tobytes() == expected


def test_twelve_bytes_hold_the_factors_of_a_k_quant():
    blocks = ramp("Q4_K", 0.5, 0.25, [1, 2, 3, 4, 20, 40, 60, 63], [0, 5, 10, 15, 17, 33, 50, 63])
    assert encode(blocks).numpy().tobytes()[4:16] == bytes.fromhex("4182C3C44085CACF14182CFF")


K_HASHES = {
    "Q4_K": (ramp("Q4_K", 0.5, 0.5, [1] * 8, [8] * 8), "7f13054f5ba732e8"),
    "Q5_K": (ramp("Q5_K", 0.5, 0.5, [1] * 8, [16] * 8), "b30cde4c76ad87d9"),
    "Q6_K": (ramp("Q6_K", 0.5, factors=[1] * 16), "be2f04da85a5822e"),
}


@pytest.mark.parametrize("kind", K_HASHES)
def test_blocks_of_256_by_hash(kind):
    blocks, expected = K_HASHES[kind]
    assert hashlib.sha256(encode(blocks).numpy().tobytes()).hexdigest()[:16] == expected


def test_rows_of_the_same_kind_are_stacked():
    one = random_blocks("Q4_K")
    both = stack_rows([one, one])
    assert same(both, Blocks("Q4_K", *(torch.cat([f, f]) for f in one[1:])))


def test_rows_that_blocks_do_not_fill_are_refused():
    with pytest.raises(FormatError, match="Q4_K needs rows of a multiple of 256 weights, found 64"):
        row_bytes("Q4_K", 64)


def test_a_cut_row_is_refused():
    with pytest.raises(FormatError, match="multiple of 18 bytes, found 17"):
        decode("Q4_0", torch.zeros(1, 17, dtype=torch.uint8))


def result(bits: int, group: int, symmetric: bool, k: int = 512) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (6, k), generator=generator, dtype=torch.uint8)
    # bf16 values, as bf16 models have them
    scales = (torch.randn(6, k // group, generator=generator) * 0.01 + 0.02).bfloat16().float()
    zeros = torch.full((6, k // group), 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(0, 2**bits, zeros.shape, generator=generator, dtype=torch.uint8)
    return QuantizedWeight(codes, scales, zeros, bits, group, symmetric)


# kind, bits, group, symmetric
EXACT = [
    ("Q4_0", 4, 32, True), ("Q4_0", 4, 128, True), ("Q4_0", 4, 512, True), ("Q4_0", 3, 32, True),
    ("Q4_0", 3, 64, False), ("Q5_0", 4, 32, False), ("Q8_0", 8, 32, True), ("Q8_0", 4, 128, False),
    ("Q4_K", 4, 256, False), ("Q4_K", 4, 512, True), ("Q5_K", 5, 256, False), ("Q6_K", 6, 256, True),
    ("Q6_K", 4, 256, False),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "bits", "group", "symmetric"), EXACT)
def test_what_fits_is_carried_without_changing_a_value(kind, bits, group, symmetric):
    quantized = result(bits, group, symmetric)
    assert fits(kind, Scheme(bits, group, symmetric), 512)
    blocks, off = carry(kind, quantized, "weight")
    assert off == 0
    assert torch.equal(values(blocks), quantized.dequantize())
    if KINDS[kind].bits == bits:
        assert torch.equal(blocks.codes, quantized.codes)


@pytest.mark.parametrize(("kind", "bits"), [("Q4_1", 4), ("Q5_1", 5), ("Q4_1", 3)])
def test_a_minimum_is_rounded_and_the_codes_stay(kind, bits):
    quantized = result(bits, 64, False)
    blocks, off = carry(kind, quantized, "weight")
    assert torch.equal(blocks.codes, quantized.codes)
    step = quantized.scales.abs().repeat_interleave(64, 1)
    # float16 rounds to 11 bits: half a unit in the last place of at most (2**bits - 1) steps
    assert off <= (2**bits - 1) * 2.0**-11
    # the float32 sums round once more
    assert ((values(blocks) - quantized.dequantize()).abs() / step).max() <= off + (2**bits) * 2.0**-23


@pytest.mark.parametrize(
    ("kind", "scheme", "columns"),
    [("Q4_0", Scheme(4, 16, True), 512), ("Q4_0", Scheme(4, 32, False), 512), ("Q8_0", Scheme(8, 32, False), 512),
     ("Q4_K", Scheme(4, 128, True), 512), ("Q4_1", Scheme(8, 32, True), 512), ("Q4_K", Scheme(4, -1, True), 320)],
)  # fmt: skip
def test_what_does_not_fit(kind, scheme, columns):
    assert not fits(kind, scheme, columns)


def test_a_scale_that_float16_does_not_hold_is_refused():
    quantized = result(4, 32, True)
    quantized.scales[2, 3] = 0.1
    with pytest.raises(FormatError, match=r"q_proj: .* float16 scales, which 0.1"):
        carry("Q4_0", quantized, "q_proj")


def test_a_minimum_that_float16_does_not_reach_is_refused():
    quantized = result(4, 32, False)
    quantized.scales[2, 3], quantized.zeros[2, 3] = 8192.0, 9
    with pytest.raises(FormatError, match=r"q_proj: Q4_1 blocks hold float16 minimums, .*; found 73728: export"):
        carry("Q4_1", quantized, "q_proj")
