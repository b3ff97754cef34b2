// 8-bit activations: rows of x as signed bytes with one scale each, and the codes of a weight as bytes.
#pragma once
#include <limits>

#include "rows.h"

namespace {

// Codes as unsigned bytes: read(p, use) calls use(j, bytes) for the STEP k values at p. Vector j holds four k values for
// each of 16 columns, in the order that ORDER gives the values of x in, 16 at a time.
template <int BITS>
struct ByteCodes {
  static constexpr int STEP = BITS == 3 ? 32 : 32 / BITS;
  static constexpr int8_t ORDER[4][16] = {
      {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
      {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15},
      {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15},
  };

  static __m128i order() {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(ORDER[BITS == 8 ? 0 : BITS == 4 ? 1 : 2]));
  }

  template <class Use>
  static inline __attribute__((always_inline)) void read(const uint8_t* p, Use use) {
    if constexpr (BITS == 8) {
      use(0, load_words(p));
    } else if constexpr (BITS == 3) {
      const __m512i third = load_words(p + 128);
      for (int plane = 0; plane < 2; plane++) {
        const __m512i low = load_words(p + 64 * plane);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) use(4 * plane + i, with_third(fields(low, 2 * i, 3), third, 8 * plane + i));
      }
    } else {
      const __m512i v = load_words(p);
#pragma GCC unroll 4
      for (int i = 0; i < 8 / BITS; i++) use(i, fields(v, BITS * i, (1 << BITS) - 1));
    }
  }

 private:
  static __m512i fields(__m512i v, int shift, int mask) {
    return _mm512_and_si512(_mm512_srli_epi32(v, unsigned(shift)), _mm512_set1_epi8(char(mask)));
  }

  // Bit 2 of every byte: bytes 0 and 2 are eight k values before bytes 1 and 3, which is four bits of the third plane.
  static __m512i with_third(__m512i low, __m512i third, int right) {
    const __m512i even = _mm512_rorv_epi32(third, _mm512_set1_epi32(right));
    const __m512i odd = _mm512_rorv_epi32(third, _mm512_set1_epi32(right - 4));
    const __m512i bits = _mm512_mask_blend_epi8(0xAAAAAAAAAAAAAAAA, even, odd);
    return _mm512_ternarylogic_epi32(low, bits, _mm512_set1_epi8(4), 0xf8);  // low | (bits & 4)
  }
};

// x in bytes, in [rows][k] or in tiles; x = scale * byte. sums: [rows][groups] of the bytes.
struct ByteRows {
  const int8_t* values;
  const float* scales;
  const int32_t* sums;
};

// The scale of a row of which no magnitude is above `most` (as bits of a float) and what to multiply x with. A row with
// a value that is not finite becomes NaN throughout; one without a magnitude of at least 2^-121 counts as zero.
inline float byte_scale(uint32_t most, float* inverse) {
  float value;
  std::memcpy(&value, &most, 4);
  *inverse = 0;
  if (most >= 0x7f800000) return std::numeric_limits<float>::quiet_NaN();
  if (!(127 / value <= std::numeric_limits<float>::max())) return 0;
  *inverse = 127 / value;
  return value / 127;
}

inline uint32_t largest_magnitude(const float* values, int64_t count) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += LANES)
    most = _mm512_max_epu32(
        most, _mm512_and_si512(_mm512_castps_si512(load(values + i)), _mm512_set1_epi32(0x7fffffff)));
  return uint32_t(_mm512_reduce_max_epu32(most));
}

// Writes 32 values as bytes, each 16 in `order`, and returns vectors of integers that add up to their sum.
inline __m512i write_bytes(const float* values, float inverse, __m128i order, int8_t* out) {
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < UNIT; i += LANES) {
    const __m512i rounded = _mm512_cvtps_epi32(mul(load(values + i), set1(inverse)));
    const __m128i bytes = _mm_shuffle_epi8(_mm512_cvtsepi32_epi8(rounded), order);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), bytes);
    total = _mm512_add_epi32(total, rounded);
  }
  return total;
}

// All of x; place(m, k) says where 32 values of row m from padded position k (a multiple of 32) go.
template <class Place>
void convert_to_bytes(const Input& in, __m128i order, float* scales, int32_t* sums, Place place) {
  const int64_t k_total = in.groups * in.padded_group;
  run(in.rows, std::max<int64_t>(1, 65536 / k_total), [&](int64_t begin, int64_t end) {
    static thread_local Scratch memory;
    float* values = memory.get<float>(k_total);
    for (int64_t m = begin; m < end; m++) {
      for (int64_t k = 0; k < k_total; k += UNIT) read_unit(in, m, k, values + k);
      float inverse;
      scales[m] = byte_scale(largest_magnitude(values, k_total), &inverse);
      for (int64_t g = 0; g < in.groups; g++) {
        __m512i total = _mm512_setzero_si512();
        for (int64_t k = g * in.padded_group; k < (g + 1) * in.padded_group; k += UNIT)
          total = _mm512_add_epi32(total, write_bytes(values + k, inverse, order, place(m, k)));
        sums[m * in.groups + g] = _mm512_reduce_add_epi32(total);
      }
    }
  });
}

// The zero points of one group for the 16 columns of a strip, minus `center`.
inline __m512i integer_zeros(const Weight& w, int64_t strip, int64_t g, int center) {
  if (w.zeros == nullptr) return _mm512_set1_epi32((1 << (w.bits - 1)) - center);
  const uint8_t* p = w.zeros + (strip * w.groups() + g) * STRIP;
  const __m512i zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_sub_epi32(zeros, _mm512_set1_epi32(center));
}

}  // namespace
