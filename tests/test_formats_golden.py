"""Golden words of the three layouts: literal values that any reader of these formats must agree with."""

import hashlib

import pytest
import torch
from format_examples import unsigned

from ptq.formats import CODECS, QuantizedWeight, Scheme
from ptq.formats.bitpack import pack_stream


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def weight(codes, zeros, bits, group_size, scales=None) -> QuantizedWeight:
    scales = torch.full(zeros.shape, 0.5) if scales is None else scales
    symmetric = bool((zeros == 1 << (bits - 1)).all())
    return QuantizedWeight(codes.to(torch.uint8), scales, zeros.to(torch.uint8), bits, group_size, symmetric)


def ramp() -> QuantizedWeight:
    return weight(torch.arange(16).repeat(8, 1), torch.full((8, 1), 8), 4, 16)


def skew() -> QuantizedWeight:
    """Detects a packing that is transposed or in another order."""
    n, k = torch.meshgrid(torch.arange(8), torch.arange(16), indexing="ij")
    return weight((k + 3 * n) % 16, 1 + torch.arange(8)[:, None], 4, 16)


def regression(bits: int) -> QuantizedWeight:
    n, k = torch.meshgrid(torch.arange(32), torch.arange(64), indexing="ij")
    row, group = torch.meshgrid(torch.arange(32), torch.arange(2), indexing="ij")
    zeros = 1 + (row + group) % (2**bits - 1)
    return weight((k + 3 * n) % 2**bits, zeros, bits, 32, scales=(1 + (row + group) % 7) / 64)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def encode(codec: str, quantized: QuantizedWeight, dtype=torch.float16) -> dict[str, torch.Tensor]:
    return CODECS[codec].encode("m", quantized, dtype)


def test_ramp():
    quantized = ramp()
    # These 8 x 16 examples are smaller than the 32 x 32 that GPTQ files hold, so its words come from the packer.
    assert unsigned(pack_stream(quantized.codes, 4).t()) == [[0x76543210] * 8, [0xFEDCBA98] * 8]
    assert unsigned(pack_stream(quantized.zeros.t() - 1, 4)) == [[0x77777777]]
    awq = encode("awq", quantized)
    assert unsigned(awq["m.qweight"]) == [[nibble * 0x11111111] for nibble in range(16)]
    assert unsigned(awq["m.qzeros"]) == [[0x88888888]]
    packed = encode("compressed-tensors", quantized)
    assert unsigned(packed["m.weight_packed"]) == [[0x76543210, 0xFEDCBA98]] * 8


def test_skew():
    quantized = skew()
    rows = [
        words("76543210 A9876543 DCBA9876 0FEDCBA9 3210FEDC 6543210F 98765432 CBA98765"),
        words("FEDCBA98 210FEDCB 543210FE 87654321 BA987654 EDCBA987 10FEDCBA 43210FED"),
    ]
    assert unsigned(pack_stream(quantized.codes, 4).t()) == rows
    assert unsigned(pack_stream(quantized.zeros.t() - 1, 4)) == [[0x76543210]]
    assert unsigned(pack_stream(quantized.zeros.t(), 4)) == [[0x87654321]]
    awq = encode("awq", quantized)
    assert unsigned(awq["m.qweight"].t()) == [
        words(
            "5F932C60 60A43D71 71B54E82 82C65F93 93D760A4 A4E871B5 B5F982C6 C60A93D7 "
            "D71BA4E8 E82CB5F9 F93DC60A 0A4ED71B 1B5FE82C 2C60F93D 3D710A4E 4E821B5F"
        )
    ]
    assert unsigned(awq["m.qzeros"]) == [[0x86427531]]
    packed = encode("compressed-tensors", quantized)
    assert unsigned(packed["m.weight_packed"].t()) == rows
    assert unsigned(packed["m.weight_zero_point"]) == [[0x87654321]]


