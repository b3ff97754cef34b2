// Vectors of 4 floats (NEON, which every 64-bit Arm processor has) and the reading of codes as floats; the counterpart
// of simd256.h and simd512.h.
#pragma once
#include <arm_neon.h>

#include <utility>

#include "kernel.h"

namespace {

constexpr int LANES = 4;
using Floats = float32x4_t;

inline Floats zero() { return vdupq_n_f32(0); }
inline Floats set1(float f) { return vdupq_n_f32(f); }
inline Floats load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Floats v) { vst1q_f32(p, v); }
inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
inline Floats sub(Floats a, Floats b) { return vsubq_f32(a, b); }
inline Floats div(Floats a, Floats b) { return vdivq_f32(a, b); }
inline Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline Floats fnma(Floats a, Floats b, Floats c) { return vfmsq_f32(c, a, b); }

// A NaN becomes `low`, as with the other instruction sets.
inline Floats clamp(Floats v, Floats low, Floats high) { return vminnmq_f32(vmaxnmq_f32(v, low), high); }
// To whole numbers, ties to even.
inline Floats round(Floats v) { return vrndnq_f32(v); }
// Whole numbers from 0 to 255.
inline void store_bytes(uint8_t* p, Floats v) {
  const uint16x4_t half = vmovn_u32(vcvtq_u32_f32(v));
  const uint32_t bytes = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(half, half))), 0);
  std::memcpy(p, &bytes, sizeof bytes);
}
inline float sum(Floats v) { return vaddvq_f32(v); }

// v where r is finite, else 0.
inline Floats zero_unless_finite(Floats v, Floats r) {
  return vreinterpretq_f32_u32(vandq_u32(vceqq_f32(sub(r, r), zero()), vreinterpretq_u32_f32(v)));
}

inline Floats load_bytes(const uint8_t* p) {
  uint32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(bytes))))));
}

inline Floats load_as(Type type, const void* base, int64_t i) {
  if (type == FLOAT32) return load(static_cast<const float*>(base) + i);
  const uint16x4_t v = vld1_u16(static_cast<const uint16_t*>(base) + i);
  if (type == FLOAT16) return vcvt_f32_f16(vreinterpret_f16_u16(v));
  return vreinterpretq_f32_u32(vshll_n_u16(v, 16));
}

// Round to nearest, ties to even; a NaN stays one.
inline uint16x4_t to_bfloat16(Floats v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, vdupq_n_u32(0x7fc00000)), 16);
}

inline void store_as(Type type, void* base, int64_t i, Floats v) {
  if (type == FLOAT32) return store(static_cast<float*>(base) + i, v);
  vst1_u16(static_cast<uint16_t*>(base) + i, type == FLOAT16 ? vreinterpret_u16_f16(vcvt_f16_f32(v)) : to_bfloat16(v));
}

inline uint32x4_t load_words(const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }

// Codes as floats: read(p, use) calls use(k, 4 floats) for the STEP k values at p. A field stays where it is in its
// word: the conversion takes the number of bits below it as those of a fraction.
template <int BITS>
struct FloatCodes {
  static constexpr int STEP = BITS == 3 ? 32 : 32 / BITS;
  static constexpr int CENTER = 0;

  template <int AT>
  static Floats field(uint32x4_t v) {
    const uint32x4_t alone = vandq_u32(v, vdupq_n_u32(((1u << BITS) - 1) << AT));
    if constexpr (AT == 0) return vcvtq_f32_u32(alone);
    else return vcvtq_n_f32_u32(alone, AT);
  }

  // Bit of the word where the code of k begins, see codes.h.
  static constexpr int place(int k) { return BITS == 8 ? 8 * k : BITS * (k / 2) + 16 * (k % 2); }

  template <class Use, int... K>
  static inline __attribute__((always_inline)) void fields(uint32x4_t v, Use use, std::integer_sequence<int, K...>) {
    (use(K, field<place(K)>(v)), ...);
  }

  template <class Use>
  inline __attribute__((always_inline)) void read(const uint8_t* p, Use use) const {
    if constexpr (BITS == 3) {
      uint32x4_t third = load_words(p + 128);
      for (int plane = 0; plane < 2; plane++) {
        uint32x4_t low = load_words(p + 64 * plane);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
          const uint32x4_t v = vbslq_u32(vdupq_n_u32(0x00030003), low, third);
          use(16 * plane + 2 * i, field<0>(v));
          use(16 * plane + 2 * i + 1, field<16>(v));
          low = vshrq_n_u32(low, 2);
          third = vsliq_n_u32(vshrq_n_u32(third, 1), third, 31);
        }
      }
    } else {
      fields(load_words(p), use, std::make_integer_sequence<int, STEP>());
    }
  }
};

}  // namespace
