// From the statistic of a row to its loss and to what its exponentials are multiplied by in the gradient:
//
//   grad_v = on_s exp_s,v + on_t exp_t,v + on_1 exp_1,v + constant - [v == label] label
#pragma once

#include <cmath>

#include "cuda/kd_sums.cuh"

namespace ft::distill {

inline constexpr int kSums = 6;

// Sums of a whole row, or of a part of it, relative to the maxima of the row.
struct Totals {
  double exp_s, exp_t, exp_1, gap, cross, shift_s;
};
static_assert(sizeof(Totals) == kSums * sizeof(double));

template <class A>
FT_DEVICE Totals totals_of(const Sums<A>& sum) {
  return {double(sum.exp_s), double(sum.exp_t), double(sum.exp_1),
          double(sum.gap),   double(sum.cross), double(sum.shift_s)};
}

struct Factors {
  double on_s, on_t, on_1, constant, label;
  bool valid;  // if not, the gradient is NaN
};

template <class A>
FT_DEVICE RowStat<double> stat_of(const Totals& totals, const RowMath<A>& m, double max_s, double max_t,
                                  int64_t columns) {
  RowStat<double> stat = {};
  stat.max_s = max_s;
  stat.max_t = max_t;
  stat.exp_s = totals.exp_s;
  stat.exp_t = totals.exp_t;
  stat.exp_1 = m.hot ? totals.exp_1 : totals.exp_s;
  stat.gap = totals.gap;
  stat.cross = totals.cross;
  stat.shift_s = totals.shift_s;
  stat.count = double(columns);
  return stat;
}

// Not so: a NaN or +inf anywhere, a side that is -inf throughout, or a label out of range.
template <class A>
FT_DEVICE bool is_valid(const KdCall& call, const KdRow& row, const RowMath<A>& m, const RowStat<double>& stat) {
  return stat.exp_s > 0 && (!m.teacher || stat.exp_t > 0) &&
         (row.label_weight == 0 || (row.label >= 0 && row.label < call.columns));
}

FT_DEVICE double power_of_two(int k) { return __builtin_bit_cast(double, uint64_t(1023 + k) << 52); }

// The power of two that brings a gradient of at most `bound` near the top of fp16. Without it a mean over 8192 rows
// of 128k logits is all zeros in fp16: the loss scale of a GradScaler arrives only in backward.
FT_DEVICE int half_exponent(double bound) {
  bound = fabs(bound);  // the weight of a row may be negative
  if (!(bound > 0 && bound < 1e300)) return 0;
  const int k = 14 - (int(__builtin_bit_cast(uint64_t, bound) >> 52) - 1022);
  return k > 100 ? 100 : k < -100 ? -100 : k;
}

template <class A>
FT_DEVICE Factors factors_of(const KdCall& call, const KdRow& row, const RowMath<A>& m, const RowStat<double>& stat) {
  const int up =
      call.grad_scales ? half_exponent(row.kd_weight * row.inv_t + row.label_weight) : 0;  // |grad| <= this
  const double scale = power_of_two(up);
  const double label_weight = row.label_weight * scale, smoothing = label_weight != 0 ? call.smoothing : 0;
  Policy::Grad<double> kd = {0, 0};
  if (m.teacher) kd = Policy::grad(stat, row.inv_t);
  Factors f;
  f.valid = is_valid(call, row, m, stat);
  const double on_1 = label_weight / stat.exp_1;
  f.on_s = kd.on_s * row.kd_weight * scale + (m.hot ? 0 : on_1);
  f.on_t = kd.on_t * row.kd_weight * scale;
  f.on_1 = m.hot ? on_1 : 0;
  f.constant = -label_weight * smoothing / double(call.columns);
  f.label = label_weight * (1 - smoothing);
  return f;
}

// The factor that turns the stored gradient of row i into the gradient, and the row's loss.
template <class A>
FT_DEVICE void store_results(const KdCall& call, int64_t i, const KdRow& row, const RowMath<A>& m,
                             const RowStat<double>& stat, double label_logit) {
  if (call.grad_scales) {
    const int up = half_exponent(row.kd_weight * row.inv_t + row.label_weight);
    store(call.grad_scales + i, float(power_of_two(-up)));
  }
  double loss = __builtin_nan("");
  if (is_valid(call, row, m, stat)) {
    loss = m.teacher ? row.kd_weight * Policy::value(stat, row.inv_t) : 0;
    if (row.label_weight != 0) {
      const double log_sum = log(stat.exp_1), smoothing = call.smoothing;
      double ce = 0;  // 0 * inf = 0, at both ends of label_smoothing
      if (smoothing != 1) ce = (1 - smoothing) * (log_sum - (label_logit - reference(stat.max_s)));
      if (smoothing != 0) ce += smoothing * (log_sum - stat.shift_s / double(call.columns));
      loss += row.label_weight * ce;
    }
  }
  store_loss(call, i, loss);
}

// Factors in the arithmetic of the gradient.
template <class A>
struct GradFactors {
  A on_s, on_t, on_1, constant;
  FT_DEVICE explicit GradFactors(const Factors& f)
      : on_s(A(f.on_s)), on_t(A(f.on_t)), on_1(A(f.on_1)), constant(A(f.constant)) {}
};

// The gradient of a vector of columns, of which number `hit` is the label's if there is such a one: that logit's is
// computed whole, not corrected after a rounding.
template <class A, int N>
FT_DEVICE void gradient(const RowMath<A>& m, const GradFactors<A>& g, const Factors& f, int hit, const A (&es)[N],
                        const A (&et)[N], const A (&e1)[N], A (&grad)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    grad[k] = es[k] * g.on_s + g.constant;
    if (m.teacher) grad[k] += et[k] * g.on_t;
    if (m.hot) grad[k] += e1[k] * g.on_1;
  }
  if (hit < 0 || hit >= N) return;
  A s = 0, t = 0, one = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (k != hit) continue;
    s = es[k];
    if (m.teacher) t = et[k];
    if (m.hot) one = e1[k];
  }
  const A whole = A(f.on_s * s + f.on_t * t + f.on_1 * one + f.constant - f.label);
#pragma unroll
  for (int k = 0; k < N; ++k) grad[k] = k == hit ? whole : grad[k];
}

// The label's column, or one that no vector holds.
FT_DEVICE int64_t label_column(const KdRow& row) { return row.label_weight != 0 ? row.label : -(int64_t{1} << 30); }

// Its place in a vector of columns from `first` on, or -1.
FT_DEVICE int hit_of(int64_t label, int64_t first, int lanes) {
  const int64_t past = label - first;
  return past >= 0 && past < lanes ? int(past) : -1;
}

}  // namespace ft::distill
