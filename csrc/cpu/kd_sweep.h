// The sweep of distillation: one block of a row pair into its statistic, exponentials kept for the gradient.
//
// Exponentials are relative to a reference, which need not be the block's maximum, only near it: a sum relative to
// something smaller is larger by a factor that cancels later. So there is no pass for the maximum before the sweep;
// the sweep finds it on its way, and kd.h sweeps the few blocks again whose maximum turned out to be far above.
#pragma once

#include "core/divergence.h"
#include "core/row_stat.h"
#include "cpu/simd.h"

namespace ft::FT_ISA {
namespace {

constexpr int64_t kKdBlock = 2048;  // columns; student and teacher blocks in fp32 are 16 KB of L1

template <class F>
struct KdScratch {
  F* exp_s;  // [columns, padded to a vector]
  F* exp_t;
  F* exp_1;
  F* ref_s;  // [blocks]: what each block's exponentials are relative to
  F* ref_t;
  F* staged_s;  // [kKdBlock]
  F* staged_t;

  KdScratch(void* memory, int64_t columns) {
    const int64_t padded = (columns + kKdBlock - 1) / kKdBlock * kKdBlock;
    exp_s = static_cast<F*>(memory);
    exp_t = exp_s + padded;
    exp_1 = exp_t + padded;
    staged_s = exp_1 + padded;
    staged_t = staged_s + kKdBlock;
    ref_s = staged_t + kKdBlock;
    ref_t = ref_s + padded / kKdBlock;
  }

  static int64_t bytes(int64_t columns) {
    const int64_t blocks = (columns + kKdBlock - 1) / kKdBlock;
    return int64_t(sizeof(F)) * (3 * blocks * kKdBlock + 2 * kKdBlock + 2 * blocks);
  }
};

int64_t kd_scratch_bytes(int64_t columns, bool is_double) {
  return is_double ? KdScratch<double>::bytes(columns) : KdScratch<float>::bytes(columns);
}

// One block of one side as contiguous F: for columns that are not neighbours, or stored otherwise than the other
// side.
template <class F, class S>
FT_HD void stage(const S* p, int64_t stride, int64_t n, F* buffer) {
  constexpr int L = kLanes<F>;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + L <= n; i += L) Memory<F, F>::store(buffer + i, Memory<F, S>::load(p + i));
  }
  for (; i < n; i += L) {
    S line[L];
    for (int64_t j = 0; j < L; ++j) line[j] = p[(i + j < n ? i + j : n - 1) * stride];
    Memory<F, F>::store(buffer + i, Memory<F, S>::load(line));
  }
}

// The largest of n values; of no value, or of NaN only, -inf.
template <class F, class S>
FT_HD F largest(const S* p, int64_t n) {
  constexpr int L = kLanes<F>;
  const Vec<F> lowest = splat<F>(neg_inf<F>());
  if (n < L) return horizontal_max<F>(vmax(load_partial<F, S>(p, n, p[0]), lowest));
  Vec<F> m = vmax(Memory<F, S>::load(p + n - L), lowest);
  for (int64_t i = 0; i + L <= n; i += L) m = vmax(Memory<F, S>::load(p + i), m);
  return horizontal_max<F>(m);
}

// Cache lines to be fetched beside column i of a block.
struct Lines {
  const char* data;
  int64_t step;  // bytes per column
  FT_HD const void* at(int64_t i) const { return data + i * step; }
};

// What the sweep of one block fetches. The next block of both sides: from memory into L1, since from L2 the next
// sweep would still wait. And this block's gradient, so that storing it does not wait for memory: the sweep is bound
// by arithmetic, the gradient by memory, and one row's do not overlap otherwise.
struct Fetch {
  Lines student, teacher, grad;
};

template <class F>
struct SweepSums {
  Vec<F> exp_s{}, exp_t{}, exp_1{}, gap{}, cross{}, shift_s{}, shift_t{};
};

// What the sweep of a block is given beside the logits.
template <class F>
struct SweepCall {
  F ref_s, ref_t;  // what is subtracted: finite, or a logit is infinite
  ExpScale<F> scale, scale_1;
  int power;  // exp(x) is this power of exp(x/T); 0: an exponential of its own
  Fetch fetch;
};

// The statistic of a block, relative to the references, and its maxima.
template <class F>
struct Block {
  RowStat<double> stat;
  F max_s, max_t;
};

// exp(x) from e = exp(x/T), for T = 2, 3 or 4: off by at most T 6e-8, where the label term may be off by 2e-6.
template <class F>
FT_HD Vec<F> raised(Vec<F> e, int power) {
  const Vec<F> square = e * e;
  return power == 2 ? square : power == 3 ? square * e : square * square;
}

