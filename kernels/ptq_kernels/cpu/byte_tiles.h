// 8-bit activations in AMX tiles: panels of codes as small integers, int32 sums of a group, the scale on those.
#pragma once
#include "byte_rows.h"
#include "tiles_amx.h"

namespace {

// Codes minus their zero points, which are exact in a byte; of 8 bits minus 128, and the rest is up to the sums of x.
template <int BITS>
struct ByteValues {
  using Element = int8_t;
  static constexpr int DEPTH = 4;

  template <int64_t COLUMNS>
  static void write_unit(const Weight& w, int64_t strip, int64_t k, int8_t* out) {
    const __m512i zeros = BITS == 8 ? _mm512_set1_epi32(128) : integer_zeros(w, strip, k / w.group, 0);
    const __m512i subtracted = _mm512_shuffle_epi8(zeros, _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
    for (int64_t i = 0; i < UNIT; i += ByteCodes<BITS>::STEP)
      ByteCodes<BITS>::read(w.at(strip, k + i), [&](int j, __m512i codes) __attribute__((always_inline)) {
        _mm512_store_si512(out + (i + 4 * j) * COLUMNS, _mm512_sub_epi8(codes, subtracted));
      });
  }
};

// Registers as in AmxTiles. A tile is `depth_` (32 or 64) k values deep, so that it never crosses a group.
class ByteTiles {
 public:
  static constexpr int64_t COLUMNS = 32, ROWS = 32;

  explicit ByteTiles(int64_t group) : depth_(group % 64 == 0 ? 64 : 32) {}

  ~ByteTiles() {
    if (configured_ != 0) _tile_release();
  }

  // [rows / 16][k / depth][16][depth].
  int64_t place(int64_t k_total, int64_t m, int64_t k) const {
    return m / 16 * 16 * k_total + k / depth_ * depth_ * 16 + m % 16 * depth_ + k % depth_;
  }

  int64_t steps(int64_t rows, int64_t depth) const { return (rows + ROWS - 1) / ROWS * (depth / depth_); }

  // sums [32][COLUMNS] of up to 32 rows from x (a whole tile row) over `depth` k values of the panel.
  template <class Filler>
  void multiply(const int8_t* x, int64_t k_total, const int8_t* panel, int64_t depth, int64_t rows, int32_t* sums,
                Filler& filler) {
    memory_barrier();
    configure(rows);
    _tile_zero(0);
    _tile_zero(1);
    if (rows > 16) {
      _tile_zero(2);
      _tile_zero(3);
      multiply_steps<true>(x, k_total, panel, depth, filler);
    } else {
      multiply_steps<false>(x, k_total, panel, depth, filler);
    }
    _tile_stored(0, sums, COLUMNS * 4);
    _tile_stored(1, sums + 16, COLUMNS * 4);
    if (rows > 16) {
      _tile_stored(2, sums + 16 * COLUMNS, COLUMNS * 4);
      _tile_stored(3, sums + 16 * COLUMNS + 16, COLUMNS * 4);
    }
    memory_barrier();
  }

 private:
  void configure(int64_t rows) {
    if (rows == configured_) return;
    TileConfig t;
    for (int i = 0; i < 8; i++) t.bytes_per_row[i] = 64, t.rows[i] = 16;
    t.rows[0] = t.rows[1] = t.rows[4] = uint8_t(std::min<int64_t>(rows, 16));
    t.rows[2] = t.rows[3] = t.rows[5] = uint8_t(std::max<int64_t>(rows - 16, 1));
    t.bytes_per_row[4] = t.bytes_per_row[5] = uint16_t(depth_);
    t.rows[6] = t.rows[7] = uint8_t(depth_ / 4);
    memory_barrier();
    _tile_loadconfig(&t);
    configured_ = rows;
  }

  template <bool TWO, class Filler>
  void multiply_steps(const int8_t* x, int64_t k_total, const int8_t* panel, int64_t depth, Filler& filler) const {
    for (int64_t k = 0; k < depth; k += depth_, x += 16 * depth_, panel += depth_ * COLUMNS) {
      _tile_loadd(4, x, depth_);
      _tile_loadd(6, panel, COLUMNS * 4);
      _tile_dpbssd(0, 4, 6);
      _tile_loadd(7, panel + 64, COLUMNS * 4);
      _tile_dpbssd(1, 4, 7);
      if constexpr (TWO) {
        _tile_loadd(5, x + 16 * k_total, depth_);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
      filler.step();
    }
  }

  int64_t depth_, configured_ = 0;  // rows
};

constexpr int64_t BYTE_ROWS = 64;    // of one block
constexpr int64_t BYTE_DEPTH = 256;  // two panels, and the sums of a block, stay in the first-level cache

template <int BITS>
class ByteProduct {
 public:
  ByteProduct(const Weight& w, const Output& out, const ByteRows& x, int64_t rows)
      : w_(w), out_(out), x_(x), rows_(rows) {}

