// The product as a kernel of torch's dispatcher. Nothing of torch is included or linked: Python hands in the functions of
// torch's C interface (torch/csrc/stable/c/shim.h), and registers `boxed` through it.
#pragma once
#include <algorithm>
#include <stdexcept>

#include "kernel.h"

namespace {

using Tensor = void*;  // a handle

// As library.py fills it in. Every function returns 0 on success.
struct Torch {
  int32_t (*data_ptr)(Tensor, void** out);
  int32_t (*dim)(Tensor, int64_t* out);
  int32_t (*sizes)(Tensor, int64_t** out);
  int32_t (*strides)(Tensor, int64_t** out);
  int32_t (*numel)(Tensor, int64_t* out);
  int32_t (*dtype)(Tensor, int32_t* out);
  int32_t (*empty)(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device_type,
                   int32_t device_index, Tensor* out);
  int32_t (*destroy)(Tensor);
  int32_t dtypes[3];  // torch's numbers for the entries of Type
};
Torch torch;

void require(bool holds, const char* otherwise) {
  if (!holds) throw std::runtime_error(otherwise);
}

// A tensor that the dispatcher has handed over; it is given back at the end of the scope.
class Argument {
 public:
  explicit Argument(uint64_t handle) : handle_(reinterpret_cast<Tensor>(handle)) {}
  Argument(const Argument&) = delete;
  Argument& operator=(const Argument&) = delete;
  ~Argument() { torch.destroy(handle_); }

  const uint8_t* data() const { return static_cast<const uint8_t*>(get<void*>(torch.data_ptr)); }
  int64_t dim() const { return get<int64_t>(torch.dim); }
  const int64_t* sizes() const { return get<int64_t*>(torch.sizes); }
  const int64_t* strides() const { return get<int64_t*>(torch.strides); }
  int64_t numel() const { return get<int64_t>(torch.numel); }

  // The entry of Type; -1 for any other dtype.
  int32_t type() const {
    const int32_t found = get<int32_t>(torch.dtype);
    for (int32_t i = 0; i < 3; i++)
      if (torch.dtypes[i] == found) return i;
    return -1;
  }

 private:
  template <class T>
  T get(int32_t (*function)(Tensor, T*)) const {
    T value;
    require(function(handle_, &value) == 0, "torch does not tell what a tensor is like");
    return value;
  }

  Tensor handle_;
};

// The distances of a contiguous tensor; false where `x` has others. As torch counts: a dimension of no entries counts as
// one, and a tensor without entries is contiguous whatever its distances.
inline bool contiguous(const Argument& x, int64_t* distances) {
  const int64_t *sizes = x.sizes(), *strides = x.strides();
  bool as_is = true;
  int64_t step = 1;
  for (int64_t d = x.dim() - 1; d >= 0; step *= std::max<int64_t>(sizes[d--], 1)) {
    distances[d] = step;
    as_is = as_is && (sizes[d] == 1 || strides[d] == step);
  }
  return as_is || x.numel() == 0;
}

}  // namespace
