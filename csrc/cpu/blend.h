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

constexpr int kGroup = 4;  // terms beside the base that one pass over a block adds up

template <class F, bool kConvex>
void blend_run_as(const BlendRun& run) {
  Buffer<F> base_buffer, x_buffers[kGroup], sum_buffer, out_buffer;
  for (int64_t begin = 0; begin < run.n; begin += kBlock) {
    const int64_t n = run.n - begin < kBlock ? run.n - begin : kBlock;
    const F* base = read_block<F>(run.terms[0].dtype, run.terms[0].data, begin, n, base_buffer);
    F* out = result_block<F>(run.out_dtype, run.out, begin, out_buffer);
    const F base_coef = kConvex ? F(1) : F(run.terms[0].coef);
    const F* sum = nullptr;  // of the groups before, in the L1 cache
    int first = 1;
    do {
      const int count = run.count - first < kGroup ? run.count - first : kGroup;
      const F* x[kGroup];
      F coef[kGroup];
      for (int j = 0; j < count; ++j) {
        const BlendTerm& t = run.terms[first + j];
        x[j] = read_block<F>(t.dtype, t.data, begin, n, x_buffers[j]);
        coef[j] = F(t.coef);
      }
      first += count;
      // The output may be the memory of any term, so only the last group writes there.
      F* to = first < run.count ? sum_buffer.values : out;
      for_each_vector<F>(n, [&](int64_t i, auto mem) __attribute__((always_inline)) {
        prefetch(base + i + kAhead<F>);
        const Vec<F> b = mem.load(base + i);
        // A coefficient of 0 does not look at its operand; that of the base is 0 only where all are.
        Vec<F> total = sum ? mem.load(sum + i) : base_coef == F(0) ? Vec<F>{} : b * base_coef;
        for (int j = 0; j < count; ++j) {
          prefetch(x[j] + i + kAhead<F>);
          total += term<F, kConvex>(mem.load(x[j] + i), b, coef[j]);
        }
        mem.store(to + i, total);
      });
      sum = to;
    } while (first < run.count);
    write_block<F>(run.out_dtype, run.out, begin, n, out_buffer);
  }
}

template <class F>
void blend_run(const BlendRun& run) {
  run.convex ? blend_run_as<F, true>(run) : blend_run_as<F, false>(run);
}

}  // namespace
}  // namespace ft::FT_ISA
