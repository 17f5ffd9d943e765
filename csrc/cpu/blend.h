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

// out = (sum, or the base times its coefficient) + kCount terms. The output may be the memory of any operand.
template <class F, bool kConvex, bool kFirst, int kCount>
FT_HD void blend_block(const F* base, F base_coef, const F* sum, const F* const* x, const F* coef, F* out,
                       int64_t n) {
  for_each_vector<F>(n, [&](int64_t i, auto mem) __attribute__((always_inline)) {
    prefetch(base + i + kAhead<F>);
    const Vec<F> b = mem.load(base + i);
    // A coefficient of 0 does not look at its operand; that of the base is 0 only where all are.
    Vec<F> total = !kFirst ? mem.load(sum + i) : base_coef == F(0) ? Vec<F>{} : b * base_coef;
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) {
      prefetch(x[j] + i + kAhead<F>);
      total += term<F, kConvex>(mem.load(x[j] + i), b, coef[j]);
    }
    mem.store(out + i, total);
  });
}

template <class F, bool kConvex, bool kFirst>
FT_HD void blend_block(int count, const F* base, F base_coef, const F* sum, const F* const* x, const F* coef, F* out,
                       int64_t n) {
  static_assert(kGroup == 4);
  switch (count) {
    case 0:
      return blend_block<F, kConvex, kFirst, 0>(base, base_coef, sum, x, coef, out, n);
    case 1:
      return blend_block<F, kConvex, kFirst, 1>(base, base_coef, sum, x, coef, out, n);
    case 2:
      return blend_block<F, kConvex, kFirst, 2>(base, base_coef, sum, x, coef, out, n);
    case 3:
      return blend_block<F, kConvex, kFirst, 3>(base, base_coef, sum, x, coef, out, n);
    default:
      return blend_block<F, kConvex, kFirst, 4>(base, base_coef, sum, x, coef, out, n);
  }
}

template <class F, bool kConvex>
void blend_run_as(const BlendRun& run) {
  Buffer<F> base_buffer, x_buffers[kGroup], sum_buffer, out_buffer;
  bool direct = run.count - 1 <= kGroup && is_type<F>(run.out_dtype);
  for (int j = 0; j < run.count; ++j) direct = direct && is_type<F>(run.terms[j].dtype);
  const int64_t block = direct ? run.n : kBlock, end = run.begin + run.n;
  for (int64_t begin = run.begin; begin < end; begin += block) {
    const int64_t n = end - begin < block ? end - begin : block;
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
      // Only the last group writes to the output, which may be the memory of any term.
      F* to = first < run.count ? sum_buffer.values : out;
      if (sum) {
        blend_block<F, kConvex, false>(count, base, base_coef, sum, x, coef, to, n);
      } else {
        blend_block<F, kConvex, true>(count, base, base_coef, sum, x, coef, to, n);
      }
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
