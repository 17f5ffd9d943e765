// The sweeps that read a row and leave sums: maxima and means, deviations, sums at T and at T = 1, and for jsd and
// tvd the terms, which are known only once the sums are. What one thread makes of them is distill_finish.cuh.
//
// A sum is of kColumns terms in the type of the arithmetic, and of those in double: threads, warps and the block add
// in an order that the number of threads alone decides.
#pragma once

#include "core/terms.h"
#include "cuda/distill_call.cuh"

namespace ft::distill {

// Over the columns of the divergence (decoupled: without the label's), the last two over all. KL is of side a, which
// weighs, from side b: KL(a || b).
enum Sum {
  kExpA,    // exp((x - max x)/T)
  kExpB,    //
  kGap,     // exp_b - exp_a, where the sides nearly agree from their difference: kd_sums.cuh
  kCross,   // exp_a (a - b)
  kMoved,   // exp_a ((a - b) - its value at a's maximum): for the gradient of a
  kKl,      // exp_t (t - s), for the statistics where a is not t
  kPLogP,   // exp_s (s - max s), for the statistics
  kQLogQ,   // exp_t (t - max t)
  kExp1,    // exp(z - max z) of the student
  kShift1,  // z - max z
  kSumsOfRow
};
// Of the terms; then of what they are multiplied by in the gradients.
enum Term { kValue, kMeanS, kMeanT, kTerms };

// The first of the greatest; or a NaN.
template <class A>
struct Top {
  A value = neg_inf<A>();
  int64_t column = 0;
  FT_DEVICE void see(A z, int64_t v) {
    if (!(z > value || z != z)) return;
    value = z;
    column = v;
  }
  FT_DEVICE void merge(const Top& o) {
    const bool later = o.value == value ? o.column >= column : !(o.value > value || o.value != o.value);
    if (value != value || later) return;
    *this = o;
  }
  FT_DEVICE bool is_logit() const { return value > neg_inf<A>() && value < -neg_inf<A>(); }
};

template <class A>
FT_DEVICE Top<A> first_over_warp(Top<A> top) {
  for (int l = kWarp / 2; l > 0; l /= 2) {
    Top<A> other;
    other.value = shuffle_xor(kAllLanes, top.value, l);
    other.column = shuffle_xor(kAllLanes, top.column, l);
    top.merge(other);
  }
  return top;
}

// What a row is computed with; each sweep takes what it needs into registers.
template <class A>
struct RowConstants {
  bool pair;        // both sides are read
  bool label_term;  // exponentials at T = 1
  bool smooth, stats, moved;
  int64_t column;  // the label's, or -1
  A c, c_1;        // exp_of's scale at T and at 1
  A inv_t, top_1;  // 1/T; the greatest z of the student
  A at;            // a - b at a's maximum
};

// The gradient for x, at T, of side a and b of a KL, or of both sides of jsd and tvd; then what follows.
template <class A>
struct GradConstants {
  A on_a, on_b;                      // KL: gradient of b = exp_b on_b - exp_a on_a
  A mean_s, mean_t, mass_s, mass_t;  // exp ((f - at) - mean) mass
  A at_s, at_t;
  A log_ratio, p, q;           // jsd, tvd: log(exp_s/exp_t), 1/exp_s, 1/exp_t
  A spread, label_s, label_t;  // decoupled: exp_t spread is taken off; the label's own
  A slope_s, slope_t;          // standardize: core/terms.h
  A on_1, constant;            // the label term: exp_1 on_1 + constant, and at the label itself, in double,
  double label_on_1, label_constant;
  A up_s, up_t;  // fp16: the power of two
};

template <class A>
struct DistillShared {
  KdRow row;
  bool valid;               // a softmax can be taken of either side, and the label is in range
  bool agrees;              // both sides have the same first maximum
  double label_s, label_t;  // z of the label
  double s_at_t, t_at_s;    // z of a side where the other is greatest
  Side<A> s, t;
  Standard<double> standard_s, standard_t;
  RowConstants<A> constants;
  GradConstants<A> grad;
  double parts[kDistillWarps][kSumsOfRow];
  double sums[kSumsOfRow], terms[kTerms + 1];
  Top<A> tops_s[kDistillWarps], tops_t[kDistillWarps];
};

// The sums of all threads, into `out`.
template <int N, class A>
FT_DEVICE void total(DistillShared<A>& block, double (&x)[N], double* out) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    x[n] = sum_over(kWarp, x[n]);
    if (lane() == 0) block.parts[warp()][n] = x[n];
  }
  barrier();
  if (thread() < N) {
    double sum = 0;
    for (int w = 0; w < threads() / kWarp; ++w) sum += block.parts[w][thread()];
    out[thread()] = sum;
  }
  barrier();
}

template <int N, class A>
FT_DEVICE void add_to(double (&total)[N], const A (&part)[N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) total[n] += double(part[n]);
}

