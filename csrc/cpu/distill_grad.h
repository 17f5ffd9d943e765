// The gradients of `distill`, from what the sweeps kept: of either side it is, block by block,
//
//   g_v = on_e exp_v + on_w w_v   +   on_1 exp1_v + constant - hit [v == label]   (the label term: the student's
//   only)
//
// and for raw logits  g (1 - (z/cap)^2)  of softcap and  (g - x slope)/scale  of standardization (core/terms.h).
#pragma once

#include "cpu/distill_rows.h"
#include "cpu/kd_grad.h"

namespace ft::FT_ISA {
namespace {

enum class Role { kM, kO, kNone };  // whose reference something is relative to; kNone: final as it is

// The divergence's part, for x.
template <class F>
struct DistillGrad {
  const F* exp;
  const F* w;
  Role exp_role, w_role;
  double on_exp = 0, on_delta = 0, on_w = 0;  // of the row; on_delta times f_delta adds to on_exp
  bool has_label = false;                     // decoupled: this is the label's own logit
  double of_label = 0;
};

// The label term's part, for z.
template <class F>
struct HotGrad {
  const F* exp_1 = nullptr;  // null: exp of the divergence
  double on_1 = 0, constant = 0, hit = 0;
};

template <class F>
struct DistillStore {
  const DistillCall& call;
  const DistillRow& row;
  const DistillScratch<F>& scratch;
  const Refs& last;
  double inv_t;
  int side;
  const DistillGrad<F>& of;
  const HotGrad<F>& hot;

  static double to_last(double from, double to, double inv_t) { return to_row(from, reference(to), inv_t); }
  FT_HD double factor(Role role, const Refs& at) const {
    return role == Role::kM ? to_last(at.m, last.m, inv_t) : role == Role::kO ? to_last(at.o, last.o, inv_t) : 1;
  }

  // Of block k. Without a factor w may be infinite, and is not looked at.
  FT_HD GradFactors<F> factors(int64_t k) const {
    const Refs& at = scratch.refs[k];
    GradFactors<F> f{};
    const double on_e = factor(of.exp_role, at);
    f.on_s = F(on_e * (of.on_exp + (of.on_delta != 0 ? of.on_delta * f_delta(at, last) : 0)));
    f.on_t = F(of.on_w != 0 ? of.on_w * factor(of.w_role, at) : 0);
    return f;
  }
  FT_HD F on_1(int64_t k) const {
    const Refs& at = scratch.refs[k];
    return F(hot.on_1 * (hot.exp_1 ? to_last(at.hot, last.hot, 1.0) : factor(of.exp_role, at)));
  }
  FT_HD double label_part(double kd) const {
    const int64_t y = row.label;
    return kd + double(on_1(y / kDistillBlock)) * (hot.exp_1 ? hot.exp_1 : of.exp)[y] + hot.constant - hot.hit;
  }
  FT_HD double kd_part(int64_t v) const {
    if (of.has_label && v == row.label) return of.of_label;
    const GradFactors<F> f = factors(v / kDistillBlock);
    return double(f.on_s) * of.exp[v] + (f.on_t != 0 ? double(f.on_t) * of.w[v] : 0);
  }

  // One pass: for raw logits that are x, stored in fp32, bf16 or fp64.
  template <class S>
  FT_HD void direct(S* out) const {
    const DistillSide& to = call.side[side];
    for (int64_t begin = 0, k = 0; begin < call.columns; begin += kDistillBlock, ++k) {
      const int64_t n = call.columns - begin < kDistillBlock ? call.columns - begin : kDistillBlock;
      GradFactors<F> f = factors(k);
      const F one = on_1(k);
      f.constant = F(hot.constant);
      const F* const e = of.exp + begin;
      const F* const w = f.on_t == 0 ? e : of.w + begin;
      S* const at = out + begin * to.grad_stride;
      if (hot.exp_1) {
        f.on_1 = one;
        grad_block<F, S, true, true>(f, e, w, hot.exp_1 + begin, n, at, to.grad_stride, to.stream);
      } else {
        f.on_s += one;
        grad_block<F, S, true, false>(f, e, w, e, n, at, to.grad_stride, to.stream);
      }
    }
    if (hot.hit != 0 || of.has_label) {
      // The label's own logit: one rounding of the whole value.
      const int64_t y = row.label;
      fill<F>(out, y, y + 1, to.grad_stride, F(hot.on_1 != 0 ? label_part(kd_part(y)) : kd_part(y)));
    }
  }

