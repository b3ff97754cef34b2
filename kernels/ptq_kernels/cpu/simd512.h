// Vectors of 16 floats (AVX512F, BW, VL) and the reading of codes as floats or, for pair products, as bfloat16.
#pragma once
#include <immintrin.h>

#include "kernel.h"

namespace {

constexpr int LANES = 16;
using Floats = __m512;

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats set1(float f) { return _mm512_set1_ps(f); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats clamp(Floats v, Floats low, Floats high) { return _mm512_min_ps(_mm512_max_ps(v, low), high); }
// To whole numbers, ties to even.
inline Floats round(Floats v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float sum(Floats v) { return _mm512_reduce_add_ps(v); }

// v where r is finite, else 0.
inline Floats zero_unless_finite(Floats v, Floats r) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(sub(r, r), zero(), _CMP_EQ_OQ), v);
}

inline Floats load_bytes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// Whole numbers from 0 to 255.
inline void store_bytes(uint8_t* p, Floats v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}

inline __m512i shifted_to_high(__m256i v) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16); }

inline Floats load_as(Type type, const void* base, int64_t i) {
  if (type == FLOAT32) return load(static_cast<const float*>(base) + i);
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(base) + i));
  return type == FLOAT16 ? _mm512_cvtph_ps(v) : _mm512_castsi512_ps(shifted_to_high(v));
}

// Round to nearest, ties to even; a NaN stays one.
inline __m256i to_bfloat16(Floats v) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
#endif
}

inline void store_as(Type type, void* base, int64_t i, Floats v) {
  if (type == FLOAT32) return store(static_cast<float*>(base) + i, v);
  const __m256i half = type == FLOAT16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT) : to_bfloat16(v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(base) + i), half);
}

inline __m512i load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }

// The words of a plane of 3-bit codes: the low two bits from `low`, the rest, of which bit 2 counts, from `high`.
inline __m512i joined(__m512i low, __m512i high) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x00030003), low, high, 0xca);  // mask ? low : high
}

// Signed byte i of every word.
template <int I>
inline __m512i signed_byte(__m512i v) {
  return _mm512_srai_epi32(I == 3 ? v : _mm512_slli_epi32(v, 24 - 8 * I), 24);
}

// Codes minus CENTER as floats: read(p, use) calls use(k, 16 floats) for the STEP k values at p. A table look-up takes
// the low four bits of each word as its index, so fewer bits leave rubbish above them and the table repeats itself.
template <int BITS>
struct FloatCodes {
  static constexpr int STEP = BITS == 3 ? 32 : 32 / BITS;
  static constexpr int CENTER = 1 << (BITS - 1);
  Floats table;

  FloatCodes() {
    float t[16];
    for (int i = 0; i < 16; i++) t[i] = float(i % (1 << BITS) - CENTER);
    table = load(t);
  }

  template <class Use>
  inline __attribute__((always_inline)) void read(const uint8_t* p, Use use) const {
    if constexpr (BITS == 8) {
      const __m512i v = _mm512_xor_si512(load_words(p), _mm512_set1_epi32(int(0x80808080)));
      use(0, _mm512_cvtepi32_ps(signed_byte<0>(v)));
      use(1, _mm512_cvtepi32_ps(signed_byte<1>(v)));
      use(2, _mm512_cvtepi32_ps(signed_byte<2>(v)));
      use(3, _mm512_cvtepi32_ps(signed_byte<3>(v)));
    } else if constexpr (BITS == 3) {
      __m512i third = load_words(p + 128);
      for (int plane = 0; plane < 2; plane++) {
        __m512i low = load_words(p + 64 * plane);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
          const __m512i v = joined(low, third);
          use(16 * plane + 2 * i, _mm512_permutexvar_ps(v, table));
          use(16 * plane + 2 * i + 1, _mm512_permutexvar_ps(_mm512_srli_epi32(v, 16), table));
          low = _mm512_srli_epi32(low, 2);
          third = _mm512_ror_epi32(third, 1);
        }
      }
    } else {
      __m512i even = load_words(p), odd = _mm512_srli_epi32(even, 16);
#pragma GCC unroll 8
      for (int i = 0; i < STEP; i += 2) {
        use(i, _mm512_permutexvar_ps(even, table));
        use(i + 1, _mm512_permutexvar_ps(odd, table));
        even = _mm512_srli_epi32(even, BITS);
        odd = _mm512_srli_epi32(odd, BITS);
      }
    }
  }
};

// Codes minus CENTER as exact bfloat16: read(p, use) calls use(k, words of the pair k, k + 1) for every even k.
// Here the look-up takes five bits of each half word.
template <int BITS>
struct PairCodes {
  static constexpr int STEP = FloatCodes<BITS>::STEP;
  static constexpr int CENTER = FloatCodes<BITS>::CENTER;
  __m512i table;

  PairCodes() {
    uint16_t t[32];
    for (int i = 0; i < 32; i++) {
      const float f = float(i % (1 << BITS) - CENTER);
      uint32_t word;
      std::memcpy(&word, &f, 4);
      t[i] = uint16_t(word >> 16);
    }
    table = _mm512_loadu_si512(t);
  }

  template <class Use>
  inline __attribute__((always_inline)) void read(const uint8_t* p, Use use) const {
    if constexpr (BITS == 8) {
      const __m512i v = _mm512_xor_si512(load_words(p), _mm512_set1_epi32(int(0x80808080)));
      use(0, paired(signed_byte<0>(v), signed_byte<1>(v)));
      use(2, paired(signed_byte<2>(v), signed_byte<3>(v)));
    } else if constexpr (BITS == 3) {
      __m512i third = load_words(p + 128);
      for (int plane = 0; plane < 2; plane++) {
        __m512i low = load_words(p + 64 * plane);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
          use(16 * plane + 2 * i, _mm512_permutexvar_epi16(joined(low, third), table));
          low = _mm512_srli_epi16(low, 2);
          third = _mm512_ror_epi32(third, 1);
        }
      }
    } else {
      __m512i v = load_words(p);
#pragma GCC unroll 8
      for (int i = 0; i < STEP; i += 2) {
        use(i, _mm512_permutexvar_epi16(v, table));
        v = _mm512_srli_epi16(v, BITS);
      }
    }
  }

  // Integers of at most 8 bits are exact in bfloat16, so their floats end in 16 zero bits.
  static __m512i paired(__m512i even, __m512i odd) {
    const __m512i low = _mm512_castps_si512(_mm512_cvtepi32_ps(even));
    return _mm512_or_si512(_mm512_srli_epi32(low, 16), _mm512_castps_si512(_mm512_cvtepi32_ps(odd)));
  }
};

}  // namespace
