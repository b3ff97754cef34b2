// The tiles of gemm.h in AMX registers: 32 rows times 32 columns, four sums of 16 x 16.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "gemm.h"

namespace {

// Linux grants the tile registers on request, once for the process: ARCH_REQ_XCOMP_PERM of XTILEDATA.
inline bool amx_granted() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
}

// Compilers may not know that tile instructions read and write memory, and move or drop the stores before them.
inline void memory_barrier() { asm volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// Registers 0 to 3: sums of two row tiles times two column tiles; 4, 5: rows of x; 6, 7: columns of the panel.
class AmxTiles {
 public:
  template <int BITS>
  using Values = PairValues<BITS>;
  using Element = uint16_t;
  static constexpr int64_t COLUMNS = 32, ROWS = 32, INTERLEAVE = 16;
  static constexpr int64_t UNIT_BYTES = COLUMNS * 4;  // a pair of k values of a panel

  ~AmxTiles() {
    if (configured_ != 0) _tile_release();
  }

  // [rows / 16][k / 32][16][32]: one tile is 1 KiB without gaps. Rows at their natural distance, a power of two, would
  // fall into the same few sets of the first-level cache.
  static Element* place(Element* x, int64_t k_total, int64_t m, int64_t k) {
    return x + m / 16 * 16 * k_total + k * 16 + m % 16 * 32;
  }

  static void arrange(const Input& in, int64_t k_total, Element* out) {
    if (in.type == BFLOAT16 && in.group == in.padded_group) return copy(in, k_total, out);
    convert_rows(in, nullptr, [&](int64_t m, int64_t k, const float* values) {
      write_unit(values, place(out, k_total, m, k));
      return 0.0f;
    });
  }

  // bfloat16 rows without padding, as they are.
  static void copy(const Input& in, int64_t k_total, Element* out) {
    const auto* x = reinterpret_cast<const Element*>(in.data);
    run(in.rows, std::max<int64_t>(1, 65536 / k_total), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; m++)
        for (int64_t k = 0; k < k_total; k += UNIT)
          std::memcpy(place(out, k_total, m, k), x + m * k_total + k, UNIT * sizeof(Element));
    });
  }

  // Portions of another panel that fit in between.
  static int64_t steps(int64_t rows, int64_t depth) { return (rows + ROWS - 1) / ROWS * (depth / UNIT); }

  // The product with x, or with the sum of as many `terms`, `term` values apart.
  template <class Filler>
  void multiply(const Element* x, int64_t k_total, const Element* panel, int64_t depth, int64_t rows, float* c,
                bool accumulate, Filler& filler, int terms = 1, int64_t term = 0) {
    memory_barrier();
    configure(rows);
    if (accumulate) {
      load_sums(c, rows > 16);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    if (rows > 16) {
      multiply_steps<true>(x, k_total, panel, depth, filler, terms, term);
    } else {
      multiply_steps<false>(x, k_total, panel, depth, filler, terms, term);
    }
    store_sums(c, rows > 16);
    memory_barrier();
  }

 private:
  void configure(int64_t rows) {
    if (rows == configured_) return;
    TileConfig t;
    for (int i = 0; i < 8; i++) t.bytes_per_row[i] = 64, t.rows[i] = 16;
    t.rows[0] = t.rows[1] = t.rows[4] = uint8_t(std::min<int64_t>(rows, 16));
    t.rows[2] = t.rows[3] = t.rows[5] = uint8_t(std::max<int64_t>(rows - 16, 1));
    memory_barrier();
    _tile_loadconfig(&t);
    configured_ = rows;
  }

  template <bool TWO, class Filler>
  static void multiply_steps(const Element* x, int64_t k_total, const Element* panel, int64_t depth, Filler& filler,
                             int terms, int64_t term) {
    for (int64_t k = 0; k < depth; k += 32, x += 512, panel += 16 * UNIT_BYTES / 2) {
      _tile_loadd(6, panel, UNIT_BYTES);
      _tile_loadd(7, panel + 32, UNIT_BYTES);
      for (int t = terms - 1; t >= 0; t--) {  // the smallest first
        const Element* a = x + t * term;
        _tile_loadd(4, a, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (TWO) {
          _tile_loadd(5, a + 16 * k_total, 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        filler.step();
      }
    }
  }

  static void load_sums(const float* c, bool two) {
    _tile_loadd(0, c, COLUMNS * 4);
    _tile_loadd(1, c + 16, COLUMNS * 4);
    if (!two) return;
    _tile_loadd(2, c + 16 * COLUMNS, COLUMNS * 4);
    _tile_loadd(3, c + 16 * COLUMNS + 16, COLUMNS * 4);
  }

  static void store_sums(float* c, bool two) {
    _tile_stored(0, c, COLUMNS * 4);
    _tile_stored(1, c + 16, COLUMNS * 4);
    if (!two) return;
    _tile_stored(2, c + 16 * COLUMNS, COLUMNS * 4);
    _tile_stored(3, c + 16 * COLUMNS + 16, COLUMNS * 4);
  }

  int64_t configured_ = 0;  // rows
};

}  // namespace
