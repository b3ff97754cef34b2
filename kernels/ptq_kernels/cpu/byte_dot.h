// 8-bit activations in vector registers (AVX512-VNNI): four products of a code and a byte of x at a time, int32 sums of a
// group, the scale on those.
#pragma once
#include "byte_rows.h"

namespace {

// y[row .. row+M)[strip .. strip+NB); x: as ByteRows, from `row` on.
template <int BITS, int M, int NB>
void dot_bytes(const ByteRows& x, const Weight& w, const Output& out, int64_t row, int64_t strip) {
  using Codes = ByteCodes<BITS>;
  const int8_t* values = x.values + row * w.k;
  const int32_t* sums = x.sums + row * w.groups();
  Floats total[M][NB];
  for (auto& m : total)
    for (auto& t : m) t = zero();
  for (int64_t g = 0; g < w.groups(); g++) {
    __m512i acc[M][NB];
    for (int b = 0; b < NB; b++) {
      const __m512i z = integer_zeros(w, strip + b, g, 0);
      for (int m = 0; m < M; m++)
        acc[m][b] = _mm512_mullo_epi32(z, _mm512_set1_epi32(-sums[m * w.groups() + g]));
    }
    for (int64_t k = g * w.group; k < (g + 1) * w.group; k += Codes::STEP) {
      const int64_t ahead = w.ahead<BITS, NB>(k);
#pragma GCC unroll 4
      for (int b = 0; b < NB; b++) {
        const uint8_t* p = w.at(strip + b, k);
#pragma GCC unroll 4
        for (int line = 0; line < 2 * BITS * Codes::STEP; line += 64)
          __builtin_prefetch(p + ahead + line);
        Codes::read(p, [&](int j, __m512i codes) __attribute__((always_inline)) {
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) {
            int32_t four;
            std::memcpy(&four, values + m * w.k + k + 4 * j, 4);
            acc[m][b] = _mm512_dpbusd_epi32(acc[m][b], codes, _mm512_set1_epi32(four));
          }
        });
      }
    }
    for (int b = 0; b < NB; b++) {
      const Floats s = scales_of(w, strip + b, g, 0);
      for (int m = 0; m < M; m++) total[m][b] = fma(_mm512_cvtepi32_ps(acc[m][b]), s, total[m][b]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int b = 0; b < NB; b++)
      out.put(row + m, (strip + b) * STRIP, mul(total[m][b], set1(x.scales[row + m])));
}

template <int BITS, int M>
void dot_byte_range(const ByteRows& x, const Weight& w, const Output& out, int64_t row, int64_t begin, int64_t end) {
  constexpr int NB = M <= 2 ? 4 : 2;
  for (; begin + NB <= end; begin += NB) dot_bytes<BITS, M, NB>(x, w, out, row, begin);
  for (; begin < end; begin++) dot_bytes<BITS, M, 1>(x, w, out, row, begin);
}

// Eight rows at a time: the codes are unpacked again for each eight, which costs less than a panel in memory.
template <int BITS>
void byte_dot(const Input& in, const Weight& w, const Output& out) {
  static thread_local Scratch values_memory, scales_memory, sums_memory;
  auto* values = values_memory.get<int8_t>(in.rows * w.k);
  float* scales = scales_memory.get<float>(in.rows);
  auto* sums = sums_memory.get<int32_t>(in.rows * in.groups);
  convert_to_bytes(in, ByteCodes<BITS>::order(), scales, sums, [&](int64_t m, int64_t k) {
    return values + m * w.k + k;
  });
  const ByteRows x{values, scales, sums};
  constexpr int64_t GRAIN = 4;  // strips: few enough to stay in the second-level cache while the rows pass
  run((w.strips() + GRAIN - 1) / GRAIN, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * GRAIN; first < std::min(w.strips(), end * GRAIN); first += GRAIN) {
      const int64_t last = std::min(w.strips(), first + GRAIN);
      int64_t m = 0;
      for (; m + 8 <= in.rows; m += 8) dot_byte_range<BITS, 8>(x, w, out, m, first, last);
      for (; m + 4 <= in.rows; m += 4) dot_byte_range<BITS, 4>(x, w, out, m, first, last);
      switch (in.rows - m) {
        case 1: dot_byte_range<BITS, 1>(x, w, out, m, first, last); break;
        case 2: dot_byte_range<BITS, 2>(x, w, out, m, first, last); break;
        case 3: dot_byte_range<BITS, 3>(x, w, out, m, first, last); break;
      }
    }
  });
}

}  // namespace
