// What one thread of a block makes of a row's sums, in double: its loss, its statistics, and the constants of its
// gradients.
#pragma once

#include "cuda/distill_sums.cuh"

namespace ft::distill {

// log(b/a), gap = b - a.
FT_DEVICE double log_of_ratio(double a, double b, double gap) {
  RowStat<double> stat = {};
  stat.exp_t = a;
  stat.exp_s = b;
  stat.gap = gap;
  return log_ratio(stat);
}

// No mass times an infinite difference is nothing.
FT_DEVICE double weighed(double mass, double by) { return mass == 0 ? 0 : mass * by; }

// ------------------------------------------------------------------------------------------------ before all sums
// Options, label, and which sides are read; what depends on the maxima comes later.
template <class A, Divergence D>
FT_DEVICE void begin_row(const DistillCall& call, int64_t i, DistillShared<A>& block) {
  const KdCall& kd = call.kd;
  block.row = read_row(kd, i);
  if (!block.row.counted()) return;
  const bool labelled = kd.labels && block.row.label != kd.ignore_index;
  const bool in_range = block.row.label >= 0 && block.row.label < kd.columns;
  RowConstants<A>& row = block.constants;
  row.pair = block.row.kd_weight != 0 || call.stats;
  row.stats = call.stats;
  row.label_term = labelled && (block.row.label_weight != 0 || call.stats);
  row.smooth = labelled && block.row.label_weight != 0 && kd.smoothing != 0;
  row.moved = kIsKl<D> && (kOfStudent<D> ? kd.grad.data : call.teacher_grad.data);
  row.column = labelled && in_range ? block.row.label : kWithoutLabel<D> ? 0 : -1;
  const double log2_e = 1.4426950408889634;
  row.inv_t = A(block.row.inv_t);
  row.c = A(block.row.inv_t * (sizeof(A) == 4 ? log2_e : 1));
  row.c_1 = A(sizeof(A) == 4 ? log2_e : 1);
  block.valid = !labelled || in_range;
  block.s = {kd.student.row<char>(i), kd.student.column_stride, kd.student.dtype, A(call.cap_s), 0, 1, 0, 0};
  block.t = {nullptr, kd.teacher.column_stride, kd.teacher.dtype, A(call.cap_t), 0, 1, 0, 0};
  if (row.pair) block.t.row = kd.teacher.row<char>(i);
  block.label_s = block.label_t = 0;
  if (row.column >= 0 && (row.label_term || kWithoutLabel<D>)) block.label_s = block.s.at(row.column);
  if (kWithoutLabel<D> && row.pair) block.label_t = block.t.at(row.column);
  block.grad = {};
  block.grad.up_s = block.grad.up_t = 1;
}

// --------------------------------------------------------------------------------------- between maxima and sums
// a - b at a's maximum, where a - max a is 0.
template <class A, Divergence D>
FT_DEVICE void set_at(DistillShared<A>& block) {
  block.constants.at = kOfStudent<D> ? -block.t.below(A(block.t_at_s)) : -block.s.below(A(block.s_at_t));
}

// ---------------------------------------------------------------------------------------- between sums and terms
template <class A, Divergence D>
FT_DEVICE void set_term_constants(const DistillCall& call, DistillShared<A>& block) {
  const RowConstants<A>& row = block.constants;
  GradConstants<A>& grad = block.grad;
  const double exp_t = block.sums[kExpA], exp_s = block.sums[kExpB];
  grad.log_ratio = A(log_of_ratio(exp_t, exp_s, block.sums[kGap]));
  grad.p = A(1 / exp_s);
  grad.q = A(1 / exp_t);
  const auto at = [&](A ds, A dt) {
    return terms_of<A, D>(log_ratio_of(ds, dt, row.inv_t, grad.log_ratio), exp_of(ds, row.c) * grad.p,
                          exp_of(dt, row.c) * grad.q, A(call.args[0]));
  };
  grad.at_s = at(A(0), block.t.below(A(block.t_at_s))).of_s;
  grad.at_t = at(block.s.below(A(block.s_at_t)), A(0)).of_t;
}

// ---------------------------------------------------------------------------------------------------- after all
template <class A, Divergence D>
FT_DEVICE double kl_value(const DistillShared<A>& block) {
  const double* const sums = block.sums;
  return sums[kCross] / sums[kExpA] * block.row.inv_t + log_of_ratio(sums[kExpA], sums[kExpB], sums[kGap]);
}

// A KL of weight `weight`: constants of the gradients of b and of a.
template <class A, Divergence D>
FT_DEVICE void set_kl(DistillShared<A>& block, double value, double weight) {
  const double exp_a = block.sums[kExpA], exp_b = block.sums[kExpB], inv_t = block.row.inv_t;
  GradConstants<A>& grad = block.grad;
  grad.on_a = A(weight * inv_t / exp_a);
  grad.on_b = A(weight * inv_t / exp_b);
  if (value == -neg_inf<double>()) return;  // the mass's own gradient is then 0
  (kOfStudent<D> ? grad.mean_s : grad.mean_t) = A(block.sums[kMoved] / exp_a);
  (kOfStudent<D> ? grad.mass_s : grad.mass_t) = A(weight * inv_t * inv_t / exp_a);
}

template <class A>
FT_DEVICE double set_decoupled(const DistillCall& call, DistillShared<A>& block) {
  const double on_target = call.args[0], on_rest = call.args[1], inv_t = block.row.inv_t;
  const double weight = block.row.kd_weight, exp_t = block.sums[kExpA], exp_s = block.sums[kExpB];
  const double odds_s = label_odds(double(block.s.below(A(block.label_s))), 0.0, exp_s, inv_t);
  const double odds_t = label_odds(double(block.t.below(A(block.label_t))), 0.0, exp_t, inv_t);
  GradConstants<A>& grad = block.grad;
  double rest = 0;
  if (exp_t > 0) {
    rest = -neg_inf<double>();
    if (exp_s > 0) {
      rest = kl_value<A, Divergence::kDecoupled>(block);
      set_kl<A, Divergence::kDecoupled>(block, rest, weight * on_rest);
    }
  }
  const double move_s = weighed(on_target, binary_kl_slope_s(odds_t, odds_s)) * inv_t * weight;
  const double move_t = weighed(on_target, binary_kl_slope_t(odds_t, odds_s)) * inv_t * weight;
  grad.label_s = A(move_s);
  grad.label_t = A(move_t);
  if (exp_s > 0) {
    const double both = exp_t > 0 ? weight * on_rest * inv_t : 0;
    grad.on_b = A((both - move_s) / exp_s);
  }
  if (exp_t > 0) grad.spread = A(move_t / exp_t);
  return weighed(on_target, binary_kl(odds_t, odds_s)) + weighed(on_rest, rest);
}

// The divergence; and the constants of its gradients, times its weight.
template <class A, Divergence D>
FT_DEVICE double divergence_of(const DistillCall& call, DistillShared<A>& block) {
  const double weight = block.row.kd_weight, inv_t = block.row.inv_t;
  if constexpr (D == Divergence::kDecoupled) {
    return set_decoupled(call, block);
  } else if constexpr (kIsKl<D>) {
    const double value = kl_value<A, D>(block);
    set_kl<A, D>(block, value, weight);
    return value;
  } else {
    GradConstants<A>& grad = block.grad;
    grad.mean_s = A(block.terms[kMeanS]);
    grad.mean_t = A(block.terms[kMeanT]);
    grad.mass_s = A(weight * inv_t / block.sums[kExpB]);
    grad.mass_t = A(weight * inv_t / block.sums[kExpA]);
    return block.terms[kValue];
  }
}

// Cross entropy without smoothing; its gradient's constants; the label term of the loss.
template <class A>
FT_DEVICE double label_term(const DistillCall& call, DistillShared<A>& block, double& plain) {
  const double weight = block.row.label_weight, smoothing = call.kd.smoothing, exp_1 = block.sums[kExp1];
  const double columns = double(call.kd.columns), log_sum = log(exp_1);
  plain = log_sum - (block.label_s - double(block.constants.top_1));
  if (weight == 0) return 0;
  GradConstants<A>& grad = block.grad;
  grad.label_on_1 = weight / exp_1;
  grad.label_constant = -weight * smoothing / columns - weight * (1 - smoothing);
  grad.on_1 = A(grad.label_on_1);
  grad.constant = A(-weight * smoothing / columns);
  return weight * (weighed(1 - smoothing, plain) + weighed(smoothing, log_sum - block.sums[kShift1] / columns));
}

template <class A>
FT_DEVICE void store_stats(const DistillCall& call, int64_t i, const double (&stats)[kStats]) {
  for (int k = 0; k < kStats; ++k) {
    if (call.kd.loss_is_double) {
      store(static_cast<double*>(call.stats) + i * kStats + k, stats[k]);
    } else {
      store(static_cast<float*>(call.stats) + i * kStats + k, float(stats[k]));
    }
  }
}
template <class A>
FT_DEVICE void store_stats(const DistillCall& call, int64_t i, double all) {
  const double stats[kStats] = {all, all, all, all, all};
  store_stats<A>(call, i, stats);
}

// Sums of whole rows, from those without the label's column (decoupled) and that column.
struct WholeSums {
  double exp_s, exp_t, kl, p_log_p, q_log_q;
};
template <class A>
FT_DEVICE WholeSums with_label(const DistillShared<A>& block) {
  const double* const sums = block.sums;
  const double inv_t = block.row.inv_t;
  // x of the greatest of the others, and of the label, below the greatest of all.
  const auto below = [](const Side<A>& side, double label, double& rest, double& of_label, bool has_rest) {
    const double top = double(side.top), greatest = has_rest && top > label ? top : label;
    rest = has_rest ? (top - greatest) * double(side.factor) : 0;
    of_label = (label - greatest) * double(side.factor);
  };
  double rest_s, rest_t, label_s, label_t;
  below(block.s, block.label_s, rest_s, label_s, sums[kExpB] > 0);
  below(block.t, block.label_t, rest_t, label_t, sums[kExpA] > 0);
  const double by_s = exp(rest_s * inv_t), by_t = exp(rest_t * inv_t), on_s = exp(label_s * inv_t),
               on_t = exp(label_t * inv_t), exp_s = by_s * sums[kExpB], exp_t = by_t * sums[kExpA];
  WholeSums whole;
  whole.exp_s = exp_s + on_s;
  whole.exp_t = exp_t + on_t;
  whole.kl = weighed(by_t, sums[kCross]) + weighed(exp_t, rest_t - rest_s) + weighed(on_t, label_t - label_s);
  whole.p_log_p = by_s * sums[kPLogP] + weighed(exp_s, rest_s) + weighed(on_s, label_s);
  whole.q_log_q = by_t * sums[kQLogQ] + weighed(exp_t, rest_t) + weighed(on_t, label_t);
  return whole;
}

template <class A, Divergence D>
FT_DEVICE void put_stats(const DistillCall& call, int64_t i, const DistillShared<A>& block, double plain_ce) {
  const double* const sums = block.sums;
  const double inv_t = block.row.inv_t;
  WholeSums whole;
  double log_ratio;  // log(exp_s/exp_t)
  if constexpr (kWithoutLabel<D>) {
    whole = with_label(block);
    log_ratio = log(whole.exp_s / whole.exp_t);
  } else {
    const double log_b_a = log_of_ratio(sums[kExpA], sums[kExpB], sums[kGap]);
    log_ratio = kOfStudent<D> ? -log_b_a : log_b_a;
    whole = {sums[kOfStudent<D> ? kExpA : kExpB], sums[kOfStudent<D> ? kExpB : kExpA],
             sums[kOfStudent<D> ? kKl : kCross], sums[kPLogP], sums[kQLogQ]};
  }
  const double stats[kStats] = {whole.kl / whole.exp_t * inv_t + log_ratio, plain_ce,
                                log(whole.exp_s) - whole.p_log_p / whole.exp_s * inv_t,
                                log(whole.exp_t) - whole.q_log_q / whole.exp_t * inv_t, block.agrees ? 1.0 : 0.0};
  store_stats<A>(call, i, stats);
}

// The loss and the statistics of a row that is valid, and block.grad but for slopes and powers of two.
template <class A, Divergence D>
FT_DEVICE void finish_distilled(const DistillCall& call, int64_t i, DistillShared<A>& block) {
  double loss = 0, plain_ce = 0;
  if (block.constants.pair) {
    const double value = divergence_of<A, D>(call, block);
    loss = weighed(block.row.kd_weight, value);
  }
  if (block.constants.label_term) loss += label_term(call, block, plain_ce);
  store_loss(call.kd, i, loss);
  if (call.stats) put_stats<A, D>(call, i, block, plain_ce);
}

}  // namespace ft::distill
