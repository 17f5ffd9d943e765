// A weighted sum of k + 1 runs, rounded once, and its dot product with another run, which is never written anywhere.
//
//   sum = sum_j coef_j x_j                                    as it stands, or, where the coefficients sum to S,
//   sum = S x_b + sum_{j != b} coef_j (x_j - x_b)             around a base x_b
//
// out = sum, where S is 1, around the x_b of the largest coefficient: where all x_j agree the result is that value
// exactly (an average that has converged stays), and a coefficient of 1 beside zeros copies exactly. With alpha and
// 1 - alpha rounded apart, an exponential average at alpha = 0.999 settles 3e-5 beside its target.
// dot = sum_i with_i sum_i, where S is 0 (the gradient of alpha: target - sum_j w_j source_j): differences first, of
// which nothing is lost where target and sources are close. A run whose coefficient is 0 is not read.
//
// Passes over memory: one for all k sources. Bytes per fp32 element: 4 (k + 2), for either.
#pragma once

#include "cpu/blocks.h"
#include "cpu/kernels.h"

namespace ft::FT_ISA {
namespace {

// What a term adds to the sum.
template <class F, bool kAround>
FT_HD Vec<F> term(Vec<F> x, Vec<F> base, F coef) {
  return kAround ? (x - base) * coef : x * coef;
}

constexpr int kGroup = 4;  // terms beside the base that one pass over a block adds up

// What becomes of the sums of a block: they are stored, perhaps in the memory of an operand; or multiplied and added
// up.
template <class F>
struct Stored {
  F* to;
  template <class Mem>
  FT_HD void take(int64_t i, Mem mem, Vec<F> sum) {
    mem.store(to + i, sum);
  }
};
template <class F>
struct Multiplied {
  const F* with;
  BlockSum<F> products{};
  template <class Mem>
  FT_HD void take(int64_t i, Mem mem, Vec<F> sum) {
    prefetch(with + i + kAhead<F>);
    products.add(mem.load(with + i) * sum);
  }
};

// (sum, or the base times its coefficient) + kCount terms
template <class F, bool kAround, bool kFirst, int kCount, class Sink>
FT_HD void blend_block(const F* base, F base_coef, const F* sum, const F* const* x, const F* coef, Sink& sink,
                       int64_t n) {
  Sink own = sink;  // in registers: what it points to may not be it
  for_each_vector<F>(n, [&](int64_t i, auto mem) __attribute__((always_inline)) {
    prefetch(base + i + kAhead<F>);
    const Vec<F> b = mem.load(base + i);
    // A coefficient of 0 does not look at its operand.
    Vec<F> total = !kFirst ? mem.load(sum + i) : base_coef == F(0) ? Vec<F>{} : b * base_coef;
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) {
      prefetch(x[j] + i + kAhead<F>);
      total += term<F, kAround>(mem.load(x[j] + i), b, coef[j]);
    }
    own.take(i, mem, total);
  });
  sink = own;
}

template <class F, bool kAround, bool kFirst, class Sink>
FT_HD void blend_block(int count, const F* base, F base_coef, const F* sum, const F* const* x, const F* coef,
                       Sink& sink, int64_t n) {
  static_assert(kGroup == 4);
  switch (count) {
    case 0:
      return blend_block<F, kAround, kFirst, 0>(base, base_coef, sum, x, coef, sink, n);
    case 1:
      return blend_block<F, kAround, kFirst, 1>(base, base_coef, sum, x, coef, sink, n);
    case 2:
      return blend_block<F, kAround, kFirst, 2>(base, base_coef, sum, x, coef, sink, n);
    case 3:
      return blend_block<F, kAround, kFirst, 3>(base, base_coef, sum, x, coef, sink, n);
    default:
      return blend_block<F, kAround, kFirst, 4>(base, base_coef, sum, x, coef, sink, n);
  }
}

// Result: how often a sum around its base holds that base, its sink for a block, what it does with it afterwards.
template <class F, bool kAround, class Result>
void blend_blocks(const BlendSum& run, Result& result) {
  Buffer<F> base_buffer, x_buffers[kGroup], sum_buffer, buffer;
  bool direct = run.count - 1 <= kGroup && result.direct();
  for (int j = 0; j < run.count; ++j) direct = direct && is_type<F>(run.terms[j].dtype);
  const int64_t block = direct ? run.n : kBlock, end = run.begin + run.n;
  for (int64_t begin = run.begin; begin < end; begin += block) {
    const int64_t n = end - begin < block ? end - begin : block;
    const F* base = read_block<F>(run.terms[0].dtype, run.terms[0].data, begin, n, base_buffer);
    const F base_coef = kAround ? Result::kOfBase : F(run.terms[0].coef);
    auto last = result.sink(begin, n, buffer);
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
      const auto add_to = [&](auto& sink) __attribute__((always_inline)) {
        if (sum) {
          blend_block<F, kAround, false>(count, base, base_coef, sum, x, coef, sink, n);
        } else {
          blend_block<F, kAround, true>(count, base, base_coef, sum, x, coef, sink, n);
        }
      };
      // Only the last group meets the result, which may be the memory of any term.
      if (first < run.count) {
        Stored<F> kept{sum_buffer.values};
        add_to(kept);
        sum = sum_buffer.values;
      } else {
        add_to(last);
      }
    } while (first < run.count);
    result.take(last, begin, n, buffer);
  }
}

template <class F>
struct BlendResult {
  static constexpr F kOfBase = 1;
  const BlendRun& run;
  FT_HD bool direct() const { return is_type<F>(run.out_dtype); }
  FT_HD Stored<F> sink(int64_t begin, int64_t, Buffer<F>& buffer) {
    return {result_block<F>(run.out_dtype, run.out, begin, buffer)};
  }
  FT_HD void take(const Stored<F>&, int64_t begin, int64_t n, const Buffer<F>& buffer) {
    write_block<F>(run.out_dtype, run.out, begin, n, buffer);
  }
};

template <class F>
struct BlendDot {
  static constexpr F kOfBase = 0;
  const BlendDotRun& run;
  double total = 0;
  FT_HD bool direct() const { return is_type<F>(run.with_dtype); }
  FT_HD Multiplied<F> sink(int64_t begin, int64_t n, Buffer<F>& buffer) {
    return {read_block<F>(run.with_dtype, run.with, begin, n, buffer)};
  }
  FT_HD void take(Multiplied<F>& sink, int64_t, int64_t, const Buffer<F>&) { total += sink.products.total(); }
};

template <class F>
void blend_run(const BlendRun& run) {
  BlendResult<F> result{run};
  run.around ? blend_blocks<F, true>(run, result) : blend_blocks<F, false>(run, result);
}

template <class F>
double blend_dot_run(const BlendDotRun& run) {
  BlendDot<F> dot{run};
  run.around ? blend_blocks<F, true>(run, dot) : blend_blocks<F, false>(run, dot);
  return dot.total;
}

}  // namespace
}  // namespace ft::FT_ISA
