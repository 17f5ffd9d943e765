// Torch's side of table.h: tensors as runs of elements, numbers that may be in device memory. The counterpart of
// cpu/lists.h, with the same answers to the same tensors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/tensors.h"
#include "cuda/runtime.h"
#include "cuda/table.h"

namespace ft::lists {

using OptTensor = std::optional<Tensor>;

// Whether kernels can reach a tensor's memory; in the harness the CPU is the machine.
inline bool on_machine(const Tensor& t) {
#if defined(FT_SIMT)
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

inline void check_device(const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(on_machine(t) && t.get_device_index() == like.get_device_index(),
                  "fasttransfer: expected all tensors on one CUDA device");
}

// t.scalar_type() compares with the code of one dtype after the other, each of them a call.
inline DType storage_type(const Tensor& t) {
  static const int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_bfloat16(),
                                  aoti_torch_dtype_float16()};
  int32_t code;
  if (aoti_torch_get_dtype(t.get(), &code) == AOTI_TORCH_SUCCESS) {
    for (DType type : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
      if (code == codes[int(type)]) return type;
    }
  }
  return dtype_of(t);  // which throws
}

// How a tensor's elements lie in memory.
struct Layout {
  bool contiguous;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size) of those with more than one index, innermost first

  explicit Layout(const Tensor& t) : contiguous(t.is_contiguous()) {
    if (contiguous) return;
    const auto sizes = t.sizes(), strides = t.strides();
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] != 1) dims.emplace_back(strides[d], sizes[d]);
    }
    std::sort(dims.begin(), dims.end());
  }
  // Without gaps, in some order of the dimensions.
  bool dense() const {
    int64_t expected = 1;
    for (const auto& [stride, size] : dims) {
      if (stride != expected) return false;
      expected *= size;
    }
    return true;
  }
  // Whether two indices may be the same memory (an expanded tensor).
  bool overlaps_itself() const {
    int64_t reach = 0;
    for (const auto& [stride, size] : dims) {
      if (size > 1 && stride <= reach) return true;
      reach += stride * (size - 1);
    }
    return false;
  }
};

inline bool same_strides(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1 && x[d] != y[d]) return false;
  }
  return true;
}

struct Operand {
  const Tensor* tensor;
  bool written;
};

// The operands of items so that element i of each lies at position i of its memory: as they are if they are dense in
// the same order (contiguous, or all channels_last), else contiguous copies, which live as long as this: the kernels
// are queued by then, and torch gives their memory away only to what is queued behind them. finish() copies written
// copies back.
class Flattened {
 public:
  explicit Flattened(const Tensor& like) : like_(like) {}

  // One item; its first operand gives the shape. Throws, before anything was written, where they do not fit.
  void flatten(const Operand* operands, Run* runs, size_t count) {
    const Tensor& first = *operands[0].tensor;
    bool contiguous = true;
    for (size_t i = 0; i < count; ++i) {
      check(*operands[i].tensor, first);
      contiguous = contiguous && operands[i].tensor->is_contiguous();
    }
    const bool flat = contiguous || same_dense_order(operands, count);
    for (size_t i = 0; i < count; ++i) {
      const Tensor& t = *operands[i].tensor;
      STD_TORCH_CHECK(contiguous || !operands[i].written || !Layout(t).overlaps_itself(),
                      "fasttransfer: a tensor whose elements overlap in memory cannot be written");
      const Tensor* used = &t;
      if (!flat && !t.is_contiguous()) {
        copies_.push_back(std::make_unique<Copy>(Copy{t, torch::stable::contiguous(t), operands[i].written}));
        used = &copies_.back()->copy;
      }
      runs[i] = {operands[i].written ? used->mutable_data_ptr() : used->const_data_ptr(), storage_type(t)};
    }
  }

  void finish() {
    for (const auto& c : copies_) {
      if (c->written) torch::stable::copy_(c->original, c->copy);
    }
  }

 private:
  struct Copy {
    Tensor original, copy;
    bool written;
  };

  void check(const Tensor& t, const Tensor& first) const {
    static const int32_t strided = aoti_torch_layout_strided();
    int32_t layout;
    STD_TORCH_CHECK(aoti_torch_get_layout(t.get(), &layout) == AOTI_TORCH_SUCCESS && layout == strided,
                    "fasttransfer: expected a dense tensor");
    check_device(t, like_);
    const auto sizes = first.sizes(), own = t.sizes();
    STD_TORCH_CHECK(own.size() == sizes.size() && std::equal(own.begin(), own.end(), sizes.begin()),
                    "fasttransfer: tensors that belong together differ in shape");
  }

  static bool same_dense_order(const Operand* operands, size_t count) {
    const Tensor& first = *operands[0].tensor;
    if (!first.is_contiguous() && !Layout(first).dense()) return false;
    return std::all_of(operands + 1, operands + count,
                       [&](const Operand& o) { return same_strides(first, *o.tensor); });
  }

  const Tensor& like_;
  std::vector<std::unique_ptr<Copy>> copies_;
};

// A tensor of `count` fp32 or fp64 numbers. On the device only kernels look at them; on the CPU they are known.
class Numbers {
 public:
  Numbers(const Tensor& t, int64_t count, const Tensor& like, const char* complaint)
      : tensor_(t.dim() == 1 ? t : torch::stable::contiguous(t)),
        is_double_(storage_type(t) == DType::kFloat64),
        on_device_(on_machine(t)) {
    STD_TORCH_CHECK(t.numel() == count && (is_double_ || storage_type(t) == DType::kFloat32), complaint);
    STD_TORCH_CHECK(on_device_ || t.is_cpu(), "fasttransfer: expected numbers on the device, or on the CPU");
    if (on_device_) check_device(t, like);
  }
  bool on_device() const { return on_device_; }
  int64_t stride() const { return tensor_.dim() == 1 ? tensor_.stride(0) : 1; }
  Scalar scalar() const {
    return on_device_ ? Scalar{tensor_.const_data_ptr(), 0, is_double_} : Scalar{nullptr, at(0), false};
  }
  // Of numbers on the CPU.
  double at(int64_t i) const {
    return is_double_ ? tensor_.const_data_ptr<double>()[i * stride()]
                      : double(tensor_.const_data_ptr<float>()[i * stride()]);
  }

 private:
  Tensor tensor_;
  bool is_double_, on_device_;
};

// Value i of a list that has one for each item, or one for all.
template <class T>
T value_of(const std::vector<T>& values, size_t i) {
  return values[values.size() == 1 ? 0 : i];
}

}  // namespace ft::lists
