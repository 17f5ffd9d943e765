// The gradients of a row, from its constants (distill_finish.cuh): for x, through standardization to z, the label
// term added there, through the softcap to the logits.
#pragma once

#include "cuda/distill_finish.cuh"

namespace ft::distill {

template <class A>
struct GradPair {
  A s, t;
};

// How gradients are computed: which are wanted, and a row's constants, in registers as far as they are used.
template <class A>
struct GradContext {
  Side<A> s, t;
  RowConstants<A> row;
  GradConstants<A> grad;
  bool standardize, want_s, want_t;
  A beta;
  FT_DEVICE GradContext(const DistillCall& call, const DistillShared<A>& block)
      : s(block.s),
        t(block.t),
        row(block.constants),
        grad(block.grad),
        standardize(call.standardize),
        want_s(call.kd.grad.data),
        want_t(call.teacher_grad.data),
        beta(A(call.args[0])) {}
};

template <class A>
FT_DEVICE A spread(A mass, A f, A at, A mean, A factor) {
  return mass != 0 && factor != 0 ? mass * ((f - at) - mean) * factor : A(0);
}

// For x of one column.
template <class A, Divergence D>
FT_DEVICE GradPair<A> for_x(const GradContext<A>& c, int64_t column, A zs, A zt) {
  const GradConstants<A>& g = c.grad;
  if (!c.row.pair) return {0, 0};
  if (kWithoutLabel<D> && column == c.row.column) return {g.label_s, g.label_t};
  const A ds = c.s.below(zs), dt = c.t.below(zt);
  const A es = exp_of(ds, c.row.c), et = exp_of(dt, c.row.c);
  if constexpr (D == Divergence::kReverseKL) {
    return {spread(es, ds - dt, c.row.at, g.mean_s, g.mass_s), et * g.on_b - es * g.on_a};
  } else if constexpr (kIsKl<D>) {
    A of_t = spread(et, dt - ds, c.row.at, g.mean_t, g.mass_t);
    if constexpr (kWithoutLabel<D>) of_t -= et * g.spread;
    return {es * g.on_b - et * g.on_a, of_t};
  } else {
    const DistillTerms<A> f =
        terms_of<A, D>(log_ratio_of(ds, dt, c.row.inv_t, g.log_ratio), es * g.p, et * g.q, c.beta);
    return {spread(es, f.of_s, g.at_s, g.mean_s, g.mass_s), spread(et, f.of_t, g.at_t, g.mean_t, g.mass_t)};
  }
}

template <class A>
FT_DEVICE A through_standardize(const Side<A>& side, A z, A grad, A slope) {
  return z == neg_inf<A>() ? A(0) : (grad - side.centred(z) * slope) * side.factor;
}

template <class A>
FT_DEVICE A through_softcap(const Side<A>& side, A z, A grad) {
  if (side.cap == 0) return grad;
  return z == neg_inf<A>() ? A(0) : grad * softcap_slope(z, 1 / side.cap);
}

template <class A>
FT_DEVICE A of_label_term(const GradContext<A>& c, int64_t column, A z) {
  const A e = exp_of(z - c.row.top_1, c.row.c_1);
  // The label's own is computed whole: its two parts may nearly cancel.
  if (column == c.row.column) return A(double(e) * c.grad.label_on_1 + c.grad.label_constant);
  return e * c.grad.on_1 + c.grad.constant;
}

// For the logits of one column.
template <class A, Divergence D>
FT_DEVICE GradPair<A> for_logits(const GradContext<A>& c, int64_t column, A zs, A zt) {
  GradPair<A> grad = for_x<A, D>(c, column, zs, zt);
  if (c.standardize) {
    grad.s = through_standardize(c.s, zs, grad.s, c.grad.slope_s);
    grad.t = through_standardize(c.t, zt, grad.t, c.grad.slope_t);
  }
  if (c.grad.label_on_1 != 0) grad.s += of_label_term(c, column, zs);
  return {through_softcap(c.s, zs, grad.s), through_softcap(c.t, zt, grad.t)};
}

// What the gradients for x have along x: core/terms.h.
template <class A, Divergence D>
FT_DEVICE void find_slopes(const DistillCall& call, DistillShared<A>& block) {
  const GradContext<A> c(call, block);
  double along[2] = {};
  sweep(c.s, c.t, call.kd.columns, [&](const Columns& columns, const A(&a)[kColumns], const A(&b)[kColumns]) {
    A part[2] = {};
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const GradPair<A> grad = for_x<A, D>(c, columns.at(k), a[k], b[k]);
      if (a[k] != neg_inf<A>()) part[0] += grad.s * c.s.centred(a[k]);
      if (b[k] != neg_inf<A>()) part[1] += grad.t * c.t.centred(b[k]);
    }
    add_to(along, part);
  });
  total(block, along, block.terms);
  if (thread() == 0) {
    block.grad.slope_s = A(standard_slope(block.standard_s, block.terms[0]));
    block.grad.slope_t = A(standard_slope(block.standard_t, block.terms[1]));
  }
  barrier();
}

