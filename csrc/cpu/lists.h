// Elementwise work over a whole list of tensors at once: operands as flat runs of memory, chunks over threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/tensors.h"

namespace ft {

// Elements per chunk. Chunks are cut from the list as if it were one array, so a model of 600 small tensors splits
// as evenly as one large tensor, and their borders do not depend on the number of threads: a sum over chunks is the
// same for any.
constexpr int64_t kChunk = 16384;

inline int64_t chunk_count(const std::vector<int64_t>& sizes) {
  return (std::accumulate(sizes.begin(), sizes.end(), int64_t{0}) + kChunk - 1) / kChunk;
}

// f(chunk, item, begin, n) for every piece of an item that lies in one chunk.
template <class Fn>
void for_each_chunk(const std::vector<int64_t>& sizes, const Fn& f) {
  std::vector<int64_t> starts(sizes.size() + 1, 0);
  std::partial_sum(sizes.begin(), sizes.end(), starts.begin() + 1);
  torch::stable::parallel_for(0, chunk_count(sizes), 2, [&](int64_t first, int64_t last) {
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

// Whether the elements fill their memory without gaps, in some order of the dimensions.
inline bool is_dense(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1) dims.emplace_back(strides[d], sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline bool same_order(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1 && x[d] != y[d]) return false;
  }
  return true;
}

// The operands of one elementwise item, so that element i of each lies at position i of its memory: as they are if
// they are dense in the same order (contiguous, or all channels_last), else contiguous copies. finish() copies a
// written copy back.
class Operands {
 public:
  explicit Operands(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) {
    bool flat = is_dense(tensors_.front());
    for (size_t i = 1; i < tensors_.size() && flat; ++i) flat = same_order(tensors_.front(), tensors_[i]);
    if (flat) return;
    original_ = tensors_;
    for (Tensor& t : tensors_) t = torch::stable::contiguous(t);
  }

  const Tensor& operator[](size_t i) const { return tensors_[i]; }

  void finish(size_t written) {
    if (original_.empty() || tensors_[written].const_data_ptr() == original_[written].const_data_ptr()) return;
    torch::stable::copy_(original_[written], tensors_[written]);
  }

 private:
  std::vector<Tensor> tensors_, original_;
};

inline bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

}  // namespace ft
