// expm1, log1p and tanh of a vector. fp64 is rare here: lane by lane, by libm.
#pragma once

#include "cpu/simd.h"

namespace ft::FT_ISA {
namespace {

// x, rounded: what is multiplied before is not contracted into what is added after.
template <class V>
FT_HD V rounded(V x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

template <class F>
FT_HD Vec<F> vabs(Vec<F> x) {
  using I = typename Simd<F>::I;
  constexpr auto kLow = typename Simd<F>::Lane((uint64_t{1} << (8 * sizeof(F) - 1)) - 1);
  return bits<Vec<F>>(bits<I>(x) & kLow);
}

template <class F>
struct VecMath;

template <>
struct VecMath<float> {
  using V = Vec<float>;
  using I = Simd<float>::I;

  // exp(x) - 1 for x <= 0. With x = (n + f) ln 2 it is 2^n (2^f - 1) + (2^n - 1): exp_scaled's polynomial without
  // its 1.
  static FT_HD V expm1(V x) {
    using E = Exp2<float>;
    constexpr float kLog2e = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
    const V shifted = x * kLog2e + E::kMagic;
    const V n = shifted - E::kMagic;
    const V f = kHasFma ? x * kLog2e - n : ((x - n * kLn2High) - n * kLn2Low) * kLog2e;
    constexpr int kDegree = sizeof(E::kPoly) / sizeof(float);
    V p = splat<float>(E::kPoly[kDegree - 1]);
#pragma GCC unroll 16
    for (int k = kDegree - 2; k >= 0; --k) p = p * f + E::kPoly[k];
    const V power = bits<V>((bits<I>(shifted) << E::kShift) + 0x3f800000);
    const V result = (p * f) * power + (power - 1.0f);
    return x < -80.0f ? splat(-1.0f) : result;
  }

  // log(1 + x) for -1 < x <= 0. 1 + x = 2^k (1 + f) with f in [-1/4, 1/2): for k = 0 f is x itself, and what 1 + x
  // rounds away is not lost. f + f^2 r(f), minimax: relative error 2.8e-8.
  static FT_HD V log1p(V x) {
    constexpr float kR[] = {-0.5000005960464478f,  0.3333354890346527f,  -0.24993443489074707f, 0.1997709572315216f,
                            -0.16822810471057892f, 0.14983688294887543f, -0.12066896259784698f, 0.05412985384464264f};
    const I k = (bits<I>(x + 1.0f) - 0x3f400000) & ~0x7fffff;  // of 3/4
    const V inverse = bits<V>(I{} + 0x3f800000 - k);           // 2^-k
    const V f = x * inverse + (inverse - 1.0f);
    V r = splat(kR[7]);
#pragma GCC unroll 16
    for (int i = 6; i >= 0; --i) r = r * f + kR[i];
    return __builtin_convertvector(k >> 23, V) * 0.693147181f + (f * f * r + f);
  }

  static FT_HD V tanh(V x) {
    const V e = expm1(vabs<float>(x) * -2.0f), t = -e / (e + 2.0f);
    return x < 0.0f ? -t : t;
  }
};

template <>
struct VecMath<double> {
  using V = Vec<double>;
  template <class Fn>
  static FT_HD V each(V x, Fn f) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = f(x[i]);
    return x;
  }
  static FT_HD V expm1(V x) {
    return each(x, [](double y) { return __builtin_expm1(y); });
  }
  static FT_HD V log1p(V x) {
    return each(x, [](double y) { return __builtin_log1p(y); });
  }
  static FT_HD V tanh(V x) {
    return each(x, [](double y) { return __builtin_tanh(y); });
  }
};

}  // namespace
}  // namespace ft::FT_ISA
