// Elementwise work over a whole list of tensors at once: operands as flat runs of memory, chunks over threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/tensors.h"

namespace ft {

using torch::headeronly::IntHeaderOnlyArrayRef;

// Elements per chunk. Chunks are cut from the list as if it were one array, so a model of 600 small tensors splits
// as evenly as one large tensor, and their borders do not depend on the number of threads: a sum over chunks is the
// same for any.
constexpr int64_t kChunk = 16384;

// Chunks that a second thread is woken for: half a megabyte per operand. Fewer are done in the 10 us that waking it
// takes on a quiet machine; on one where somebody else has the core, waiting for it takes milliseconds.
constexpr int64_t kChunksPerThread = 8;

inline int64_t chunk_count(const std::vector<int64_t>& sizes) {
  return (std::accumulate(sizes.begin(), sizes.end(), int64_t{0}) + kChunk - 1) / kChunk;
}

// f(chunk, item, begin, n) for every piece of an item that lies in one chunk.
template <class Fn>
void for_each_chunk(const std::vector<int64_t>& sizes, const Fn& f) {
  std::vector<int64_t> starts(sizes.size() + 1, 0);
  std::partial_sum(sizes.begin(), sizes.end(), starts.begin() + 1);
  torch::stable::parallel_for(0, chunk_count(sizes), kChunksPerThread, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      int64_t at = chunk * kChunk;
      const int64_t stop = std::min(at + kChunk, starts.back());
      size_t item = std::upper_bound(starts.begin(), starts.end(), at) - starts.begin() - 1;
      for (; at < stop; ++item) {
        const int64_t n = std::min(stop, starts[item + 1]) - at;
        if (n > 0) f(chunk, item, at - starts[item], n);
        at += n;
      }
    }
  });
}

// The storage type of a tensor; false, and nothing said, where it is none of ours. t.scalar_type() compares with the
// code of one dtype after the other, each of them a call: as long as a small tensor's arithmetic.
inline bool find_storage(AtenTensorHandle t, DType& dtype) {
  static const int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_bfloat16(),
                                  aoti_torch_dtype_float16()};
  int32_t code;
  if (aoti_torch_get_dtype(t, &code) != AOTI_TORCH_SUCCESS) return false;
  for (DType candidate : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    if (code == codes[int(candidate)]) {
      dtype = candidate;
      return true;
    }
  }
  return false;
}

inline DType storage_of(const Tensor& t) {
  DType dtype;
  return find_storage(t.get(), dtype) ? dtype : dtype_of(t);  // which throws
}

// A dense CPU tensor of this shape: what a kernel may read without a look at its strides, if it is contiguous.
inline void check_operand(const Tensor& t, IntHeaderOnlyArrayRef sizes) {
  static const int32_t strided = aoti_torch_layout_strided();
  int32_t layout;
  STD_TORCH_CHECK(aoti_torch_get_layout(t.get(), &layout) == AOTI_TORCH_SUCCESS && layout == strided && t.is_cpu(),
                  "fasttransfer: expected a dense tensor on the CPU");
  const auto own = t.sizes();
  STD_TORCH_CHECK(own.size() == sizes.size() && std::equal(own.begin(), own.end(), sizes.begin()),
                  "fasttransfer: tensors that belong together differ in shape");
}

// Dimensions of more than one element as (stride, size), the innermost first.
inline std::vector<std::pair<int64_t, int64_t>> dimensions(IntHeaderOnlyArrayRef sizes,
                                                           IntHeaderOnlyArrayRef strides) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1) dims.emplace_back(strides[d], sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  return dims;
}

// Whether the elements fill their memory without gaps, in some order of the dimensions.
inline bool is_dense(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides) {
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions(sizes, strides)) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Whether two indices may be the same memory (an expanded tensor).
inline bool overlaps_itself(const Tensor& t) {
  int64_t reach = 0;
  for (const auto& [stride, size] : dimensions(t.sizes(), t.strides())) {
    if (size > 1 && stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

inline bool same_order(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef x, IntHeaderOnlyArrayRef y) {
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1 && x[d] != y[d]) return false;
  }
  return true;
}

// Elements that lie one after the other.
struct Flat {
  void* data;
  DType dtype;
};

struct Operand {
  const Tensor* tensor;
  bool written;
};

// The operands of elementwise items, so that element i of each lies at position i of its memory: as they are if
// they are dense in the same order (contiguous, or all channels_last), else contiguous copies, which live as long as
// this. finish() copies written copies back.
class Operands {
 public:
  // One item; its first operand gives the shape. Throws, before anything was written, where they do not fit.
  void flatten(const Operand* operands, Flat* flats, size_t count) {
    const Tensor& first = *operands[0].tensor;
    const auto sizes = first.sizes();
    bool contiguous = true;
    for (size_t i = 0; i < count; ++i) {
      check_operand(*operands[i].tensor, sizes);
      flats[i].dtype = storage_of(*operands[i].tensor);
      contiguous = operands[i].tensor->is_contiguous() && contiguous;
    }
    const bool flat = contiguous || same_dense_order(operands, count);
    for (size_t i = 0; i < count; ++i) {
      const Tensor& t = *operands[i].tensor;
      STD_TORCH_CHECK(contiguous || !operands[i].written || !overlaps_itself(t),
                      "fasttransfer: a tensor whose elements overlap in memory cannot be written");
      const Tensor* used = &t;
      if (!flat && !t.is_contiguous()) {
        copies_.push_back(std::make_unique<Copy>(Copy{t, torch::stable::contiguous(t), operands[i].written}));
        used = &copies_.back()->copy;
      }
      flats[i].data = operands[i].written ? used->mutable_data_ptr() : const_cast<void*>(used->const_data_ptr());
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

  static bool same_dense_order(const Operand* operands, size_t count) {
    const auto sizes = operands[0].tensor->sizes(), strides = operands[0].tensor->strides();
    if (!is_dense(sizes, strides)) return false;
    for (size_t i = 1; i < count; ++i) {
      if (!same_order(sizes, strides, operands[i].tensor->strides())) return false;
    }
    return true;
  }

  std::vector<std::unique_ptr<Copy>> copies_;
};

// Value i of a list that has one for each of n items, or one for all.
inline double value_of(const std::vector<double>& values, size_t i) { return values[values.size() == 1 ? 0 : i]; }

inline bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

}  // namespace ft
