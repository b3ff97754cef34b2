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
#include "kernel.h"

namespace {

inline uint32_t rotated(uint32_t word, int left) { return word << left | word >> (32 - left); }

// Swaps the bits of `mask` with those `left` places above them.
inline uint32_t swapped(uint32_t word, int left, uint32_t mask) {
  const uint32_t differ = (word ^ word >> left) & mask;
  return word ^ differ ^ differ << left;
}

// The inner two of four neighbours of 1, 2, 4 and 8 bits.
constexpr uint32_t INNER[4] = {0x22222222, 0x0c0c0c0c, 0x00f000f0, 0x0000ff00};

// Fields of 2^log bits at even places to the low half, at odd places to the high half, and back.
inline uint32_t by_parity(uint32_t word, int log) {
  for (int i = log; i < 4; i++) word = swapped(word, 1 << i, INNER[i]);
  return word;
}
inline uint32_t in_order(uint32_t word, int log) {
  for (int i = 3; i >= log; i--) word = swapped(word, 1 << i, INNER[i]);
  return word;
}

// Sixteen 3-bit codes as their low two bits and their third ones, and back.
struct Halves {
  uint32_t low, third;
};
inline Halves halves(uint64_t codes) {
  Halves h{0, 0};
  for (int i = 0; i < 16; i++) {
    h.low |= uint32_t(codes >> 3 * i & 3) << 2 * i;
    h.third |= uint32_t(codes >> (3 * i + 2) & 1) << i;
  }
  return h;
}
inline uint64_t joined(uint32_t low, uint32_t third) {
  uint64_t codes = 0;
  for (int i = 0; i < 16; i++) codes |= uint64_t((low >> 2 * i & 3) | (third >> i & 1) << 2) << 3 * i;
  return codes;
}

inline void three_to_strip(const uint32_t* stream, uint32_t* out) {
  const Halves first = halves(stream[0] | uint64_t(stream[1] & 0xffff) << 32);
  const Halves second = halves(stream[1] >> 16 | uint64_t(stream[2]) << 16);
  out[0] = by_parity(first.low, 1);
  out[STRIP] = by_parity(second.low, 1);
  out[2 * STRIP] = rotated(by_parity(first.third | second.third << 16, 0), 2);
}

inline void three_to_stream(const uint32_t* in, uint32_t* stream) {
  const uint32_t third = in_order(rotated(in[2 * STRIP], 30), 0);
  const uint64_t first = joined(in_order(in[0], 1), third), second = joined(in_order(in[STRIP], 1), third >> 16);
  stream[0] = uint32_t(first);
  stream[1] = uint32_t(first >> 32 | second << 16);
  stream[2] = uint32_t(second >> 16);
}

// The `bits` words of 32 codes of one row; the strip's words are STRIP apart.
inline void to_strip(int bits, const uint32_t* stream, uint32_t* out) {
  if (bits == 3) return three_to_strip(stream, out);
  for (int i = 0; i < bits; i++)
    out[i * STRIP] = bits == 8 ? stream[i] : by_parity(stream[i], bits / 2);
}

inline void to_stream(int bits, const uint32_t* in, uint32_t* stream) {
  if (bits == 3) return three_to_stream(in, stream);
  for (int i = 0; i < bits; i++)
    stream[i] = bits == 8 ? in[i * STRIP] : in_order(in[i * STRIP], bits / 2);
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
