// A weighted sum of k + 1 runs, rounded once.
//
//   out = sum_j coef_j x_j                                    as it stands, or, where the coefficients sum to 1,
//   out = x_b + sum_{j != b} coef_j (x_j - x_b)               around the x_b of the largest coefficient
//
// Around x_b: where all x_j agree the result is that value exactly (an average that has converged stays), and a
// coefficient of 1 beside zeros copies exactly. With alpha and 1 - alpha rounded apart, an exponential average at
// alpha = 0.999 settles 3e-5 beside its target. A run whose coefficient is 0 is not read.
//
// Passes over memory: one for all k sources. Bytes per fp32 element: 4 (k + 2).
#pragma once

#include "cpu/blocks.h"
#include "cpu/kernels.h"

namespace ft::FT_ISA {
namespace {

// What a term adds to the sum.
template <class F, bool kConvex>
FT_HD Vec<F> term(Vec<F> x, Vec<F> base, F coef) {
  return kConvex ? (x - base) * coef : x * coef;
}

template <class F, bool kConvex>
void blend_run_as(const BlendRun& run) {
  Buffer<F> base_buffer, x_buffer, sum_buffer, out_buffer;
  for (int64_t begin = 0; begin < run.n; begin += kBlock) {
    const int64_t n = run.n - begin < kBlock ? run.n - begin : kBlock;
    const F* base = read_block<F>(run.terms[0].dtype, run.terms[0].data, begin, n, base_buffer);
    F* out = result_block<F>(run.out_dtype, run.out, begin, out_buffer);
    const F base_coef = kConvex ? F(1) : F(run.terms[0].coef);
    if (run.count == 1) {
      for_each_vector<F>(n, [&](int64_t i, auto mem) __attribute__((always_inline)) {
        mem.store(out + i, base_coef == F(0) ? Vec<F>{} : mem.load(base + i) * base_coef);
      });
    }
    // The output may be the memory of any term, so only the last step writes there.
    const F* sum = nullptr;
    for (int j = 1; j < run.count; ++j) {
      const F* x = read_block<F>(run.terms[j].dtype, run.terms[j].data, begin, n, x_buffer);
      F* to = j + 1 < run.count ? sum_buffer.values : out;
      const F coef = F(run.terms[j].coef);
      for_each_vector<F>(n, [&](int64_t i, auto mem) __attribute__((always_inline)) {
        prefetch(base + i + kAhead<F>);
        prefetch(x + i + kAhead<F>);
        const Vec<F> b = mem.load(base + i);
        mem.store(to + i, term<F, kConvex>(mem.load(x + i), b, coef) + (sum ? mem.load(sum + i) : b * base_coef));
      });
      sum = to;
    }
    write_block<F>(run.out_dtype, run.out, begin, n, out_buffer);
  }
}

template <class F>
void blend_run(const BlendRun& run) {
  run.convex ? blend_run_as<F, true>(run) : blend_run_as<F, false>(run);
}

}  // namespace
}  // namespace ft::FT_ISA
