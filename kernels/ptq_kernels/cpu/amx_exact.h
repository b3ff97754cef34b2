// Rows in AMX tiles with the codes as small integers: a panel of one group at a time needs a table look-up and no
// arithmetic, and the scale and the zero act on the float32 sums of the group, exactly as in gemv.h. It is the fastest
// way for a few rows. With every float32 value of x as the sum of three bfloat16 values, which is exact, it is also the
// fastest float32 product for many.
#pragma once
#include "tiles_amx.h"

namespace {

constexpr int64_t EXACT_ROWS = 64;       // of one block
constexpr int64_t EXACT_DEPTH = 256;     // two panels of integers stay in the first-level cache
constexpr int64_t EXACT_CHUNK = 393216;  // values of x that stay in the second-level cache while the panels of
constexpr int64_t EXACT_PANELS = 8;      // one block pass

// The sums of a group, in portions: total += s * (sums - z * sum of x), the latter once a group.
template <int BITS>
class Scaling {
 public:
  // offsets: the sums of x over this group, w.groups() apart; null: no zeros to account for. `steps` calls of step()
  // are expected.
  void start(const Weight& w, int64_t strip, int64_t group, const float* sums, const float* offsets, int64_t rows,
             int64_t steps, float* total) {
    for (int64_t b = 0; b < 2; b++) {
      scales_[b] = scales_of(w, strip + b, group, 0);
      minus_sz_[b] = mul(scales_[b], sub(zero(), zeros_of(w, strip + b, group, 0, PairCodes<BITS>::CENTER)));
    }
    sums_ = sums, offsets_ = offsets, distance_ = w.groups(), rows_ = rows, total_ = total, done_ = 0;
    portion_ = steps > 0 ? (rows + steps - 1) / steps : rows;
  }

  void step() { until(std::min(done_ + portion_, rows_)); }
  void finish() { until(rows_); }

 private:
  void until(int64_t last) {
    for (; done_ < last; done_++)
      for (int64_t b = 0; b < 2; b++) {
        const int64_t at = done_ * 32 + b * 16;
        Floats sum = fma(load(sums_ + at), scales_[b], load(total_ + at));
        if (offsets_ != nullptr) sum = fma(minus_sz_[b], set1(offsets_[done_ * distance_]), sum);
        store(total_ + at, sum);
      }
  }

  Floats scales_[2], minus_sz_[2];
  const float *sums_ = nullptr, *offsets_ = nullptr;
  float* total_ = nullptr;
  int64_t distance_ = 0, rows_ = 0, done_ = 0, portion_ = 1;
};

template <int BITS>
class ExactRows {
 public:
  // x: `terms` times the rows as AmxTiles places them, to be added up.
  ExactRows(const Weight& w, const Output& out, const uint16_t* x, int terms, const float* sums, int64_t rows)
      : w_(w), out_(out), x_(x), terms_(terms), sums_(sums), rows_(rows) {}

  void all() const {
    const int64_t panels = w_.columns / 32, most = chunk() < w_.k ? EXACT_PANELS : 1;
    run((rows_ + EXACT_ROWS - 1) / EXACT_ROWS * panels, 1, [&](int64_t begin, int64_t end) {
      AmxTiles tiles;
      while (begin < end) {
        const int64_t first = begin % panels, count = std::min({panels - first, end - begin, most});
        block(tiles, begin / panels * EXACT_ROWS, first, count);
        begin += count;
      }
    });
  }

 private:
  // The k values of one panel of integers; the last piece of a group brings its zero points into account.
  struct Piece {
    int64_t panel, k, depth, group;
    bool last;
  };

  // What goes on beside a multiplication: the next panel is written and the sums of the one before are scaled. What
  // comes out of the tiles or goes in is best left alone for a while.
  struct Beside {
    Filler<PairIntegers<BITS>, 32> filler;
    Scaling<BITS> scaling;

    void step() { filler.step(), scaling.step(); }
    void finish() { filler.finish(), scaling.finish(); }
  };

  int64_t chunk() const { return EXACT_CHUNK / (terms_ * std::min(rounded_up(rows_, 16), EXACT_ROWS)); }

  Piece piece_at(int64_t panel, int64_t k) const {
    if (k == w_.k) return {panel, k, 0, 0, false};
    const int64_t g = k / w_.group, end = (g + 1) * w_.group, depth = std::min(end - k, EXACT_DEPTH);
    return {panel, k, depth, g, k + depth == end};
  }

  // All panels pass over one chunk of k, then over the next; `begin` is where the chunk begins.
  Piece after(const Piece& piece, int64_t panels, int64_t& begin) const {
    const int64_t k = piece.k + piece.depth;
    if (k < w_.k && k < begin + chunk()) return piece_at(piece.panel, k);
    if (piece.panel + 1 < panels) return piece_at(piece.panel + 1, begin);
    begin = k;
    return piece_at(0, k);
  }

  void block(AmxTiles& tiles, int64_t m_begin, int64_t first, int64_t count) const {
    static thread_local Scratch memory;
    alignas(64) float sums[2][EXACT_ROWS * 32];
    alignas(64) uint16_t panels[2][EXACT_DEPTH * 32];
    const int64_t rows = std::min(rows_ - m_begin, EXACT_ROWS);
    float* total = memory.get<float>(count * rows * 32);
    std::memset(total, 0, size_t(count * rows * 32) * sizeof(float));
    Beside beside{Filler<PairIntegers<BITS>, 32>(w_), {}};
    int64_t begin = 0;
    Piece piece = piece_at(0, 0);
    beside.filler.start(2 * first, 0, piece.depth, 1, panels[0]);
    beside.finish();
    for (int turn = 0; piece.depth > 0; turn ^= 1) {
      const Piece next = after(piece, count, begin);
      const int64_t steps = terms_ * AmxTiles::steps(rows, piece.depth);
      beside.filler.start(2 * (first + next.panel), next.k, next.depth, steps, panels[turn ^ 1]);
      multiply(tiles, m_begin, rows, piece, panels[turn], sums[turn], beside);
      beside.finish();
      const bool offset = piece.last && sums_ != nullptr;
      const float* offsets = offset ? sums_ + m_begin * w_.groups() + piece.group : nullptr;
      beside.scaling.start(w_, 2 * (first + piece.panel), piece.group, sums[turn], offsets, rows,
                           terms_ * AmxTiles::steps(rows, next.depth), total + piece.panel * rows * 32);
      piece = next;
    }
    beside.scaling.finish();
    for (int64_t m = 0; m < rows; m++)
      for (int64_t i = 0; i < count * 32; i += LANES)
        out_.put(m_begin + m, first * 32 + i, load(total + (i / 32 * rows + m) * 32 + i % 32));
  }

  void multiply(AmxTiles& tiles, int64_t m_begin, int64_t rows, const Piece& piece, const uint16_t* panel, float* sums,
                Beside& beside) const {
    const int64_t term = rounded_up(rows_, AmxTiles::ROWS) * w_.k;
    for (int64_t m = 0; m < rows; m += 32) {
      const uint16_t* x = x_ + (m_begin + m) * w_.k + piece.k * 16;
      const int64_t count = std::min<int64_t>(32, rows - m);
      tiles.multiply(x, w_.k, panel, piece.depth, count, sums + m * 32, false, beside, terms_, term);
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
