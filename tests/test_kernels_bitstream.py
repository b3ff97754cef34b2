"""ptq_kernels.pack and unpack: the canonical bit stream."""

import pytest
import torch
from ptq_kernels import pack, unpack

BITS = (2, 3, 4, 8)
WIDTHS = (1, 5, 10, 11, 31, 32, 33, 64, 100, 257)  # whole words, straddled words, lone values


def stream_words(codes: list[int], bits: int) -> list[int]:
    """Oracle: the row as one big integer, cut into signed 32-bit words."""
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", BITS)
def test_pack_is_the_little_endian_bit_stream(bits: int, width: int) -> None:
    codes = torch.randint(0, 2**bits, (3, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(width))
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [stream_words(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(packed, bits, width), codes)


def test_golden_words_of_three_bits() -> None:
    # codes 0..7 repeated: 0o76543210 is the 24-bit period, so word 0 holds it and the first 8 bits of the next one
    codes = (torch.arange(32) % 8).to(torch.uint8).view(1, 32)
    period = 0o76543210
    stream = period | period << 24 | period << 48 | period << 72
    want = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(3)]
    assert [word & 0xFFFFFFFF for word in pack(codes, 3)[0].tolist()] == want


@pytest.mark.parametrize("bits", BITS)
def test_agrees_with_compressed_tensors(bits: int) -> None:
    packing = pytest.importorskip("compressed_tensors.compressors", reason="another reader of the format")
    codes = torch.randint(0, 2**bits, (4, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits), packing.pack_to_int32(signed, bits))


def test_result_does_not_share_memory_with_the_weight() -> None:
    packed = pack(torch.full((2, 4), 7, dtype=torch.uint8), 8)
    unpack(packed, 8, 4).zero_()
    assert torch.equal(unpack(packed, 8, 4), torch.full((2, 4), 7, dtype=torch.uint8))


def test_accepts_views_and_meta_tensors() -> None:
    codes = torch.arange(12, dtype=torch.uint8).view(4, 3)
    assert torch.equal(unpack(pack(codes.T, 4), 4, 4), codes.T)
    assert pack(torch.empty(5, 33, dtype=torch.uint8, device="meta"), 3).shape == (5, 4)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "bits must be one of", lambda: pack(torch.zeros(1, 8, dtype=torch.uint8), 5)),
        (ValueError, "bits must be one of", lambda: unpack(torch.zeros(1, 1, dtype=torch.int32), 6, 4)),
        (TypeError, r"uint8 codes of shape \[N, K\]", lambda: pack(torch.zeros(1, 8), 4)),
        (TypeError, r"uint8 codes of shape \[N, K\]", lambda: pack(torch.zeros(8, dtype=torch.uint8), 4)),
        (ValueError, r"bits must be one of .* got 4.0", lambda: pack(torch.zeros(1, 8, dtype=torch.uint8), 4.0)),
        (ValueError, r"one row and one column of codes, got \[2, 0\]", lambda: pack(torch.zeros(2, 0).byte(), 4)),
        (ValueError, r"one row and one column of codes, got \[0, 8\]", lambda: pack(torch.zeros(0, 8).byte(), 4)),
        (ValueError, "must be below 16, found 16", lambda: pack(torch.full((1, 8), 16, dtype=torch.uint8), 4)),
        (TypeError, "needs int32 words", lambda: unpack(torch.zeros(1, 1), 4, 8)),
        (ValueError, "need 2 words a row, got 1", lambda: unpack(torch.zeros(1, 1, dtype=torch.int32), 4, 9)),
    ],
)
def test_refuses(error: type[Exception], match: str, call) -> None:
    with pytest.raises(error, match=match):
        call()