  void all() const {
    const int64_t panels = w_.columns / 32;
    run((rows_ + BYTE_ROWS - 1) / BYTE_ROWS * panels, 1, [&](int64_t begin, int64_t end) {
      ByteTiles tiles(w_.group);
      for (int64_t i = begin; i < end; i++) block(tiles, i / panels * BYTE_ROWS, i % panels);
    });
  }

 private:
  // The k values of one panel; the last piece of a group brings what is left of its zero points into account.
  struct Piece {
    int64_t k, depth, group;
    bool last;
  };

  Piece piece_at(int64_t k) const {
    if (k == w_.k) return {k, 0, 0, false};
    const int64_t g = k / w_.group, end = (g + 1) * w_.group, depth = std::min(end - k, BYTE_DEPTH);
    return {k, depth, g, k + depth == end};
  }

  // As in amx_exact.h: while a piece is multiplied the next one is written, and the sums of the one before are scaled
  // when nothing waits for them.
  void block(ByteTiles& tiles, int64_t m_begin, int64_t p) const {
    alignas(64) float total[BYTE_ROWS * 32];
    alignas(64) int32_t sums[2][BYTE_ROWS * 32];
    alignas(64) int8_t panels[2][BYTE_DEPTH * 32];
    const int64_t rows = std::min(rows_ - m_begin, BYTE_ROWS);
    std::memset(total, 0, size_t(rows * 32) * sizeof(float));
    Filler<ByteValues<BITS>, 32> filler(w_);
    Piece before{0, 0, 0, false}, piece = piece_at(0);
    filler.start(2 * p, 0, piece.depth, 1, panels[0]);
    filler.finish();
    for (int turn = 0; piece.depth > 0; turn ^= 1) {
      const Piece next = piece_at(piece.k + piece.depth);
      filler.start(2 * p, next.k, next.depth, tiles.steps(rows, piece.depth), panels[turn ^ 1]);
      for (int64_t m = 0; m < rows; m += 32)
        tiles.multiply(x_.values + tiles.place(w_.k, m_begin + m, piece.k), w_.k, panels[turn], piece.depth,
                       std::min<int64_t>(32, rows - m), sums[turn] + m * 32, filler);
      filler.finish();
      if (before.depth > 0) scale(sums[turn ^ 1], 2 * p, before, m_begin, rows, total);
      before = piece, piece = next;
      if (piece.depth == 0) scale(sums[turn], 2 * p, before, m_begin, rows, total);
    }
    for (int64_t m = 0; m < rows; m++)
      for (int64_t i = 0; i < 32; i += LANES)
        out_.put(m_begin + m, p * 32 + i, mul(load(total + m * 32 + i), set1(x_.scales[m_begin + m])));
  }

  // total += s * sums.
  void scale(const int32_t* sums, int64_t strip, const Piece& piece, int64_t m_begin, int64_t rows,
             float* total) const {
    const bool offset = BITS == 8 && piece.last && w_.zeros != nullptr;
    for (int64_t b = 0; b < 2; b++) {
      const Floats s = scales_of(w_, strip + b, piece.group, 0);
      const __m512i z = integer_zeros(w_, strip + b, piece.group, 128);
      for (int64_t m = 0; m < rows; m++) {
        float* t = total + m * 32 + b * 16;
        __m512i sum = _mm512_load_si512(sums + m * 32 + b * 16);
        if (offset) {
          const int32_t of_x = x_.sums[(m_begin + m) * w_.groups() + piece.group];
          sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(z, _mm512_set1_epi32(of_x)));
        }
        store(t, fma(_mm512_cvtepi32_ps(sum), s, load(t)));
      }
    }
  }

  const Weight& w_;
  const Output& out_;
  const ByteRows& x_;
  int64_t rows_;
};

template <int BITS>
void byte_tiles(const Input& in, const Weight& w, const Output& out) {
  static thread_local Scratch values_memory, scales_memory, sums_memory;
  const ByteTiles tiles(w.group);
  auto* values = values_memory.get<int8_t>(rounded_up(in.rows, ByteTiles::ROWS) * w.k);
  float* scales = scales_memory.get<float>(in.rows);
  auto* sums = sums_memory.get<int32_t>(in.rows * in.groups);
  convert_to_bytes(in, ByteCodes<BITS>::order(), scales, sums, [&](int64_t m, int64_t k) {
    return values + tiles.place(w.k, m, k);
  });
  const ByteRows x{values, scales, sums};
  ByteProduct<BITS>(w, out, x, in.rows).all();
}

}  // namespace
