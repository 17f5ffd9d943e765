// One vector type for every SIMD level, by GCC/Clang vector extensions: +, *, comparisons and ?: work on all of them
// and the compiler picks the instructions, so a kernel is written once. Only what the extensions cannot say
// (fp16 conversion, non-temporal stores) is spelled per level.
//
// Everything is in an anonymous namespace inside ft::FT_ISA: no symbol of a level is visible to another level.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"
#include "cpu/dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ft::FT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class F>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int kLanes = kVectorBytes / 4;
  typedef float V __attribute__((vector_size(kVectorBytes)));
  using Lane = int32_t;
  typedef Lane I __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Half16 __attribute__((vector_size(kVectorBytes / 2)));
};

template <>
struct Simd<double> {
  static constexpr int kLanes = kVectorBytes / 8;
  typedef double V __attribute__((vector_size(kVectorBytes)));
  using Lane = int64_t;
  typedef Lane I __attribute__((vector_size(kVectorBytes)));
  typedef float Float __attribute__((vector_size(kVectorBytes / 2)));
};

template <class F>
using Vec = typename Simd<F>::V;
template <class F>
constexpr int kLanes = Simd<F>::kLanes;

template <class F>
FT_HD Vec<F> splat(F x) {
  return x - Vec<F>{};  // x - 0 == x, also for x == -0.0
}

template <class To, class From>
FT_HD To bits(From x) {
  To y;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&y, &x, sizeof y);
  return y;
}

template <class V>
FT_HD V vmax(V a, V b) {
  return a > b ? a : b;  // maxps: b where either is NaN
}

// One number of the N lanes of v by a tree of halves: lane after lane would be a chain of N latencies.
template <class T, int N>
struct Lanes {
  typedef T V __attribute__((vector_size(N * sizeof(T))));
  typename Lanes<T, N / 2>::V low, high;
};
template <class T>
struct Lanes<T, 1> {
  typedef T V;
};

template <class T, int N, class Combine>
FT_HD T reduced(typename Lanes<T, N>::V v, Combine combine) {
  if constexpr (N == 1) {
    return v;
  } else {
    const Lanes<T, N> halves = bits<Lanes<T, N>>(v);
    return reduced<T, N / 2>(combine(halves.low, halves.high), combine);
  }
}

template <class F>
FT_HD F horizontal_max(Vec<F> v) {
  return reduced<F, kLanes<F>>(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// A sum of vectors in double, lane by lane.
template <class F>
struct DoubleSum;

template <>
struct DoubleSum<double> {
  Vec<double> sum{};
  FT_HD void add(Vec<double> x) { sum += x; }
  FT_HD double total() const {
    return reduced<double, kLanes<double>>(sum, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
  }
};

template <>
struct DoubleSum<float> {
  DoubleSum<double> low, high;
  FT_HD void add(Vec<float> x) {
#if defined(__AVX512F__)
    // Spelled out: GCC 12 converts the halves by quarters.
    low.sum += _mm512_maskz_cvtps_pd(0xff, _mm512_castps512_ps256(x));
    high.sum += _mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, x, 1));
#elif defined(__AVX2__)
    low.sum += _mm256_cvtps_pd(_mm256_castps256_ps128(x));
    high.sum += _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
#else
    struct Halves {
      Simd<double>::Float low, high;
    };
    const Halves h = bits<Halves>(x);
    low.add(__builtin_convertvector(h.low, Vec<double>));
    high.add(__builtin_convertvector(h.high, Vec<double>));
#endif
  }
  FT_HD double total() const { return DoubleSum<double>{low.sum + high.sum}.total(); }
};

// A sum of many vectors: in F over 8 of them, then in double.
template <class F>
struct BlockSum {
  DoubleSum<F> whole;
  Vec<F> part{};
  int pending = 0;
  FT_HD void add(Vec<F> x) {
    part += x;
    if (++pending < 8) return;
    whole.add(part);
    part = Vec<F>{};
    pending = 0;
  }
  FT_HD double total() {
    whole.add(part);
    return whole.total();
  }
};

// ---------------------------------------------------------------------------------------------------------------
// 2^(x c) for x <= 0: n = round(x c) by the magic-number addition, f = x c - n with c in two parts, 2^f by a
// polynomial with p(0) = 1 exactly, then n added to the exponent. Below the smallest normal number the result is 0; a
// NaN must be caught elsewhere (RowStat::shift).
template <class F>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  static constexpr float kSmallest = -126.0f;
  static constexpr int kShift = 23;
  // Minimax on [-1/2, 1/2] with p(0) = 1, relative error 2.0e-9. With degree 5 (9.1e-8, 4% faster) the gradient of
  // two nearly equal logits at T = 8 misses the bound of 2e-6: p - q is small beside p.
  static constexpr float kPoly[] = {0.693147202856f,   0.240226479135f,   0.0555033246969f,
                                    0.00961843736642f, 0.00133988748666f, 0.000153533606293f};
};

