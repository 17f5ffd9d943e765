// Temperature-softmax distillation of one row, with an optional label term.
//
//   loss = kd_weight * D(q || p) + label_weight * CE(label, softmax(s)),   p = softmax(s/T), q = softmax(t/T)
//   grad_v = kd_weight/T * (p_v - q_v) + label_weight * (softmax(s)_v - (1-e) [v == label] - e/V)   for ForwardKL,
//   e = label_smoothing
//
// Passes over memory: one. Columns are taken in blocks that fit the L1 cache; per block
//   1. sweep (kd_sweep.h): exponentials relative to the maxima so far, their sums, exponentials kept in scratch (L2);
// and when the row's statistic is known
//   2. grad (kd_grad.h): two or three multiplications per logit on the kept exponentials, one store.
// Bytes per logit: read s, read t, write grad = 12 (fp32), 6 (16 bit); 8 and 4 without a gradient.
//
// Why exponentials are kept: an exponential is ~10 vector operations, a scratch store and load are 2, and L2 holds
// the scratch of a 32k row beside the row itself.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/divergence.h"
#include "core/row_stat.h"
#include "cpu/kd_grad.h"
#include "cpu/kd_sweep.h"
#include "cpu/kernels.h"

namespace ft::FT_ISA {
namespace {

// The first reference of a row is the largest of so many logits. A block's maximum may be above the reference by a
// factor of 2^kHeadroom in its exponentials: far from where they would overflow in fp32.
constexpr int64_t kSample = 128;
constexpr double kHeadroom = 30;

// Where the sweep fetches for this block: rows lie one after the other more often than not, so that past the last
// block the next row begins.
FT_HD Fetch fetch_for(const KdCall& call, const KdRow& row, int64_t begin, const void* scratch) {
  const auto lines = [](const void* row, DType dtype, int64_t stride, int64_t column) __attribute__((always_inline)) {
    const int64_t step = stride * with_dtype(dtype, [](auto tag) { return int64_t(sizeof tag); });
    return Lines{static_cast<const char*>(row) + column * step, step};
  };
  return {lines(row.student, call.student, call.student_stride, begin + kKdBlock),
          lines(row.teacher, call.teacher, call.teacher_stride, begin + kKdBlock),
          // What is stored around the cache must not be in it. Some line that is there costs nothing.
          call.stream ? Lines{static_cast<const char*>(scratch), 0}
                      : lines(row.grad, call.grad, call.grad_stride, begin)};
}

// A row while it is swept.
template <class F, class Policy, bool kTeacher, bool kHot, bool kSave>
struct RowSweep {
  const KdCall& call;
  const KdRow& row;
  const KdScratch<F>& scratch;
  double inv_t;
  SweepCall<F> args;
  double most;   // how far a maximum may be above its reference
  bool careful;  // see sweep
  F ref_s = neg_inf<F>(), ref_t = neg_inf<F>();
  RowStat<double> stat = empty_stat<double>();

