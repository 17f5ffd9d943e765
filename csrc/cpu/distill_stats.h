// The statistics of a row of `distill`: from the logits again, while the row is in the cache.
#pragma once

#include "cpu/distill_rows.h"

namespace ft::FT_ISA {
namespace {

// The first maximum of a side.
struct FirstMax {
  double max = neg_inf<double>();
  int64_t at = 0;

  template <class F>
  FT_HD void add(const F* z, int64_t begin, int64_t n, F block_max) {
    if (!(double(block_max) > max)) return;
    max = block_max;
    at = begin + first_of(z, n, block_max);
  }
};

// One side's sums: of exp((x - top)/T), and of (x - top) weighed by it.
struct EntropySums {
  double exp = 0, cross = 0;
  FT_HD double entropy(double inv_t) const { return log(exp) - cross / exp * inv_t; }
};

// KL(q || p), and the entropies of p and q, into stats[0], [2] and [3]; agreement into [4].
template <class F>
__attribute__((noinline)) void distill_stats(const DistillInput<F>& input, const double tops[2], double inv_t,
                                             const FirstMax first[2], double* stats) {
  constexpr int L = kLanes<F>;
  const int64_t columns = input.call.columns;
  const bool both = input.row.logits[1];
  const ExpScale<F> scale = exp_scale<F>(inv_t);
  const F top_s = F(tops[0]), top_t = F(tops[1]);
  DoubleSum<F> total_s, total_t, total_cross_s, total_cross_t, total_gap, total_cross;
  for (int64_t begin = 0; begin < columns; begin += kDistillBlock) {
    const int64_t n = columns - begin < kDistillBlock ? columns - begin : kDistillBlock;
    const F* const s = input.block(0, begin, n);
    const F* const t = both ? input.block(1, begin, n) : s;
    Vec<F> sum_s{}, sum_t{}, cross_s{}, cross_t{}, gap{}, cross{};
    over_kept<F>(
        n,
        [&](int64_t i) __attribute__((always_inline)) {
          const auto load = [&](const F* p) __attribute__((always_inline)) {
            return i + L <= n ? Memory<F, F>::load(p + i) : load_partial<F, F>(p + i, n - i, neg_inf<F>());
          };
          const Vec<F> ds = load(s) - top_s, es = exp_scaled<F>(ds, scale);
          const Vec<F> dt = load(t) - top_t, et = exp_scaled<F>(dt, scale);
          const auto no_s = es == F(0), no_t = et == F(0);
          sum_s += es;
          sum_t += et;
          gap += es - et;
          cross_s += es * (no_s ? Vec<F>{} : ds);
          cross_t += et * (no_t ? Vec<F>{} : dt);
          cross += et * (no_t ? Vec<F>{} : dt - ds);
        },
        [&]() __attribute__((always_inline)) {
          total_s.add(sum_s);
          total_t.add(sum_t);
          total_gap.add(gap);
          total_cross_s.add(cross_s);
          total_cross_t.add(cross_t);
          total_cross.add(cross);
          sum_s = sum_t = cross_s = cross_t = gap = cross = Vec<F>{};
        });
  }
  stats[2] = EntropySums{total_s.total(), total_cross_s.total()}.entropy(inv_t);
  if (!both) return;
  const PairSums pair{total_t.total(), total_s.total(), total_gap.total(), total_cross.total()};
  stats[0] = pair.cross / pair.m * inv_t + log_ratio(pair);
  stats[3] = EntropySums{total_t.total(), total_cross_t.total()}.entropy(inv_t);
  stats[4] = first[0].at == first[1].at;
}

}  // namespace
}  // namespace ft::FT_ISA
