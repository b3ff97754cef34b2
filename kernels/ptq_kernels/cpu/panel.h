// Panels: some strips of the weight, over some depth, written out in the order that the multiplication reads.
#pragma once
#include "rows.h"

namespace {

// A row of a panel holds DEPTH (1 or 2) values of k for each of its columns; one unit is 32 values of k of one strip.

template <int BITS>
struct FloatValues {  // dequantized in float32, rounded once
  using Element = float;
  static constexpr int DEPTH = 1;

  template <int64_t COLUMNS>
  static void write_unit(const Weight& w, int64_t strip, int64_t k, float* out) {
    const FloatCodes<BITS> codes;
    for (int v = 0; v < STRIP / LANES; v++) {
      const Floats s = scales_of(w, strip, k / w.group, v * LANES);
      const Floats z = zeros_of(w, strip, k / w.group, v * LANES, FloatCodes<BITS>::CENTER);
      for (int64_t i = 0; i < UNIT; i += FloatCodes<BITS>::STEP)
        codes.read(w.at(strip, k + i) + 4 * LANES * v, [&](int j, Floats code) __attribute__((always_inline)) {
          store(out + (i + j) * COLUMNS + v * LANES, mul(sub(code, z), s));
        });
    }
  }
};

#ifdef __AVX512BF16__
template <int BITS>
struct PairValues {  // dequantized in float32, rounded to the nearest bfloat16, ties away from zero
  using Element = uint16_t;
  static constexpr int DEPTH = 2;

  template <int64_t COLUMNS>
  static void write_unit(const Weight& w, int64_t strip, int64_t k, uint16_t* out) {
    const PairCodes<BITS> codes;
    const __m512i high = _mm512_set1_epi32(int(0xffff0000)), half = _mm512_set1_epi32(0x8000);
    const Floats s = scales_of(w, strip, k / w.group, 0);
    const Floats minus_sz = mul(s, sub(zero(), zeros_of(w, strip, k / w.group, 0, PairCodes<BITS>::CENTER)));
    for (int64_t i = 0; i < UNIT; i += PairCodes<BITS>::STEP)
      codes.read(w.at(strip, k + i), [&](int j, __m512i pair) __attribute__((always_inline)) {
        const Floats even = fma(_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)), s, minus_sz);
        const Floats odd = fma(_mm512_castsi512_ps(_mm512_and_si512(pair, high)), s, minus_sz);
        const __m512i e = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
        const __m512i o = _mm512_add_epi32(_mm512_castps_si512(odd), half);
        _mm512_store_si512(out + (i + j) * COLUMNS, _mm512_mask_blend_epi16(0xAAAAAAAA, e, o));
      });
  }
};

template <int BITS>
struct PairIntegers {  // the codes minus CENTER themselves
  using Element = uint16_t;
  static constexpr int DEPTH = 2;

  template <int64_t COLUMNS>
  static void write_unit(const Weight& w, int64_t strip, int64_t k, uint16_t* out) {
    const PairCodes<BITS> codes;
    for (int64_t i = 0; i < UNIT; i += PairCodes<BITS>::STEP)
      codes.read(w.at(strip, k + i), [&](int j, __m512i pair) __attribute__((always_inline)) {
        _mm512_store_si512(out + (i + j) * COLUMNS, pair);
      });
  }
};
#endif

// Writes a panel in small portions between the steps of a multiplication with another panel, so that the vector units
// work while the tile unit does, and stores have long arrived when tiles are loaded.
template <class Values, int64_t COLUMNS>
class Filler {
 public:
  using Element = typename Values::Element;

  explicit Filler(const Weight& w) : w_(w) {}

  // To be filled: columns from `strip`, depth from k; `steps` calls of step() are expected.
  void start(int64_t strip, int64_t k, int64_t depth, int64_t steps, Element* panel) {
    strip_ = strip, k_ = k, panel_ = panel, done_ = 0, units_ = depth / UNIT * STRIPS, steps_ = steps, credit_ = 0;
  }

  void step() {
    for (credit_ += units_; credit_ >= steps_ && done_ < units_; credit_ -= steps_) unit();
  }

  void finish() {
    while (done_ < units_) unit();
  }

 private:
  static constexpr int64_t STRIPS = COLUMNS / STRIP;

  void unit() {
    const int64_t b = done_ % STRIPS, k = done_ / STRIPS * UNIT;
    const uint8_t* next = w_.at(strip_ + b, k_ + k) + 2048;
    for (int64_t line = 0; line < w_.bits; line++) __builtin_prefetch(next + 64 * line);
    Values::template write_unit<COLUMNS>(w_, strip_ + b, k_ + k, panel_ + k * COLUMNS + b * STRIP * Values::DEPTH);
    done_++;
  }

  const Weight& w_;
  Element* panel_ = nullptr;
  int64_t strip_ = 0, k_ = 0, done_ = 0, units_ = 0, steps_ = 1, credit_ = 0;
};

}  // namespace
