// One row of `distill`: a divergence of two softmaxes, standardized and softcapped logits, an optional label term,
// the gradients of both sides. The formulas: fasttransfer/ops/distill.py; the terms: core/terms.h.
//
// Passes over memory: one, block by block (2048 columns of either side, which fit the L1 cache); per block
//   1. the maxima, which are the block's references where they are the row's so far;
//   2. sweep: exponentials, their sums, what the gradient needs, kept in scratch (L2);
// when the row's sums are known, from scratch,
//   3. jsd and tvd: the terms, which need both sums;
//   4. the gradients: two multiplications per logit, one store per side.
// Standardization needs a row's moments before its first exponential: a pass before, which keeps the row in scratch.
// Bytes per logit, with the student's gradient: read s, read t, write grad = 12 (fp32), 6 (16 bit).
#pragma once

#include "cpu/distill_grad.h"
#include "cpu/distill_rows.h"
#include "cpu/distill_stats.h"
#include "cpu/distill_sweep.h"

namespace ft::FT_ISA {
namespace {

constexpr int kStudent = 0, kTeacher = 1;

template <class F>
struct DistillRun {
  const DistillCall& call;
  const DistillRow& row;
  const DistillScratch<F> scratch;
  const int m, o;  // which side has which part (cpu/distill_sweep.h)
  const bool distills, wants_label;
  const double inv_t;
  int power = 0;  // of the label term's exponentials from the kept ones: 0, or T
  bool hot;       // exponentials of its own for the label term
  DistillInput<F> input;
  bool broken = false;
  Refs refs;
  PairSums sums;
  HotSums label_sums;
  FirstMax first[2];
  double z_label = 0;          // the student's
  double x_label[2] = {0, 0};  // decoupled
  Standard<double> standard[2] = {{}, {}};
  double means[2] = {0, 0};                    // of f, at m and o
  double value = 0, target_slope[2] = {0, 0};  // decoupled: d value / d a

  FT_HD bool decoupled() const { return distills && call.divergence == Divergence::kDecoupled; }
  FT_HD int64_t label() const { return row.labelled ? row.label : 0; }
  FT_HD bool is_kl() const { return call.divergence != Divergence::kJsd && call.divergence != Divergence::kTvd; }

  DistillRun(const DistillCall& call_, const DistillRow& row_, void* memory)
      : call(call_),
        row(row_),
        scratch(memory, call_.columns),
        m(call_.divergence == Divergence::kForwardKL || call_.divergence == Divergence::kDecoupled ? kTeacher
                                                                                                   : kStudent),
        o(1 - m),
        distills(row_.logits[kTeacher]),
        wants_label(row_.labelled && (row_.label_weight != 0 || call_.want_stats)),
        inv_t(row_.inv_t),
        input{call_, row_, scratch} {
    hot = !distills || (wants_label && (inv_t != 1 || call.standardize || decoupled() ||
                                        (row.label_weight != 0 && call.label_smoothing != 0)));
    if (__is_same(F, float) && hot && distills && !call.standardize && !decoupled() && call.label_smoothing == 0 &&
        (inv_t == 0.5 || inv_t == 1.0 / 3 || inv_t == 0.25)) {
      power = int(1 / inv_t + 0.5);
    }
  }

  FT_HD int sides() const { return distills ? 2 : 1; }

  template <class Fn>
  FT_HD void each_block(Fn&& fn) const {
    for (int64_t begin = 0; begin < call.columns; begin += kDistillBlock) {
      fn(begin, call.columns - begin < kDistillBlock ? call.columns - begin : kDistillBlock);
    }
  }

  // A block's maximum. -inf of a block that holds what is no logit: the row is broken.
  FT_HD F top(const F* x, int64_t n) {
    const Top<F> of = top_of(x, n);
    if (!of.finite && holds_nan_or_inf(x, n)) broken = true;
    return of.max;
  }

  // What is asked of z, before anything is done to it.
  FT_HD void look(int side, const F* z, int64_t begin, int64_t n, F max) {
    if (call.want_stats) first[side].add(z, begin, n, max);
    if (side == kStudent && row.labelled && row.label >= begin && row.label < begin + n)
      z_label = z[row.label - begin];
  }

  FT_HD F* student_exp() const { return scratch.exp[m == kStudent ? 0 : 1]; }

  FT_HD void sweep_hot(const F* z, int64_t begin, int64_t n, F max) {
    const double before = refs.hot;
    refs.hot = max > refs.hot ? double(max) : refs.hot;
    const double ref = reference(refs.hot), moved_by = reference(before) - ref;
    F* const e = scratch.exp_1 + begin;
    HotSums of;
    if (power) {
      of.exp = sum_raised(student_exp() + begin, n, power);
    } else {
      of = call.label_smoothing != 0 ? hot_sweep<F, true>(z, n, F(ref), e) : hot_sweep<F, false>(z, n, F(ref), e);
    }
    label_sums.exp = scaled(label_sums.exp, rescale(reference(before), ref, 1.0)) + of.exp;
    label_sums.shift = label_sums.shift + double(begin) * moved_by + of.shift;
  }

