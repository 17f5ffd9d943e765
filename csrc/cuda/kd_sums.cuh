// The statistic of core/row_stat.h over a few columns, in registers.
//
// exp((s - max)/T) = 2^((s - max) c), c = log2(e)/T: the difference first, then one multiplication and the
// special-function unit, which is off by up to 2 units in the last place. That is enough for p and q, and not for
// `gap` where student and teacher nearly agree: there the loss is of second order in x = ((s - max_s) - (t -
// max_t))/T, and what is left of two exponentials that are off independently is noise. So where |x| is small
//
//   exp_s - exp_t = exp_t (e^x - 1),   e^x - 1 = x r(x), r a polynomial
//
// with the same exp_t that weighs `cross`: the loss is then that of a teacher whose masses are off by 2 units, which
// changes it by a relative 1e-7, however small it is.
//
// Instructions per pair of logits: 15 where rows differ and 21 where they nearly agree, 2 of them of the
// special-function unit; a vector that holds -inf, NaN or huge values is done again, element by element with checks.
#pragma once

#include "core/divergence.h"
#include "core/row_stat.h"
#include "cuda/kd_call.cuh"
#include "cuda/kd_vectors.cuh"

namespace ft::distill {

using Policy = ForwardKL;

template <class A>
struct Sums {
  A exp_s, exp_t, exp_1, gap, cross, shift_s;
  FT_DEVICE void add(const Sums& o) {
    exp_s += o.exp_s;
    exp_t += o.exp_t;
    exp_1 += o.exp_1;
    gap += o.gap;
    cross += o.cross;
    shift_s += o.shift_s;
  }
};

// How a row is computed: which terms it has, and the constants of its exponentials.
template <class A>
struct RowMath {
  bool teacher;  // there is a distillation term
  bool hot;      // the label term needs exponentials at T = 1 beside those at T
  bool smooth;   // label smoothing needs shift_s
  int power;     // exp_1 is this power of exp_s; 0: an exponential of its own
  A c, c_1;      // exp_of's scale at T and at 1
  A minus_inv_t;
};

FT_DEVICE float exp_of(float x, float c) { return exp2_fast(x * c); }
FT_DEVICE double exp_of(double x, double inv_t) { return exp(x * inv_t); }

// Without a distillation term only the label term is left, at T = 1.
FT_DEVICE double inv_t_of(const KdRow& row) { return row.kd_weight != 0 ? row.inv_t : 1.0; }

template <class A>
FT_DEVICE RowMath<A> row_math(const KdCall& call, const KdRow& row) {
  const double inv_t = inv_t_of(row), log2_e = 1.4426950408889634;
  const bool labelled = row.label_weight != 0;
  RowMath<A> m;
  m.teacher = row.kd_weight != 0;
  m.hot = m.teacher && labelled && inv_t != 1;
  m.smooth = labelled && call.smoothing != 0;
  m.power = 0;
  if constexpr (sizeof(A) == 4) {
    m.power = inv_t == 0.5 ? 2 : inv_t == 1.0 / 3 ? 3 : inv_t == 0.25 ? 4 : 0;
    m.c = A(inv_t * log2_e);
    m.c_1 = A(log2_e);
  } else {
    m.c = inv_t;
    m.c_1 = 1;
  }
  m.minus_inv_t = A(-inv_t);
  return m;
}

// What differences are taken from: the maxima, or 0 where that is -inf.
template <class A>
struct Refs {
  A s, t;
};

// exp(x) from e = exp(x/T) for the temperatures that people use: off by T units more, within the label term's bound.
template <class A>
FT_DEVICE A raised(A e, int power) {
  const A square = e * e;
  return power == 2 ? square : power == 3 ? square * e : square * square;
}
template <class A>
FT_DEVICE A exp_1_of(const RowMath<A>& m, A ds, A es) {
  return m.power ? raised(es, m.power) : exp_of(ds, m.c_1);
}

inline constexpr float kSmall = 0.5f;
// (e^x - 1)/x for |x| <= kSmall, off by 2e-7.
FT_DEVICE float expm1_ratio(float x) {
  float r = 0x1.6f3c5cp-10f;
  r = fused(r, x, 0x1.1356bap-7f);
  r = fused(r, x, 0x1.5551d4p-5f);
  r = fused(r, x, 0x1.555284p-3f);
  r = fused(r, x, 0x1.000002p-1f);
  return fused(r, x, 1.0f);
}

template <int N>
FT_DEVICE float sum_of(const float (&x)[N]) {
  float y[N];
#pragma unroll
  for (int k = 0; k < N; ++k) y[k] = x[k];
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2) {
#pragma unroll
    for (int k = 0; k < half; ++k) y[k] += y[k + half];
  }
  return y[0];
}

