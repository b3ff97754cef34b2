// Product of rows with a weight of 2, 3, 4 or 8 bits, and the loops of solvers, for x86 and 64-bit Arm processors.
// Compiled once for each instruction set into a library of its own, with a plain C interface: neither torch's nor
// Python's ABI.
#include "codes.h"
#if defined(__aarch64__)
#include "simd128.h"
#elif defined(__AVX512F__)
#include "simd512.h"
#else
#include "simd256.h"
#endif
#include "boxed.h"
#include "columns.h"
#include "gemm.h"
#include "gemv.h"
#include "grids.h"
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

enum Mode : int32_t { FAST = 0, EXACT = 1, BYTES = 2, PAIRS = 3 };

// Which kernel serves how many rows: where they were measured to meet. In mode EXACT, or for one or two rows, or where
// floats are all there is, the product is as good as float32 throughout. Otherwise float32 and float16 rows are rounded
// to bfloat16, and so are the dequantized weights where there are many rows. PAIRS: as EXACT, but AMX takes of float32
// rows the 16 leading bits, as two bfloat16 values.
template <int BITS>
void multiply(const Input& in, const Weight& w, const Output& out, int32_t mode) {
  const bool exact = mode != FAST;
#if defined(__AMX_BF16__)
  if (in.rows <= 2) return gemv<BITS>(in, w, out);
  if (exact) return amx_exact<BITS>(in, w, out, in.type == BFLOAT16 ? 1 : in.type == FLOAT16 || mode == PAIRS ? 2 : 3);
  if (in.rows <= (w.group < 64 ? 24 : 32)) return amx_exact<BITS>(in, w, out, 1);
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

template <int BITS>
int32_t product(const Input& in, const Weight& w, const Output& out, int32_t mode) {
  if (mode == BYTES) return multiply_bytes<BITS>(in, w, out) ? 0 : -2;
  multiply<BITS>(in, w, out, mode);
  return 0;
}

}  // namespace

extern "C" {

// Changes with the meaning of any function or of the packed bytes; Python refuses another one.
int32_t qmm_version() { return 5; }

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

static int64_t columns_of(const Linear& w) { return rounded_up(w.n, 2 * STRIP); }
static int64_t code_bytes(const Linear& w) {
  return columns_of(w) * (w.k / w.group) * rounded_up(w.group, UNIT) * w.bits / 8;
}
static int64_t bytes_of(const Linear& w) {
  return code_bytes(w) + columns_of(w) * (w.k / w.group) * (bytes_of(Type(w.scale_type)) + (w.has_zeros != 0));
}

// x [m][k] and y [m][n] of x_type. mode: FAST, EXACT or PAIRS, see multiply(), or BYTES. -1: bits not known; -2: no such mode.
int32_t qmm_matmul(const Linear* linear, const uint8_t* x, int32_t x_type, uint8_t* y, int64_t m, int32_t mode) {
  const int64_t columns = columns_of(*linear), groups = linear->k / linear->group;
  const int64_t padded = rounded_up(linear->group, UNIT);
  const Type scales = Type(linear->scale_type);
  const uint8_t* scale_bytes = linear->packed + code_bytes(*linear);
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

void qmm_solve_columns(const Columns* columns, float* weight, float* errors) {
  solve_columns(*columns, weight, errors);
}

void qmm_descend_columns(const Columns* columns, float* values, const float* slopes, float* moved) {
  descend_columns(*columns, values, slopes, moved);
}

void qmm_grid_losses(const Groups* groups, int64_t count, const float* scales, const float* zeros, float* losses) {
  grid_losses(*groups, count, scales, zeros, losses);
}

void qmm_grid_moments(const Groups* groups, const float* scales, const float* zeros, float* squares, float* products) {
  grid_moments(*groups, scales, zeros, squares, products);
}

void qmm_set_torch(const Torch* functions) { torch = *functions; }

// ptq_kernels::strips(x, qweight, bias, out_features, group_size, bits, scale_type, has_zeros, mode) -> y, as torch's
// dispatcher calls it: the arguments on `stack`, tensors as handles that are the callee's; the result takes their place.
// x: contiguous, [..., k]. bias: a tensor of another dtype than float, bfloat16 or float16 (qweight, say) means none.
void qmm_boxed(uint64_t* stack, uint64_t, uint64_t) {
  const Argument x(stack[0]), packed(stack[1]), bias(stack[2]);
  constexpr int64_t MOST = 16;
  const int64_t dim = x.dim(), n = int64_t(stack[3]), group = int64_t(stack[4]), bits = int64_t(stack[5]);
  const int32_t scale_type = int32_t(stack[6]), has_zeros = (stack[7] & 0xff) != 0, bias_type = bias.type();
  require(dim >= 1 && dim <= MOST && x.type() >= 0, "x must be a float tensor [..., K] of at most 16 dimensions");
  int64_t sizes[MOST], distances[MOST];
  require(bias_type < 0 || (bias.dim() == 1 && contiguous(bias, distances)), "bias must be contiguous, of shape [N]");
  require(contiguous(x, distances), "x must be contiguous; call .contiguous()");
  std::memcpy(sizes, x.sizes(), size_t(dim) * sizeof(int64_t));
  const int64_t k = sizes[dim - 1], rows = k > 0 ? x.numel() / k : 0;
  const Linear linear{packed.data(), bias_type < 0 ? nullptr : bias.data(), n, k, group, scale_type,
                      std::max(bias_type, 0), has_zeros, int32_t(bits)};
  require(k > 0 && group > 0 && k % group == 0 && packed.dim() == 1 && *packed.strides() == 1 &&
              packed.numel() == bytes_of(linear) && (bias_type < 0 || bias.numel() == n),
          "x, qweight and bias must fit each other; call ptq_kernels.matmul, which says what does not");
  for (int64_t d = 0; d + 1 < dim; d++) distances[d] = distances[d] / k * n;
  sizes[dim - 1] = n;
  Tensor y = nullptr;
  void* out = nullptr;
  require(torch.empty(dim, sizes, distances, torch.dtypes[x.type()], 0, -1, &y) == 0, "torch has no memory for y");
  torch.data_ptr(y, &out);
  if (rows > 0) qmm_matmul(&linear, x.data(), x.type(), static_cast<uint8_t*>(out), rows, int32_t(stack[8]));
  stack[0] = reinterpret_cast<uint64_t>(y);
}
}
