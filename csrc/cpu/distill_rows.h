// What `distill` reads: a row's blocks as contiguous F, softcapped, and what is asked of a block before it is swept.
#pragma once

#include "cpu/distill_sweep.h"
#include "cpu/kernels.h"

namespace ft::FT_ISA {
namespace {

// [columns] each; touched only where needed.
template <class F>
struct DistillScratch {
  F* exp[2];  // m's, o's: cpu/distill_sweep.h
  F* w[2];
  F* x[2];  // the student's and the teacher's logits, where they are capped or standardized
  F* exp_1;
  F* grad;
  F* staged[2];  // [kDistillBlock]
  Refs* refs;    // [blocks]

  static int64_t blocks(int64_t columns) { return (columns + kDistillBlock - 1) / kDistillBlock; }
  // Not a multiple of the page: lines of the same columns would share a set of the L1 cache.
  static int64_t padded(int64_t columns) { return blocks(columns) * kDistillBlock + 5 * 64 / int64_t(sizeof(F)); }

  DistillScratch(void* memory, int64_t columns) {
    F* next = static_cast<F*>(memory);
    const auto take = [&next](int64_t n) { return (next += n) - n; };
    const int64_t row = padded(columns);
    F** const rows[] = {&exp[0], &exp[1], &w[0], &w[1], &x[0], &x[1], &exp_1, &grad};
    for (F** p : rows) *p = take(row);
    for (F*& p : staged) p = take(kDistillBlock + 5 * 64 / int64_t(sizeof(F)));
    refs = reinterpret_cast<Refs*>(next);
  }
  static int64_t bytes(int64_t columns) {
    return int64_t(sizeof(F)) * (8 * padded(columns) + 2 * (kDistillBlock + 5 * 64 / int64_t(sizeof(F)))) +
           int64_t(sizeof(Refs)) * blocks(columns);
  }
};

int64_t distill_scratch_bytes(int64_t columns, bool is_double) {
  return is_double ? DistillScratch<double>::bytes(columns) : DistillScratch<float>::bytes(columns);
}

// A logit of -inf stays; +inf and NaN become NaN, since capped they would be numbers.
template <class F>
__attribute__((noinline)) void softcap(F* x, int64_t n, F cap) {
  const F inv_cap = 1 / cap;
  for (int64_t i = 0; i < n; i += kLanes<F>) {
    const Vec<F> raw = Memory<F, F>::load(x + i);
    const Vec<F> capped = VecMath<F>::tanh(raw * inv_cap) * cap;
    const Vec<F> special = raw == neg_inf<F>() ? raw : splat(F(__builtin_nan("")));
    Memory<F, F>::store(x + i, raw - raw == F(0) ? capped : special);
  }
}

// The largest of a block, and whether all are finite.
template <class F>
struct Top {
  F max;
  bool finite;
};

template <class F>
FT_HD Top<F> top_of(const F* x, int64_t n) {
  constexpr int L = kLanes<F>;
  const Vec<F> lowest = splat(neg_inf<F>());
  Vec<F> m[4] = {lowest, lowest, lowest, lowest}, check[4] = {};  // check: 0, or NaN
  int64_t i = 0;
  const auto add = [&](int k, Vec<F> v) __attribute__((always_inline)) {
    m[k] = vmax(v, m[k]);
    check[k] += v * F(0);
  };
  for (; i + 4 * L <= n; i += 4 * L) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) add(k, Memory<F, F>::load(x + i + k * L));
  }
  for (; i + L <= n; i += L) add(0, Memory<F, F>::load(x + i));
  if (i < n) add(1, load_partial<F, F>(x + i, n - i, x[i]));
  const Vec<F> all = (check[0] + check[1]) + (check[2] + check[3]);
  const F sum = reduced<F, L>(all, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
  return {horizontal_max<F>(vmax(vmax(m[0], m[1]), vmax(m[2], m[3]))), sum == 0};
}

// Of a block that is not finite: whether it holds what is no logit.
template <class F>
__attribute__((noinline)) bool holds_nan_or_inf(const F* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (!(x[i] < F(__builtin_huge_val()))) return true;
  }
  return false;
}