  // Columns [begin, begin + n), at s and t. False: to be staged, since there is no careful sweep of S.
  template <class S>
  __attribute__((noinline)) bool block(const S* s, const S* t, int64_t begin, int64_t n) {
    if (begin == 0) {
      const int64_t sample = n < kSample ? n : kSample;
      ref_s = largest<F, S>(s, sample);
      if constexpr (kTeacher) ref_t = largest<F, S>(t, sample);
    }
    args.fetch = fetch_for(call, row, begin, scratch.exp_s);
    Block<F> block;
    for (;;) {
      args.ref_s = reference(ref_s);
      args.ref_t = reference(ref_t);
      F* const exp_s = scratch.exp_s + begin;
      F* const exp_t = scratch.exp_t + begin;
      F* const exp_1 = scratch.exp_1 + begin;
      if constexpr (__is_same(F, S)) {
        block = careful ? sweep_carefully<F, Policy, kTeacher, kHot, kSave>(s, t, n, args, exp_s, exp_t, exp_1)
                        : sweep<F, S, Policy, kTeacher, kHot, kSave, false>(s, t, n, args, exp_s, exp_t, exp_1);
      } else {
        block = sweep<F, S, Policy, kTeacher, kHot, kSave, false>(s, t, n, args, exp_s, exp_t, exp_1);
      }
      const bool far_s = block.max_s - ref_s > most, far_t = block.max_t - ref_t > most;
      if (far_s || far_t) {
        ref_s = far_s ? block.max_s : ref_s;
        ref_t = far_t ? block.max_t : ref_t;
      } else if (!careful && block.stat.cross != block.stat.cross) {
        careful = true;  // and so are the blocks after it
        if (!__is_same(F, S)) return false;
      } else {
        break;
      }
    }
    block.stat.max_s = ref_s;
    block.stat.max_t = ref_t;
    scratch.ref_s[begin / kKdBlock] = ref_s;
    scratch.ref_t[begin / kKdBlock] = ref_t;
    stat = begin == 0 ? block.stat : combine<Policy>(stat, block.stat, inv_t);
    // The running maxima: most blocks then need no rescaling when they are merged.
    ref_s = block.max_s > ref_s ? block.max_s : ref_s;
    ref_t = block.max_t > ref_t ? block.max_t : ref_t;
    return true;
  }

  // A block where it lies. False where it cannot be, or not without care: then it is staged, and nothing has
  // happened.
  FT_HD bool in_place(int64_t begin, int64_t n) {
    if (!kTeacher || call.student != call.teacher || call.student_stride != 1 || call.teacher_stride != 1)
      return false;
    return with_dtype(call.student, [&](auto tag) __attribute__((always_inline)) {
      using S = decltype(tag);
      // fp64 arithmetic on 16-bit logits is rare, and so is care: no sweeps of their own for them.
      if constexpr (__is_same(F, double) != __is_same(S, double)) {
        return false;
      } else {
        if (careful && !__is_same(F, S)) return false;
        return block(static_cast<const S*>(row.student) + begin, static_cast<const S*>(row.teacher) + begin, begin,
                     n);
      }
    });
  }

  FT_HD void staged(int64_t begin, int64_t n) {
    const auto to = [n, begin](F* buffer, const void* from, DType dtype, int64_t stride)
                        __attribute__((always_inline)) {
                          with_dtype(dtype, [&](auto tag) __attribute__((always_inline)) {
                            stage(static_cast<const decltype(tag)*>(from) + begin * stride, stride, n, buffer);
                          });
                        };
    to(scratch.staged_s, row.student, call.student, call.student_stride);
    if constexpr (kTeacher) to(scratch.staged_t, row.teacher, call.teacher, call.teacher_stride);
    block<F>(scratch.staged_s, scratch.staged_t, begin, n);
  }

