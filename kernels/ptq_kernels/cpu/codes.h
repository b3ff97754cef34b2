// How the codes of a strip lie: conversion from and to the canonical bit stream of a row, exactly.
//
// 32 consecutive k values of one row are `bits` 32-bit words in the canonical stream and as many in a strip. In a strip
// word w of column c lies at byte 64 * w + 4 * c, so that one 64-byte load brings the same word of all 16 columns:
//   8 bits: word k / 4, byte k % 4                           (a word is the same as in the stream)
//   4 bits: word k / 8; even k in the low half, odd k in the high half, nibble k % 8 / 2
//   2 bits: word k / 16; likewise, field k % 16 / 2
//   3 bits: words 0 and 1: the low two bits of each code, as 2 bits; word 2: the third bits,
//           k at bit (k / 2 + 16 * (k % 2) + 2) % 32, so that one rotation a step brings the next pair into place
// Halves by parity are what bfloat16 pair products read: one table look-up gives the pairs of all 16 columns.
#pragma once
#include <immintrin.h>

#include "kernel.h"

namespace {

inline uint32_t rotated(uint32_t word, int left) { return word << left | word >> (32 - left); }

// Fields at even places to the low half, at odd places to the high half, and back; `even` selects the even fields.
inline uint32_t by_parity(uint32_t word, uint32_t even) { return _pext_u32(word, even) | _pext_u32(word, ~even) << 16; }
inline uint32_t in_order(uint32_t word, uint32_t even) { return _pdep_u32(word, even) | _pdep_u32(word >> 16, ~even); }

constexpr uint32_t EVEN_NIBBLES = 0x0f0f0f0f, EVEN_TWOS = 0x33333333, EVEN_BITS = 0x55555555;
constexpr uint64_t LOW_TWO = 0x6db6db6db6db, THIRD = 0x924924924924;  // of sixteen 3-bit codes in 48 bits

inline void three_to_strip(const uint32_t* stream, uint32_t* out) {
  const uint64_t first = stream[0] | uint64_t(stream[1] & 0xffff) << 32;
  const uint64_t second = stream[1] >> 16 | uint64_t(stream[2]) << 16;
  out[0] = by_parity(uint32_t(_pext_u64(first, LOW_TWO)), EVEN_TWOS);
  out[STRIP] = by_parity(uint32_t(_pext_u64(second, LOW_TWO)), EVEN_TWOS);
  const uint32_t third = uint32_t(_pext_u64(first, THIRD) | _pext_u64(second, THIRD) << 16);
  out[2 * STRIP] = rotated(by_parity(third, EVEN_BITS), 2);
}

inline void three_to_stream(const uint32_t* in, uint32_t* stream) {
  const uint32_t third = in_order(rotated(in[2 * STRIP], 30), EVEN_BITS);
  const uint64_t first = _pdep_u64(in_order(in[0], EVEN_TWOS), LOW_TWO) | _pdep_u64(third & 0xffff, THIRD);
  const uint64_t second = _pdep_u64(in_order(in[STRIP], EVEN_TWOS), LOW_TWO) | _pdep_u64(third >> 16, THIRD);
  stream[0] = uint32_t(first);
  stream[1] = uint32_t(first >> 32 | second << 16);
  stream[2] = uint32_t(second >> 16);
}

// The `bits` words of 32 codes of one row; the strip's words are STRIP apart.
inline void to_strip(int bits, const uint32_t* stream, uint32_t* out) {
  if (bits == 3) return three_to_strip(stream, out);
  for (int i = 0; i < bits; i++)
    out[i * STRIP] = bits == 8 ? stream[i] : by_parity(stream[i], bits == 4 ? EVEN_NIBBLES : EVEN_TWOS);
}

inline void to_stream(int bits, const uint32_t* in, uint32_t* stream) {
  if (bits == 3) return three_to_stream(in, stream);
  for (int i = 0; i < bits; i++)
    stream[i] = bits == 8 ? in[i * STRIP] : in_order(in[i * STRIP], bits == 4 ? EVEN_NIBBLES : EVEN_TWOS);
}

// stream: [rows][k * bits / 32] with k a multiple of 32; rows beyond `rows` become zeros in the strips.
void pack_codes(const uint32_t* stream, uint32_t* strips, int64_t rows, int64_t k, int bits) {
  const int64_t words = k * bits / 32;
  run(rounded_up(rows, 2 * STRIP) / STRIP, 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; strip++)
      for (int64_t w = 0; w < words; w += bits)
        for (int64_t c = 0; c < STRIP; c++) {
          const uint32_t none[8] = {};
          const int64_t row = strip * STRIP + c;
          to_strip(bits, row < rows ? stream + row * words + w : none, strips + (strip * words + w) * STRIP + c);
        }
  });
}

void unpack_codes(const uint32_t* strips, uint32_t* stream, int64_t rows, int64_t k, int bits) {
  const int64_t words = k * bits / 32;
  run(rows, STRIP, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      for (int64_t w = 0; w < words; w += bits)
        to_stream(bits, strips + (row / STRIP * words + w) * STRIP + row % STRIP, stream + row * words + w);
  });
}

}  // namespace
