// What a launch of distill is told, one side's logits as they enter the loss, and a sweep over a pair of rows.
#pragma once

#include "cuda/kd_any.cuh"

namespace ft::distill {

enum class Divergence : int { kForwardKL, kReverseKL, kJsd, kTvd, kDecoupled };

// So many that a thread has the registers that it needs, on every architecture: at most 128 of 512, 168 of 384.
template <class A, Divergence D>
inline constexpr int kDistillThreads = sizeof(A) == 8                                   ? 256
                                       : D == Divergence::kJsd || D == Divergence::kTvd ? 384
                                                                                        : 512;
inline constexpr int kDistillWarps = 16;
inline constexpr int kColumns = 4;  // in flight per thread and side
inline constexpr int kStats = 5;    // KL(q || p), CE, entropies of p and q, agreement

struct DistillCall {
  KdCall kd;  // both sides' logits, options of the rows; kd.grad: the student's gradient
  View teacher_grad;
  int64_t teacher_columns;  // that gradient's width
  float* teacher_scales;    // as kd.grad_scales
  void* stats;              // [rows, kStats] of the loss's type; null: not wanted
  double cap_s, cap_t;      // 0: none
  bool standardize;
  double args[2];  // jsd: beta; decoupled: weights of the target and of the other part
};

FT_DEVICE float tanh_of(float x) { return tanhf(x); }
FT_DEVICE double tanh_of(double x) { return tanh(x); }
FT_DEVICE float expm1_of(float x) { return expm1f(x); }
FT_DEVICE double expm1_of(double x) { return expm1(x); }
FT_DEVICE float log1p_of(float x) { return log1pf(x); }
FT_DEVICE double log1p_of(double x) { return log1p(x); }
template <class A>
FT_DEVICE A absolute(A x) {
  return x < 0 ? -x : x;
}
// The greater; NaN before all others.
template <class A>
FT_DEVICE A greatest(A a, A b) {
  return b > a || b != b ? b : a;
}

// kColumns columns from `first` on, a block's width apart.
struct Columns {
  int64_t first, count;
  FT_DEVICE int64_t at(int k) const { return first + int64_t(k) * threads(); }
  FT_DEVICE bool has(int k) const { return at(k) < count; }
};

template <class A>
struct Side {
  const void* row;  // null: not read
  int64_t stride;   // elements
  DType dtype;
  A cap;             // 0: none
  A top;             // what differences are taken from: the greatest z of the divergence's columns
  A factor;          // 1/(deviation + 1e-7); 1 where not standardized
  A mean, mean_low;  // in two parts: it may be large beside the deviation

  // z; what is no logit stays what it is.
  FT_DEVICE A capped(A raw) const {
    if (cap == 0 || absolute(raw) == -neg_inf<A>()) return raw;
    return cap * tanh_of(raw / cap);
  }
  // x - max x
  FT_DEVICE A below(A z) const { return (z - top) * factor; }
  // x
  FT_DEVICE A centred(A z) const { return ((z - mean) - mean_low) * factor; }

  FT_DEVICE A at(int64_t column) const { return capped(element<A>(dtype, row, column * stride)); }
};

// The type of the switch is outside the loop, so that all loads are under way before the first is waited for.
template <class S, class A>
FT_DEVICE void fetch_as(const Side<A>& side, const Columns& at, A (&z)[kColumns]) {
  S raw[kColumns] = {};
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    if (at.has(k)) raw[k] = load(static_cast<const S*>(side.row) + at.at(k) * side.stride);
  }
#pragma unroll
  for (int k = 0; k < kColumns; ++k) z[k] = at.has(k) ? A(widen(raw[k])) : neg_inf<A>();
}

// -inf where there is no such column.
template <class A>
FT_DEVICE void fetch(const Side<A>& side, const Columns& at, A (&z)[kColumns]) {
  if (!side.row) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) z[k] = neg_inf<A>();
    return;
  }
  switch (side.dtype) {
    case DType::kFloat64:
      if constexpr (sizeof(A) == 8) fetch_as<double>(side, at, z);
      break;
    case DType::kBFloat16:
      fetch_as<BFloat16>(side, at, z);
      break;
    case DType::kFloat16:
      fetch_as<Half>(side, at, z);
      break;
    case DType::kFloat32:
      fetch_as<float>(side, at, z);
      break;
  }
#pragma unroll
  for (int k = 0; k < kColumns; ++k) z[k] = side.capped(z[k]);
}

// body(columns, z of the student, z of the teacher)
template <class A, class Body>
FT_DEVICE void sweep(const Side<A>& s, const Side<A>& t, int64_t columns, const Body& body) {
  for (int64_t first = thread(); first < columns; first += kColumns * threads()) {
    const Columns at = {first, columns};
    A a[kColumns], b[kColumns];
    fetch(s, at, a);
    fetch(t, at, b);
    body(at, a, b);
  }
}

}  // namespace ft::distill
