// Logits in 16-byte vectors, and one by one where a row's address, its ends or its stride do not allow that.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/row_stat.h"
#include "cuda/device.cuh"

namespace ft::distill {

using namespace device;

template <class S>
using Value = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Elements of S in a vector.
template <class S>
inline constexpr int kLanes = 16 / int(sizeof(S));

struct alignas(16) Pack {
  uint32_t w[4];
};

FT_DEVICE float higher(float a, float b) { return fmaxf(a, b); }  // of a NaN and a number, the number
FT_DEVICE double higher(double a, double b) { return fmax(a, b); }
// Written out where a compiler could fuse or not: the sums of two kernels must not differ by that.
FT_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
FT_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }

template <class S>
FT_DEVICE void unpack(const Pack& pack, Value<S> (&x)[kLanes<S>]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (sizeof(S) == 8) {
      if (k % 2 == 0) x[k / 2] = __builtin_bit_cast(double, uint64_t(pack.w[k]) | uint64_t(pack.w[k + 1]) << 32);
    } else if constexpr (sizeof(S) == 4) {
      x[k] = __builtin_bit_cast(float, pack.w[k]);
    } else {
      x[2 * k] = widen(S{uint16_t(pack.w[k])});
      x[2 * k + 1] = widen(S{uint16_t(pack.w[k] >> 16)});
    }
  }
}

template <class S>
FT_DEVICE Pack packed(const Value<S> (&x)[kLanes<S>]) {
  Pack pack;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (sizeof(S) == 8) {
      pack.w[k] = uint32_t(__builtin_bit_cast(uint64_t, x[k / 2]) >> (k % 2 * 32));
    } else if constexpr (sizeof(S) == 4) {
      pack.w[k] = __builtin_bit_cast(uint32_t, x[k]);
    } else {
      pack.w[k] = narrow_pair(x[2 * k], x[2 * k + 1], S{});
    }
  }
  return pack;
}

template <class S>
FT_DEVICE Pack splat(Value<S> value) {
  Value<S> x[kLanes<S>];
#pragma unroll
  for (int k = 0; k < kLanes<S>; ++k) x[k] = value;
  return packed<S>(x);
}

// The greater of each two elements, in their storage type: for 16 bits half an instruction per logit.
template <class S>
FT_DEVICE void raise(Pack& top, const Pack& x) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (sizeof(S) == 4) {
      top.w[k] = __builtin_bit_cast(uint32_t,
                                    higher(__builtin_bit_cast(float, top.w[k]), __builtin_bit_cast(float, x.w[k])));
    } else {
      top.w[k] = max_pair(top.w[k], x.w[k], S{});
    }
  }
}

template <class S>
FT_DEVICE float highest(const Pack& pack) {
  float x[kLanes<S>];
  unpack<S>(pack, x);
  float top = x[0];
#pragma unroll
  for (int k = 1; k < kLanes<S>; ++k) top = higher(top, x[k]);
  return top;
}

// The vector of columns [first, first + kLanes), element by element; -inf where there is no such column.
template <class S, class Int>
FT_DEVICE Pack load_some(const S* row, int64_t stride, Int first, Int columns) {
  Value<S> x[kLanes<S>];
  row += first * stride;
#pragma unroll
  for (int k = 0; k < kLanes<S>; ++k) {
    x[k] = first + k >= 0 && first + k < columns ? widen(load_once(row)) : neg_inf<Value<S>>();
    row += stride;
  }
  return packed<S>(x);
}

template <class S, class Int>
FT_DEVICE void store_some(S* row, int64_t stride, Int first, Int columns, const Value<S> (&x)[kLanes<S>]) {
  row += first * stride;
#pragma unroll
  for (int k = 0; k < kLanes<S>; ++k) {
    S rounded;
    narrow(x[k], rounded);
    if (first + k >= 0 && first + k < columns) store(row, rounded);
    row += stride;
  }
}

// By how many elements p lies past a 16-byte boundary.
template <class S>
FT_DEVICE int phase_of(const S* p) {
  return int(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(S));
}

// One value into columns [begin, end), by `count` threads of which this is number `id`.
template <class S>
FT_DEVICE void fill_columns(S* row, int64_t stride, int64_t begin, int64_t end, Value<S> value, int id, int count) {
  constexpr int N = kLanes<S>;
  S one;
  narrow(value, one);
  if (stride != 1) {
    for (int64_t v = begin + id; v < end; v += count) store(row + v * stride, one);
    return;
  }
  const Pack all = splat<S>(value);
  int64_t head = begin + (N - phase_of(row + begin)) % N;
  if (head > end) head = end;
  const int64_t vectors = (end - head) / N, tail = head + vectors * N;
  for (int64_t v = begin + id; v < head; v += count) store(row + v, one);
  for (int64_t j = id; j < vectors; j += count) store(reinterpret_cast<Pack*>(row + head + j * N), all);
  for (int64_t v = tail + id; v < end; v += count) store(row + v, one);
}

}  // namespace ft::distill
