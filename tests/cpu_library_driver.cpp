// Drives the C interface of the library with heap blocks of exactly the documented sizes, so that a sanitizer sees any
// step beyond them, and compares with the definition in double. Run by scripts/sanitize; "quick" leaves out large shapes.
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "library.cpp"

namespace {

// Every second call is split between two threads, as torch's pool may do.
int32_t two_threads(int64_t begin, int64_t end, int64_t, Body body, void* context) {
  const int64_t middle = (begin + end) / 2;
  std::thread other(body, middle, end, context);
  body(begin, middle, context);
  other.join();
  return 0;
}

uint32_t state = 1;
uint32_t random_bits() { return (state = state * 1664525 + 1013904223) >> 8; }
float random_float() { return float(random_bits() % 2001) / 1000 - 1; }

// Only values that all three types hold: multiples of 1/8 below 1.
float random_x() { return float(int(random_bits() % 15) - 7) / 8; }

#ifdef __aarch64__
using Half = __fp16;
#else
using Half = _Float16;
#endif

void write_as(Type type, uint8_t* to, float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (type == FLOAT32) std::memcpy(to, &word, 4);
  const uint16_t high = uint16_t(word >> 16);
  const Half half = Half(value);
  if (type == BFLOAT16) std::memcpy(to, &high, 2);
  if (type == FLOAT16) std::memcpy(to, &half, 2);
}

float read_as(Type type, const uint8_t* from) {
  float value = 0;
  uint16_t high;
  Half half;
  std::memcpy(&high, from, 2);
  std::memcpy(&half, from, 2);
  const uint32_t word = uint32_t(high) << 16;
  if (type == FLOAT32) std::memcpy(&value, from, 4);
  if (type == BFLOAT16) std::memcpy(&value, &word, 4);
  if (type == FLOAT16) value = float(half);
  return value;
}

struct Shape {
  int64_t n, k, group;
  int bits;
  bool zeros;
};

struct Layer {
  Shape shape;
  std::vector<int> codes;      // [n][k]
  std::vector<float> scales;   // [n][groups]
  std::vector<int> zeros;      // [n][groups]
  std::unique_ptr<uint8_t[]> packed;

  explicit Layer(const Shape& s) : shape(s), codes(size_t(s.n * s.k)) {
    const int64_t groups = s.k / s.group, padded = rounded_up(s.group, UNIT), words = groups * padded * s.bits / 32;
    const int64_t columns = rounded_up(s.n, 2 * STRIP);
    for (int& code : codes) code = int(random_bits() % (1u << s.bits));
    for (int64_t i = 0; i < s.n * groups; i++) {
      scales.push_back(random_float());
      zeros.push_back(s.zeros ? int(random_bits() % (1u << s.bits)) : 1 << (s.bits - 1));
    }
    std::vector<uint32_t> stream(size_t(s.n * words)), back(stream.size());
    for (int64_t row = 0; row < s.n; row++)
      for (int64_t k = 0; k < s.k; k++)
        for (int bit = 0; bit < s.bits; bit++) {
          const int64_t at = (k / s.group * padded + k % s.group) * s.bits + bit;
          stream[size_t(row * words + at / 32)] |= uint32_t(codes[size_t(row * s.k + k)] >> bit & 1) << (at % 32);
        }
    const int64_t code_bytes = columns * words * 4;
    packed.reset(new uint8_t[size_t(code_bytes + columns * groups * (4 + s.zeros))]());
    auto* strips = reinterpret_cast<uint32_t*>(packed.get());
    qmm_pack(stream.data(), strips, s.n, groups * padded, s.bits);
    qmm_unpack(strips, back.data(), s.n, groups * padded, s.bits);
    if (stream != back) std::printf("pack does not invert\n"), std::exit(1);
    for (int64_t row = 0; row < s.n; row++)
      for (int64_t g = 0; g < groups; g++) {
        const int64_t at = (row / STRIP * groups + g) * STRIP + row % STRIP;
        std::memcpy(packed.get() + code_bytes + at * 4, &scales[size_t(row * groups + g)], 4);
        if (s.zeros) packed[size_t(code_bytes + columns * groups * 4 + at)] = uint8_t(zeros[size_t(row * groups + g)]);
      }
  }