  __attribute__((noinline)) void read_standardized() {
    for (int side = 0; side < sides(); ++side) {
      each_block([&](int64_t begin, int64_t n) {
        const F* const z = input.block(side, begin, n);
        const F max = top(z, n);
        look(side, z, begin, n, max);
        if (side == kStudent && hot) {
          sweep_hot(z, begin, n, max);
          scratch.refs[begin / kDistillBlock].hot = refs.hot;
        }
      });
      if (broken) return;
      standard[side] = standardize(scratch.x[side], call.columns);
      input.ready[side] = true;
    }
  }

  // The running maxima, and what the other side has there.
  FT_HD void raise(const F* const x[2], int64_t n, const F max[2]) {
    if (max[m] > refs.m) {
      refs.m = max[m];
      refs.o_at_m = x[o][first_of(x[m], n, max[m])];
    }
    if (max[o] > refs.o) {
      refs.o = max[o];
      refs.m_at_o = x[m][first_of(x[o], n, max[o])];
    }
  }

  FT_HD Fetch fetch(int64_t begin) const {
    const auto lines = [&](int side, const void* data, int64_t stride,
                           int64_t column) __attribute__((always_inline)) {
      const int64_t step = stride * with_dtype(call.side[side].dtype, [](auto tag) { return int64_t(sizeof tag); });
      return Lines{static_cast<const char*>(data) + column * step, step};
    };
    const auto next = [&](int side) __attribute__((always_inline)) {
      return lines(side, row.logits[side], call.side[side].stride, begin + kDistillBlock);
    };
    const DistillSide& out = call.side[kStudent];
    return {next(kStudent), next(kTeacher),
            row.grad[kStudent] && !out.stream ? lines(kStudent, row.grad[kStudent], out.grad_stride, begin)
                                              : Lines{reinterpret_cast<const char*>(scratch.exp[0]), 0}};
  }

  FT_HD PairSums sweep_block(const F* xm, const F* xo, int64_t begin, int64_t n, bool careful) const {
    F* const em = scratch.exp[0] + begin;
    F* const eo = scratch.exp[1] + begin;
    F* const w = scratch.w[0] + begin;
    const SweepRefs<F> at{F(reference(refs.m)), F(reference(refs.o)), F(reference(refs.o_at_m)), exp_scale<F>(inv_t),
                          fetch(begin)};
    if (call.divergence == Divergence::kJsd) return softmax_sweep<F, true>(xm, xo, n, at, em, eo, w);
    if (call.divergence == Divergence::kTvd) return softmax_sweep<F, false>(xm, xo, n, at, em, eo, w);
    if constexpr (__is_same(F, float)) {
      if (!careful) {
        // With a power, the student's are kept whatever is wanted.
        const bool for_o = row.grad[o] || (power && o == kStudent), for_m = row.grad[m] || (power && m == kStudent);
        const PairSums of = for_o   ? for_m ? kl_sweep<F, true, true, false>(xm, xo, n, at, em, eo, w)
                                            : kl_sweep<F, true, false, false>(xm, xo, n, at, em, eo, w)
                            : for_m ? kl_sweep<F, false, true, false>(xm, xo, n, at, em, eo, w)
                                    : kl_sweep<F, false, false, false>(xm, xo, n, at, em, eo, w);
        if (of.cross == of.cross) return of;
      }
    }
    return kl_sweep_carefully<F>(xm, xo, n, at, em, eo, w);
  }

  FT_HD void block(int64_t begin, int64_t n) {
    const F* x[2] = {input.block(kStudent, begin, n), nullptr};
    F max[2] = {top(x[kStudent], n), 0};
    if (distills) {
      x[kTeacher] = input.block(kTeacher, begin, n);
      max[kTeacher] = top(x[kTeacher], n);
    }
    if (broken) return;
    Refs& kept = scratch.refs[begin / kDistillBlock];
    if (!call.standardize) {
      for (int side = 0; side < sides(); ++side) look(side, x[side], begin, n, max[side]);
      if (hot && !power) sweep_hot(x[kStudent], begin, n, max[kStudent]);
    } else {
      refs.hot = kept.hot;
    }
    bool careful = false;
    if (distills) {
      if (decoupled() && label() >= begin && label() < begin + n) {
        for (int side = 0; side < 2; ++side) {
          x_label[side] = x[side][label() - begin];
          F* const without = input.copy(side, x[side], n);
          without[label() - begin] = neg_inf<F>();
          x[side] = without;
          max[side] = top(without, n);
        }
        careful = true;
      }
      const Refs before = refs;
      raise(x, n, max);
      move(sums, before, refs, inv_t, sizeof(F) == 4 ? 0x1p-126 : 0x1p-1022);
      const PairSums of = sweep_block(x[m], x[o], begin, n, careful);
      if (power) sweep_hot(x[kStudent], begin, n, max[kStudent]);
      sums = {sums.m + of.m, sums.o + of.o, sums.gap + of.gap, sums.cross + of.cross};
    }
    kept = refs;
  }

