// Rows in AMX tiles with the codes as small integers: a panel of one group at a time needs a table look-up and no
// arithmetic, and the scale and the zero act on the float32 sums of the group, exactly as in gemv.h. It is the fastest
// way for a few rows. With every float32 value of x as the sum of three bfloat16 values, which is exact, it is also the
// fastest float32 product for many.
#pragma once
#include "tiles_amx.h"

namespace {

constexpr int64_t EXACT_ROWS = 64;    // of one block
constexpr int64_t EXACT_DEPTH = 256;  // two panels of integers stay in the first-level cache

template <int BITS>
class ExactRows {
 public:
  // x: `terms` times the rows as AmxTiles places them, to be added up.
  ExactRows(const Weight& w, const Output& out, const uint16_t* x, int terms, const float* sums, int64_t rows)
      : w_(w), out_(out), x_(x), terms_(terms), sums_(sums), rows_(rows) {}

  void all() const {
    const int64_t panels = w_.columns / 32;
    run((rows_ + EXACT_ROWS - 1) / EXACT_ROWS * panels, 1, [&](int64_t begin, int64_t end) {
      AmxTiles tiles;
      for (int64_t i = begin; i < end; i++) block(tiles, i / panels * EXACT_ROWS, i % panels);
    });
  }

 private:
  // The k values of one panel of integers; the last piece of a group brings its zero points into account.
  struct Piece {
    int64_t k, depth, group;
    bool last;
  };

  Piece piece_at(int64_t k) const {
    if (k == w_.k) return {k, 0, 0, false};
    const int64_t g = k / w_.group, end = (g + 1) * w_.group, depth = std::min(end - k, EXACT_DEPTH);
    return {k, depth, g, k + depth == end};
  }

  // While a piece is multiplied, the next one is written and the sums of the one before are scaled: what comes out of
  // the tiles or goes in is best left alone for a while.
  void block(AmxTiles& tiles, int64_t m_begin, int64_t p) const {
    alignas(64) float total[EXACT_ROWS * 32], sums[2][EXACT_ROWS * 32];
    alignas(64) uint16_t panels[2][EXACT_DEPTH * 32];
    const int64_t rows = std::min(rows_ - m_begin, EXACT_ROWS);
    std::memset(total, 0, size_t(rows * 32) * sizeof(float));
    Filler<PairIntegers<BITS>, 32> filler(w_);
    Piece before{0, 0, 0, false}, piece = piece_at(0);
    filler.start(2 * p, 0, piece.depth, 1, panels[0]);
    filler.finish();
    for (int turn = 0; piece.depth > 0; turn ^= 1) {
      const Piece next = piece_at(piece.k + piece.depth);
      filler.start(2 * p, next.k, next.depth, terms_ * AmxTiles::steps(rows, piece.depth), panels[turn ^ 1]);
      multiply(tiles, m_begin, rows, piece, panels[turn], sums[turn], filler);
      filler.finish();
      if (before.depth > 0) scale(sums[turn ^ 1], 2 * p, before, m_begin, rows, total);
      before = piece, piece = next;
      if (piece.depth == 0) scale(sums[turn], 2 * p, before, m_begin, rows, total);
    }
    for (int64_t m = 0; m < rows; m++)
      for (int64_t i = 0; i < 32; i += LANES) out_.put(m_begin + m, p * 32 + i, load(total + m * 32 + i));
  }

  void multiply(AmxTiles& tiles, int64_t m_begin, int64_t rows, const Piece& piece, const uint16_t* panel, float* sums,
                Filler<PairIntegers<BITS>, 32>& filler) const {
    const int64_t term = rounded_up(rows_, AmxTiles::ROWS) * w_.k;
    for (int64_t m = 0; m < rows; m += 32)
      for (int t = terms_ - 1; t >= 0; t--) {  // the smallest first
        const uint16_t* x = x_ + t * term + (m_begin + m) * w_.k + piece.k * 16;
        const int64_t count = std::min<int64_t>(32, rows - m);
        tiles.multiply(x, w_.k, panel, piece.depth, count, sums + m * 32, t < terms_ - 1, filler);
      }
  }

  // total += s * (sums - z * sum of x), the latter once a group.
  void scale(const float* sums, int64_t strip, const Piece& piece, int64_t m_begin, int64_t rows,
             float* total) const {
    const bool offset = piece.last && sums_ != nullptr;
    for (int64_t b = 0; b < 2; b++) {
      const Floats s = scales_of(w_, strip + b, piece.group, 0);
      const Floats minus_sz = mul(s, sub(zero(), zeros_of(w_, strip + b, piece.group, 0, PairCodes<BITS>::CENTER)));
      for (int64_t m = 0; m < rows; m++) {
        float* t = total + m * 32 + b * 16;
        Floats sum = fma(load(sums + m * 32 + b * 16), s, load(t));
        if (offset) sum = fma(minus_sz, set1(sums_[(m_begin + m) * w_.groups() + piece.group]), sum);
        store(t, sum);
      }
    }
  }

  const Weight& w_;
  const Output& out_;
  const uint16_t* x_;
  int terms_;
  const float* sums_;  // of x over the groups; null: no zeros to account for
  int64_t rows_;
};

// Rounds to bfloat16 (one term), or splits float32 into three terms without loss.
template <int BITS>
void amx_exact(const Input& in, const Weight& w, const Output& out, int terms) {
  static thread_local Scratch memory, sums_memory;
  const int64_t term = rounded_up(in.rows, AmxTiles::ROWS) * w.k;
  auto* x = memory.get<uint16_t>(terms * term);
  float* sums = w.zeros == nullptr ? nullptr : sums_memory.get<float>(in.rows * in.groups);
  convert_rows(in, sums, [&](int64_t m, int64_t k, float* values) {
    float total = 0;
    for (int t = 0; t < terms; t++) {
      uint16_t* place = AmxTiles::place(x + t * term, w.k, m, k);
      write_unit(values, place);
      if (sums != nullptr) total += sum_of_unit(place);
      if (t + 1 < terms) subtract_unit(place, values);
    }
    return total;
  });
  ExactRows<BITS>(w, out, x, terms, sums, in.rows).all();
}

}  // namespace
