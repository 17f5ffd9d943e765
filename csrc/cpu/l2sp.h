// The L2-SP penalty of one run of parameters, and its gradient.
//
//   value = sum F (p - p0)^2        grad (+)= factor F (p - p0)        p0 = 0 where there is no start point
//                                                                     F = 1 where there is no importance
// Passes over memory: one. Bytes per fp32 parameter: read p, p0, read and write grad = 16; 8 for the value alone,
// 12 where the gradient is written and not added to; 4 more with an importance.
#pragma once

#include "cpu/blocks.h"
#include "cpu/kernels.h"

namespace ft::FT_ISA {
namespace {

// What a block reads and writes, in F.
template <class F>
struct L2spBlock {
  const F *p, *p0, *importance, *grad_in;
  F* grad;
};

template <class F, bool kStart, bool kImportance, bool kGrad, bool kAccumulate>
FT_HD double l2sp_block(const L2spBlock<F>& at, F factor, int64_t n) {
  BlockSum<F> sum;
  for_each_vector<F>(n, [&](int64_t i, auto mem) __attribute__((always_inline)) {
    prefetch(at.p + i + kAhead<F>);
    if constexpr (kStart) prefetch(at.p0 + i + kAhead<F>);
    if constexpr (kImportance) prefetch(at.importance + i + kAhead<F>);
    if constexpr (kAccumulate) prefetch(at.grad_in + i + kAhead<F>);
    Vec<F> d = mem.load(at.p + i);
    if constexpr (kStart) d -= mem.load(at.p0 + i);
    const Vec<F> weighed = kImportance ? d * mem.load(at.importance + i) : d;
    sum.add(weighed * d);
    if constexpr (kGrad) {
      Vec<F> g = weighed * factor;
      if constexpr (kAccumulate) g += mem.load(at.grad_in + i);
      mem.store(at.grad + i, g);
    }
  });
  return sum.total();
}

template <class F, bool kStart, bool kImportance>
FT_HD double l2sp_block(const L2spBlock<F>& at, F factor, int64_t n) {
  if (!at.grad) return l2sp_block<F, kStart, kImportance, false, false>(at, factor, n);
  return at.grad_in ? l2sp_block<F, kStart, kImportance, true, true>(at, factor, n)
                    : l2sp_block<F, kStart, kImportance, true, false>(at, factor, n);
}

template <class F>
double l2sp_run(const L2spRun& run) {
  Buffer<F> p_buffer, start_buffer, importance_buffer, grad_in_buffer, grad_buffer;
  const auto is_direct = [](const void* data, DType dtype)
                             __attribute__((always_inline)) { return !data || is_type<F>(dtype); };
  const bool direct = is_direct(run.param, run.param_dtype) && is_direct(run.start, run.start_dtype) &&
                      is_direct(run.importance, run.importance_dtype) && is_direct(run.grad, run.grad_dtype);
  const int64_t block = direct ? run.n : kBlock;
  const F factor = F(run.factor);
  double value = 0;
  for (int64_t begin = 0; begin < run.n; begin += block) {
    const int64_t n = run.n - begin < block ? run.n - begin : block;
    const auto read = [&](DType dtype, const void* data, Buffer<F>& buffer) __attribute__((always_inline)) {
      return data ? read_block<F>(dtype, data, begin, n, buffer) : nullptr;
    };
    L2spBlock<F> at{};
    at.p = read(run.param_dtype, run.param, p_buffer);
    at.p0 = read(run.start_dtype, run.start, start_buffer);
    at.importance = read(run.importance_dtype, run.importance, importance_buffer);
    if (run.grad) at.grad = result_block<F>(run.grad_dtype, run.grad, begin, grad_buffer);
    if (run.accumulate) at.grad_in = read(run.grad_dtype, run.grad, grad_in_buffer);
    if (at.importance) {
      value += at.p0 ? l2sp_block<F, true, true>(at, factor, n) : l2sp_block<F, false, true>(at, factor, n);
    } else {
      value += at.p0 ? l2sp_block<F, true, false>(at, factor, n) : l2sp_block<F, false, false>(at, factor, n);
    }
    if (run.grad) write_block<F>(run.grad_dtype, run.grad, begin, n, grad_buffer);
  }
  return value;
}

}  // namespace
}  // namespace ft::FT_ISA
