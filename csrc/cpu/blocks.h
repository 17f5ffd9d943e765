// Runs of elements of any storage type as blocks of F in the L1 cache: read where they are if they are F already,
// converted into a buffer otherwise. A kernel's arithmetic is then written once per F, not once per combination.
#pragma once

#include "cpu/simd.h"

namespace ft::FT_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // elements

// How far ahead a memory-bound loop fetches, in elements. The hardware's prefetcher stops at each 4 KB page, which is
// every block of each operand.
template <class F>
constexpr int64_t kAhead = 2048 / int64_t(sizeof(F));

template <class F>
struct alignas(64) Buffer {
  F values[kBlock];
};

// Whether blocks of this type are read and written where they are. Where all operands' are, a block may be the whole
// run, without a stop at every kBlock elements.
template <class F>
FT_HD bool is_type(DType dtype) {
  return dtype == (sizeof(F) == 8 ? DType::kFloat64 : DType::kFloat32);
}

// Elements [begin, begin + n) of `data`, n <= kBlock or is_type<F>(dtype).
template <class F>
FT_HD const F* read_block(DType dtype, const void* data, int64_t begin, int64_t n, Buffer<F>& buffer) {
  return with_dtype(dtype, [&](auto tag) __attribute__((always_inline)) -> const F* {
    using S = decltype(tag);
    const S* p = static_cast<const S*>(data) + begin;
    if constexpr (__is_same(F, S)) {
      return p;
    } else {
      constexpr int L = kLanes<F>;
      int64_t i = 0;
      for (; i + L <= n; i += L) {
        prefetch(p + i + kAhead<S>);
        Memory<F, F>::store(buffer.values + i, Memory<F, S>::load(p + i));
      }
      if (i < n) Memory<F, F>::store(buffer.values + i, load_partial<F, S>(p + i, n - i, S{}));
      return buffer.values;
    }
  });
}

// Where a block of results is computed: in place if `data` holds F, in the buffer otherwise.
template <class F>
FT_HD F* result_block(DType dtype, void* data, int64_t begin, Buffer<F>& buffer) {
  return is_type<F>(dtype) ? static_cast<F*>(data) + begin : buffer.values;
}

// Rounds a block that result_block() put in the buffer to its storage type.
template <class F>
FT_HD void write_block(DType dtype, void* data, int64_t begin, int64_t n, const Buffer<F>& buffer) {
  with_dtype(dtype, [&](auto tag) __attribute__((always_inline)) {
    using S = decltype(tag);
    if constexpr (!__is_same(F, S)) {
      constexpr int L = kLanes<F>;
      S* p = static_cast<S*>(data) + begin;
      int64_t i = 0;
      for (; i + L <= n; i += L) Memory<F, S>::store(p + i, Memory<F, F>::load(buffer.values + i));
      if (i < n) store_partial<F, S>(p + i, n - i, Memory<F, F>::load(buffer.values + i));
    }
  });
}

// f(i, load, store) for each vector of a block: full ones first, then the tail through partial loads and stores.
struct FullVector {
  template <class F>
  FT_HD Vec<F> load(const F* p) const {
    return Memory<F, F>::load(p);
  }
  template <class F>
  FT_HD void store(F* p, Vec<F> x) const {
    Memory<F, F>::store(p, x);
  }
};
struct PartialVector {
  int64_t n;
  template <class F>
  FT_HD Vec<F> load(const F* p) const {
    return load_partial<F, F>(p, n, F(0));
  }
  template <class F>
  FT_HD void store(F* p, Vec<F> x) const {
    store_partial<F, F>(p, n, x);
  }
};

template <class F, class Fn>
FT_HD void for_each_vector(int64_t n, Fn&& f) {
  constexpr int L = kLanes<F>;
  int64_t i = 0;
  for (; i + L <= n; i += L) f(i, FullVector{});
  if (i < n) f(i, PartialVector{n - i});
}

}  // namespace
}  // namespace ft::FT_ISA
