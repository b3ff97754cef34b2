// x on its way in and y on its way out: conversion, padding and the sums over groups.
#pragma once
#include <algorithm>

#include "kernel.h"

namespace {

// 32 values of row m from padded position k (a multiple of 32), as floats; what pads a group is 0.
inline void read_unit(const Input& in, int64_t m, int64_t k, float* out) {
  const int64_t g = k / in.padded_group, inside = k - g * in.padded_group;
  const int64_t count = std::clamp<int64_t>(in.group - inside, 0, UNIT);
  const int64_t at = (m * in.groups + g) * in.group + inside;
  const int64_t whole = count / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) store(out + i, load_as(in.type, in.data, at + i));
  if (whole == UNIT) return;
  alignas(64) uint8_t rest[4 * LANES] = {};
  std::memcpy(rest, in.data + (at + whole) * bytes_of(in.type), size_t((count - whole) * bytes_of(in.type)));
  store(out + whole, load_as(in.type, rest, 0));
  for (int64_t i = whole + LANES; i < UNIT; i += LANES) store(out + i, zero());
}

inline void write_unit(const float* values, float* out) { std::memcpy(out, values, UNIT * sizeof(float)); }

inline void write_unit(const float* values, uint16_t* out) {
  for (int64_t i = 0; i < UNIT; i += LANES) store_as(BFLOAT16, out, i, load(values + i));
}

inline float sum_of_unit(const float* p) {
  Floats total = load(p);
  for (int64_t i = LANES; i < UNIT; i += LANES) total = add(total, load(p + i));
  return sum(total);
}

inline float sum_of_unit(const uint16_t* p) {
  Floats total = load_as(BFLOAT16, p, 0);
  for (int64_t i = LANES; i < UNIT; i += LANES) total = add(total, load_as(BFLOAT16, p, i));
  return sum(total);
}

// What `rounded` lacks of the values; nothing where it is not finite.
inline void subtract_unit(const uint16_t* rounded, float* values) {
  for (int64_t i = 0; i < UNIT; i += LANES) {
    const Floats r = load_as(BFLOAT16, rounded, i);
    store(values + i, zero_unless_finite(sub(load(values + i), r), r));
  }
}

// Hands out all of x as convert(m, k, values), 32 values of row m from padded position k on; what that returns is added
// up over each group into sums [rows][groups], unless that is null.
template <class Convert>
void convert_rows(const Input& in, float* sums, Convert convert) {
  const int64_t units = in.padded_group / UNIT;
  run(in.rows, std::max<int64_t>(1, 65536 / (in.groups * in.padded_group)), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++)
      for (int64_t g = 0; g < in.groups; g++) {
        float total = 0;
        for (int64_t u = 0; u < units; u++) {
          alignas(64) float values[UNIT];
          const int64_t k = g * in.padded_group + u * UNIT;
          read_unit(in, m, k, values);
          total += convert(m, k, values);
        }
        if (sums != nullptr) sums[m * in.groups + g] = total;
      }
  });
}

// y: [rows][columns] of `type`; bias: [columns] of its own type, or null.
struct Output {
  uint8_t* data;
  Type type;
  const uint8_t* bias;
  Type bias_type;
  int64_t columns;

  // Columns n to n + LANES of row m; those beyond the last are dropped.
  void put(int64_t m, int64_t n, Floats v) const {
    const int64_t count = columns - n;
    if (count >= LANES) {
      store_as(type, data, m * columns + n, bias == nullptr ? v : add(v, load_as(bias_type, bias, n)));
    } else if (count > 0) {
      alignas(64) uint8_t values[4 * LANES] = {}, stored[4 * LANES];
      if (bias != nullptr) std::memcpy(values, bias + n * bytes_of(bias_type), size_t(count * bytes_of(bias_type)));
      store_as(type, stored, 0, add(v, load_as(bias_type, values, 0)));
      std::memcpy(data + (m * columns + n) * bytes_of(type), stored, size_t(count * bytes_of(type)));
    }
  }
};

// The scales of one group for LANES columns of a strip, and the zero points minus `center`.
inline Floats scales_of(const Weight& w, int64_t strip, int64_t g, int64_t lane) {
  return load_as(w.scale_type, w.scales, (strip * w.groups() + g) * STRIP + lane);
}

inline Floats zeros_of(const Weight& w, int64_t strip, int64_t g, int64_t lane, int center) {
  if (w.zeros == nullptr) return set1(float((1 << (w.bits - 1)) - center));
  return sub(load_bytes(w.zeros + (strip * w.groups() + g) * STRIP + lane), set1(float(center)));
}

inline bool shifted(const Weight& w, int center) { return w.zeros != nullptr || center != 1 << (w.bits - 1); }

}  // namespace