  FT_HD void run() {
    for (int64_t begin = 0; begin < call.columns; begin += kKdBlock) {
      const int64_t n = call.columns - begin < kKdBlock ? call.columns - begin : kKdBlock;
      if (!in_place(begin, n)) staged(begin, n);
    }
  }
};

template <class F, class Policy, bool kTeacher, bool kHot, bool kSave>
KdRowLoss kd_row_as(const KdCall& call, const KdRow& row, void* memory) {
  const int64_t columns = call.columns;
  const KdScratch<F> scratch(memory, columns);
  // Without a teacher only the label term is left, at T = 1.
  const double inv_t = kTeacher ? row.inv_t : 1.0;
  const int power =
      __is_same(F, float) && (inv_t == 0.5 || inv_t == 1.0 / 3 || inv_t == 0.25) ? int(1 / inv_t + 0.5) : 0;
  RowSweep<F, Policy, kTeacher, kHot, kSave> swept{
      .call = call,
      .row = row,
      .scratch = scratch,
      .inv_t = inv_t,
      .args = {.scale = exp_scale<F>(inv_t), .scale_1 = exp_scale<F>(1.0), .power = power},
      .most = kHeadroom / 1.4426950408889634074 / (kHot && inv_t < 1 ? 1 : inv_t),
      .careful = !kTeacher || (row.label_weight != 0 && call.label_smoothing != 0),  // which needs shift_s
  };
  swept.run();
  RowStat<double>& stat = swept.stat;
  if (!kHot) stat.exp_1 = stat.exp_s;

  const bool labelled = row.label_weight != 0;
  // A NaN or +inf anywhere, a side that is -inf throughout, or a label out of range.
  const bool valid = stat.shift_s == stat.shift_s && stat.exp_s != 0 &&
                     (!kTeacher || (stat.shift_t == stat.shift_t && stat.exp_t != 0)) &&
                     (!labelled || (row.label >= 0 && row.label < columns));
  KdRowLoss loss{0, 0, 1};
  if (!valid) {
    loss.kd = kTeacher ? quiet_nan() : 0;
    loss.ce = labelled ? quiet_nan() : 0;
  } else {
    if (kTeacher) loss.kd = Policy::value(stat, row.inv_t);
    if (labelled) {
      const double s_label = with_dtype(call.student, [&](auto tag) __attribute__((always_inline)) {
        using S = decltype(tag);
        return double(
            load_partial<F, S>(static_cast<const S*>(row.student) + row.label * call.student_stride, 1, S{})[0]);
      });
      const double log_sum = log(stat.exp_1);
      // 0 * inf = 0, at both ends of label_smoothing.
      if (call.label_smoothing != 1)
        loss.ce = (1 - call.label_smoothing) * (log_sum - (s_label - reference(stat.max_s)));
      if (call.label_smoothing != 0) loss.ce += call.label_smoothing * (log_sum - stat.shift_s / double(columns));
    }
  }
  if constexpr (kSave) {
    const double scale_up =
        call.grad == DType::kFloat16 ? half_scale(row.kd_weight * row.inv_t + row.label_weight) : 1;
    write_grad<F, Policy, kTeacher, kHot>(call, row, stat, scratch, valid, scale_up, power);
    if (call.stream) fence();
    loss.grad_scale = 1 / scale_up;
  }
  return loss;
}

template <class F, class Policy, bool kTeacher, bool kHot>
KdRowLoss kd_row_grad(const KdCall& call, const KdRow& row, void* scratch) {
  return row.grad ? kd_row_as<F, Policy, kTeacher, kHot, true>(call, row, scratch)
                  : kd_row_as<F, Policy, kTeacher, kHot, false>(call, row, scratch);
}

template <class F, class Policy>
KdRowLoss kd_row(const KdCall& call, const KdRow& row, void* scratch) {
  if (!row.teacher) return kd_row_grad<F, Policy, false, false>(call, row, scratch);
  if (row.label_weight != 0 && row.inv_t != 1) return kd_row_grad<F, Policy, true, true>(call, row, scratch);
  return kd_row_grad<F, Policy, true, false>(call, row, scratch);
}

// The upstream gradient, applied to a saved gradient: one read, one write.
void kd_scale_row(const KdScale& call, const void* in, void* out, double factor) {
  with_dtype(call.dtype, [&](auto tag) __attribute__((always_inline)) {
    using S = decltype(tag);
    using F = std::conditional_t<__is_same(S, double), double, float>;
    const S* p = static_cast<const S*>(in);
    S* q = static_cast<S*>(out);
    int64_t i = 0;
    if (call.in_stride == 1 && call.out_stride == 1) {
      for (; i + kLanes<F> <= call.columns; i += kLanes<F>) {
        Memory<F, S>::store(q + i, Memory<F, S>::load(p + i) * F(factor));
      }
    }
    for (; i < call.columns; ++i) {
      store_partial<F, S>(q + i * call.out_stride, 1, load_partial<F, S>(p + i * call.in_stride, 1, S{}) * F(factor));
    }
  });
}

}  // namespace
}  // namespace ft::FT_ISA