template <>
struct Exp2<double> {
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kSmallest = -1022.0;
  static constexpr int kShift = 52;
  // Taylor, ln(2)^k / k!: relative error 1.7e-16 on [-1/2, 1/2].
  static constexpr double kPoly[] = {0.69314718055994530942,   0.24022650695910071233,    0.055504108664821579953,
                                     0.0096181291076284771619, 0.0013333558146428443423,  0.00015403530393381609954,
                                     1.525273380405984028e-5,  1.3215486790144309488e-6,  1.0178086009239699727e-7,
                                     7.0549116208011233299e-9, 4.4455382718708114976e-10, 2.5678435993488205142e-11};
};

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

// c = log2(e)/T, and 1/c = T ln 2, each in two parts; and the x below which 2^(x c) is 0.
template <class F>
struct ExpScale {
  F high, low;
  F step_high, step_low;  // step_high is so short that n step_high is exact
  F smallest;
};

template <class F>
FT_HD ExpScale<F> exp_scale(double inv_t) {
  const double c = 1.4426950408889634074 * inv_t, step = 0.69314718055994530942 / inv_t;
  const F high = F(c);
  // In double the second parts are those of log2(e) and ln 2; the rounding of 1/T remains, which is the caller's T.
  const double low = sizeof(F) == 8 ? 2.0355273740931033e-17 * inv_t : c - double(high);
  uint64_t u = bits<uint64_t>(step);
  u &= ~uint64_t{0} << (sizeof(F) == 8 ? 14 : 37);  // 39 or 16 bits of mantissa
  const double step_high = bits<double>(u);
  const double step_low = (step - step_high) + (sizeof(F) == 8 ? 2.3190468138462996e-17 / inv_t : 0);
  return {high, F(low), F(step_high), F(step_low), F(Exp2<F>::kSmallest / c)};
}

template <class F>
FT_HD Vec<F> exp_scaled(Vec<F> x, ExpScale<F> c) {
  using E = Exp2<F>;
  using I = typename Simd<F>::I;
  const Vec<F> shifted = x * c.high + E::kMagic;
  const Vec<F> n = shifted - E::kMagic;
  // f = x c - n without the rounding of the product, which would put the result off by |x| 6e-8. With FMA: every use
  // of x c.high is a multiply-add (GCC contracts a product only if all its uses are). Without: f = (x - n/c) c.
  // In fp32 the second part of c is left out: it is a change of T by 3e-8, the same for student and teacher.
  Vec<F> f;
  if constexpr (kHasFma) {
    f = x * c.high - n;
    if constexpr (sizeof(F) == 8) f += x * c.low;
  } else {
    f = ((x - n * c.step_high) - n * c.step_low) * c.high;
  }
  constexpr int kDegree = sizeof(E::kPoly) / sizeof(F);
  Vec<F> p = splat<F>(E::kPoly[kDegree - 1]);
#pragma GCC unroll 16
  for (int k = kDegree - 2; k >= 0; --k) p = p * f + E::kPoly[k];
  p = p * f + F(1);
  const I scaled = bits<I>(p) + (bits<I>(shifted) << E::kShift);
  return x < c.smallest ? Vec<F>{} : bits<Vec<F>>(scaled);
}