  // What mode BYTES makes of the values of one row.
  static void round_to_bytes(double* x, int64_t k) {
    float most = 0;
    for (int64_t i = 0; i < k; i++) most = std::fmax(most, std::fabs(float(x[i])));
    const float inverse = most > 0 ? 127 / most : 0, scale = most / 127;
    for (int64_t i = 0; i < k; i++) x[i] = double(std::nearbyint(float(x[i]) * inverse)) * scale;
  }

  // The largest error over the sum of magnitudes; 0 where the library has no such mode.
  double error(int64_t m, Type type, Mode mode) const {
    const Shape& s = shape;
    const int64_t size = bytes_of(type), groups = s.k / s.group;
    std::unique_ptr<uint8_t[]> x(new uint8_t[size_t(m * s.k * size)]), y(new uint8_t[size_t(m * s.n * size)]);
    std::unique_ptr<float[]> bias(new float[size_t(s.n)]);
    for (int64_t i = 0; i < m * s.k; i++) write_as(type, x.get() + i * size, random_x());
    for (int64_t i = 0; i < s.n; i++) bias[size_t(i)] = random_float();
    std::memset(y.get(), 0xff, size_t(m * s.n * size));  // NaN
    const auto* bias_bytes = reinterpret_cast<const uint8_t*>(bias.get());
    const Linear linear{packed.get(), bias_bytes, s.n, s.k, s.group, FLOAT32, FLOAT32, s.zeros, s.bits};
    const int32_t failed = qmm_matmul(&linear, x.get(), type, y.get(), m, mode);
    if (failed == -2 && mode == BYTES) return 0;
    if (failed != 0) return 1;
    std::vector<double> values;
    for (int64_t i = 0; i < m * s.k; i++) values.push_back(read_as(type, x.get() + i * size));
    for (int64_t row = 0; row < m && mode == BYTES; row++) round_to_bytes(values.data() + row * s.k, s.k);
    double worst = 0;
    for (int64_t row = 0; row < m; row++)
      for (int64_t n = 0; n < s.n; n++) {
        double want = bias[size_t(n)], magnitude = std::fabs(want) + 1;
        for (int64_t k = 0; k < s.k; k++) {
          const size_t g = size_t(n * groups + k / s.group);
          const double term = values[size_t(row * s.k + k)] * scales[g] * (codes[size_t(n * s.k + k)] - zeros[g]);
          want += term, magnitude += std::fabs(term);
        }
        const double error = std::fabs(read_as(type, y.get() + (row * s.n + n) * size) - want) / magnitude;
        worst = error <= worst ? worst : error;  // keeps a NaN
      }
    return worst;
  }
};

// What torch's C interface tells of a tensor; every handle is counted.
struct Mock {
  void* data;
  int64_t dim, sizes[2], strides[2];
  int32_t dtype;
};
int64_t handles = 0;

Tensor handle(void* data, int64_t rows, int64_t columns, int32_t dtype) {
  handles++;
  if (rows == 0) return new Mock{data, 1, {columns, 0}, {1, 0}, dtype};
  return new Mock{data, 2, {rows, columns}, {columns, 1}, dtype};
}

const Torch MOCKED = {
    [](Tensor t, void** out) { return *out = static_cast<Mock*>(t)->data, 0; },
    [](Tensor t, int64_t* out) { return *out = static_cast<Mock*>(t)->dim, 0; },
    [](Tensor t, int64_t** out) { return *out = static_cast<Mock*>(t)->sizes, 0; },
    [](Tensor t, int64_t** out) { return *out = static_cast<Mock*>(t)->strides, 0; },
    [](Tensor t, int64_t* out) {
      const auto* mock = static_cast<Mock*>(t);
      return *out = mock->sizes[0] * (mock->dim == 2 ? mock->sizes[1] : 1), 0;
    },
    [](Tensor t, int32_t* out) { return *out = static_cast<Mock*>(t)->dtype, 0; },
    [](int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t, int32_t, Tensor* out) {
      if (dim != 2 || strides[0] != sizes[1] || strides[1] != 1) return 1;
      *out = handle(new uint8_t[size_t(sizes[0] * sizes[1] * 4)], sizes[0], sizes[1], dtype);
      return 0;
    },
    [](Tensor t) { return delete static_cast<Mock*>(t), handles--, 0; },
    {6, 15, 5},
};

// The boxed call gives what the plain one gives, frees its arguments, and refuses what does not fit.
bool boxed_agrees(const Layer& layer, int64_t m) {
  const Shape& s = layer.shape;
  std::vector<float> x(size_t(m * s.k)), bias(size_t(s.n)), want(size_t(m * s.n));
  for (float& value : x) value = random_x();
  for (float& value : bias) value = random_float();
  const Linear linear{layer.packed.get(), reinterpret_cast<const uint8_t*>(bias.data()), s.n, s.k, s.group, FLOAT32,
                      FLOAT32, s.zeros, s.bits};
  qmm_matmul(&linear, reinterpret_cast<const uint8_t*>(x.data()), FLOAT32, reinterpret_cast<uint8_t*>(want.data()), m,
             EXACT);
  for (int64_t missing : {0, 1}) {
    uint64_t stack[9] = {0, 0, 0, uint64_t(s.n), uint64_t(s.group), uint64_t(s.bits), FLOAT32, s.zeros, EXACT};
    const Tensor arguments[3] = {handle(x.data(), m, s.k, 6),
                                 handle(layer.packed.get(), 0, bytes_of(linear) - missing, 0),
                                 handle(bias.data(), 0, s.n, 6)};
    for (int i = 0; i < 3; i++) stack[i] = reinterpret_cast<uint64_t>(arguments[i]);
    bool refused = false;
    try {
      qmm_boxed(stack, 9, 1);
    } catch (const std::runtime_error&) {
      refused = true;
    }
    if (refused != (missing == 1)) return false;
    if (refused) continue;
    auto* y = reinterpret_cast<Mock*>(stack[0]);
    if (std::memcmp(y->data, want.data(), want.size() * sizeof(float)) != 0) return false;
    delete[] static_cast<uint8_t*>(y->data);
    torch.destroy(y);
  }
  return handles == 0;
}

// A block of columns on a grid of 3 bits: what the functions write follows from the codes in double, and every code is
// nearest to what its column should be.
bool columns_agree(int64_t count, int64_t rows, bool descend) {
  const int64_t pitch = count + 3, groups = 2;
  auto floats = [](int64_t n) { return std::unique_ptr<float[]>(new float[size_t(n)]); };
  auto factors = floats((count - 1) * pitch + count), scales = floats(groups * rows), zeros = floats(groups * rows);
  auto target = floats(count * rows), values = floats(count * rows), slopes = floats(count * rows);
  auto errors = floats(count * rows);
  std::unique_ptr<int32_t[]> group(new int32_t[size_t(count)]);
  std::unique_ptr<uint8_t[]> codes(new uint8_t[size_t(count * rows)]);
  for (int64_t i = 0; i < (count - 1) * pitch + count; i++) factors[i] = random_float() / 8;
  for (int64_t j = 0; j < count; j++) factors[j * pitch + j] = 1 + float(j) / 8, group[j] = int32_t(random_bits() % groups);
  for (int64_t i = 0; i < groups * rows; i++) scales[i] = 0.25f + random_float() / 8, zeros[i] = float(random_bits() % 8);
  for (int64_t i = 0; i < count * rows; i++) target[i] = values[i] = random_float(), slopes[i] = random_float();
  const Columns columns{count, rows, pitch, factors.get(), scales.get(), zeros.get(), group.get(), codes.get(), 7};
  if (descend) {
    qmm_descend_columns(&columns, values.get(), slopes.get(), errors.get());
  } else {
    qmm_solve_columns(&columns, values.get(), errors.get());
  }
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t j = 0; j < count; j++) {
      const float scale = scales[group[j] * rows + r], zero = zeros[group[j] * rows + r], diagonal = factors[j * pitch + j];
      const double value = (codes[j * rows + r] - double(zero)) * scale;
      double rest = descend ? slopes[j * rows + r] : target[j * rows + r];
      for (int64_t i = 0; i < j; i++) rest -= double(factors[i * pitch + j]) * errors[i * rows + r];
      const double wanted = descend ? target[j * rows + r] + rest / diagonal : rest;
      const double error = descend ? value - target[j * rows + r] : (wanted - value) / diagonal;
      const double level = wanted / scale + zero;
      const double held = level < 0 ? 0 : level > 7 ? 7 : level;
      if (std::abs(values[j * rows + r] - value) > 1e-6 || std::abs(errors[j * rows + r] - error) > 1e-4) return false;
      if (std::abs(held - codes[j * rows + r]) > 0.5001) return false;
    }
  }
  return true;
}

