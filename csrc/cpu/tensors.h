// What kd.cpp, l2sp.cpp and blend.cpp share on torch's side: storage types, scratch memory, rows of a view.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/dtype.h"

namespace ft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Python has checked dtypes with a better message; this one is for a direct caller of torch.ops.fasttransfer.
inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "fasttransfer: expected a float32, float64, bfloat16 or float16 tensor");
  }
}

inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// A buffer that a thread keeps between calls, aligned to a cache line: mapping a megabyte anew at each call would
// cost as much as the row it serves.
class ThreadScratch {
 public:
  void* at_least(int64_t bytes) {
    if (bytes > size_) {
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_.reset(std::aligned_alloc(64, size_));
      STD_TORCH_CHECK(memory_ != nullptr, "fasttransfer: out of memory for ", size_, " bytes of scratch");
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

// The rows of a [..., V] tensor: where row i of the flattened leading dimensions starts, without a copy for views
// such as logits[:, :-1].
class Rows {
 public:
  explicit Rows(const Tensor& t) : element_bytes_(bytes_of(dtype_of(t))) {
    const auto sizes = t.sizes(), strides = t.strides();
    const int64_t leading = int64_t(sizes.size()) - 1;
    for (int64_t d = 0; d < leading; ++d) {
      count_ *= sizes[d];
      if (sizes[d] == 1) continue;
      if (!dims_.empty() && dims_.back().stride == sizes[d] * strides[d]) {
        dims_.back() = {dims_.back().size * sizes[d], strides[d]};
      } else {
        dims_.push_back({sizes[d], strides[d]});
      }
    }
    width_ = sizes[leading];
    column_stride_ = width_ > 1 ? strides[leading] : 1;
  }

  int64_t count() const { return count_; }
  int64_t width() const { return width_; }
  int64_t column_stride() const { return column_stride_; }

  // Bytes from the tensor's data pointer to row i.
  int64_t offset(int64_t i) const {
    int64_t elements = 0;
    for (auto d = dims_.rbegin(); d != dims_.rend(); ++d) {
      elements += i % d->size * d->stride;
      i /= d->size;
    }
    return elements * element_bytes_;
  }

 private:
  struct Dim {
    int64_t size, stride;
  };
  std::vector<Dim> dims_;
  int64_t count_ = 1, width_ = 0, column_stride_ = 1, element_bytes_;
};

}  // namespace ft