  // KL(m || o) from the sums.
  FT_HD double kl() const {
    return sums.cross / sums.m * inv_t - (reference(refs.o_at_m) - reference(refs.o)) * inv_t + log_ratio(sums);
  }

  template <bool kJsd, bool kM, bool kO>
  __attribute__((noinline)) void terms(const TermsCall<F>& row_call, double shift) {
    TermSums total;
    each_block([&](int64_t begin, int64_t n) __attribute__((always_inline)) {
      const Refs& at = scratch.refs[begin / kDistillBlock];
      TermsCall<F> of = row_call;
      of.on_m = F(to_row(at.m, reference(refs.m), inv_t) / sums.m);
      of.on_o = F(to_row(at.o, reference(refs.o), inv_t) / sums.o);
      of.shift = F(shift + ((reference(at.m) - reference(refs.m)) - (reference(at.o) - reference(refs.o))) * inv_t);
      const TermSums block = terms_sweep<F, kJsd, kM, kO>(n, of, scratch.exp[0] + begin, scratch.exp[1] + begin,
                                                          scratch.w[0] + begin, scratch.w[1] + begin);
      total = {total.value + block.value, total.mean_m + block.mean_m, total.mean_o + block.mean_o};
    });
    value = total.value;
    means[0] = total.mean_m;
    means[1] = total.mean_o;
  }

  template <bool kJsd>
  FT_HD void terms_wanted() {
    TermsCall<F> of{
        .on_m = 0, .on_o = 0, .inv_t = F(inv_t), .shift = 0, .beta = F(call.args[0]), .at_m = 0, .at_o = 0};
    const double shift = log_ratio(sums);  // x - y = difference/T + log(o/m)
    // f where the student's mass is largest, and the teacher's.
    const double d_m = (reference(refs.o) - refs.o_at_m) * inv_t + shift;
    const double d_o = (refs.m_at_o - reference(refs.m)) * inv_t + shift;
    if constexpr (kJsd) {
      of.at_m = jsd_terms<VecMath<F>>(splat(F(d_m)), of.beta).from_p[0];
      of.at_o = jsd_terms<VecMath<F>>(splat(F(d_o)), of.beta).from_q[0];
    } else {
      of.at_m = d_m > 0 ? F(0.5) : d_m < 0 ? F(-0.5) : F(0);
      of.at_o = d_o > 0 ? F(-0.5) : d_o < 0 ? F(0.5) : F(0);
    }
    if (row.grad[o]) {
      terms<kJsd, true, true>(of, shift);
    } else if (row.grad[m]) {
      terms<kJsd, true, false>(of, shift);
    } else {
      terms<kJsd, false, false>(of, shift);
    }
  }

  __attribute__((noinline)) void decouple() {
    const double a_t = label_odds(x_label[kTeacher], reference(refs.m), sums.m, inv_t);
    const double a_s = label_odds(x_label[kStudent], reference(refs.o), sums.o, inv_t);
    const double rest = sums.m == 0 ? 0 : sums.o == 0 ? __builtin_huge_val() : kl();
    value = call.args[0] * binary_kl(a_t, a_s) + call.args[1] * rest;
    target_slope[kStudent] = call.args[0] * binary_kl_slope_s(a_t, a_s) * inv_t;
    target_slope[kTeacher] = call.args[0] * binary_kl_slope_t(a_t, a_s) * inv_t;
  }