// The first of n that is `value`, which is there.
template <class F>
FT_HD int64_t first_of(const F* x, int64_t n, F value) {
  constexpr int64_t L = kLanes<F>, kStep = 8 * L;
  using I = typename Simd<F>::I;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    I any{};
    for (int64_t k = 0; k < kStep; k += L) any |= Memory<F, F>::load(x + i + k) == value;
    if (reduced<typename Simd<F>::Lane, L>(any, [](auto a, auto b) __attribute__((always_inline)) { return a | b; }))
      break;
  }
  while (i < n - 1 && x[i] != value) ++i;
  return i;
}

// The blocks of both sides of a row.
template <class F>
struct DistillInput {
  const DistillCall& call;
  const DistillRow& row;
  const DistillScratch<F>& scratch;
  bool ready[2] = {false, false};  // scratch.x holds the whole row

  FT_HD bool transformed(int side) const { return call.side[side].softcap != 0 || call.standardize; }

  FT_HD const F* block(int side, int64_t begin, int64_t n) const {
    const DistillSide& of = call.side[side];
    F* const x = scratch.x[side] + begin;
    if (ready[side]) return x;
    const void* const data = row.logits[side];
    const bool keep = transformed(side);
    if (of.dtype == (sizeof(F) == 8 ? DType::kFloat64 : DType::kFloat32) && of.stride == 1 && !keep)
      return static_cast<const F*>(data) + begin;
    F* const to = keep ? x : scratch.staged[side];
    with_dtype(of.dtype, [&](auto tag) __attribute__((always_inline)) {
      stage(static_cast<const decltype(tag)*>(data) + begin * of.stride, of.stride, n, to);
    });
    if (of.softcap != 0) softcap<F>(to, n, F(of.softcap));
    return to;
  }

  // A block that may be written: the same, apart from where the row is kept.
  FT_HD F* copy(int side, const F* x, int64_t n) const {
    F* const to = scratch.staged[side];
    if (x != to) {
      for (int64_t i = 0; i < n; ++i) to[i] = x[i];
    }
    return to;
  }
};

// ------------------------------------------------------------------------------------------- standardize
// Sums over the logits above -inf, and the extremes.
template <class F>
struct Moments {
  double count = 0, sum = 0, square = 0;  // of z - from
  F min = F(__builtin_huge_val()), max = neg_inf<F>();
};

template <class F>
__attribute__((noinline)) Moments<F> moments_of(const F* z, int64_t n, F from) {
  constexpr int L = kLanes<F>;
  DoubleSum<F> total_count, total, total_square;
  Vec<F> count{}, sum{}, square{}, low = splat(F(__builtin_huge_val())), high = splat(neg_inf<F>());
  over_kept<F>(
      n,
      [&](int64_t i) __attribute__((always_inline)) {
        const Vec<F> v = i + L <= n ? Memory<F, F>::load(z + i) : load_partial<F, F>(z + i, n - i, neg_inf<F>());
        const auto finite = v > neg_inf<F>();
        const Vec<F> d = finite ? v - from : Vec<F>{};
        count += finite ? splat(F(1)) : Vec<F>{};
        sum += d;
        square += d * d;
        low = (finite & (v < low)) ? v : low;
        high = vmax(v, high);
      },
      [&]() __attribute__((always_inline)) {
        total_count.add(count);
        total.add(sum);
        total_square.add(square);
        count = sum = square = Vec<F>{};
      });
  return {total_count.total(), total.total(), total_square.total(), -horizontal_max<F>(-low),
          horizontal_max<F>(high)};
}

// z -> (z - mean)/scale in place. The mean in two parts: softmaxes do not see that it is rounded, but the gradient's
// part along x does, which at an offset of 1e4 lost four digits.
template <class F>
Standard<double> standardize(F* z, int64_t n) {
  const Moments<F> rough = moments_of(z, n, F(0));
  const F from = F(rough.sum / rough.count);
  const Moments<F> fine = moments_of(z, n, from);
  const double mean = fine.sum / fine.count;
  // Of a constant row rounding would leave something.
  const double square = fine.min < fine.max ? fine.square - fine.sum * mean : 0;
  const Standard<double> of = standard_of(double(from) + mean, square > 0 ? square : 0, fine.count);
  const F shift = fine.min < fine.max ? F(of.mean) : fine.max, factor = F(1 / of.scale);
  const F low = fine.min < fine.max ? F(of.mean - double(shift)) : F(0);
  for (int64_t i = 0; i < n; i += kLanes<F>) {
    Memory<F, F>::store(z + i, (Memory<F, F>::load(z + i) - shift - low) * factor);
  }
  return of;
}

}  // namespace
}  // namespace ft::FT_ISA