// ---------------------------------------------------------------------------------------------------------------
// Memory<F, S>: values of storage type S as vectors of F. Loads and stores are unaligned.

#if !defined(__F16C__) && !defined(__AVX512F__)
// fp16 -> fp32: the exponent is re-biased by a multiplication, which also normalises subnormals.
FT_HD Vec<float> from_half(Simd<float>::Half16 h) {
  using U = Simd<float>::U;
  const U u = __builtin_convertvector(h, U);
  const U magnitude = (u & 0x7fffu) << 13;
  const U special = magnitude >= 0x0f800000u ? U{} + 0x7f800000u : U{};
  return bits<Vec<float>>(bits<U>(bits<Vec<float>>(magnitude) * 0x1p112f) | special | ((u & 0x8000u) << 16));
}

// fp32 -> fp16, to nearest even: adding a suitable power of two lets the adder do the rounding.
FT_HD Simd<float>::Half16 to_half(Vec<float> x) {
  using U = Simd<float>::U;
  const U u = bits<U>(x), shifted = u << 1, sign = (u >> 16) & 0x8000u;
  const Vec<float> base = (bits<Vec<float>>(u & 0x7fffffffu) * 0x1p112f) * 0x1p-110f;
  U bias = shifted & 0xff000000u;
  bias = bias < 0x71000000u ? U{} + 0x71000000u : bias;
  const U rounded = bits<U>(bits<Vec<float>>((bias >> 1) + 0x07800000u) + base);
  const U finite = ((rounded >> 13) & 0x7c00u) + (rounded & 0x0fffu);
  const U result = sign | (shifted > 0xff000000u ? U{} + 0x7e00u : finite);
  return __builtin_convertvector(result, Simd<float>::Half16);
}
#endif

FT_HD Vec<float> widen(Simd<float>::Half16 h, BFloat16) {
  using U = Simd<float>::U;
  return bits<Vec<float>>(__builtin_convertvector(h, U) << 16);
}

FT_HD Simd<float>::Half16 narrow(Vec<float> x, BFloat16) {
  using U = Simd<float>::U;
  const U u = bits<U>(x);
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest even
  return __builtin_convertvector(x == x ? rounded : U{} + 0x7fc0u, Simd<float>::Half16);
}

FT_HD Vec<float> widen(Simd<float>::Half16 h, Half) {
#if defined(__AVX512F__)
  return bits<Vec<float>>(_mm512_maskz_cvtph_ps(0xffff, bits<__m256i>(h)));
#elif defined(__F16C__)
  return bits<Vec<float>>(_mm256_cvtph_ps(bits<__m128i>(h)));
#else
  return from_half(h);
#endif
}

