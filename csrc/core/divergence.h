// Divergences as policies over RowStat. With x = log p (student), y = log q (teacher), p and q at temperature T:
//
//   policy       D                  d D / d s_v                 sweeps
//   ForwardKL    sum q (y - x)      (p_v - q_v) / T             1
//
// A policy says which exponentials weigh the cross sum, how a finished statistic becomes the value, and what the
// gradient of one logit is, given that logit's two exponentials. Adding a divergence is adding a struct here and a
// line in the table of cpu/kd.h.
#pragma once

#include "core/row_stat.h"

namespace ft {

struct ForwardKL {
  // cross = sum exp_t,v ((t_v - max_t) - (s_v - max_s)): weighed by the teacher.
  template <class V>
  static FT_HD V weight(V /*exp_s*/, V exp_t) {
    return exp_t;
  }
  template <class F>
  static FT_HD F cross_mass(const RowStat<F>& stat) {
    return stat.exp_t;
  }
  // The teacher's exponentials weigh the sum, so the teacher's factor rescales it.
  template <class F>
  static FT_HD F cross_of(F /*factor_s*/, F factor_t) {
    return factor_t;
  }

  // sum q (y - x) = cross/(exp_t T) + log(exp_s/exp_t), exactly 0 when s == t.
  template <class F>
  static FT_HD F value(const RowStat<F>& stat, F inv_t) {
    return stat.cross / stat.exp_t * inv_t + log_ratio(stat);
  }

  // gradient of logit v = on_s exp_s,v + on_t exp_t,v
  template <class F>
  struct Grad {
    F on_s, on_t;
  };
  template <class F>
  static FT_HD Grad<F> grad(const RowStat<F>& stat, F inv_t) {
    return {inv_t / stat.exp_s, -inv_t / stat.exp_t};
  }
};

}  // namespace ft
