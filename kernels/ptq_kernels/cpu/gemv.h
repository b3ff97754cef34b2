// A few rows: the codes stay small integers (exact), the scale and the zero act on the float32 sum over a group.
#pragma once
#include "rows.h"

namespace {

// y[row .. row+M)[strip .. strip+NB) from rows of x, [M][w.k]; sums: [M][groups], read only where a zero needs them.
template <int BITS, int M, int NB>
void dot_strips(const float* x, const float* sums, const Weight& w, const Output& out, int64_t row,
                int64_t strip) {
  using Codes = FloatCodes<BITS>;
  constexpr int V = STRIP / LANES;
  const Codes codes;
  Floats total[M][NB][V];
  for (auto& m : total)
    for (auto& b : m)
      for (auto& t : b) t = zero();
  const bool has_offset = shifted(w, Codes::CENTER);
  for (int64_t g = 0; g < w.groups(); g++) {
    Floats acc[M][NB][V];
    for (auto& m : acc)
      for (auto& b : m)
        for (auto& t : b) t = zero();
    for (int64_t k = g * w.group; k < (g + 1) * w.group; k += Codes::STEP) {
      const int64_t ahead = w.ahead<BITS, NB>(k);
#pragma GCC unroll 8
      for (int b = 0; b < NB; b++) {
        const uint8_t* p = w.at(strip + b, k);
#pragma GCC unroll 4
        for (int line = 0; line < 2 * BITS * Codes::STEP; line += 64)
          __builtin_prefetch(p + ahead + line);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
          codes.read(p + 4 * LANES * v, [&](int i, Floats weights) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) acc[m][b][v] = fma(weights, set1(x[m * w.k + k + i]), acc[m][b][v]);
          });
      }
    }
    for (int b = 0; b < NB; b++)
      for (int v = 0; v < V; v++) {
        const Floats s = scales_of(w, strip + b, g, v * LANES);
        const Floats z = zeros_of(w, strip + b, g, v * LANES, Codes::CENTER);
        for (int m = 0; m < M; m++) {
          Floats t = acc[m][b][v];
          if (has_offset) t = fnma(z, set1(sums[m * w.groups() + g]), t);
          total[m][b][v] = fma(t, s, total[m][b][v]);
        }
      }
  }
  for (int m = 0; m < M; m++)
    for (int b = 0; b < NB; b++)
      for (int v = 0; v < V; v++) out.put(row + m, (strip + b) * STRIP + v * LANES, total[m][b][v]);
}

// As many strips at a time as keep the sums in registers.
template <int BITS, int M>
void dot_range(const float* x, const float* sums, const Weight& w, const Output& out, int64_t row,
               int64_t begin, int64_t end) {
  constexpr int NB = LANES == 16 ? (M <= 2 ? 4 : 2) : (M == 1 ? 2 : 1);
  for (; begin + NB <= end; begin += NB) dot_strips<BITS, M, NB>(x, sums, w, out, row, begin);
  for (; begin < end; begin++) dot_strips<BITS, M, 1>(x, sums, w, out, row, begin);
}

template <int BITS>
void gemv(const Input& in, const Weight& w, const Output& out) {
  static thread_local Scratch rows, sums_memory;
  const bool has_offset = shifted(w, FloatCodes<BITS>::CENTER);
  const bool as_is = in.group == in.padded_group && in.type == FLOAT32;
  const float* x = reinterpret_cast<const float*>(in.data);
  float* sums = has_offset ? sums_memory.get<float>(in.rows * in.groups) : nullptr;
  if (!as_is || has_offset) {
    float* converted = as_is ? nullptr : rows.get<float>(in.rows * w.k);
    convert_rows(in, sums, [&](int64_t m, int64_t k, const float* values) {
      if (converted != nullptr) write_unit(values, converted + m * w.k + k);
      return has_offset ? sum_of_unit(values) : 0.0f;
    });
    if (converted != nullptr) x = converted;
  }
  constexpr int64_t GRAIN = 4;  // strips
  run((w.strips() + GRAIN - 1) / GRAIN, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * GRAIN, last = std::min(w.strips(), end * GRAIN);
    for (int64_t m = 0; m < in.rows; m += 4) {
      const float* from = x + m * w.k;
      const float* row_sums = has_offset ? sums + m * w.groups() : nullptr;
      switch (in.rows - m) {
        case 1: dot_range<BITS, 1>(from, row_sums, w, out, m, first, last); break;
        case 2: dot_range<BITS, 2>(from, row_sums, w, out, m, first, last); break;
        case 3: dot_range<BITS, 3>(from, row_sums, w, out, m, first, last); break;
        default: dot_range<BITS, 4>(from, row_sums, w, out, m, first, last);
      }
    }
  });
}

}  // namespace
