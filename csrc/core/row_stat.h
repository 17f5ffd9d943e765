// The statistic that one sweep over a pair of rows (student s, teacher t) accumulates, and its monoid.
//
//   max_s = max s_v                      max_t = max t_v
//   exp_s = sum exp((s_v - max_s)/T)     exp_t = sum exp((t_v - max_t)/T)
//   exp_1 = sum exp(s_v - max_s)                                  the student at T = 1, for the label term
//   gap   = sum exp((s_v - max_s)/T) - exp((t_v - max_t)/T)
//   cross = sum w_v ((t_v - max_t) - (s_v - max_s))               w_v = exp_t's or exp_s's terms: the policy's choice
//   shift_s = sum (s_v - max_s)          shift_t = sum (t_v - max_t)
//
// combine() merges two statistics of disjoint columns. It is associative, so lanes, column blocks, warps, blocks of
// a cluster and tensor-parallel ranks all merge by it. Differences from the maximum are taken before anything is
// multiplied by 1/T, and `cross` and `gap` sum differences: where student and teacher nearly agree, the terms are
// small themselves instead of cancelling in the sum. log(exp_s/exp_t), which is the whole loss there, is taken from
// gap/exp_t: two fp32 sums of exponentials round by 1e-7 each, and independently.
//
// shift_* are the only sums in which every element appears unweighted. They carry label smoothing, and they are NaN
// exactly when the row holds a NaN or a +inf, which is how such a row is recognised.
//
// A maximum of -inf means "no finite element yet". Its reference is 0: exp(-inf - 0) = 0, where -inf - (-inf) would
// be NaN. That makes blocks of -inf inside a row (a masked vocabulary) exact.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace ft {

template <class F>
struct RowStat {
  F max_s, max_t;
  F exp_s, exp_t, exp_1;
  F gap;
  F cross;
  F shift_s, shift_t;
  F count;  // columns seen: what a change of reference moves shift_* by
};

template <class F>
FT_HD F neg_inf() {
  return -F(__builtin_huge_val());
}

// What differences of a row are taken from: its maximum, or 0 while that is -inf.
template <class F>
FT_HD F reference(F max) {
  return max == neg_inf<F>() ? F(0) : max;
}

template <class F>
FT_HD RowStat<F> empty_stat() {
  return {neg_inf<F>(), neg_inf<F>(), F(0), F(0), F(0), F(0), F(0), F(0), F(0), F(0)};
}

// exp((from - to)/T) with 1 where nothing moves: a factor of exactly 1 must not be rounded.
template <class F>
FT_HD F rescale(F from, F to, F inv_t) {
  return from == to ? F(1) : F(exp((from - to) * inv_t));
}

// A sum of weight `mass`, rescaled. No mass stays no mass, also where the factor is infinite.
template <class F>
FT_HD F scaled(F mass, F factor) {
  return mass == F(0) ? F(0) : factor * mass;
}

// A weighted sum `acc` of weight `mass`, moved by `delta` in its differences and rescaled by `factor`. Mass that
// underflows is no mass, also where the sum was infinite.
template <class F>
FT_HD F moved(F acc, F mass, F delta, F factor) {
  return mass == F(0) || factor == F(0) ? F(0) : factor * (acc + mass * delta);
}

// A gap whose two sides are rescaled by different factors. Where it is as large as the sides it holds no more than
// they do, and one side may be lost in its rounding (references far from the maxima, on one side more than the
// other).
template <class F>
FT_HD F moved_gap(const RowStat<F>& stat, F factor_s, F factor_t) {
  const F relative = stat.gap / stat.exp_t;
  if (!(relative > F(-0.5) && relative < F(0.5))) return scaled(stat.exp_s, factor_s) - scaled(stat.exp_t, factor_t);
  return factor_s * stat.gap + (factor_s - factor_t) * stat.exp_t;
}

// log(exp_s / exp_t)
template <class F>
FT_HD F log_ratio(const RowStat<F>& stat) {
  const F relative = stat.gap / stat.exp_t;
  return relative > F(-0.5) && relative < F(1) ? log1p(relative) : log(stat.exp_s / stat.exp_t);
}

template <class Policy, class F>
FT_HD RowStat<F> combine(const RowStat<F>& a, const RowStat<F>& b, F inv_t) {
  RowStat<F> r;
  r.max_s = a.max_s > b.max_s ? a.max_s : b.max_s;
  r.max_t = a.max_t > b.max_t ? a.max_t : b.max_t;
  const F rs = reference(r.max_s), rt = reference(r.max_t);
  const F as = reference(a.max_s), at = reference(a.max_t), bs = reference(b.max_s), bt = reference(b.max_t);
  const F fas = rescale(as, rs, inv_t), fat = rescale(at, rt, inv_t);
  const F fbs = rescale(bs, rs, inv_t), fbt = rescale(bt, rt, inv_t);
  r.exp_s = scaled(a.exp_s, fas) + scaled(b.exp_s, fbs);
  r.exp_t = scaled(a.exp_t, fat) + scaled(b.exp_t, fbt);
  r.exp_1 = scaled(a.exp_1, rescale(as, rs, F(1))) + scaled(b.exp_1, rescale(bs, rs, F(1)));
  r.gap = moved_gap(a, fas, fat) + moved_gap(b, fbs, fbt);
  r.cross = moved(a.cross, Policy::cross_mass(a), (at - rt) - (as - rs), Policy::cross_of(fas, fat)) +
            moved(b.cross, Policy::cross_mass(b), (bt - rt) - (bs - rs), Policy::cross_of(fbs, fbt));
  r.shift_s = a.shift_s + a.count * (as - rs) + b.shift_s + b.count * (bs - rs);
  r.shift_t = a.shift_t + a.count * (at - rt) + b.shift_t + b.count * (bt - rt);
  r.count = a.count + b.count;
  return r;
}

}  // namespace ft
