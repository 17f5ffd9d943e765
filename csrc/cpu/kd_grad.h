// The gradient of distillation, from what the sweep kept on chip: two or three multiplications per logit, one store.
#pragma once

#include "cpu/kd_sweep.h"
#include "cpu/kernels.h"

namespace ft::FT_ISA {
namespace {

// grad_v = on_s exp_s + on_t exp_t + on_1 exp_1 + constant, for one block.
template <class F>
struct GradFactors {
  F on_s, on_t, on_1, constant;
  int power;  // exp_1 is this power of exp_s; 0: it was kept
};

template <class F, bool kTeacher, bool kHot>
FT_HD Vec<F> grad_vector(const GradFactors<F>& f, const F* exp_s, const F* exp_t, const F* exp_1) {
  Vec<F> g = Memory<F, F>::load(exp_s) * f.on_s + f.constant;
  if constexpr (kTeacher) g += Memory<F, F>::load(exp_t) * f.on_t;
  if constexpr (kHot)
    g += (f.power ? raised<F>(Memory<F, F>::load(exp_s), f.power) : Memory<F, F>::load(exp_1)) * f.on_1;
  return g;
}

template <class F, class S, bool kTeacher, bool kHot>
FT_HD void grad_block(const GradFactors<F>& f, const F* exp_s, const F* exp_t, const F* exp_1, int64_t n, S* out,
                      int64_t stride, bool streaming) {
  constexpr int L = kLanes<F>;
  const auto value = [&](int64_t i) __attribute__((always_inline)) {
    return grad_vector<F, kTeacher, kHot>(f, exp_s + i, exp_t + i, exp_1 + i);
  };
  if (stride != 1) {
    S line[L];
    for (int64_t i = 0; i < n; i += L) {
      Memory<F, S>::store(line, value(i));
      for (int64_t j = 0; j < L && i + j < n; ++j) out[(i + j) * stride] = line[j];
    }
    return;
  }
  int64_t i = 0;
  if constexpr (__is_same(F, float) && sizeof(S) <= sizeof(float)) {
    constexpr int64_t W = kVectorBytes / int64_t(sizeof(S));  // one vector of fp32, two of 16 bit
    if (streaming && n >= W) {
      for (; i < W; i += L) Memory<F, S>::store(out + i, value(i));
      i = (-reinterpret_cast<intptr_t>(out) & (kVectorBytes - 1)) / int64_t(sizeof(S));
      for (; i + W <= n; i += W) {
        if constexpr (__is_same(S, float)) {
          stream(out + i, value(i));
        } else {
          stream(out + i, value(i), value(i + L));
        }
      }
    }
  }
  for (; i + L <= n; i += L) Memory<F, S>::store(out + i, value(i));
  if (i < n && n >= L) {
    Memory<F, S>::store(out + n - L, value(n - L));  // some of it again, the same
  } else if (i < n) {
    store_partial<F, S>(out, n, value(0));
  }
}

FT_HD double quiet_nan() { return __builtin_nan(""); }

template <class F, class S>
FT_HD void fill(S* out, int64_t begin, int64_t end, int64_t stride, F value) {
  S line[kLanes<F>];
  Memory<F, S>::store(line, splat<F>(value));
  for (int64_t i = begin; i < end; ++i) out[i * stride] = line[0];
}

// The power of two that brings a gradient of at most `bound` near the top of fp16. Without it a mean over 8192 rows
// of 128k logits is all zeros in fp16: the loss scale of a GradScaler arrives only in backward.
FT_HD double half_scale(double bound) {
  bound = fabs(bound);  // the weight of a row may be negative
  int exponent = 0;
  if (!(bound > 0 && bound < 1e300)) return 1;
  frexp(bound, &exponent);
  const int k = 14 - exponent;
  return ldexp(1.0, k > 100 ? 100 : k < -100 ? -100 : k);
}

// What a block's exponentials are multiplied by to be relative to the row's maximum; a block without a finite element
// so far has none, and no reference to speak of.
FT_HD double to_row(double block_max, double row_ref, double inv_t) {
  return block_max == neg_inf<double>() ? 0 : rescale(block_max, row_ref, inv_t);
}

template <class F, class Policy, bool kTeacher, bool kHot>
FT_HD void write_grad(const KdCall& call, const KdRow& row, const RowStat<double>& stat, const KdScratch<F>& scratch,
                      bool valid, double scale, int power) {
  const int64_t columns = call.columns;
  const double smoothing = row.label_weight != 0 ? call.label_smoothing : 0;
  typename Policy::template Grad<double> kd{0, 0};
  if constexpr (kTeacher) kd = Policy::grad(stat, row.inv_t);
  const double on_s = kd.on_s * row.kd_weight * scale, on_t = kd.on_t * row.kd_weight * scale;
  const double on_1 = row.label_weight * scale / stat.exp_1;
  const double constant = -row.label_weight * scale * smoothing / double(columns);
  const double ref_s = reference(stat.max_s), ref_t = reference(stat.max_t);

  with_dtype(call.grad, [&](auto tag) __attribute__((always_inline)) {
    using S = decltype(tag);
    S* grad = static_cast<S*>(row.grad);
    if (!valid) {
      fill<F>(grad, 0, columns, call.grad_stride, F(quiet_nan()));
    } else {
      for (int64_t begin = 0, k = 0; begin < columns; begin += kKdBlock, ++k) {
        const int64_t n = columns - begin < kKdBlock ? columns - begin : kKdBlock;
        // Without a separate exp_1 the student's exponentials are the label term's as well (T = 1).
        const double to_s = to_row(scratch.ref_s[k], ref_s, kTeacher ? row.inv_t : 1.0);
        const double to_1 = kHot ? to_row(scratch.ref_s[k], ref_s, 1.0) : 0;
        const double to_t = kTeacher ? to_row(scratch.ref_t[k], ref_t, row.inv_t) : 0;
        const GradFactors<F> f{F((on_s + (kHot ? 0 : on_1)) * to_s), F(on_t * to_t), F(on_1 * to_1), F(constant),
                               power};
        grad_block<F, S, kTeacher, kHot>(f, scratch.exp_s + begin, scratch.exp_t + begin, scratch.exp_1 + begin, n,
                                         grad + begin * call.grad_stride, call.grad_stride, call.stream);
      }
      if (row.label_weight != 0) {
        // The label's own logit: one rounding of the whole value, not a correction of a rounded one.
        const int64_t y = row.label, k = y / kKdBlock;
        const double to_s = to_row(scratch.ref_s[k], ref_s, kTeacher ? row.inv_t : 1.0);
        const double es = scratch.exp_s[y] * to_s;
        double g = on_s * es + constant - row.label_weight * scale * (1 - smoothing);
        const double e1 = kHot && power ? raised<F>(splat(scratch.exp_s[y]), power)[0] : scratch.exp_1[y];
        g += on_1 * (kHot ? e1 * to_row(scratch.ref_s[k], ref_s, 1.0) : es);
        if constexpr (kTeacher) g += on_t * scratch.exp_t[y] * to_row(scratch.ref_t[k], ref_t, row.inv_t);
        fill<F>(grad, y, y + 1, call.grad_stride, F(g));
      }
    }
    fill<F>(grad, columns, call.grad_columns, call.grad_stride, F(0));
  });
}

}  // namespace
}  // namespace ft::FT_ISA
