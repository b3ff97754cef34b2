// The columns of a weight that a solver decides one after another, each error going to the columns still to come. In
// torch every column is half a dozen small operations; here some rows go through all of a block in the first cache.
#pragma once
#include <algorithm>

#include "kernel.h"

namespace {

constexpr int ROWS_AT_ONCE = 32;

// A block of `count` columns, each of `rows` values that lie beside each other (the weight is transposed, in the order
// of the visits). factors: [count][pitch], what an error of column j does to column i > j is factors[j][i]; scales and
// zeros: [groups][rows]; group: of each column; codes: [count][rows], written.
struct Columns {
  int64_t count, rows, pitch;
  const float* factors;
  const float* scales;
  const float* zeros;
  const int32_t* group;
  uint8_t* codes;
  float top;
};

using Lanes = float[ROWS_AT_ONCE];

// Moves a tile between a matrix [count][rows] and the cache; lanes beyond the last row hold `filling`.
template <class T>
void fetch(T (*tile)[ROWS_AT_ONCE], const T* from, int64_t count, int64_t rows, int64_t n, T filling) {
  for (int64_t j = 0; j < count; j++) {
    std::fill_n(tile[j] + n, ROWS_AT_ONCE - n, filling);
    std::memcpy(tile[j], from + j * rows, size_t(n) * sizeof(T));
  }
}

template <class T>
void put(const T (*tile)[ROWS_AT_ONCE], T* to, int64_t count, int64_t rows, int64_t n) {
  for (int64_t j = 0; j < count; j++) std::memcpy(to + j * rows, tile[j], size_t(n) * sizeof(T));
}

// To the nearest value of column j's grid; ties go to the even code, as in torch.
inline void round_to_grid(const Columns& c, int64_t j, int64_t first, int64_t n, const Lanes wanted, Lanes value) {
  Lanes scale[1], middle[1];
  uint8_t code[ROWS_AT_ONCE];
  const int64_t at = c.group[j] * c.rows + first;
  fetch<float>(scale, c.scales + at, 1, 0, n, 1.0f);
  fetch<float>(middle, c.zeros + at, 1, 0, n, 0.0f);
  for (int r = 0; r < ROWS_AT_ONCE; r += LANES) {
    const Floats step = load(scale[0] + r), offset = load(middle[0] + r);
    const Floats held = clamp(add(round(div(load(wanted + r), step)), offset), zero(), set1(c.top));
    store(value + r, mul(sub(held, offset), step));
    store_bytes(code + r, held);
  }
  std::memcpy(c.codes + j * c.rows + first, code, size_t(n));
}

// Takes factors[j][i] * error from every later column i.
inline void push(const Columns& c, int64_t j, const Lanes error, Lanes* rest) {
  Floats taken[ROWS_AT_ONCE / LANES];
  for (int v = 0; v < ROWS_AT_ONCE / LANES; v++) taken[v] = load(error + v * LANES);
  for (int64_t i = j + 1; i < c.count; i++) {
    const Floats factor = set1(c.factors[j * c.pitch + i]);
    for (int v = 0; v < ROWS_AT_ONCE / LANES; v++) {
      store(rest[i] + v * LANES, fnma(factor, taken[v], load(rest[i] + v * LANES)));
    }
  }
}

// Some rows at a time in the first cache: tiles of two matrices [count][rows], the second of which need not be read
// (other_in null). `column` is called for each column in turn; then the tiles go to `one` and to `other_out`.
template <class F>
void by_rows(const Columns& c, float* one, const float* other_in, float* other_out, F column) {
  run((c.rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    auto tile = reinterpret_cast<Lanes*>(scratch.get<float>(2 * c.count * ROWS_AT_ONCE));
    auto other = tile + c.count;
    for (int64_t part = begin; part < end; part++) {
      const int64_t first = part * ROWS_AT_ONCE, n = std::min<int64_t>(ROWS_AT_ONCE, c.rows - first);
      fetch<float>(tile, one + first, c.count, c.rows, n, 0.0f);
      if (other_in != nullptr) fetch<float>(other, other_in + first, c.count, c.rows, n, 0.0f);
      for (int64_t j = 0; j < c.count; j++) column(j, first, n, tile, other);
      put<float>(tile, one + first, c.count, c.rows, n);
      put<float>(other, other_out + first, c.count, c.rows, n);
    }
  });
}

// GPTQ. weight: [count][rows], compensated for all columns before; becomes the values of the codes. errors:
// [count][rows], of each column, divided by its factors[j][j].
void solve_columns(const Columns& c, float* weight, float* errors) {
  by_rows(c, weight, nullptr, errors, [&](int64_t j, int64_t first, int64_t n, Lanes* tile, Lanes* error) {
    Lanes value;
    round_to_grid(c, j, first, n, tile[j], value);
    const Floats diagonal = set1(c.factors[j * c.pitch + j]);
    for (int r = 0; r < ROWS_AT_ONCE; r += LANES) {
      store(error[j] + r, div(sub(load(tile[j] + r), load(value + r)), diagonal));
    }
    std::memcpy(tile[j], value, sizeof value);
    push(c, j, error[j], tile);
  });
}

// Coordinate descent. values: [count][rows] of the codes so far, becomes those of the new ones; slopes: [count][rows],
// of the loss (not written); moved: [count][rows], how far each value went.
void descend_columns(const Columns& c, float* values, const float* slopes, float* moved) {
  by_rows(c, values, slopes, moved, [&](int64_t j, int64_t first, int64_t n, Lanes* value, Lanes* slope) {
    Lanes wanted, next;
    const Floats curvature = set1(c.factors[j * c.pitch + j]);
    for (int r = 0; r < ROWS_AT_ONCE; r += LANES) {
      store(wanted + r, add(load(value[j] + r), div(load(slope[j] + r), curvature)));
    }
    round_to_grid(c, j, first, n, wanted, next);
    for (int r = 0; r < ROWS_AT_ONCE; r += LANES) store(slope[j] + r, sub(load(next + r), load(value[j] + r)));
    std::memcpy(value[j], next, sizeof next);
    push(c, j, slope[j], slope);
  });
}

}  // namespace
