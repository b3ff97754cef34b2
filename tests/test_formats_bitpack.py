"""Bit streams. Oracle: one Python integer a row, golden words, and the definition of the inverse."""

import pytest
import torch
from format_examples import packed_by_integers, unsigned
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.errors import FormatError
from ptq.formats.bitpack import pack_stream, unpack_stream, words_for


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(0, 4),
    columns=st.integers(0, 100),
    seed=st.integers(0, 2**16),
)
def test_pack_matches_integers_and_unpacks(bits, rows, columns, seed):
    codes = torch.randint(
        0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    words = pack_stream(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, words_for(columns, bits))
    assert unsigned(words) == packed_by_integers(codes, bits)
    assert torch.equal(unpack_stream(words, bits, columns), codes)


def test_three_bit_words_straddle_as_specified():
    ramp = (torch.arange(32, dtype=torch.uint8) % 8)[None]
    assert unsigned(pack_stream(ramp, 3)) == [[0x88FAC688, 0xC688FAC6, 0xFAC688FA]]
    two = torch.zeros(1, 32, dtype=torch.uint8)
    two[0, [10, 21]] = 7
    assert unsigned(pack_stream(two, 3)) == [[0xC0000000, 0x80000001, 0x00000003]]


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (2, [0x93939393]),
        (3, [0x63447D63, 0x7D63447D, 0x447D6344]),
        (4, [0xA9876543, 0x210FEDCB]),
        (5, [0x50731483, 0xF7358B52, 0x56939460]),
        (6, [0x07185103, 0xD30B2892, 0x49140F38]),
        (7, [0x70C14203, 0x0B142440, 0x80F1C346]),
        (8, [0x06050403, 0x0A090807]),
    ],
)
def test_golden_first_words_of_every_width(bits, words):
    codes = ((torch.arange(64) + 3) % (1 << bits)).to(torch.uint8)[None]
    assert unsigned(pack_stream(codes, bits))[0][: len(words)] == words


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_transposed_views_are_packed_by_value(bits):
    codes = torch.randint(0, 1 << bits, (64, 33), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    words = pack_stream(codes.t(), bits)
    assert torch.equal(words, pack_stream(codes.t().contiguous(), bits))
    transposed = words.t().contiguous().t()
    assert torch.equal(unpack_stream(transposed, bits, 64), codes.t())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_stream(torch.zeros(1, 4, dtype=torch.uint8), 9), "1 to 8 bits wide, found 9"),
        (lambda: unpack_stream(torch.zeros(1, 4, dtype=torch.int32), 0, 4), "1 to 8 bits wide, found 0"),
        (lambda: pack_stream(torch.zeros(1, 4), 4), r"must be uint8 \[R, C\], found torch.float32 \[1, 4\]"),
        (lambda: pack_stream(torch.full((1, 4), 16, dtype=torch.uint8), 4), "must be 0..15, found 16"),
        (lambda: unpack_stream(torch.zeros(4), 4, 8), r"must be int32 \[R, words\], found torch.float32 \[4\]"),
        (lambda: unpack_stream(torch.zeros(1, 2, dtype=torch.int32), 3, 32), "fill 3 words a row, found 2 words"),
    ],
)
def test_errors(call, message):
    with pytest.raises(FormatError, match=message):
        call()
