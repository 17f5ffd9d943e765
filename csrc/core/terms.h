// The terms of the divergences beside ForwardKL, and what surrounds one: standardization, softcap, the label's share
// of decoupled distillation. With x = log p (student), y = log q (teacher), and d = x - y, all at temperature T:
//
//   divergence   value                            d/d s_v                      d/d t_v
//   reverse_kl   sum p (x - y)                    p (f - sum p f)/T, f = d     (q - p)/T
//   jsd          sum p from_p + q from_q          f = from_p                   q (f - sum q f)/T, f = from_q
//   tvd          sum |p - q| / 2                  f = sign(p - q)/2            f = sign(q - p)/2
//
// A function over columns takes V, a number (CUDA: one column) or a vector of them (cpu/simd.h); F is the number's
// type. In `mass (f - sum mass f)` the caller takes f from its value where the mass is largest: where nearly all of
// it is in one place the difference is small beside f, and rounding f would be all that is left of it.
#pragma once

#include <cmath>

#include "core/macros.h"

namespace ft {

// Of one column, for D = sum p from_p + q from_q. What has no mass may be infinite: the caller leaves it out.
template <class V>
struct JsdTerms {
  V from_p, from_q;  // (1 - beta) (x - m), beta (y - m)
};

// m = log(beta q + (1 - beta) p) relative to the larger of x and y: exp of what is at most 0, so nothing overflows.
// Math has expm1 and log1p of what is at most 0 (above -1 for log1p); both must be relatively exact, and 0 at 0.
template <class Math, class V, class F>
FT_HD JsdTerms<V> jsd_terms(V d, F beta) {
  const auto above = d >= F(0);  // p >= q
  const V e = Math::expm1(above ? -d : d);
  const V from_larger = -Math::log1p((above ? V{} + beta : V{} + (F(1) - beta)) * e);
  return {(above ? from_larger : from_larger + d) * (F(1) - beta), (above ? from_larger - d : from_larger) * beta};
}

// sign(p - q)/2; 0 where they are the same. p and q are to be rounded products: contracted into p - q they are never.
template <class V, class F>
FT_HD V tvd_slope(V p, V q, F half) {
  return p > q ? V{} + half : (p < q ? V{} - half : V{});
}

// ------------------------------------------------------------------------------------------------ decoupled
// The label's odds a = x_y - log sum_{u != y} exp x_u at temperature T: its probability is sigmoid(a).
template <class F>
FT_HD F label_odds(F label, F ref, F sum_of_others, F inv_t) {
  return (label - ref) * inv_t - log(sum_of_others);
}

template <class F>
FT_HD F sigmoid(F a) {
  return F(1) / (F(1) + exp(-a));
}

template <class F>
FT_HD F log_sigmoid(F a) {
  return a < F(0) ? a - log1p(exp(a)) : -log1p(exp(-a));
}

// KL of (sigmoid(a_t), sigmoid(-a_t)) from that of a_s; no mass times an infinite difference is nothing.
template <class F>
FT_HD F binary_kl(F a_t, F a_s) {
  if (a_t == a_s) return F(0);
  const F on = sigmoid(a_t), off = sigmoid(-a_t);
  return (on == F(0) ? F(0) : on * (log_sigmoid(a_t) - log_sigmoid(a_s))) +
         (off == F(0) ? F(0) : off * (log_sigmoid(-a_t) - log_sigmoid(-a_s)));
}

// d binary_kl / d a_s and / d a_t. An infinite loss has no slope: 0.
template <class F>
FT_HD F binary_kl_slope_s(F a_t, F a_s) {
  return sigmoid(a_s) - sigmoid(a_t);
}
template <class F>
FT_HD F binary_kl_slope_t(F a_t, F a_s) {
  const F slope = sigmoid(a_t) * sigmoid(-a_t) * (a_t - a_s);
  return slope - slope == F(0) ? slope : F(0);
}

// ------------------------------------------------------------------------------- standardization and softcap
// x = (z - mean)/scale over the logits above -inf, scale = deviation + 1e-7, with Bessel's correction.
template <class F>
struct Standard {
  F mean, deviation, scale, count;
};

// `square`: sum (z - mean)^2
template <class F>
FT_HD Standard<F> standard_of(F mean, F square, F count) {
  const F deviation = sqrt(square / (count > F(2) ? count - F(1) : F(1)));
  return {mean, deviation, deviation + F(1e-7), count};
}

// The gradient for z is (g - x slope)/scale, from g, that for x, and along = sum g x: gradients of softmaxes sum to
// 0, so the mean's part vanishes. A deviation of 0 has no derivative, and 0 is taken.
template <class F>
FT_HD F standard_slope(const Standard<F>& of, F along) {
  const F others = of.count > F(2) ? of.count - F(1) : F(1);
  return of.deviation > F(0) ? along * of.scale / (of.deviation * others) : F(0);
}

// d (cap tanh(z/cap)) / dz from the capped logit.
template <class V, class F>
FT_HD V softcap_slope(V capped, F inv_cap) {
  const V r = capped * inv_cap;
  return F(1) - r * r;
}

}  // namespace ft