FT_HD Simd<float>::Half16 narrow(Vec<float> x, Half) {
#if defined(__AVX512F__)
  return bits<Simd<float>::Half16>(_mm512_maskz_cvtps_ph(0xffff, bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bits<Simd<float>::Half16>(_mm256_cvtps_ph(bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  return to_half(x);
#endif
}

template <class F, class S>
struct Memory {  // fp32 values of a 16-bit type
  static FT_HD Vec<float> load(const S* p) {
    Simd<float>::Half16 h;
    std::memcpy(&h, p, sizeof h);
    return widen(h, S{});
  }
  static FT_HD void store(S* p, Vec<float> x) {
    const Simd<float>::Half16 h = narrow(x, S{});
    std::memcpy(p, &h, sizeof h);
  }
};

template <class F>
struct Memory<F, F> {
  static FT_HD Vec<F> load(const F* p) {
    Vec<F> x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static FT_HD void store(F* p, Vec<F> x) { std::memcpy(p, &x, sizeof x); }
};

template <>
struct Memory<float, double> {
  static FT_HD Vec<float> load(const double* p) {
    Vec<float> x;
    for (int i = 0; i < kLanes<float>; ++i) x[i] = float(p[i]);
    return x;
  }
  static FT_HD void store(double* p, Vec<float> x) {
    for (int i = 0; i < kLanes<float>; ++i) p[i] = x[i];
  }
};

template <>
struct Memory<double, float> {
  static FT_HD Vec<double> load(const float* p) {
    Simd<double>::Float x;
    std::memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, Vec<double>);
  }
  static FT_HD void store(float* p, Vec<double> x) {
    const Simd<double>::Float y = __builtin_convertvector(x, Simd<double>::Float);
    std::memcpy(p, &y, sizeof y);
  }
};

// fp64 arithmetic on 16-bit values is rare (a 16-bit model beside an fp64 one): by way of a padded fp32 vector.
template <class S>
struct Memory16AsDouble {
  static FT_HD Vec<double> load(const S* p) {
    S padded[kLanes<float>] = {};
    std::memcpy(padded, p, sizeof(S) * kLanes<double>);
    const Vec<float> x = Memory<float, S>::load(padded);
    Vec<double> y;
    for (int i = 0; i < kLanes<double>; ++i) y[i] = x[i];
    return y;
  }
  static FT_HD void store(S* p, Vec<double> x) {
    Vec<float> y{};
    for (int i = 0; i < kLanes<double>; ++i) y[i] = float(x[i]);
    S padded[kLanes<float>];
    Memory<float, S>::store(padded, y);
    std::memcpy(p, padded, sizeof(S) * kLanes<double>);
  }
};
template <>
struct Memory<double, BFloat16> : Memory16AsDouble<BFloat16> {};
template <>
struct Memory<double, Half> : Memory16AsDouble<Half> {};

// The last n < kLanes values of a run; the other lanes hold `fill` (given in S, so that it is converted alike). By
// loops: a memcpy of unknown length becomes `rep movs`, which takes longer to start than the copy.
template <class F, class S>
FT_HD Vec<F> load_partial(const S* p, int64_t n, S fill) {
  S padded[kLanes<F>];
  for (int i = 0; i < kLanes<F>; ++i) padded[i] = fill;
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return Memory<F, S>::load(padded);
}

template <class F, class S>
FT_HD void store_partial(S* p, int64_t n, Vec<F> x) {
  S padded[kLanes<F>];
  Memory<F, S>::store(padded, x);
  for (int i = 0; i < n; ++i) p[i] = padded[i];
}

// All ones in the last n lanes.
template <class F>
FT_HD typename Simd<F>::I last_lanes(int64_t n) {
  typename Simd<F>::I lane{};
  for (int i = 0; i < kLanes<F>; ++i) lane[i] = i;
  return lane >= (typename Simd<F>::I{} + typename Simd<F>::Lane(kLanes<F> - n));
}

// Bring the cache line of p into L2; any address will do.
FT_HD void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// The same into L1, for what is read within a few thousand cycles.
FT_HD void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }

// A store that does not read the cache line first; p is aligned to the vector. fence() before others read it.
FT_HD void stream(float* p, Vec<float> x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, bits<__m512>(x));
#elif defined(__AVX2__)
  _mm256_stream_ps(p, bits<__m256>(x));
#elif defined(__x86_64__)
  _mm_stream_ps(p, bits<__m128>(x));
#else
  std::memcpy(p, &x, sizeof x);
#endif
}

// A vector's width of 16-bit values, from two vectors.
template <class S>
FT_HD void stream(S* p, Vec<float> low, Vec<float> high) {
  struct {
    Simd<float>::Half16 low, high;
  } const both{narrow(low, S{}), narrow(high, S{})};
  stream(reinterpret_cast<float*>(p), bits<Vec<float>>(both));
}

FT_HD void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace ft::FT_ISA