REGRESSION = {  # bits: qweight, qzeros v2, weight_packed, weight_zero_point, W[1,5], W[31,63], sum(W)
    2: ("9de0abb5522e6457", "ca3cd2160dab7993", "f0e021d6a7c05051", "ca3cd2160dab7993", -0.0625, -0.234375, -61),
    3: ("fcb51c5b82454664", "7f95ffbd9cad9701", "c0d51e25a55e1897", "b5029f3a9a21c190", -0.0625, -0.078125, -168),
    4: ("74875ece8c7333b0", "4303eca16083687f", "650d67c86a31b8b8", "391716336cff2544", 0.1875, 0.703125, -43),
    5: (None, None, "c5b5d0d796f3874a", "e21569cf2f5daa46", 0.1875, 2.03125, -4.5),
    6: (None, None, "8d4a031fc6b5cd33", "d4471684acdceb44", 0.1875, -0.390625, 1786),
    7: (None, None, "a1ace6eb4160ac2b", "eec4e33e8d4cd130", 0.1875, -0.390625, 6423),
    8: ("023bb5dfad950bdf", "163bc0b1df17dae8", "d50e804b7ebe9776", "13e625438952aeb8", 0.1875, 9.609375, 7633),
}
ZEROS_V1 = {2: "8ef18033d7ae56aa", 3: "7a99026da95c1dc0", 4: "c066eb40af897f18", 8: "0bc5e47a9635138c"}


@pytest.mark.parametrize("bits", REGRESSION)
def test_regression_hashes(bits):
    quantized = regression(bits)
    qweight, qzeros, weight_packed, zero_point, *values = REGRESSION[bits]
    dense = quantized.dequantize(torch.float64)
    assert [dense[1, 5].item(), dense[31, 63].item(), dense.sum().item()] == values
    packed = encode("compressed-tensors", quantized)
    assert digest(packed["m.weight_packed"]) == weight_packed
    assert digest(packed["m.weight_zero_point"]) == zero_point
    assert digest(packed["m.weight_scale"]) == "1b204ca07f272ba1"
    if qweight is not None:
        gptq = encode("gptq_v2", quantized)
        assert (digest(gptq["m.qweight"]), digest(gptq["m.qzeros"])) == (qweight, qzeros)
        assert digest(gptq["m.scales"]) == "6f1723721a8db30f"
        assert torch.equal(gptq["m.g_idx"], (torch.arange(64) // 32).int())
        # Asymmetric v1 is not written, but its words are known and read.
        v1 = {**gptq, "m.qzeros": pack_stream(quantized.zeros.t() - 1, bits)}
        assert digest(v1["m.qzeros"]) == ZEROS_V1[bits]
        decoded = CODECS["gptq"].decode("m", v1, Scheme(bits, 32, False))
        assert torch.equal(decoded.dequantize(), quantized.dequantize())


def test_regression_awq():
    awq = encode("awq", regression(4))
    assert (digest(awq["m.qweight"]), digest(awq["m.qzeros"])) == ("b18519ceb0d64c63", "900ce23172ffc968")
    assert unsigned(awq["m.qweight"])[0] == words("5F932C60 D71BA4E8 5F932C60 D71BA4E8")


@pytest.mark.parametrize(
    ("bits", "v1", "v2"),
    [
        (2, "55555555", "AAAAAAAA"),
        (3, "DB6DB6DB B6DB6DB6 6DB6DB6D", "24924924 49249249 92492492"),
        (4, "77777777", "88888888"),
        (8, "7F7F7F7F", "80808080"),
    ],
)
def test_symmetric_zero_words(bits, v1, v2):
    quantized = weight(torch.zeros(32, 32), torch.full((32, 1), 1 << (bits - 1)), bits, 32)
    for codec, expected in (("gptq", v1), ("gptq_v2", v2)):
        found = unsigned(encode(codec, quantized)["m.qzeros"])[0]
        assert found == words(expected) * (len(found) // len(words(expected)))
