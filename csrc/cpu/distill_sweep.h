// The sweeps of `distill`: one block of a row pair, in L1, into sums and what the gradient needs of it (in L2).
//
// In a pair one side carries the mass, m, and the other is o: forward KL is KL(m || o) with the teacher as m, reverse
// KL with the student; jsd and tvd are symmetric and have the student as m. Exponentials of a block are relative to
// the running maxima of the row; the row's sums move to new references when a block brings new maxima.
#pragma once

#include "core/row_stat.h"
#include "core/terms.h"
#include "cpu/kd_sweep.h"
#include "cpu/simd_math.h"

namespace ft::FT_ISA {
namespace {

constexpr int64_t kDistillBlock = kKdBlock;

// What a block's exponentials are relative to; also the o logit where m is largest, and the m logit where o is.
struct Refs {
  double m = neg_inf<double>(), o = neg_inf<double>();
  double o_at_m = 0, m_at_o = 0;
  double hot = neg_inf<double>();  // of the label term's exponentials
};

// f = (m_v - ref_m) - (o_v - o_at_m): relative to f where the mass is largest (core/terms.h).
struct PairSums {
  double m = 0, o = 0;
  double gap = 0;    // sum exp_o - exp_m
  double cross = 0;  // sum exp_m f
};

FT_HD double log_ratio(const PairSums& of) {  // log(o/m)
  const double relative = of.gap / of.m;
  return relative > -0.5 && relative < 1 ? log1p(relative) : log(of.o / of.m);
}

// What f grows by from one reference to another.
FT_HD double f_delta(const Refs& from, const Refs& to) {
  return (reference(from.m) - reference(to.m)) + (reference(to.o_at_m) - reference(from.o_at_m));
}

// Mass below `smallest` is none, as in one block of F: an infinite term of it is nothing.
FT_HD void move(PairSums& sums, const Refs& from, const Refs& to, double inv_t, double smallest) {
  if (from.m == to.m && from.o == to.o) return;
  const double on_m = rescale(reference(from.m), reference(to.m), inv_t);
  const double on_o = rescale(reference(from.o), reference(to.o), inv_t);
  sums.cross = moved(sums.cross, sums.m, f_delta(from, to), on_m < smallest ? 0 : on_m);
  const double relative = sums.gap / sums.m;
  const bool small = relative > -0.5 && relative < 0.5;  // else it holds no more than the sums do
  const double m = scaled(sums.m, on_m), o = scaled(sums.o, on_o);
  sums.gap = small ? on_o * sums.gap + (on_o - on_m) * sums.m : o - m;
  sums.m = m;
  sums.o = o;
}

template <bool kTail>
struct Part {
  static constexpr bool is_tail = kTail;
};

// body(i, m's vector, o's vector, Part) over n columns; flush() after every 32 vectors, where sums in F go to double.
// The tail is filled up by -inf: columns without mass.
template <class F, class Body, class Flush>
FT_HD void over_pairs(const F* m, const F* o, int64_t n, const Fetch& fetch, Body&& body, Flush&& flush) {
  constexpr int L = kLanes<F>;
  constexpr int64_t kFlush = 32 * L;
  int64_t i = 0;
  while (i + L <= n) {
    const int64_t stop = i + kFlush < n - L + 1 ? i + kFlush : n - L + 1;
    for (; i < stop; i += L) {
      prefetch_near(fetch.student.at(i));
      prefetch_near(fetch.teacher.at(i));
      prefetch_near(fetch.grad.at(i));
      body(i, Memory<F, F>::load(m + i), Memory<F, F>::load(o + i), Part<false>{});
    }
    flush();
  }
  if (i < n) {
    const F fill = neg_inf<F>();
    body(i, load_partial<F, F>(m + i, n - i, fill), load_partial<F, F>(o + i, n - i, fill), Part<true>{});
    flush();
  }
}

// body(i) over what a sweep kept of n columns, past the end to whole vectors.
template <class F, class Body, class Flush>
FT_HD void over_kept(int64_t n, Body&& body, Flush&& flush) {
  constexpr int L = kLanes<F>;
  for (int64_t i = 0; i < n;) {
    const int64_t stop = i + 32 * L < n ? i + 32 * L : n;
    for (; i < stop; i += L) body(i);
    flush();
  }
}

template <class F>
struct SweepRefs {
  F m, o, o_at_m;
  ExpScale<F> scale;
  Fetch fetch;
};

// KL(m || o). kOther, kMass: what is kept for the gradient of o, of m. kCareful: what has no mass may be infinite.
template <class F, bool kOther, bool kMass, bool kCareful>
FT_HD PairSums kl_sweep(const F* m, const F* o, int64_t n, const SweepRefs<F>& refs, F* exp_m, F* exp_o, F* w) {
  DoubleSum<F> total_m, total_o, total_gap, total_cross;
  Vec<F> sum_m{}, sum_o{}, gap{}, cross{};
  over_pairs(
      m, o, n, refs.fetch,
      [&](int64_t i, Vec<F> vm, Vec<F> vo, auto part) __attribute__((always_inline)) {
        const Vec<F> dm = vm - refs.m;
        const Vec<F> em = exp_scaled<F>(dm, refs.scale), eo = exp_scaled<F>(vo - refs.o, refs.scale);
        Vec<F> f = dm - (vo - refs.o_at_m);
        if constexpr (kCareful || decltype(part)::is_tail) f = em == F(0) ? Vec<F>{} : f;
        const Vec<F> term = rounded(em * f);  // so that the loss is the same with and without a gradient
        sum_m += em;
        sum_o += eo;
        gap += eo - em;
        cross += term;
        if constexpr (kOther || kMass) Memory<F, F>::store(exp_m + i, em);
        if constexpr (kOther) Memory<F, F>::store(exp_o + i, eo);
        if constexpr (kMass) Memory<F, F>::store(w + i, term);
      },
      [&]() __attribute__((always_inline)) {
        total_m.add(sum_m);
        total_o.add(sum_o);
        total_gap.add(gap);
        total_cross.add(cross);
        sum_m = sum_o = gap = cross = Vec<F>{};
      });
  return {total_m.total(), total_o.total(), total_gap.total(), total_cross.total()};
}

template <class F>
__attribute__((noinline)) PairSums kl_sweep_carefully(const F* m, const F* o, int64_t n, const SweepRefs<F>& refs,
                                                      F* exp_m, F* exp_o, F* w) {
  return kl_sweep<F, true, true, true>(m, o, n, refs, exp_m, exp_o, w);
}

// The softmaxes of both sides, for the divergences whose terms need the row's sums; kDifference: for jsd.
template <class F, bool kDifference>
FT_HD PairSums softmax_sweep(const F* m, const F* o, int64_t n, const SweepRefs<F>& refs, F* exp_m, F* exp_o,
                             F* difference) {
  DoubleSum<F> total_m, total_o, total_gap;
  Vec<F> sum_m{}, sum_o{}, gap{};
  over_pairs(
      m, o, n, refs.fetch,
      [&](int64_t i, Vec<F> vm, Vec<F> vo, auto) __attribute__((always_inline)) {
        const Vec<F> dm = vm - refs.m, d_o = vo - refs.o;
        const Vec<F> em = exp_scaled<F>(dm, refs.scale), eo = exp_scaled<F>(d_o, refs.scale);
        sum_m += em;
        sum_o += eo;
        if constexpr (kDifference) gap += eo - em;
        Memory<F, F>::store(exp_m + i, em);
        Memory<F, F>::store(exp_o + i, eo);
        if constexpr (kDifference) Memory<F, F>::store(difference + i, dm - d_o);
      },
      [&]() __attribute__((always_inline)) {
        total_m.add(sum_m);
        total_o.add(sum_o);
        if constexpr (kDifference) total_gap.add(gap);
        sum_m = sum_o = gap = Vec<F>{};
      });
  return {total_m.total(), total_o.total(), total_gap.total(), 0};
}

// The terms of jsd or tvd from what was kept, and mass (f - f at the largest mass) in its place where wanted.
template <class F>
struct TermsCall {
  F on_m, on_o;    // a block's exponentials to probabilities
  F inv_t, shift;  // a kept difference to x - y
  F beta;
  F at_m, at_o;  // f where the mass is largest
};
struct TermSums {
  double value = 0, mean_m = 0, mean_o = 0;
};

template <class F, bool kJsd, bool kM, bool kO>
FT_HD TermSums terms_sweep(int64_t n, const TermsCall<F>& call, const F* exp_m, const F* exp_o, F* w_m, F* w_o) {
  DoubleSum<F> total, total_m, total_o;
  Vec<F> value{}, mean_m{}, mean_o{};
  over_kept<F>(
      n,
      [&](int64_t i) __attribute__((always_inline)) {
        const Vec<F> p = rounded(Memory<F, F>::load(exp_m + i) * call.on_m);
        const Vec<F> q = rounded(Memory<F, F>::load(exp_o + i) * call.on_o);
        Vec<F> f_m, f_o;
        if constexpr (kJsd) {
          // The differences are kept where w_m goes.
          const JsdTerms<Vec<F>> terms =
              jsd_terms<VecMath<F>>(Memory<F, F>::load(w_m + i) * call.inv_t + call.shift, call.beta);
          f_m = p == F(0) ? Vec<F>{} : terms.from_p;
          f_o = q == F(0) ? Vec<F>{} : terms.from_q;
          value += p * f_m + q * f_o;
        } else {
          f_m = tvd_slope(p, q, F(0.5));
          f_o = -f_m;
          value += (p - q) * f_m;  // |p - q| / 2
        }
        if constexpr (kM) {
          const Vec<F> w = rounded(p * (f_m - call.at_m));
          mean_m += w;
          Memory<F, F>::store(w_m + i, w);
        }
        if constexpr (kO) {
          const Vec<F> w = rounded(q * (f_o - call.at_o));
          mean_o += w;
          Memory<F, F>::store(w_o + i, w);
        }
      },
      [&]() __attribute__((always_inline)) {
        total.add(value);
        if constexpr (kM) total_m.add(mean_m);
        if constexpr (kO) total_o.add(mean_o);
        value = mean_m = mean_o = Vec<F>{};
      });
  return {total.total(), total_m.total(), total_o.total()};
}

// The label term's exponentials, at T = 1.
struct HotSums {
  double exp = 0, shift = 0;  // sum exp(z - ref), sum (z - ref)
};

// kShift: for label smoothing. Only it sees every column alike.
template <class F, bool kShift>
FT_HD HotSums hot_sweep(const F* z, int64_t n, F ref, F* exp_1) {
  const ExpScale<F> scale = exp_scale<F>(1.0);
  DoubleSum<F> total, total_shift;
  Vec<F> sum{}, shift{};
  over_kept<F>(
      n,
      [&](int64_t i) __attribute__((always_inline)) {
        const bool whole = i + kLanes<F> <= n;
        const auto load = [&](F fill) __attribute__((always_inline)) {
          return whole ? Memory<F, F>::load(z + i) : load_partial<F, F>(z + i, n - i, fill);
        };
        const Vec<F> e = exp_scaled<F>(load(neg_inf<F>()) - ref, scale);
        sum += e;
        if constexpr (kShift) shift += load(ref) - ref;
        Memory<F, F>::store(exp_1 + i, e);
      },
      [&]() __attribute__((always_inline)) {
        total.add(sum);
        if constexpr (kShift) total_shift.add(shift);
        sum = shift = Vec<F>{};
      });
  return {total.total(), total_shift.total()};
}

// The sum of exp(x) from kept exp(x/T): their power.
template <class F>
FT_HD double sum_raised(const F* exp, int64_t n, int power) {
  DoubleSum<F> total;
  Vec<F> sum{};
  over_kept<F>(
      n, [&](int64_t i) __attribute__((always_inline)) { sum += raised<F>(Memory<F, F>::load(exp + i), power); },
      [&]() __attribute__((always_inline)) {
        total.add(sum);
        sum = Vec<F>{};
      });
  return total.total();
}

}  // namespace
}  // namespace ft::FT_ISA