template <class A>
FT_DEVICE A power_for(float* scales, int64_t i, A most) {
  const int up = scales ? half_exponent(double(float(most))) : 0;
  if (scales) store(scales + i, float(power_of_two(-up)));
  return A(power_of_two(up));
}

// The powers of two of fp16 gradients, from the greatest of each row.
template <class A, Divergence D>
FT_DEVICE void find_powers(const DistillCall& call, int64_t i, DistillShared<A>& block) {
  const GradContext<A> c(call, block);
  A most_s = 0, most_t = 0;
  sweep(c.s, c.t, call.kd.columns, [&](const Columns& columns, const A(&a)[kColumns], const A(&b)[kColumns]) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      if (!columns.has(k)) continue;
      const GradPair<A> grad = for_logits<A, D>(c, columns.at(k), a[k], b[k]);
      most_s = greatest(most_s, absolute(grad.s));
      most_t = greatest(most_t, absolute(grad.t));
    }
  });
  for (int l = kWarp / 2; l > 0; l /= 2) {
    most_s = greatest(most_s, shuffle_xor(kAllLanes, most_s, l));
    most_t = greatest(most_t, shuffle_xor(kAllLanes, most_t, l));
  }
  if (lane() == 0) {
    block.tops_s[warp()].value = most_s;
    block.tops_t[warp()].value = most_t;
  }
  barrier();
  if (thread() == 0) {
    for (int w = 1; w < threads() / kWarp; ++w) {
      most_s = greatest(most_s, block.tops_s[w].value);
      most_t = greatest(most_t, block.tops_t[w].value);
    }
    block.grad.up_s = power_for(call.kd.grad_scales, i, most_s);
    block.grad.up_t = power_for(call.teacher_scales, i, most_t);
  }
  barrier();
}

// A column's logits are read before its gradients are written, by the same thread: in place it is the same memory.
template <class A, Divergence D>
FT_DEVICE void write_gradients(const DistillCall& call, int64_t i, const DistillShared<A>& block) {
  const GradContext<A> c(call, block);
  void* const grad_s = c.want_s ? call.kd.grad.row<char>(i) : nullptr;
  void* const grad_t = c.want_t ? call.teacher_grad.row<char>(i) : nullptr;
  sweep(c.s, c.t, call.kd.columns, [&](const Columns& columns, const A(&a)[kColumns], const A(&b)[kColumns]) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const int64_t v = columns.at(k);
      if (!columns.has(k)) continue;
      const GradPair<A> grad = for_logits<A, D>(c, v, a[k], b[k]);
      if (grad_s) put_element(call.kd.grad.dtype, grad_s, v * call.kd.grad.column_stride, grad.s * c.grad.up_s);
      if (grad_t)
        put_element(call.teacher_grad.dtype, grad_t, v * call.teacher_grad.column_stride, grad.t * c.grad.up_t);
    }
  });
}

template <class A>
FT_DEVICE void fill(const View& view, int64_t i, int64_t begin, int64_t end, A value) {
  if (!view.data) return;
  for (int64_t v = begin + thread(); v < end; v += threads()) {
    put_element(view.dtype, view.row<char>(i), v * view.column_stride, value);
  }
}

// Of both gradients: the columns that count, and those beside them.
template <class A>
FT_DEVICE void fill_gradients(const DistillCall& call, int64_t i, A value) {
  fill(call.kd.grad, i, 0, call.kd.columns, value);
  fill(call.teacher_grad, i, 0, call.kd.columns, value);
}
template <class A>
FT_DEVICE void fill_padding(const DistillCall& call, int64_t i) {
  fill(call.kd.grad, i, call.kd.columns, call.kd.grad_columns, A(0));
  fill(call.teacher_grad, i, call.kd.columns, call.teacher_columns, A(0));
}

}  // namespace ft::distill
