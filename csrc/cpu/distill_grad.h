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
  int power = 0;             // exp_1 is kept as exp(x/T), which is to be raised; 0: as it is
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
    return kd + double(on_1(y / kDistillBlock)) * hot_exp(y)[0] + hot.constant - hot.hit;
  }
  // Of columns i to i + L.
  FT_HD Vec<F> hot_exp(int64_t i) const {
    const Vec<F> e = Memory<F, F>::load((hot.exp_1 ? hot.exp_1 : of.exp) + i);
    return hot.power ? raised<F>(e, hot.power) : e;
  }
  FT_HD double kd_part(int64_t v) const {
    if (of.has_label && v == row.label) return of.of_label;
    const GradFactors<F> f = factors(v / kDistillBlock);
    return double(f.on_s) * of.exp[v] + (f.on_t != 0 ? double(f.on_t) * of.w[v] : 0);
  }

  template <class Fn>
  FT_HD void each_block(Fn&& fn) const {
    for (int64_t begin = 0, k = 0; begin < call.columns; begin += kDistillBlock, ++k) {
      fn(begin, call.columns - begin < kDistillBlock ? call.columns - begin : kDistillBlock, k);
    }
  }

  // One pass: for raw logits that are x, stored in fp32, bf16 or fp64.
  template <class S>
  FT_HD void direct(S* out) const {
    const DistillSide& to = call.side[side];
    each_block([&](int64_t begin, int64_t n, int64_t k) __attribute__((always_inline)) {
      GradFactors<F> f = factors(k);
      const F one = on_1(k);
      f.constant = F(hot.constant);
      const F* const e = of.exp + begin;
      const F* const w = f.on_t == 0 ? e : of.w + begin;
      S* const at = out + begin * to.grad_stride;
      if (hot.exp_1) {
        f.on_1 = one;
        f.power = hot.power;
        grad_block<F, S, true, true>(f, e, w, hot.exp_1 + begin, n, at, to.grad_stride, to.stream);
      } else {
        f.on_s += one;
        grad_block<F, S, true, false>(f, e, w, e, n, at, to.grad_stride, to.stream);
      }
    });
    if (hot.hit != 0 || of.has_label) {
      // The label's own logit: one rounding of the whole value.
      const int64_t y = row.label;
      fill<F>(out, y, y + 1, to.grad_stride, F(hot.on_1 != 0 ? label_part(kd_part(y)) : kd_part(y)));
    }
  }

  FT_HD Vec<F> kd_vector(const GradFactors<F>& f, const F* w, int64_t i) const {
    return Memory<F, F>::load(of.exp + i) * f.on_s + Memory<F, F>::load(w + i) * f.on_t;
  }

  // sum g x over the divergence's part
  __attribute__((noinline)) double along() const {
    DoubleSum<F> total;
    each_block([&](int64_t begin, int64_t n, int64_t k) {
      const GradFactors<F> f = factors(k);
      const F* const w = f.on_t == 0 ? of.exp : of.w;
      Vec<F> sum{};
      over_kept<F>(
          n,
          [&](int64_t i) __attribute__((always_inline)) {
            const Vec<F> g = kd_vector(f, w, begin + i);
            const Vec<F> x = Memory<F, F>::load(scratch.x[side] + begin + i);
            sum += x == neg_inf<F>() ? Vec<F>{} : g * x;  // g is not 0 there where the loss is infinite
          },
          [&]() __attribute__((always_inline)) {
            total.add(sum);
            sum = Vec<F>{};
          });
    });
    double sum = total.total();
    if (of.has_label) {  // whose column holds no part, or one without mass
      const double x = scratch.x[side][row.label];
      sum += x != neg_inf<double>() ? of.of_label * x : 0;
    }
    return sum;
  }

  // The gradient with what surrounds the divergence: stored block by block; of fp16, whose scale is not known
  // yet, into scratch.grad, and the result is its largest magnitude.
  template <bool kStandard, bool kCap>
  __attribute__((noinline)) double around(const Standard<double>* standard) const {
    const bool keep = is_half();
    const DistillSide& to = call.side[side];
    const F* const x = scratch.x[side];
    const F slope = kStandard ? F(standard_slope(*standard, along())) : F(0);
    const F scale = kStandard ? F(standard->scale) : F(1), mean = kStandard ? F(standard->mean) : F(0);
    const F inv_scale = kStandard ? F(1 / standard->scale) : F(1), inv_cap = kCap ? F(1 / to.softcap) : F(0);
    const bool labelled = hot.on_1 != 0;
    const F constant = F(hot.constant);
    Vec<F> most{};
    each_block([&](int64_t begin, int64_t n, int64_t k) __attribute__((always_inline)) {
      const GradFactors<F> f = factors(k);
      const F one = on_1(k);
      const F* const w = f.on_t == 0 ? of.exp : of.w;
      F* const g = keep ? scratch.grad + begin : scratch.staged[0];
      const auto wrapped = [&](Vec<F> v, int64_t i) __attribute__((always_inline)) {
        const Vec<F> at = kStandard || kCap ? Memory<F, F>::load(x + i) : Vec<F>{};
        const auto masked = at == neg_inf<F>();
        if constexpr (kStandard) v = masked ? Vec<F>{} : (v - at * slope) * inv_scale;
        return v;
      };
      const auto capped = [&](Vec<F> v, int64_t i) __attribute__((always_inline)) {
        if constexpr (!kCap) return v;
        const Vec<F> at = Memory<F, F>::load(x + i), z = kStandard ? at * scale + mean : at;
        return at == neg_inf<F>() ? Vec<F>{} : v * softcap_slope(z, inv_cap);
      };
      for (int64_t i = 0; i < n; i += kLanes<F>) {
        Vec<F> v = wrapped(kd_vector(f, w, begin + i), begin + i);
        if (labelled) v += hot_exp(begin + i) * one + constant;
        Memory<F, F>::store(g + i, capped(v, begin + i));
      }
      if ((hot.hit != 0 || of.has_label) && row.label >= begin && row.label < begin + n) {
        // The label's own logit: the whole value, not a correction of a rounded one.
        const int64_t y = row.label;
        const double kd = wrapped(splat(F(kd_part(y))), y)[0];
        g[y - begin] = capped(splat(F(labelled ? label_part(kd) : kd)), y)[0];
      }
      if (keep) {
        for (int64_t i = n; i % kLanes<F>; ++i) g[i] = 0;
        for (int64_t i = 0; i < n; i += kLanes<F>) most = vmax(vabs<F>(Memory<F, F>::load(g + i)), most);
      } else {
        store_block(g, begin, n, F(1));
      }
    });
    return horizontal_max<F>(most);
  }

  FT_HD bool is_half() const { return call.side[side].dtype == DType::kFloat16; }

  __attribute__((noinline)) void store_block(const F* g, int64_t begin, int64_t n, F scale) const {
    const DistillSide& to = call.side[side];
    const GradFactors<F> f{scale, F(0), F(0), F(0), 0};
    with_dtype(to.dtype, [&](auto tag) __attribute__((always_inline)) {
      auto* const out = static_cast<decltype(tag)*>(row.grad[side]) + begin * to.grad_stride;
      grad_block<F, decltype(tag), false, false>(f, g, g, g, n, out, to.grad_stride, to.stream);
    });
  }

  // The stored gradient times the result is the gradient.
  double run(const Standard<double>* standard) const {
    const DistillSide& to = call.side[side];
    const bool cap = to.softcap != 0;
    double most = 0, scale = 1;
    if (standard) {
      most = cap ? around<true, true>(standard) : around<true, false>(standard);
    } else if (cap) {
      most = around<false, true>(standard);
    } else if (is_half()) {
      most = around<false, false>(standard);
    }
    if (is_half()) {
      scale = half_scale(most);
      store_block(scratch.grad, 0, call.columns, F(scale));
    }
    with_dtype(to.dtype, [&](auto tag) __attribute__((always_inline)) {
      using S = decltype(tag);
      S* const out = static_cast<S*>(row.grad[side]);
      if constexpr (!__is_same(S, Half)) {
        if (!standard && !cap) direct(out);
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
