// Lists of many small tensors, where a look at a tensor costs more than its arithmetic: each is looked at once, from
// here, and a call is served whole or, with nothing written, not at all.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <vector>

#include "cpu/lists.h"

// Of Python's own stable interface; this library is an extension module, so they are there.
extern "C" int PyGILState_Ensure();
extern "C" void PyGILState_Release(int);

namespace ft {

// The dispatcher lets go of Python's lock, and to drop a tensor that Python owns takes it: once for a list, not for
// each of its tensors (46 ns).
class PythonLock {
 public:
  PythonLock() : state_(PyGILState_Ensure()) {}
  ~PythonLock() { PyGILState_Release(state_); }
  PythonLock(const PythonLock&) = delete;
  PythonLock& operator=(const PythonLock&) = delete;

 private:
  int state_;
};

// A list of tensors as the dispatcher hands it over: owned, without a shared pointer for each.
class Handles {
 public:
  explicit Handles(StableIValue argument) {
    const auto list = torch::stable::detail::to<StableListHandle>(argument);
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    handles_.resize(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      handles_[i] = torch::stable::detail::to<AtenTensorHandle>(item);
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }
  ~Handles() {
    const PythonLock lock;
    for (AtenTensorHandle t : handles_) aoti_torch_delete_tensor_object(t);
  }
  Handles(const Handles&) = delete;
  Handles& operator=(const Handles&) = delete;

  size_t size() const { return handles_.size(); }
  AtenTensorHandle operator[](size_t i) const { return handles_[i]; }

 private:
  std::vector<AtenTensorHandle> handles_;
};

// A tensor whose elements fill their memory without gaps.
struct Plain {
  Flat flat;
  IntHeaderOnlyArrayRef sizes, strides;
  int64_t numel;
  bool contiguous;
};

// Whether a tensor is plain: the dispatcher has seen to it that it is strided and on the CPU.
inline bool look(AtenTensorHandle t, bool written, Plain& plain) {
  int64_t dim, *sizes, *strides;
  const void* data;
  const bool fine = find_storage(t, plain.flat.dtype) && aoti_torch_get_dim(t, &dim) == AOTI_TORCH_SUCCESS &&
                    aoti_torch_get_sizes(t, &sizes) == AOTI_TORCH_SUCCESS &&
                    aoti_torch_get_strides(t, &strides) == AOTI_TORCH_SUCCESS &&
                    aoti_torch_is_contiguous(t, &plain.contiguous) == AOTI_TORCH_SUCCESS;
  if (!fine) return false;
  plain.sizes = {sizes, size_t(dim)};
  plain.strides = {strides, size_t(dim)};
  if (!plain.contiguous && !is_dense(plain.sizes, plain.strides)) return false;
  plain.numel = std::accumulate(sizes, sizes + dim, int64_t{1}, std::multiplies<>());
  if (written) return torch_get_mutable_data_ptr(t, &plain.flat.data) == AOTI_TORCH_SUCCESS;
  if (torch_get_const_data_ptr(t, &data) != AOTI_TORCH_SUCCESS) return false;
  plain.flat.data = const_cast<void*>(data);
  return true;
}

// Whether element i of one belongs to element i of the other, as they lie in memory.
inline bool same_layout(const Plain& a, const Plain& b) {
  return a.sizes.size() == b.sizes.size() && std::equal(a.sizes.begin(), a.sizes.end(), b.sizes.begin()) &&
         a.contiguous == b.contiguous && (a.contiguous || same_order(a.sizes, a.strides, b.strides));
}

// Who touches whose memory.
class Ranges {
 public:
  explicit Ranges(size_t count) : ranges_(count) {}

  // Range number i: best the tensors of one list after the other, which often is the order of their addresses.
  void set(size_t i, const Plain& t, bool written) {
    const auto start = reinterpret_cast<uintptr_t>(t.flat.data);
    if (t.numel > 0) ranges_[i] = {start, start + uintptr_t(t.numel * bytes_of(t.flat.dtype)), written};
  }

  // Whether nothing that is written touches anything else.
  bool separate() {
    const auto before = [](const Range& a, const Range& b) { return a.start < b.start; };
    if (!std::is_sorted(ranges_.begin(), ranges_.end(), before)) std::sort(ranges_.begin(), ranges_.end(), before);
    uintptr_t end = 0, written_end = 0;  // of the ranges so far
    for (const Range& r : ranges_) {
      if (r.start < (r.written ? end : written_end)) return false;
      end = std::max(end, r.stop);
      if (r.written) written_end = end;
    }
    return true;
  }

 private:
  struct Range {
    uintptr_t start = 0, stop = 0;  // as of an empty tensor
    bool written = false;
  };
  std::vector<Range> ranges_;
};

}  // namespace ft