// Every element is looked at: what has no mass counts nothing, and NaN stays NaN. counted(k): whether it is a column.
template <class A, int N, class Counted>
FT_DEVICE Sums<A> sum_carefully(const RowMath<A>& m, const Refs<A>& ref, const A (&s)[N], const A (&t)[N],
                                Counted counted, A (&es)[N], A (&et)[N]) {
  Sums<A> sum = {};
#pragma unroll
  for (int k = 0; k < N; ++k) {
    es[k] = et[k] = 0;
    if (!counted(k)) continue;
    const A ds = s[k] - ref.s;
    es[k] = exp_of(ds, m.c);
    sum.exp_s += es[k];
    if (m.smooth) sum.shift_s += ds;
    if (m.hot) sum.exp_1 += exp_1_of(m, ds, es[k]);
    if (!m.teacher) continue;
    const A dt = t[k] - ref.t;
    et[k] = exp_of(dt, m.c);
    sum.exp_t += et[k];
    const A weight = Policy::weight(es[k], et[k]);
    const A difference = dt - ds;
    if (weight != 0) sum.cross = fused(weight, difference, sum.cross);
    if constexpr (sizeof(A) == 4) {
      const A x = difference * m.minus_inv_t;
      if (et[k] != 0 && x >= -kSmall && x <= kSmall) {
        sum.gap = fused(et[k] * x, expm1_ratio(x), sum.gap);
        continue;
      }
    }
    sum.gap += es[k] - et[k];
  }
  return sum;
}

// The same of columns that all count. False where a value asks for care: the sums are then not to be used.
template <int N>
FT_DEVICE bool sum_quickly(const RowMath<float>& m, const Refs<float>& ref, const float (&s)[N], const float (&t)[N],
                           float (&es)[N], float (&et)[N], Sums<float>& sum) {
  float ds[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    ds[k] = s[k] - ref.s;
    es[k] = exp_of(ds[k], m.c);
  }
  sum.exp_s = sum_of(es);
  if (m.hot) {
    float e1[N];
#pragma unroll
    for (int k = 0; k < N; ++k) e1[k] = exp_1_of(m, ds[k], es[k]);
    sum.exp_1 = sum_of(e1);
  }
  if (m.smooth) sum.shift_s = sum_of(ds);
  if (!m.teacher) return true;
  float squares = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float dt = t[k] - ref.t;
    et[k] = exp_of(dt, m.c);
    ds[k] = dt - ds[k];
    sum.cross = fused(Policy::weight(es[k], et[k]), ds[k], sum.cross);
    ds[k] *= m.minus_inv_t;
    squares = fused(ds[k], ds[k], squares);
  }
  sum.exp_t = sum_of(et);
  if (squares <= kSmall * kSmall) {
#pragma unroll
    for (int k = 0; k < N; ++k) sum.gap = fused(et[k] * ds[k], expm1_ratio(ds[k]), sum.gap);
  } else {
    sum.gap = sum.exp_s - sum.exp_t;
  }
  return squares < 1e30f;  // neither infinite, nor a difference of two infinities
}

// A vector of columns and their exponentials, with care if asked or needed.
template <int N, class Counted>
FT_DEVICE Sums<float> sum_vector(const RowMath<float>& m, const Refs<float>& ref, const float (&s)[N],
                                 const float (&t)[N], bool care, Counted counted, float (&es)[N], float (&et)[N]) {
  Sums<float> sum = {};
  if (!care) care = !sum_quickly(m, ref, s, t, es, et, sum);
  if (care) sum = sum_carefully(m, ref, s, t, counted, es, et);
  return sum;
}

}  // namespace ft::distill