  // The divergence's gradient for one side's x.
  FT_HD DistillGrad<F> grad_of(int side) const {
    const bool is_m = side == m;
    const double weight = row.kd_weight * inv_t, mine = is_m ? sums.m : sums.o;
    DistillGrad<F> g{.exp = scratch.exp[is_m ? 0 : 1],
                     .w = scratch.w[is_m ? 0 : 1],
                     .exp_role = is_m ? Role::kM : Role::kO,
                     .w_role = Role::kNone};
    if (!distills || row.kd_weight == 0) {
      if (!distills) g.exp = scratch.exp_1;
      g.exp_role = distills ? g.exp_role : Role::kNone;
      return g;
    }
    if (!is_kl()) {
      g.on_exp = -weight * means[is_m ? 0 : 1] / mine;
      g.on_w = weight;
      return g;
    }
    const bool is_decoupled = decoupled();
    const double part = is_decoupled ? weight * call.args[1] : weight;
    const double rest = sums.m > 0 && sums.o > 0 ? kl() : 0;
    if (sums.m > 0 && sums.o > 0 && part != 0) {
      if (!is_m) {
        g.w = scratch.exp[0];
        g.w_role = Role::kM;
        g.on_exp = part / sums.o;
        g.on_w = -part / sums.m;
      } else if (rest < __builtin_huge_val()) {  // an infinite value has no direction: 0
        g.w_role = Role::kM;
        g.on_exp = -part * (sums.cross / sums.m * inv_t) / sums.m;
        g.on_delta = g.on_w = part * inv_t / sums.m;
      }
    }
    if (is_decoupled) {
      const double slope = row.kd_weight * target_slope[side];
      if (mine > 0) g.on_exp -= slope / mine;
      g.has_label = true;
      g.of_label = slope;
    }
    return g;
  }

  DistillResult run() {
    DistillResult result{0, {1, 1}, {0, 0, 0, 0, 0}};
    const int64_t columns = call.columns;
    if (row.labelled && (row.label < 0 || row.label >= columns)) broken = true;
    if (!broken && call.standardize) read_standardized();
    if (!broken) {
      for (int64_t begin = 0; begin < columns && !broken; begin += kDistillBlock) {
        block(begin, columns - begin < kDistillBlock ? columns - begin : kDistillBlock);
      }
    }
    const auto is_empty = [](double max) { return max == neg_inf<double>(); };
    if (!broken) {
      // A side that is -inf throughout. Decoupled leaves the label out of the pair.
      broken = distills ? (is_empty(refs.m) && !(decoupled() && x_label[m] > neg_inf<double>())) ||
                              (is_empty(refs.o) && !(decoupled() && x_label[o] > neg_inf<double>()))
                        : is_empty(refs.hot);
    }
    if (broken) {
      result.loss = quiet_nan();
      for (double& x : result.stats) x = quiet_nan();
      for (int side = 0; side < 2; ++side) {
        if (row.grad[side]) fill_grad<F>(call, row, side, F(quiet_nan()));
      }
      return result;
    }

    if (distills) {
      if (call.divergence == Divergence::kJsd) {
        terms_wanted<true>();
      } else if (call.divergence == Divergence::kTvd) {
        terms_wanted<false>();
      } else if (decoupled()) {
        decouple();
      } else {
        value = kl();
      }
      if (row.kd_weight != 0) result.loss = row.kd_weight * value;
    }
    HotGrad<F> label_grad;
    if (wants_label) {
      const double sum = hot ? label_sums.exp : m == kStudent ? sums.m : sums.o;
      const double ref = reference(hot ? refs.hot : m == kStudent ? refs.m : refs.o);
      const double log_sum = log(sum), plain = log_sum - (z_label - ref), smoothing = call.label_smoothing;
      result.stats[1] = plain;
      if (row.label_weight != 0) {
        // 0 * inf = 0, at both ends of label_smoothing.
        double ce = smoothing != 1 ? (1 - smoothing) * plain : 0;
        if (smoothing != 0) ce += smoothing * (log_sum - label_sums.shift / double(columns));
        result.loss += row.label_weight * ce;
        label_grad = {power ? student_exp()
                      : hot ? scratch.exp_1
                            : nullptr,
                      power, row.label_weight / sum, -row.label_weight * smoothing / double(columns),
                      row.label_weight * (1 - smoothing)};
      }
    }
    if (call.want_stats) {
      for (int side = 0; side < sides(); ++side) input.ready[side] = input.transformed(side);
      const double tops[2] = {stat_top(kStudent), distills ? stat_top(kTeacher) : 0};
      distill_stats(input, tops, inv_t, first, result.stats);
    }
    for (int side = 0; side < 2; ++side) {
      if (!row.grad[side]) continue;
      if (side == kTeacher && !distills) {
        fill_grad<F>(call, row, side, F(0));
        continue;
      }
      const DistillGrad<F> grad = grad_of(side);
      const HotGrad<F> hot_grad = side == kStudent ? label_grad : HotGrad<F>{};
      const DistillStore<F> store{call, row, scratch, refs, inv_t, side, grad, hot_grad};
      result.grad_scale[side] = store.run(call.standardize ? &standard[side] : nullptr);
    }
    return result;
  }

  // A side's largest x, the label's among them.
  double stat_top(int side) const {
    const double top = side == m ? refs.m : refs.o;
    if (!distills) return refs.hot;
    return decoupled() && x_label[side] > top ? x_label[side] : top;
  }
};

template <class F>
DistillResult distill_row(const DistillCall& call, const DistillRow& row, void* scratch) {
  return DistillRun<F>(call, row, scratch).run();
}

}  // namespace
}  // namespace ft::FT_ISA
