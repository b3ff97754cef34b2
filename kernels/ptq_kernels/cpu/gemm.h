// Many rows: one panel of columns at a time is dequantized into cache and multiplied with blocks of rows.
//
// Everything is blocked for the second-level cache: a block of x (ROWS_BLOCK by DEPTH), the partial sums of GROUP panels,
// and two panels (one is multiplied while the next is written), each of which fits the first level.
#pragma once
#include "panel.h"

namespace {

// T: Values of a panel, COLUMNS of a panel, ROWS of one multiply, INTERLEAVE rows of x that lie together, arrange(),
// steps() and multiply() (see tiles_dot.h).
template <class T, int BITS>
class Gemm {
 public:
  using Values = typename T::template Values<BITS>;
  using Element = typename Values::Element;

  Gemm(const Weight& w, const Output& out, const Element* x, int64_t rows) : w_(w), out_(out), x_(x), rows_(rows) {}

  void all() const {
    const int64_t panels = w_.columns / T::COLUMNS;
    run((rows_ + ROWS_BLOCK - 1) / ROWS_BLOCK * panels, 1, [&](int64_t begin, int64_t end) {
      T tiles;
      while (begin < end) {
        const int64_t first = begin % panels, count = std::min({panels - first, end - begin, GROUP});
        block(tiles, begin / panels * ROWS_BLOCK, first, count);
        begin += count;
      }
    });
  }

 private:
  static constexpr int64_t ROWS_BLOCK = 512 / T::ROWS * T::ROWS, DEPTH = 256, GROUP = 8;

  // One block of rows times `group` panels from `first` on, the depths in turn.
  void block(T& tiles, int64_t m_begin, int64_t first, int64_t group) const {
    static thread_local Scratch memory, partial_memory;
    const int64_t rows = std::min(rows_ - m_begin, ROWS_BLOCK), sums = rounded_up(rows, T::ROWS) * T::COLUMNS;
    Element* panels = memory.get<Element>(2 * DEPTH * T::COLUMNS);
    float* partial = partial_memory.get<float>(group * sums);
    Filler<Values, T::COLUMNS> filler(w_);
    const int64_t count = (w_.k + DEPTH - 1) / DEPTH * group;
    Finished before{nullptr, 0};
    for (int64_t i = -1; i < count; i++) {
      if (i + 1 < count) {
        const int64_t p = first + (i + 1) % group, k = (i + 1) / group * DEPTH, depth = std::min(DEPTH, w_.k - k);
        Element* panel = panels + (i + 1) % 2 * DEPTH * T::COLUMNS;
        filler.start(p * (T::COLUMNS / STRIP), k, depth, T::steps(rows, DEPTH), panel);
      }
      if (i >= 0) {
        const int64_t p = i % group, k = i / group * DEPTH;
        multiply(tiles, m_begin, rows, k, panels + i % 2 * DEPTH * T::COLUMNS, partial + p * sums, before, filler);
        before = {nullptr, 0};
        if (k + DEPTH >= w_.k) before = {partial + p * sums, (first + p) * T::COLUMNS};
      }
      filler.finish();
    }
    for (int64_t m = 0; m < rows; m += T::ROWS) emit(before, m_begin, m, std::min(rows - m, T::ROWS));
  }

  // Sums that are complete, and their first column. They are rounded and stored while the next panel is multiplied.
  struct Finished {
    const float* sums;
    int64_t column;
  };

  void multiply(T& tiles, int64_t m_begin, int64_t rows, int64_t k, const Element* panel, float* c,
                const Finished& before, Filler<Values, T::COLUMNS>& filler) const {
    for (int64_t m = 0; m < rows; m += T::ROWS) {
      const Element* x = x_ + (m_begin + m) * w_.k + k * T::INTERLEAVE;
      const int64_t count = std::min(rows - m, T::ROWS);
      tiles.multiply(x, w_.k, panel, std::min(DEPTH, w_.k - k), count, c + m * T::COLUMNS, k > 0, filler);
      if (before.sums != nullptr) emit(before, m_begin, m, count);
    }
  }

  void emit(const Finished& panel, int64_t m_begin, int64_t first, int64_t count) const {
    for (int64_t m = first; m < first + count; m++) {
      const float* c = panel.sums + m * T::COLUMNS;
      for (int64_t i = 0; i < T::COLUMNS; i += LANES) out_.put(m_begin + m, panel.column + i, load(c + i));
    }
  }

  const Weight& w_;
  const Output& out_;
  const Element* x_;
  int64_t rows_;
};

template <class T, int BITS>
void gemm(const Input& in, const Weight& w, const Output& out) {
  using Element = typename Gemm<T, BITS>::Element;
  static thread_local Scratch memory;
  Element* x = memory.get<Element>(rounded_up(in.rows, T::ROWS) * w.k);
  T::arrange(in, w.k, x);
  Gemm<T, BITS>(w, out, x, in.rows).all();
}

}  // namespace