// The contribution of one vector of columns: of all lanes, or of those in `mask`. kHot: the label term needs the
// student at T = 1 as well, as exp_s to the `power`, or, with power = 0, as an exponential of its own, which is kept.
// kCareful: see sweep.
template <class F, class Policy, bool kTeacher, bool kHot, bool kSave, bool kCareful, bool kMasked>
FT_HD void sweep_vector(Vec<F> s, Vec<F> t, const SweepCall<F>& call, typename Simd<F>::I mask, SweepSums<F>& sum,
                        F* exp_s, F* exp_t, F* exp_1) {
  const auto counted = [mask](Vec<F> x)
                           __attribute__((always_inline)) { return kMasked ? (mask ? x : Vec<F>{}) : x; };
  const Vec<F> ds = s - call.ref_s;
  const Vec<F> es = exp_scaled<F>(ds, call.scale);
  sum.exp_s += counted(es);
  if constexpr (kCareful) sum.shift_s += counted(ds);
  if constexpr (kSave) Memory<F, F>::store(exp_s, es);
  if constexpr (kTeacher) {
    const Vec<F> dt = t - call.ref_t;
    const Vec<F> et = exp_scaled<F>(dt, call.scale);
    const Vec<F> weight = Policy::weight(es, et);
    sum.exp_t += counted(et);
    sum.gap += counted(es - et);
    // What is masked is the difference and not the product: a product that only the sum uses is contracted in every
    // compilation of this, and the loss is the same to the last bit with and without a gradient.
    Vec<F> difference = counted(dt - ds);
    if constexpr (kCareful) {
      sum.shift_t += counted(dt);
      difference = weight == F(0) ? Vec<F>{} : difference;  // no mass times an infinite difference is nothing
    }
    sum.cross += weight * difference;
    if constexpr (kSave) Memory<F, F>::store(exp_t, et);
  }
  if constexpr (kHot) {
    const Vec<F> e1 = call.power ? raised<F>(es, call.power) : exp_scaled<F>(ds, call.scale_1);
    sum.exp_1 += counted(e1);
    if (kSave && !call.power) Memory<F, F>::store(exp_1, e1);
  }
}

// The sums of a sweep in double.
template <class F>
struct SweepTotals {
  DoubleSum<F> exp_s, exp_t, exp_1, gap, cross, shift_s, shift_t;

  template <bool kTeacher, bool kHot>
  FT_HD void add(const SweepSums<F>& sum) {
    exp_s.add(sum.exp_s);
    shift_s.add(sum.shift_s);
    if constexpr (kTeacher) {
      exp_t.add(sum.exp_t);
      gap.add(sum.gap);
      cross.add(sum.cross);
      shift_t.add(sum.shift_t);
    }
    if constexpr (kHot) exp_1.add(sum.exp_1);
  }
};

// One block, read as S. kCareful looks at every element for -inf without mass and for NaN. Without it a product of 0
// and infinity, or a NaN, makes `cross` NaN, and the caller sweeps the block again, carefully: that is three
// operations less per 16 logits of 37. shift_* are summed only if careful.
template <class F, class S, class Policy, bool kTeacher, bool kHot, bool kSave, bool kCareful>
FT_HD Block<F> sweep(const S* s, const S* t, int64_t n, const SweepCall<F>& call, F* exp_s, F* exp_t, F* exp_1) {
  constexpr int L = kLanes<F>;
  // Sums run in fp32 over kFlush vectors, then in double.
  constexpr int kFlush = 32;
  SweepTotals<F> totals;
  Vec<F> max_s = splat<F>(neg_inf<F>()), max_t = max_s;
  int64_t i = 0;
  while (i + L <= n) {
    SweepSums<F> sum;
    const int64_t stop = i + kFlush * L < n - L + 1 ? i + kFlush * L : n - L + 1;
    for (; i < stop; i += L) {
      prefetch_near(call.fetch.student.at(i));
      if constexpr (kTeacher) prefetch_near(call.fetch.teacher.at(i));
      if constexpr (kSave) prefetch_near(call.fetch.grad.at(i));
      const Vec<F> x = Memory<F, S>::load(s + i);
      const Vec<F> y = kTeacher ? Memory<F, S>::load(t + i) : Vec<F>{};
      max_s = vmax(x, max_s);
      if constexpr (kTeacher) max_t = vmax(y, max_t);
      sweep_vector<F, Policy, kTeacher, kHot, kSave, kCareful, false>(x, y, call, typename Simd<F>::I{}, sum,
                                                                      exp_s + i, exp_t + i, exp_1 + i);
    }
    totals.template add<kTeacher, kHot>(sum);
  }
  if (i < n) {
    // The last vector, of which only the lanes from i on are new; or a row shorter than a vector, filled up by its
    // last element.
    const bool whole = n >= L;
    const int64_t at = whole ? n - L : 0;
    const auto load = [&](const S* p) __attribute__((always_inline)) {
      return whole ? Memory<F, S>::load(p + at) : load_partial<F, S>(p, n, p[n - 1]);
    };
    const auto mask = whole ? last_lanes<F>(n - i) : ~last_lanes<F>(L - n);
    const Vec<F> x = load(s), y = kTeacher ? load(t) : Vec<F>{};
    max_s = vmax(x, max_s);
    if constexpr (kTeacher) max_t = vmax(y, max_t);
    SweepSums<F> sum;
    sweep_vector<F, Policy, kTeacher, kHot, kSave, kCareful, true>(x, y, call, mask, sum, exp_s + at, exp_t + at,
                                                                   exp_1 + at);
    totals.template add<kTeacher, kHot>(sum);
  }
  Block<F> block{empty_stat<double>(), horizontal_max<F>(max_s), horizontal_max<F>(max_t)};
  RowStat<double>& stat = block.stat;
  stat.exp_s = totals.exp_s.total();
  stat.shift_s = totals.shift_s.total();
  stat.count = double(n);
  if constexpr (kTeacher) {
    stat.exp_t = totals.exp_t.total();
    stat.gap = totals.gap.total();
    stat.cross = totals.cross.total();
    stat.shift_t = totals.shift_t.total();
  }
  if constexpr (kHot) stat.exp_1 = totals.exp_1.total();
  return block;
}

template <class F, class Policy, bool kTeacher, bool kHot, bool kSave>
__attribute__((noinline)) Block<F> sweep_carefully(const F* s, const F* t, int64_t n, const SweepCall<F>& call,
                                                   F* exp_s, F* exp_t, F* exp_1) {
  return sweep<F, F, Policy, kTeacher, kHot, kSave, true>(s, t, n, call, exp_s, exp_t, exp_1);
}

}  // namespace
}  // namespace ft::FT_ISA