  // The gradient in `grad`, with what surrounds the divergence; its largest magnitude.
  __attribute__((noinline)) double in_scratch(const Standard<double>* standard) const {
    constexpr int64_t L = kLanes<F>;
    const DistillSide& to = call.side[side];
    F* const g = scratch.grad;
    const F* const x = scratch.x[side];
    DoubleSum<F> along;
    const auto each = [&](auto&& body) __attribute__((always_inline)) {
      for (int64_t i = 0; i < call.columns; i += L) body(i);
    };
    for (int64_t begin = 0, k = 0; begin < call.columns; begin += kDistillBlock, ++k) {
      const int64_t end = call.columns - begin < kDistillBlock ? call.columns : begin + kDistillBlock;
      const GradFactors<F> f = factors(k);
      const F* const w = f.on_t == 0 ? of.exp : of.w;
      for (int64_t i = begin; i < end; i += L) {
        Memory<F, F>::store(g + i, Memory<F, F>::load(of.exp + i) * f.on_s + Memory<F, F>::load(w + i) * f.on_t);
      }
    }
    for (int64_t i = call.columns; i % L; ++i) g[i] = 0;
    if (of.has_label) g[row.label] = F(of.of_label);
    if (standard) {
      each([&](int64_t i) __attribute__((always_inline)) {
        const Vec<F> v = Memory<F, F>::load(x + i), gv = Memory<F, F>::load(g + i);
        along.add(gv == F(0) ? Vec<F>{} : gv * v);
      });
      const F slope = F(standard_slope(*standard, along.total())), inv_scale = F(1 / standard->scale);
      each([&](int64_t i) __attribute__((always_inline)) {
        const Vec<F> v = Memory<F, F>::load(x + i);
        Memory<F, F>::store(g + i,
                            v == neg_inf<F>() ? Vec<F>{} : (Memory<F, F>::load(g + i) - v * slope) * inv_scale);
      });
    }
    if (hot.on_1 != 0) {
      const double kd = hot.hit != 0 ? g[row.label] : 0;
      for (int64_t begin = 0, k = 0; begin < call.columns; begin += kDistillBlock, ++k) {
        const int64_t end = call.columns - begin < kDistillBlock ? call.columns : begin + kDistillBlock;
        const F* const e = hot.exp_1 ? hot.exp_1 : of.exp;
        const F one = on_1(k), constant = F(hot.constant);
        for (int64_t i = begin; i < end; i += L) {
          Memory<F, F>::store(g + i, Memory<F, F>::load(g + i) + (Memory<F, F>::load(e + i) * one + constant));
        }
      }
      if (hot.hit != 0) g[row.label] = F(label_part(kd));
    }
    if (to.softcap != 0) {
      const F inv_cap = F(1 / to.softcap);
      const F scale = standard ? F(standard->scale) : F(1), mean = standard ? F(standard->mean) : F(0);
      each([&](int64_t i) __attribute__((always_inline)) {
        const Vec<F> v = Memory<F, F>::load(x + i), z = standard ? v * scale + mean : v;
        Memory<F, F>::store(g + i,
                            v == neg_inf<F>() ? Vec<F>{} : Memory<F, F>::load(g + i) * softcap_slope(z, inv_cap));
      });
    }
    for (int64_t i = call.columns; i % L; ++i) g[i] = 0;
    Vec<F> most{};
    each([&](int64_t i) __attribute__((always_inline)) { most = vmax(vabs<F>(Memory<F, F>::load(g + i)), most); });
    return horizontal_max<F>(most);
  }

  // The stored gradient times the result is the gradient.
  double run(const Standard<double>* standard) const {
    const DistillSide& to = call.side[side];
    const bool is_half = to.dtype == DType::kFloat16;
    const bool in_one_pass = !is_half && !standard && to.softcap == 0;
    double scale = 1;
    if (!in_one_pass) {
      const double most = in_scratch(standard);
      if (is_half) scale = half_scale(most);
    }
    with_dtype(to.dtype, [&](auto tag) __attribute__((always_inline)) {
      using S = decltype(tag);
      S* const out = static_cast<S*>(row.grad[side]);
      if (in_one_pass) {
        if constexpr (!__is_same(S, Half)) direct(out);
      } else {
        const GradFactors<F> f{F(scale), F(0), F(0), F(0), 0};
        grad_block<F, S, false, false>(f, scratch.grad, scratch.grad, scratch.grad, call.columns, out, to.grad_stride,
                                       to.stream);
      }
      fill<F>(out, call.columns, to.grad_columns, to.grad_stride, F(0));
    });
    if (to.stream) fence();
    return 1 / scale;
  }
};

// A gradient of NaN, or of zeros.
template <class F>
FT_HD void fill_grad(const DistillCall& call, const DistillRow& row, int side, F value) {
  const DistillSide& to = call.side[side];
  with_dtype(to.dtype, [&](auto tag) __attribute__((always_inline)) {
    auto* const out = static_cast<decltype(tag)*>(row.grad[side]);
    fill<F>(out, 0, call.columns, to.grad_stride, value);
    fill<F>(out, call.columns, to.grad_columns, to.grad_stride, F(0));
  });
}

}  // namespace
}  // namespace ft::FT_ISA