template <Divergence D>
inline constexpr bool kIsKl = D != Divergence::kJsd && D != Divergence::kTvd;
// Side a of a KL is the student.
template <Divergence D>
inline constexpr bool kOfStudent = D == Divergence::kReverseKL;
template <Divergence D>
inline constexpr bool kWithoutLabel = D == Divergence::kDecoupled;

// ------------------------------------------------------------------------------------- maxima, mean, deviation
template <class A>
FT_DEVICE void set_mean(Side<A>& side, Standard<double>& standard, double sum, double count) {
  standard.mean = sum / count;
  standard.count = count;
  side.mean = A(standard.mean);
  side.mean_low = A(standard.mean - double(side.mean));
}
template <class A>
FT_DEVICE void set_deviation(Side<A>& side, Standard<double>& standard, double square) {
  standard = standard_of(standard.mean, square, standard.count);
  side.factor = A(1 / standard.scale);
}

// By one thread, from the maxima of the warps.
template <class A, Divergence D>
FT_DEVICE void set_tops(DistillShared<A>& block) {
  Top<A> top_s = block.tops_s[0], top_t = block.tops_t[0];
  for (int w = 1; w < threads() / kWarp; ++w) {
    top_s.merge(block.tops_s[w]);
    top_t.merge(block.tops_t[w]);
  }
  RowConstants<A>& row = block.constants;
  block.s.top = reference(top_s.value);
  block.t.top = reference(top_t.value);
  if (row.pair) {
    block.s_at_t = block.s.at(top_t.column);
    block.t_at_s = block.t.at(top_s.column);
  }
  if constexpr (kWithoutLabel<D>) {
    top_s.merge({A(block.label_s), row.column});
    top_t.merge({A(block.label_t), row.column});
  }
  row.top_1 = reference(top_s.value);
  block.agrees = top_s.column == top_t.column;
  block.valid = block.valid && top_s.is_logit() && (!row.pair || top_t.is_logit());
}

template <class A, Divergence D>
FT_DEVICE void find_tops(const DistillCall& call, DistillShared<A>& block) {
  const Side<A> s = block.s, t = block.t;
  const int64_t without = kWithoutLabel<D> ? block.constants.column : -1;
  const bool standardize = call.standardize;
  Top<A> top_s, top_t;
  double x[4] = {};  // per side: the sum and the number of what is above -inf
  sweep(s, t, call.kd.columns, [&](const Columns& columns, const A(&a)[kColumns], const A(&b)[kColumns]) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      if (standardize) {
        if (a[k] != neg_inf<A>()) x[0] += double(a[k]), x[1] += 1;
        if (b[k] != neg_inf<A>()) x[2] += double(b[k]), x[3] += 1;
      }
      if (kWithoutLabel<D> && columns.at(k) == without) continue;
      top_s.see(a[k], columns.at(k));
      top_t.see(b[k], columns.at(k));
    }
  });
  top_s = first_over_warp(top_s);
  top_t = first_over_warp(top_t);
  if (lane() == 0) {
    block.tops_s[warp()] = top_s;
    block.tops_t[warp()] = top_t;
  }
  if (standardize) {
    total(block, x, block.sums);
  } else {
    barrier();
  }
  if (thread() == 0) {
    set_tops<A, D>(block);
    if (standardize) {
      set_mean(block.s, block.standard_s, block.sums[0], block.sums[1]);
      set_mean(block.t, block.standard_t, block.sums[2], block.sums[3]);
    }
  }
  barrier();
}

template <class A>
FT_DEVICE void find_deviations(const DistillCall& call, DistillShared<A>& block) {
  const Side<A> s = block.s, t = block.t;
  const double mean_s = block.standard_s.mean, mean_t = block.standard_t.mean;
  double x[2] = {};
  sweep(s, t, call.kd.columns, [&](const Columns&, const A(&a)[kColumns], const A(&b)[kColumns]) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const double from_s = double(a[k]) - mean_s, from_t = double(b[k]) - mean_t;
      if (a[k] != neg_inf<A>()) x[0] += from_s * from_s;
      if (b[k] != neg_inf<A>()) x[1] += from_t * from_t;
    }
  });
  total(block, x, block.sums);
  if (thread() == 0) {
    set_deviation(block.s, block.standard_s, block.sums[0]);
    set_deviation(block.t, block.standard_t, block.sums[1]);
  }
  barrier();
}

// --------------------------------------------------------------------------------------------------------- sums
// exp_b - exp_a, by = (b - a)/T.
FT_DEVICE float gap_of(float ea, float eb, float by) {
  return ea != 0 && by >= -kSmall && by <= kSmall ? ea * by * expm1_ratio(by) : eb - ea;
}
FT_DEVICE double gap_of(double ea, double eb, double) { return eb - ea; }

