// Vectors of 8 floats (AVX2, FMA, F16C) and the reading of codes as floats; the counterpart of simd512.h.
#pragma once
#include <immintrin.h>

#include "kernel.h"

namespace {

constexpr int LANES = 8;
using Floats = __m256;

inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats set1(float f) { return _mm256_set1_ps(f); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }

inline Floats clamp(Floats v, Floats low, Floats high) { return _mm256_min_ps(_mm256_max_ps(v, low), high); }
// To whole numbers, ties to even.
inline Floats round(Floats v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// Whole numbers from 0 to 255.
inline void store_bytes(uint8_t* p, Floats v) {
  const __m256i words = _mm256_cvtps_epi32(v);
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(half, half));
}
inline float sum(Floats v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// v where r is finite, else 0.
inline Floats zero_unless_finite(Floats v, Floats r) {
  return _mm256_and_ps(_mm256_cmp_ps(sub(r, r), zero(), _CMP_EQ_OQ), v);
}

inline Floats load_bytes(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

inline Floats load_as(Type type, const void* base, int64_t i) {
  if (type == FLOAT32) return load(static_cast<const float*>(base) + i);
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(base) + i));
  if (type == FLOAT16) return _mm256_cvtph_ps(v);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

// Round to nearest, ties to even; a NaN stays one.
inline __m128i to_bfloat16(Floats v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const Floats nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q), quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  const __m256i kept = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, nan));
  const __m256i high = _mm256_srli_epi32(kept, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

inline void store_as(Type type, void* base, int64_t i, Floats v) {
  if (type == FLOAT32) return store(static_cast<float*>(base) + i, v);
  const __m128i half = type == FLOAT16 ? _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT) : to_bfloat16(v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(base) + i), half);
}

inline __m256i load_words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// Codes minus CENTER as floats: read(p, use) calls use(k, 8 floats) for the STEP k values at p. A table look-up takes the
// low three bits of each word; wider codes are converted, and centered by their caller.
template <int BITS>
struct FloatCodes {
  static constexpr int STEP = BITS == 3 ? 32 : 32 / BITS;
  static constexpr int CENTER = BITS <= 3 ? 1 << (BITS - 1) : 0;
  Floats table;

  FloatCodes() {
    float t[8];
    for (int i = 0; i < 8; i++) t[i] = float(i % (1 << BITS) - CENTER);
    table = load(t);
  }

  Floats looked_up(__m256i v) const { return _mm256_permutevar8x32_ps(table, v); }

  template <class Use>
  inline __attribute__((always_inline)) void read(const uint8_t* p, Use use) const {
    if constexpr (BITS == 3) {
      __m256i third = load_words(p + 128);
      const __m256i mask = _mm256_set1_epi32(0x00030003);
      for (int plane = 0; plane < 2; plane++) {
        __m256i low = load_words(p + 64 * plane);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
          const __m256i v = _mm256_or_si256(_mm256_and_si256(mask, low), _mm256_andnot_si256(mask, third));
          use(16 * plane + 2 * i, looked_up(v));
          use(16 * plane + 2 * i + 1, looked_up(_mm256_srli_epi32(v, 16)));
          low = _mm256_srli_epi32(low, 2);
          third = _mm256_or_si256(_mm256_srli_epi32(third, 1), _mm256_slli_epi32(third, 31));
        }
      }
    } else if constexpr (BITS == 2) {
      __m256i even = load_words(p), odd = _mm256_srli_epi32(even, 16);
#pragma GCC unroll 8
      for (int i = 0; i < STEP; i += 2) {
        use(i, looked_up(even));
        use(i + 1, looked_up(odd));
        even = _mm256_srli_epi32(even, 2);
        odd = _mm256_srli_epi32(odd, 2);
      }
    } else {
      const __m256i mask = _mm256_set1_epi32((1 << BITS) - 1);
      __m256i v = load_words(p);
#pragma GCC unroll 4
      for (int i = 0; i < STEP / 2; i++) {
        const int even = BITS == 4 ? 2 * i : i, odd = BITS == 4 ? 2 * i + 1 : i + 2;
        use(even, _mm256_cvtepi32_ps(_mm256_and_si256(v, mask)));
        use(odd, _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(v, 16), mask)));
        v = _mm256_srli_epi32(v, BITS);
      }
    }
  }
};

}  // namespace
