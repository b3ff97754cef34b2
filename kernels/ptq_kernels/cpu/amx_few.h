// Up to 16 rows in AMX tiles with the codes as small integers: a panel of one group at a time needs a table look-up and
// no arithmetic, and the scale and the zero act on the float32 sums of the group, exactly as in gemv.h.
#pragma once
#include "tiles_amx.h"

namespace {

constexpr int64_t FEW_ROWS = 16;
constexpr int64_t FEW_DEPTH = 256;  // two panels of integers stay in the first-level cache

template <int BITS>
class FewRows {
 public:
  FewRows(const Weight& w, const Output& out, const uint16_t* x, const float* sums, int64_t rows)
      : w_(w), out_(out), x_(x), sums_(sums), rows_(rows) {}

  void all() const {
    run(w_.columns / 32, 1, [&](int64_t begin, int64_t end) {
      AmxTiles tiles;
      for (int64_t p = begin; p < end; p++) panel_of_columns(tiles, p);
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
    const int64_t g = k / w_.group, end = (g + 1) * w_.group, depth = std::min(end - k, FEW_DEPTH);
    return {k, depth, g, k + depth == end};
  }

  // While a piece is multiplied, the next one is written and the sums of the one before are scaled: what comes out of
  // the tiles or goes in is best left alone for a while.
  void panel_of_columns(AmxTiles& tiles, int64_t p) const {
    alignas(64) float total[FEW_ROWS * 32], sums[2][FEW_ROWS * 32];
    alignas(64) uint16_t panels[2][FEW_DEPTH * 32];
    std::memset(total, 0, size_t(rows_ * 32) * sizeof(float));
    Filler<PairIntegers<BITS>, 32> filler(w_);
    Piece before{0, 0, 0, false}, piece = piece_at(0);
    filler.start(2 * p, 0, piece.depth, 1, panels[0]);
    filler.finish();
    for (int turn = 0; piece.depth > 0; turn ^= 1) {
      const Piece next = piece_at(piece.k + piece.depth);
      filler.start(2 * p, next.k, next.depth, AmxTiles::steps(rows_, piece.depth), panels[turn ^ 1]);
      tiles.multiply(x_ + piece.k * 16, w_.k, panels[turn], piece.depth, rows_, sums[turn], false, filler);
      filler.finish();
      if (before.depth > 0) scale(sums[turn ^ 1], 2 * p, before, total);
      before = piece, piece = next;
      if (piece.depth == 0) scale(sums[turn], 2 * p, before, total);
    }
    for (int64_t m = 0; m < rows_; m++)
      for (int64_t i = 0; i < 32; i += LANES) out_.put(m, p * 32 + i, load(total + m * 32 + i));
  }

  // total += s * (sums - z * sum of x), the latter once a group.
  void scale(const float* sums, int64_t strip, const Piece& piece, float* total) const {
    const bool offset = piece.last && sums_ != nullptr;
    for (int64_t b = 0; b < 2; b++) {
      const Floats s = scales_of(w_, strip + b, piece.group, 0);
      const Floats minus_sz = mul(s, sub(zero(), zeros_of(w_, strip + b, piece.group, 0, PairCodes<BITS>::CENTER)));
      for (int64_t m = 0; m < rows_; m++) {
        float* t = total + m * 32 + b * 16;
        Floats sum = fma(load(sums + m * 32 + b * 16), s, load(t));
        if (offset) sum = fma(minus_sz, set1(sums_[m * w_.groups() + piece.group]), sum);
        store(t, sum);
      }
    }
  }

  const Weight& w_;
  const Output& out_;
  const uint16_t* x_;
  const float* sums_;
  int64_t rows_;
};

template <int BITS>
void amx_few(const Input& in, const Weight& w, const Output& out) {
  static thread_local Scratch memory, sums_memory;
  auto* x = memory.get<uint16_t>(rounded_up(in.rows, AmxTiles::ROWS) * w.k);
  float* sums = w.zeros == nullptr ? nullptr : sums_memory.get<float>(in.rows * in.groups);
  AmxTiles::arrange(in, w.k, x, sums);
  FewRows<BITS>(w, out, x, sums, in.rows).all();
}

}  // namespace
