// The L2-SP penalty of one run of parameters, and its gradient.
//
//   value = sum (p - p0)^2          grad (+)= factor (p - p0)          p0 = 0 where there is no start point
//
// Passes over memory: one. Bytes per fp32 parameter: read p, p0, read and write grad = 16; 8 for the value alone,
// 12 where the gradient is written and not added to.
#pragma once

#include "cpu/blocks.h"
#include "cpu/kernels.h"

namespace ft::FT_ISA {
namespace {

template <class F, bool kStart, bool kGrad, bool kAccumulate>
FT_HD double l2sp_block(const F* p, const F* p0, const F* grad_in, F* grad, F factor, int64_t n) {
  DoubleSum<F> total;
  Vec<F> sum{};
  int pending = 0;
  for_each_vector<F>(n, [&](int64_t i, auto mem) __attribute__((always_inline)) {
    prefetch(p + i + kAhead<F>);
    if constexpr (kStart) prefetch(p0 + i + kAhead<F>);
    if constexpr (kAccumulate) prefetch(grad_in + i + kAhead<F>);
    Vec<F> d = mem.load(p + i);
    if constexpr (kStart) d -= mem.load(p0 + i);
    sum += d * d;
    if constexpr (kGrad) {
      Vec<F> g = d * factor;
      if constexpr (kAccumulate) g += mem.load(grad_in + i);
      mem.store(grad + i, g);
    }
    // In fp32 over 8 vectors, then in double.
    if (++pending == 8) {
      total.add(sum);
      sum = Vec<F>{};
      pending = 0;
    }
  });
  total.add(sum);
  return total.total();
}

template <class F>
double l2sp_run(const L2spRun& run) {
  Buffer<F> p_buffer, start_buffer, grad_in_buffer, grad_buffer;
  const bool direct = is_type<F>(run.param_dtype) && (!run.start || is_type<F>(run.start_dtype)) &&
                      (!run.grad || is_type<F>(run.grad_dtype));
  const int64_t block = direct ? run.n : kBlock;
  double value = 0;
  for (int64_t begin = 0; begin < run.n; begin += block) {
    const int64_t n = run.n - begin < block ? run.n - begin : block;
    const F* p = read_block<F>(run.param_dtype, run.param, begin, n, p_buffer);
    const F* p0 = run.start ? read_block<F>(run.start_dtype, run.start, begin, n, start_buffer) : nullptr;
    const F factor = F(run.factor);
    if (!run.grad) {
      value += p0 ? l2sp_block<F, true, false, false>(p, p0, nullptr, nullptr, factor, n)
                  : l2sp_block<F, false, false, false>(p, p0, nullptr, nullptr, factor, n);
      continue;
    }
    F* grad = result_block<F>(run.grad_dtype, run.grad, begin, grad_buffer);
    if (run.accumulate) {
      const F* grad_in = read_block<F>(run.grad_dtype, run.grad, begin, n, grad_in_buffer);
      value += p0 ? l2sp_block<F, true, true, true>(p, p0, grad_in, grad, factor, n)
                  : l2sp_block<F, false, true, true>(p, p0, grad_in, grad, factor, n);
    } else {
      value += p0 ? l2sp_block<F, true, true, false>(p, p0, nullptr, grad, factor, n)
                  : l2sp_block<F, false, true, false>(p, p0, nullptr, grad, factor, n);
    }
    write_block<F>(run.grad_dtype, run.grad, begin, n, grad_buffer);
  }
  return value;
}

}  // namespace
}  // namespace ft::FT_ISA
