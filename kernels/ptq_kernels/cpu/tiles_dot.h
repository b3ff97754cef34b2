// The tiles of gemm.h in vector registers: rows of x times one panel.
#pragma once
#include <utility>

#include "gemm.h"

namespace {

struct FloatDot {
  using Broadcast = float;  // what one step takes of a row of x
  using Vector = Floats;
  template <int BITS>
  using Values = FloatValues<BITS>;
  static Vector load_values(const float* p) { return load(p); }
  static Floats step(Floats total, Vector weights, Broadcast x) { return fma(weights, set1(x), total); }
};

#ifdef __AVX512BF16__
struct PairDot {
  using Broadcast = uint32_t;
  using Vector = __m512i;
  template <int BITS>
  using Values = PairValues<BITS>;
  static Vector load_values(const uint16_t* p) { return _mm512_load_si512(p); }
  static Floats step(Floats total, Vector weights, Broadcast x) {
    return _mm512_dpbf16_ps(total, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(int(x)));
  }
};
#endif

template <class Dot>
class DotTiles {
 public:
  template <int BITS>
  using Values = typename Dot::template Values<BITS>;
  using Element = typename Values<4>::Element;
  using Broadcast = typename Dot::Broadcast;
  static constexpr int64_t VECTORS = LANES == 4 ? 4 : 2, DEPTH = Values<4>::DEPTH;
  static constexpr int64_t COLUMNS = VECTORS * LANES;
  static constexpr int64_t ROWS = LANES == 16 ? 12 : 6;  // with their sums, within 32 registers, AVX2: 16
  static constexpr int64_t INTERLEAVE = ROWS;

  static int64_t steps(int64_t, int64_t) { return 1; }  // the panel is filled at once: both need the vector units

  // [rows / ROWS][k / DEPTH][ROWS][DEPTH]: what one step broadcasts lies together.
  static void arrange(const Input& in, int64_t k_total, Element* out) {
    static thread_local Scratch memory;
    auto* plain = memory.get<Element>(in.rows * k_total);
    convert_rows(in, nullptr, [&](int64_t m, int64_t k, const float* values) {
      write_unit(values, plain + m * k_total + k);
      return 0.0f;
    });
    const auto* from = reinterpret_cast<const Broadcast*>(plain);
    auto* to = reinterpret_cast<Broadcast*>(out);
    const int64_t steps = k_total / DEPTH;
    run((in.rows + ROWS - 1) / ROWS, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block++) {
        const int64_t count = std::min(ROWS, in.rows - block * ROWS);
        for (int64_t r = 0; r < count; r++)
          for (int64_t i = 0; i < steps; i++) to[(block * steps + i) * ROWS + r] = from[(block * ROWS + r) * steps + i];
      }
    });
  }

  template <class Filler>
  void multiply(const Element* x, int64_t, const Element* panel, int64_t depth, int64_t rows, float* c,
                bool accumulate, Filler&) const {
    const auto* broadcasts = reinterpret_cast<const Broadcast*>(x);
    dispatch(std::make_index_sequence<ROWS>(), rows, broadcasts, panel, depth / DEPTH, c, accumulate);
  }

 private:
  template <size_t... I, class... Arguments>
  static void dispatch(std::index_sequence<I...>, int64_t rows, Arguments... arguments) {
    ((rows == int64_t(I) + 1 ? multiply_rows<int(I) + 1>(arguments...) : void()), ...);
  }

  template <int R>
  static void multiply_rows(const Broadcast* x, const Element* panel, int64_t steps, float* c, bool accumulate) {
    Floats acc[R][VECTORS];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < VECTORS; v++) acc[r][v] = accumulate ? load(c + r * COLUMNS + v * LANES) : zero();
    for (int64_t i = 0; i < steps; i++) {
      typename Dot::Vector b[VECTORS];
      for (int v = 0; v < VECTORS; v++) b[v] = Dot::load_values(panel + (i * COLUMNS + v * LANES) * DEPTH);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) acc[r][v] = Dot::step(acc[r][v], b[v], x[i * ROWS + r]);
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < VECTORS; v++) store(c + r * COLUMNS + v * LANES, acc[r][v]);
  }
};

}  // namespace