template <class A, Divergence D>
FT_DEVICE void add_pair(const RowConstants<A>& row, A ds, A dt, A (&sum)[kSumsOfRow]) {
  const A es = exp_of(ds, row.c), et = exp_of(dt, row.c);
  const A a = kOfStudent<D> ? ds : dt, b = kOfStudent<D> ? dt : ds;
  const A ea = kOfStudent<D> ? es : et, eb = kOfStudent<D> ? et : es;
  sum[kExpA] += ea;
  sum[kExpB] += eb;
  sum[kGap] += gap_of(ea, eb, (b - a) * row.inv_t);
  if ((kIsKl<D> || row.stats) && ea != 0) {
    sum[kCross] += ea * (a - b);
    if (kIsKl<D> && row.moved) sum[kMoved] += ea * ((a - b) - row.at);
  }
  if (!row.stats) return;
  if (kOfStudent<D> && et != 0) sum[kKl] += et * (dt - ds);
  if (es != 0) sum[kPLogP] += es * ds;
  if (et != 0) sum[kQLogQ] += et * dt;
}

template <class A, Divergence D>
FT_DEVICE void sum_row(const DistillCall& call, DistillShared<A>& block) {
  const Side<A> s = block.s, t = block.t;
  const RowConstants<A> row = block.constants;
  double sums[kSumsOfRow] = {};
  sweep(s, t, call.kd.columns, [&](const Columns& columns, const A(&a)[kColumns], const A(&b)[kColumns]) {
    A sum[kSumsOfRow] = {};
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      if (!columns.has(k)) continue;
      if (row.label_term) {
        sum[kExp1] += exp_of(a[k] - row.top_1, row.c_1);
        if (row.smooth) sum[kShift1] += a[k] - row.top_1;
      }
      if (!row.pair || (kWithoutLabel<D> && columns.at(k) == row.column)) continue;
      add_pair<A, D>(row, s.below(a[k]), t.below(b[k]), sum);
    }
    add_to(sums, sum);
  });
  total(block, sums, block.sums);
}

// -------------------------------------------------------------------------------------------------------- terms
// x - y, 0 where both are -inf.
template <class A>
FT_DEVICE A log_ratio_of(A ds, A dt, A inv_t, A log_ratio) {
  return ds == neg_inf<A>() && dt == neg_inf<A>() ? A(0) : (ds - dt) * inv_t - log_ratio;
}

FT_DEVICE float expm1_small(float x) { return x * expm1_ratio(x); }
FT_DEVICE double expm1_small(double x) { return expm1(x); }

template <class A>
struct ExactMath {
  static FT_DEVICE A expm1(A x) { return expm1_of(x); }
  static FT_DEVICE A log1p(A x) { return log1p_of(x); }
};

template <class A>
struct DistillTerms {
  A value, of_s, of_t;
};

// Of a column with probabilities p and q, d = log(p/q).
template <class A, Divergence D>
FT_DEVICE DistillTerms<A> terms_of(A d, A p, A q, A beta) {
  if constexpr (D == Divergence::kJsd) {
    const JsdTerms<A> f = jsd_terms<ExactMath<A>>(d, beta);
    return {(p != 0 ? p * f.from_p : A(0)) + (q != 0 ? q * f.from_q : A(0)), f.from_p, f.from_q};
  } else {
    // Where they nearly agree from d, which is 0 where they are the same.
    const A by = d >= -A(kSmall) && d <= A(kSmall) ? q * expm1_small(d) : p - q;
    const A half = by > 0 ? A(0.5) : by < 0 ? A(-0.5) : A(0);
    return {absolute(by) * A(0.5), half, -half};
  }
}

template <class A, Divergence D>
FT_DEVICE void sum_terms(const DistillCall& call, DistillShared<A>& block) {
  const Side<A> s = block.s, t = block.t;
  const RowConstants<A> row = block.constants;
  const GradConstants<A>& grad = block.grad;
  const A log_ratio = grad.log_ratio, inv_s = grad.p, inv_t = grad.q, at_s = grad.at_s, at_t = grad.at_t;
  const A beta = A(call.args[0]);
  double terms[kTerms] = {};
  sweep(s, t, call.kd.columns, [&](const Columns&, const A(&a)[kColumns], const A(&b)[kColumns]) {
    A term[kTerms] = {};
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const A ds = s.below(a[k]), dt = t.below(b[k]);
      const A p = exp_of(ds, row.c) * inv_s, q = exp_of(dt, row.c) * inv_t;
      const DistillTerms<A> f = terms_of<A, D>(log_ratio_of(ds, dt, row.inv_t, log_ratio), p, q, beta);
      term[kValue] += f.value;
      if (p != 0) term[kMeanS] += p * (f.of_s - at_s);
      if (q != 0) term[kMeanT] += q * (f.of_t - at_t);
    }
    add_to(terms, term);
  });
  total(block, terms, block.terms);
}

}  // namespace ft::distill
