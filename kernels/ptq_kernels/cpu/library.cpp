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

}  // namespace

extern "C" {

// Changes with the meaning of any function or of the packed bytes; Python refuses another one.
int32_t qmm_version() { return 1; }

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

// x [m][k] and y [m][n] of x_type; bias float [n] or null. packed: the codes, then scales [n / 16][groups][16] of
// scale_type, then, where has_zeros, bytes [n / 16][groups][16], with n rounded up to 32. exact:
// see multiply(). -1: bits not known.
int32_t qmm_matmul(const uint8_t* x, int32_t x_type, const uint8_t* packed, int32_t scale_type, int32_t has_zeros,
                   const float* bias, uint8_t* y, int64_t m, int64_t n, int64_t k, int64_t group, int32_t bits,
                   int32_t exact) {
  const int64_t columns = rounded_up(n, 2 * STRIP), groups = k / group, padded = rounded_up(group, UNIT);
  const Type scales = Type(scale_type);
  const uint8_t* scale_bytes = packed + columns * groups * padded * bits / 8;
  const uint8_t* zeros = has_zeros ? scale_bytes + columns * groups * bytes_of(scales) : nullptr;
  const Weight w{packed, scale_bytes, zeros, scales, columns, groups * padded, padded, bits};
  const Input in{x, Type(x_type), m, group, padded, groups};
  const Output out{y, Type(x_type), bias, n};
  switch (bits) {
    case 2: multiply<2>(in, w, out, exact != 0); break;
    case 3: multiply<3>(in, w, out, exact != 0); break;
    case 4: multiply<4>(in, w, out, exact != 0); break;
    case 8: multiply<8>(in, w, out, exact != 0); break;
    default: return -1;
  }
  return 0;
}
}