// What groups lose on some grids of 3 bits, and the moments on the first of them, from codes in double.
bool grids_agree(int64_t rows, int64_t groups, int64_t size, int64_t count) {
  auto floats = [](int64_t n) { return std::unique_ptr<float[]>(new float[size_t(n)]); };
  const int64_t all = rows * groups;
  auto weight = floats(all * size), cost = floats(groups * size), scales = floats(count * all), zeros = floats(count * all);
  auto losses = floats(count * all), squares = floats(all), products = floats(all);
  for (int64_t i = 0; i < all * size; i++) weight[i] = random_float();
  for (int64_t i = 0; i < groups * size; i++) cost[i] = 1 + random_float();
  for (int64_t i = 0; i < count * all; i++) scales[i] = 0.25f + random_float() / 8, zeros[i] = float(random_bits() % 8);
  const Groups of{rows, groups, size, weight.get(), cost.get(), 7};
  qmm_grid_losses(&of, count, scales.get(), zeros.get(), losses.get());
  qmm_grid_moments(&of, scales.get(), zeros.get(), squares.get(), products.get());
  for (int64_t at = 0; at < count * all; at++) {
    double loss = 0, square = 0, product = 0;
    for (int64_t i = 0; i < size; i++) {
      const float w = weight[at % all * size + i], h = cost[at % all % groups * size + i];
      const double level = std::nearbyint(w / scales[at]) + double(zeros[at]);
      const double c = (level < 0 ? 0 : level > 7 ? 7 : level) - zeros[at], error = c * scales[at] - w;
      loss += h * error * error, square += h * c * c, product += h * c * w;
    }
    if (std::abs(losses[at] - loss) > 1e-4 * (1 + loss)) return false;
    if (at < all && std::abs(squares[at] - square) > 1e-4 * (1 + square)) return false;
    if (at < all && std::abs(products[at] - product) > 1e-4 * (1 + square)) return false;
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const bool quick = count > 1 && std::string(arguments[1]) == "quick";
  if (qmm_start() != 0 || qmm_version() < 1) return std::printf("cannot start\n"), 1;
  const Linear unknown{nullptr, nullptr, 0, 0, 32, FLOAT32, FLOAT32, 0, 5};
  if (qmm_matmul(&unknown, nullptr, FLOAT32, nullptr, 0, FAST) != -1) return 1;
  for (int64_t rows : {1, 31, 32, 100}) {
    for (int64_t n : {1, 40}) {
      qmm_set_parallel_for(rows == 100 ? two_threads : nullptr);
      if (!columns_agree(n, rows, false) || !columns_agree(n, rows, true)) return std::printf("columns do not agree\n"), 1;
      if (!grids_agree(rows, 3, n, 4) || !grids_agree(rows, 1, 32 * n, 1)) return std::printf("grids do not agree\n"), 1;
    }
  }
  std::vector<Shape> shapes;
  for (int bits : {2, 3, 4, 8}) {
    shapes.insert(shapes.end(), {{1, 32, 32, bits, true}, {33, 60, 60, bits, false}, {31, 96, 24, bits, true}});
    if (!quick) shapes.insert(shapes.end(), {{100, 384, 128, bits, true}, {290, 1088, 64, bits, false}});
  }
  int64_t calls = 0;
  for (const Shape& shape : shapes) {
    const Layer layer(shape);
    qmm_set_torch(&MOCKED);
    if (!boxed_agrees(layer, 1) || !boxed_agrees(layer, 5)) return std::printf("the boxed call does not agree\n"), 1;
    for (int64_t m : {1, 2, 3, 4, 5, 9, 16, 17, 33, 70, 270}) {
      if (quick ? m > 33 : m > 70 && shape.bits != 4) continue;
      for (Type type : {FLOAT32, BFLOAT16, FLOAT16}) {
        for (Mode mode : {calls % 3 == 0 ? EXACT : calls % 3 == 1 ? FAST : PAIRS, BYTES}) {
          qmm_set_parallel_for(calls++ % 2 == 0 ? nullptr : two_threads);
          const double error = layer.error(m, type, mode);
          // bfloat16 weights and results: 2^-8 each of the magnitudes, rounded up
          if (!(error < 0.01)) {
            std::printf("error %g: n %ld k %ld group %ld bits %d m %ld type %d mode %d\n", error, long(shape.n),
                        long(shape.k), long(shape.group), shape.bits, long(m), int(type), int(mode));
            return 1;
          }
        }
      }
    }
  }
  return std::printf("columns, grids and %ld products agree with double\n", long(calls)), 0;
}
