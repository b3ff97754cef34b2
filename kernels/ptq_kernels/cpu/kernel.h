// What every instruction set shares: the weight as it lies in memory, the output, threads and scratch memory.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

constexpr int64_t STRIP = 16;  // columns of y (rows of the weight) in one strip
constexpr int64_t UNIT = 32;   // k values that every layout of the codes can be cut at
constexpr int64_t AHEAD = 1024;  // bytes fetched before they are read

inline int64_t bytes_of(Type type) { return type == FLOAT32 ? 4 : 2; }
inline int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Torch's own thread pool (torch_parallel_for of libtorch_cpu), handed in by Python; null: the caller's thread only.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);
ParallelFor parallel_for = nullptr;

template <class F>
void run(int64_t count, int64_t grain, F body) {
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); };
  if (parallel_for == nullptr || count <= grain) {
    body(int64_t{0}, count);
  } else {
    parallel_for(0, count, grain, call, &body);
  }
}

// Memory that a thread keeps between calls: fresh pages cost more than the work of a small call.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  template <class T>
  T* get(int64_t count) {
    const size_t bytes = size_t(rounded_up(count * int64_t(sizeof(T)), 64));
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      size_ = bytes;
      if (data_ == nullptr) std::abort();
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Codes: per strip of 16 columns and 32 k values, 64 * bits bytes (see codes.h). Scales and zeros: [strip][group][16].
// Columns are padded to a multiple of 32 (their scales are 0), every group to a multiple of 32 (their x is 0).
struct Weight {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* zeros;  // null: 2^(bits-1)
  Type scale_type;
  int64_t columns, k, group;  // padded
  int bits;

  int64_t strips() const { return columns / STRIP; }
  int64_t groups() const { return k / group; }
  const uint8_t* at(int64_t strip, int64_t position) const { return codes + (strip * k + position) * 2 * bits; }

  // How far beyond at(strip, position) memory should be fetched while NB strips are read side by side. What lies behind
  // the end of a strip is the beginning of its neighbour: what comes next is NB strips on.
  template <int BITS, int NB>
  int64_t ahead(int64_t position) const {
    const int64_t at = position * 2 * BITS + AHEAD, strip = k * 2 * BITS;
    return AHEAD + (at < strip ? 0 : (NB - 1) * strip);
  }
};

// x as the caller has it, [rows][groups * group]; `padded_group` is the weight's.
struct Input {
  const uint8_t* data;
  Type type;
  int64_t rows, group, padded_group, groups;
};

}  // namespace
