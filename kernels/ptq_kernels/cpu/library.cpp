// Product of rows with a weight of 2, 3, 4 or 8 bits, for x86 processors. Compiled once for each instruction set into a
// library of its own, with a plain C interface: neither torch's nor Python's ABI.
#include "codes.h"
#ifdef __AVX512F__
#include "simd512.h"
#else
#include "simd256.h"
#endif
#include "gemm.h"
#include "gemv.h"
#include "tiles_dot.h"
#ifdef __AMX_BF16__
#include "amx_exact.h"
#endif
#ifdef __AVX512VNNI__
#include "byte_dot.h"
#endif
#ifdef __AMX_INT8__
#include "byte_tiles.h"
#endif

namespace {

// Which kernel serves how many rows: where they were measured to meet. With `exact`, or for one or two rows, or where
// floats are all there is, the product is as good as float32 throughout. Otherwise float32 and float16 rows are rounded
// to bfloat16, and so are the dequantized weights where there are many rows.
template <int BITS>
void multiply(const Input& in, const Weight& w, const Output& out, bool exact) {
#if defined(__AMX_BF16__)
  if (in.rows <= 2) return gemv<BITS>(in, w, out);
  if (exact) return amx_exact<BITS>(in, w, out, in.type == BFLOAT16 ? 1 : in.type == FLOAT16 ? 2 : 3);
  if (in.rows <= (w.group < 64 ? 8 : 16)) return amx_exact<BITS>(in, w, out, 1);
  return gemm<AmxTiles, BITS>(in, w, out);
#else
  if (in.rows <= 4) return gemv<BITS>(in, w, out);
#ifdef __AVX512BF16__
  if (!exact) return gemm<DotTiles<PairDot>, BITS>(in, w, out);
#endif
  static_cast<void>(exact);
  return gemm<DotTiles<FloatDot>, BITS>(in, w, out);
#endif
}

// With the rows of x rounded to bytes. False where the instruction set has no such product.
template <int BITS>
bool multiply_bytes(const Input& in, const Weight& w, const Output& out) {
#ifdef __AMX_INT8__
  if (in.rows > 4) return byte_tiles<BITS>(in, w, out), true;
#endif
#ifdef __AVX512VNNI__
  return byte_dot<BITS>(in, w, out), true;
#else
  static_cast<void>(in), static_cast<void>(w), static_cast<void>(out);
  return false;
#endif
}

enum Mode : int32_t { FAST = 0, EXACT = 1, BYTES = 2 };

template <int BITS>
int32_t product(const Input& in, const Weight& w, const Output& out, int32_t mode) {
  if (mode == BYTES) return multiply_bytes<BITS>(in, w, out) ? 0 : -2;
  multiply<BITS>(in, w, out, mode == EXACT);
  return 0;
}

}  // namespace

extern "C" {

// Changes with the meaning of any function or of the packed bytes; Python refuses another one.
int32_t qmm_version() { return 2; }

// 0 where this processor and kernel let the library run what the compiler was allowed to use.
int32_t qmm_start() {
#ifdef __AMX_BF16__
  return amx_granted() ? 0 : 1;
#else
  return 0;
#endif
}

void qmm_set_parallel_for(ParallelFor f) { parallel_for = f; }

// stream: [n][k * bits / 32] canonical words, k a multiple of 32. strips: n rounded up to 32, times k * bits / 8 bytes.
void qmm_pack(const uint32_t* stream, uint32_t* strips, int64_t n, int64_t k, int32_t bits) {
  pack_codes(stream, strips, n, k, bits);
}

void qmm_unpack(const uint32_t* strips, uint32_t* stream, int64_t n, int64_t k, int32_t bits) {
  unpack_codes(strips, stream, n, k, bits);
}

// What a product needs to know of a weight [n][k]. packed: the codes, then scales [n / 16][groups][16] of scale_type,
// then, where has_zeros, bytes [n / 16][groups][16], with n rounded up to 32. bias: [n] of bias_type, or null.
struct Linear {
  const uint8_t* packed;
  const uint8_t* bias;
  int64_t n, k, group;
  int32_t scale_type, bias_type, has_zeros, bits;
};

// x [m][k] and y [m][n] of x_type. mode: FAST or EXACT, see multiply(), or BYTES. -1: bits not known; -2: no such mode.
int32_t qmm_matmul(const Linear* linear, const uint8_t* x, int32_t x_type, uint8_t* y, int64_t m, int32_t mode) {
  const int64_t columns = rounded_up(linear->n, 2 * STRIP), groups = linear->k / linear->group;
  const int64_t padded = rounded_up(linear->group, UNIT);
  const Type scales = Type(linear->scale_type);
  const uint8_t* scale_bytes = linear->packed + columns * groups * padded * linear->bits / 8;
  const uint8_t* zeros = linear->has_zeros ? scale_bytes + columns * groups * bytes_of(scales) : nullptr;
  const Weight w{linear->packed, scale_bytes, zeros, scales, columns, groups * padded, padded, linear->bits};
  const Input in{x, Type(x_type), m, linear->group, padded, groups};
  const Output out{y, Type(x_type), linear->bias, Type(linear->bias_type), linear->n};
  switch (linear->bits) {
    case 2: return product<2>(in, w, out, mode);
    case 3: return product<3>(in, w, out, mode);
    case 4: return product<4>(in, w, out, mode);
    case 8: return product<8>(in, w, out, mode);
    default: return -1;
  }
}
}
