// Temperature-softmax distillation of one row, with an optional label term.
//
//   loss = kd_weight * D(q || p) + label_weight * CE(label, softmax(s)),   p = softmax(s/T), q = softmax(t/T)
//   grad_v = kd_weight/T * (p_v - q_v) + label_weight * (softmax(s)_v - (1-e) [v == label] - e/V)   for ForwardKL,
//   e = label_smoothing
//
// Passes over memory: one. Columns are taken in blocks that fit the L1 cache; per block
//   1. stage: read student and teacher (converted to F if they are stored otherwise), find the block's maxima;
//   2. sweep: exponentials relative to the running maxima, their sums, exponentials kept in scratch (L2);
// and when the row's statistic is known
//   3. grad: two or three multiplications per logit on the kept exponentials, one store.
// Bytes per logit: read s, read t, write grad = 12 (fp32), 6 (16 bit); 8 and 4 without a gradient.
//
// Why exponentials are kept: an exponential is ~10 vector operations, a scratch store and load are 2, and L2 holds
// the scratch of a 32k row beside the row itself.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/divergence.h"
#include "core/row_stat.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace ft::FT_ISA {
namespace {

constexpr int64_t kKdBlock = 2048;  // columns; student and teacher blocks in fp32 are 16 KB of L1

template <class F>
struct KdScratch {
  F* exp_s;  // [columns, padded to a vector]
  F* exp_t;
  F* exp_1;
  F* max_s;  // [blocks]: the running maxima that each block's exponentials are relative to
  F* max_t;
  F* staged_s;  // [kKdBlock]
  F* staged_t;

  KdScratch(void* memory, int64_t columns) {
    const int64_t padded = (columns + kKdBlock - 1) / kKdBlock * kKdBlock;
    exp_s = static_cast<F*>(memory);
    exp_t = exp_s + padded;
    exp_1 = exp_t + padded;
    staged_s = exp_1 + padded;
    staged_t = staged_s + kKdBlock;
    max_s = staged_t + kKdBlock;
    max_t = max_s + padded / kKdBlock;
  }

  static int64_t bytes(int64_t columns) {
    const int64_t blocks = (columns + kKdBlock - 1) / kKdBlock;
    return int64_t(sizeof(F)) * (3 * blocks * kKdBlock + 2 * kKdBlock + 2 * blocks);
  }
};

int64_t kd_scratch_bytes(int64_t columns, bool is_double) {
  return is_double ? KdScratch<double>::bytes(columns) : KdScratch<float>::bytes(columns);
}

// One block of one side as contiguous F, in place where it is that already, and its maximum. A NaN does not win the
// maximum; the sweep's shift sums see it.
template <class F, class S>
FT_HD const F* stage(const S* p, int64_t stride, int64_t n, F* buffer, F* max) {
  constexpr int L = kLanes<F>;
  Vec<F> m = splat<F>(neg_inf<F>());
  const F* block = buffer;
  if (stride != 1) {
    S line[L];
    for (int64_t i = 0; i < n; i += L) {
      const int64_t rest = n - i < L ? n - i : L;
      for (int64_t j = 0; j < rest; ++j) line[j] = p[(i + j) * stride];
      for (int64_t j = rest; j < L; ++j) line[j] = line[0];
      const Vec<F> x = Memory<F, S>::load(line);
      m = vmax(x, m);
      Memory<F, F>::store(buffer + i, x);
    }
  } else {
    int64_t i = 0;
    if constexpr (__is_same(F, S)) {
      block = p;
      Vec<F> m1 = m, m2 = m, m3 = m;
      for (; i + 4 * L <= n; i += 4 * L) {
        m = vmax(Memory<F, F>::load(p + i), m);
        m1 = vmax(Memory<F, F>::load(p + i + L), m1);
        m2 = vmax(Memory<F, F>::load(p + i + 2 * L), m2);
        m3 = vmax(Memory<F, F>::load(p + i + 3 * L), m3);
      }
      m = vmax(vmax(m1, m), vmax(m3, m2));
      for (; i + L <= n; i += L) m = vmax(Memory<F, F>::load(p + i), m);
    } else {
      for (; i + L <= n; i += L) {
        const Vec<F> x = Memory<F, S>::load(p + i);
        m = vmax(x, m);
        Memory<F, F>::store(buffer + i, x);
      }
    }
    if (i < n) {
      // The last vector again, or for the first time: a maximum does not mind, a conversion writes the same.
      const bool whole = n >= L;
      if (whole) i = n - L;
      const Vec<F> x = whole ? Memory<F, S>::load(p + i) : load_partial<F, S>(p + i, n - i, p[n - 1]);
      m = vmax(x, m);
      if constexpr (!__is_same(F, S)) Memory<F, F>::store(buffer + i, x);
    }
  }
  *max = horizontal_max<F>(m);
  return block;
}

// Where the block after this one lies. The sweep is bound by arithmetic and the staging before it by memory; fetching
// the next block during the sweep lets the two overlap. Into L1: two blocks of each side fit, and from L2 the staging
// would still wait (a forward takes 37 cycles per 16 logits then, instead of 30).
struct NextBlock {
  const char* data;
  int64_t bytes;  // per column
  FT_HD const void* at(int64_t i) const { return data + i * bytes; }
};

template <class S>
FT_HD NextBlock next_block(const S* block, int64_t stride) {
  return {reinterpret_cast<const char*>(block + kKdBlock * stride), int64_t(sizeof(S)) * stride};
}

template <class F>
struct SweepSums {
  Vec<F> exp_s{}, exp_t{}, exp_1{}, gap{}, cross{}, shift_s{}, shift_t{};
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
FT_HD void sweep_vector(Vec<F> s, Vec<F> t, F ref_s, F ref_t, ExpScale<F> scale, ExpScale<F> scale_1, int power,
                        typename Simd<F>::I mask, SweepSums<F>& sum, F* exp_s, F* exp_t, F* exp_1) {
  const auto counted = [mask](Vec<F> x)
                           __attribute__((always_inline)) { return kMasked ? (mask ? x : Vec<F>{}) : x; };
  const Vec<F> ds = s - ref_s;
  const Vec<F> es = exp_scaled<F>(ds, scale);
  sum.exp_s += counted(es);
  if constexpr (kCareful) sum.shift_s += counted(ds);
  if constexpr (kSave) Memory<F, F>::store(exp_s, es);
  if constexpr (kTeacher) {
    const Vec<F> dt = t - ref_t;
    const Vec<F> et = exp_scaled<F>(dt, scale);
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
    const Vec<F> e1 = power ? raised<F>(es, power) : exp_scaled<F>(ds, scale_1);
    sum.exp_1 += counted(e1);
    if (kSave && !power) Memory<F, F>::store(exp_1, e1);
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

// The statistic of one block. kCareful looks at every element for -inf without mass and for NaN. Without it a product
// of 0 and infinity, or a NaN, makes `cross` NaN, and the caller sweeps the block again, carefully: that is three
// operations less per 16 logits of 37. shift_* are summed only if careful.
template <class F, class Policy, bool kTeacher, bool kHot, bool kSave, bool kCareful>
FT_HD RowStat<double> sweep(const F* s, const F* t, int64_t n, F max_s, F max_t, ExpScale<F> scale,
                            ExpScale<F> scale_1, int power, NextBlock next_s, NextBlock next_t, F* exp_s, F* exp_t,
                            F* exp_1) {
  constexpr int L = kLanes<F>;
  const F ref_s = reference(max_s), ref_t = reference(max_t);
  // Sums run in fp32 over kFlush vectors, then in double.
  constexpr int kFlush = 32;
  SweepTotals<F> totals;
  const auto column = [&](int64_t i, SweepSums<F>& sum) __attribute__((always_inline)) {
    sweep_vector<F, Policy, kTeacher, kHot, kSave, kCareful, false>(
        Memory<F, F>::load(s + i), kTeacher ? Memory<F, F>::load(t + i) : Vec<F>{}, ref_s, ref_t, scale, scale_1,
        power, typename Simd<F>::I{}, sum, exp_s + i, exp_t + i, exp_1 + i);
  };
  int64_t i = 0;
  while (i + L <= n) {
    SweepSums<F> sum;
    const int64_t stop = i + kFlush * L < n - L + 1 ? i + kFlush * L : n - L + 1;
    for (; i < stop; i += L) {
      prefetch_near(next_s.at(i));
      if constexpr (kTeacher) prefetch_near(next_t.at(i));
      column(i, sum);
    }
    totals.template add<kTeacher, kHot>(sum);
  }
  if (i < n) {
    // The last vector, of which only the lanes from i on are new; or a row shorter than a vector, filled up by -inf.
    const bool whole = n >= L;
    const int64_t at = whole ? n - L : 0;
    const auto load = [&](const F* p) __attribute__((always_inline)) {
      return whole ? Memory<F, F>::load(p + at) : load_partial<F, F>(p, n, neg_inf<F>());
    };
    const auto mask = whole ? last_lanes<F>(n - i) : ~last_lanes<F>(L - n);
    SweepSums<F> sum;
    sweep_vector<F, Policy, kTeacher, kHot, kSave, kCareful, true>(load(s), kTeacher ? load(t) : Vec<F>{}, ref_s,
                                                                   ref_t, scale, scale_1, power, mask, sum,
                                                                   exp_s + at, exp_t + at, exp_1 + at);
    totals.template add<kTeacher, kHot>(sum);
  }
  RowStat<double> stat = empty_stat<double>();
  stat.max_s = max_s;
  stat.max_t = max_t;
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
  return stat;
}

template <class F, class Policy, bool kTeacher, bool kHot, bool kSave>
__attribute__((noinline)) RowStat<double> sweep_carefully(const F* s, const F* t, int64_t n, F max_s, F max_t,
                                                          ExpScale<F> scale, ExpScale<F> scale_1, int power,
                                                          NextBlock next_s, NextBlock next_t, F* exp_s, F* exp_t,
                                                          F* exp_1) {
  return sweep<F, Policy, kTeacher, kHot, kSave, true>(s, t, n, max_s, max_t, scale, scale_1, power, next_s, next_t,
                                                       exp_s, exp_t, exp_1);
}

// grad_v = on_s exp_s + on_t exp_t + on_1 exp_1 + constant, for one block.
template <class F>
struct GradFactors {
  F on_s, on_t, on_1, constant;
  int power;  // exp_1 is this power of exp_s; 0: it was kept
};

template <class F, bool kTeacher, bool kHot>
FT_HD Vec<F> grad_vector(const GradFactors<F>& f, const F* exp_s, const F* exp_t, const F* exp_1) {
  Vec<F> g = Memory<F, F>::load(exp_s) * f.on_s + f.constant;
  if constexpr (kTeacher) g += Memory<F, F>::load(exp_t) * f.on_t;
  if constexpr (kHot)
    g += (f.power ? raised<F>(Memory<F, F>::load(exp_s), f.power) : Memory<F, F>::load(exp_1)) * f.on_1;
  return g;
}

template <class F, class S, bool kTeacher, bool kHot>
FT_HD void grad_block(const GradFactors<F>& f, const F* exp_s, const F* exp_t, const F* exp_1, int64_t n, S* out,
                      int64_t stride, bool streaming) {
  constexpr int L = kLanes<F>;
  const auto value = [&](int64_t i) __attribute__((always_inline)) {
    return grad_vector<F, kTeacher, kHot>(f, exp_s + i, exp_t + i, exp_1 + i);
  };
  if (stride != 1) {
    S line[L];
    for (int64_t i = 0; i < n; i += L) {
      Memory<F, S>::store(line, value(i));
      for (int64_t j = 0; j < L && i + j < n; ++j) out[(i + j) * stride] = line[j];
    }
    return;
  }
  int64_t i = 0;
  if constexpr (__is_same(F, float) && sizeof(S) <= sizeof(float)) {
    constexpr int64_t W = kVectorBytes / int64_t(sizeof(S));  // one vector of fp32, two of 16 bit
    if (streaming && n >= W) {
      for (; i < W; i += L) Memory<F, S>::store(out + i, value(i));
      i = (-reinterpret_cast<intptr_t>(out) & (kVectorBytes - 1)) / int64_t(sizeof(S));
      for (; i + W <= n; i += W) {
        if constexpr (__is_same(S, float)) {
          stream(out + i, value(i));
        } else {
          stream(out + i, value(i), value(i + L));
        }
      }
    }
  }
  for (; i + L <= n; i += L) Memory<F, S>::store(out + i, value(i));
  if (i < n && n >= L) {
    Memory<F, S>::store(out + n - L, value(n - L));  // some of it again, the same
  } else if (i < n) {
    store_partial<F, S>(out, n, value(0));
  }
}

FT_HD double quiet_nan() { return __builtin_nan(""); }

template <class F, class S>
FT_HD void fill(S* out, int64_t begin, int64_t end, int64_t stride, F value) {
  S line[kLanes<F>];
  Memory<F, S>::store(line, splat<F>(value));
  for (int64_t i = begin; i < end; ++i) out[i * stride] = line[0];
}

// The power of two that brings a gradient of at most `bound` near the top of fp16. Without it a mean over 8192 rows
// of 128k logits is all zeros in fp16: the loss scale of a GradScaler arrives only in backward.
FT_HD double half_scale(double bound) {
  int exponent = 0;
  if (!(bound > 0 && bound < 1e300)) return 1;
  frexp(bound, &exponent);
  const int k = 14 - exponent;
  return ldexp(1.0, k > 100 ? 100 : k < -100 ? -100 : k);
}

// What a block's exponentials are multiplied by to be relative to the row's maximum; a block without a finite element
// so far has none, and no reference to speak of.
FT_HD double to_row(double block_max, double row_ref, double inv_t) {
  return block_max == neg_inf<double>() ? 0 : rescale(block_max, row_ref, inv_t);
}

template <class F, class Policy, bool kTeacher, bool kHot>
FT_HD void write_grad(const KdCall& call, const KdRow& row, const RowStat<double>& stat, const KdScratch<F>& scratch,
                      bool valid, double scale, int power) {
  const int64_t columns = call.columns;
  const double smoothing = row.label_weight != 0 ? call.label_smoothing : 0;
  typename Policy::template Grad<double> kd{0, 0};
  if constexpr (kTeacher) kd = Policy::grad(stat, row.inv_t);
  const double on_s = kd.on_s * row.kd_weight * scale, on_t = kd.on_t * row.kd_weight * scale;
  const double on_1 = row.label_weight * scale / stat.exp_1;
  const double constant = -row.label_weight * scale * smoothing / double(columns);
  const double ref_s = reference(stat.max_s), ref_t = reference(stat.max_t);

  with_dtype(call.grad, [&](auto tag) __attribute__((always_inline)) {
    using S = decltype(tag);
    S* grad = static_cast<S*>(row.grad);
    if (!valid) {
      fill<F>(grad, 0, columns, call.grad_stride, F(quiet_nan()));
    } else {
      for (int64_t begin = 0, k = 0; begin < columns; begin += kKdBlock, ++k) {
        const int64_t n = columns - begin < kKdBlock ? columns - begin : kKdBlock;
        // Without a separate exp_1 the student's exponentials are the label term's as well (T = 1).
        const double to_s = to_row(scratch.max_s[k], ref_s, kTeacher ? row.inv_t : 1.0);
        const double to_1 = kHot ? to_row(scratch.max_s[k], ref_s, 1.0) : 0;
        const double to_t = kTeacher ? to_row(scratch.max_t[k], ref_t, row.inv_t) : 0;
        const GradFactors<F> f{F((on_s + (kHot ? 0 : on_1)) * to_s), F(on_t * to_t), F(on_1 * to_1), F(constant),
                               power};
        grad_block<F, S, kTeacher, kHot>(f, scratch.exp_s + begin, scratch.exp_t + begin, scratch.exp_1 + begin, n,
                                         grad + begin * call.grad_stride, call.grad_stride, call.stream);
      }
      if (row.label_weight != 0) {
        // The label's own logit: one rounding of the whole value, not a correction of a rounded one.
        const int64_t y = row.label, k = y / kKdBlock;
        const double to_s = to_row(scratch.max_s[k], ref_s, kTeacher ? row.inv_t : 1.0);
        const double es = scratch.exp_s[y] * to_s;
        double g = on_s * es + constant - row.label_weight * scale * (1 - smoothing);
        const double e1 = kHot && power ? raised<F>(splat(scratch.exp_s[y]), power)[0] : scratch.exp_1[y];
        g += on_1 * (kHot ? e1 * to_row(scratch.max_s[k], ref_s, 1.0) : es);
        if constexpr (kTeacher) g += on_t * scratch.exp_t[y] * to_row(scratch.max_t[k], ref_t, row.inv_t);
        fill<F>(grad, y, y + 1, call.grad_stride, F(g));
      }
    }
    fill<F>(grad, columns, call.grad_columns, call.grad_stride, F(0));
  });
}

template <class F, class Policy, bool kTeacher, bool kHot, bool kSave>
KdRowLoss kd_row_as(const KdCall& call, const KdRow& row, void* memory) {
  const int64_t columns = call.columns;
  KdScratch<F> scratch(memory, columns);
  // Without a teacher only the label term is left, at T = 1.
  const double inv_t = kTeacher ? row.inv_t : 1.0;
  const ExpScale<F> scale = exp_scale<F>(inv_t), scale_1 = exp_scale<F>(1.0);
  const int power =
      __is_same(F, float) && (inv_t == 0.5 || inv_t == 1.0 / 3 || inv_t == 0.25) ? int(1 / inv_t + 0.5) : 0;
  bool careful = !kTeacher || (row.label_weight != 0 && call.label_smoothing != 0);  // which needs shift_s

  RowStat<double> stat = empty_stat<double>();
  F max_s = neg_inf<F>(), max_t = neg_inf<F>();
  for (int64_t begin = 0, k = 0; begin < columns; begin += kKdBlock, ++k) {
    const int64_t n = columns - begin < kKdBlock ? columns - begin : kKdBlock;
    F block_s, block_t = neg_inf<F>();
    const F* t = nullptr;
    NextBlock next_s, next_t{};
    const F* s = with_dtype(call.student, [&](auto tag) __attribute__((always_inline)) {
      const auto* p = static_cast<const decltype(tag)*>(row.student) + begin * call.student_stride;
      next_s = next_block(p, call.student_stride);
      return stage(p, call.student_stride, n, scratch.staged_s, &block_s);
    });
    if constexpr (kTeacher) {
      t = with_dtype(call.teacher, [&](auto tag) __attribute__((always_inline)) {
        const auto* p = static_cast<const decltype(tag)*>(row.teacher) + begin * call.teacher_stride;
        next_t = next_block(p, call.teacher_stride);
        return stage(p, call.teacher_stride, n, scratch.staged_t, &block_t);
      });
    }
    // The running maxima: most blocks then need no rescaling when they are merged.
    max_s = block_s > max_s ? block_s : max_s;
    max_t = block_t > max_t ? block_t : max_t;
    scratch.max_s[k] = max_s;
    scratch.max_t[k] = max_t;
    RowStat<double> block;
    if (!careful) {
      block = sweep<F, Policy, kTeacher, kHot, kSave, false>(s, t, n, max_s, max_t, scale, scale_1, power, next_s,
                                                             next_t, scratch.exp_s + begin, scratch.exp_t + begin,
                                                             scratch.exp_1 + begin);
      careful = block.cross != block.cross;  // and so are the blocks after it
    }
    if (careful) {
      block = sweep_carefully<F, Policy, kTeacher, kHot, kSave>(s, t, n, max_s, max_t, scale, scale_1, power, next_s,
                                                                next_t, scratch.exp_s + begin, scratch.exp_t + begin,
                                                                scratch.exp_1 + begin);
    }
    stat = k == 0 ? block : combine<Policy>(stat, block, inv_t);
  }
  if (!kHot) stat.exp_1 = stat.exp_s;

  const bool labelled = row.label_weight != 0;
  // A NaN or +inf anywhere, a side that is -inf throughout, or a label out of range.
  const bool valid = stat.shift_s == stat.shift_s && stat.exp_s != 0 &&
                     (!kTeacher || (stat.shift_t == stat.shift_t && stat.exp_t != 0)) &&
                     (!labelled || (row.label >= 0 && row.label < columns));
  KdRowLoss loss{0, 0, 1};
  if (!valid) {
    loss.kd = kTeacher ? quiet_nan() : 0;
    loss.ce = labelled ? quiet_nan() : 0;
  } else {
    if (kTeacher) loss.kd = Policy::value(stat, row.inv_t);
    if (labelled) {
      const double s_label = with_dtype(call.student, [&](auto tag) __attribute__((always_inline)) {
        using S = decltype(tag);
        return double(
            load_partial<F, S>(static_cast<const S*>(row.student) + row.label * call.student_stride, 1, S{})[0]);
      });
      const double log_sum = log(stat.exp_1);
      // 0 * inf = 0, at both ends of label_smoothing.
      if (call.label_smoothing != 1)
        loss.ce = (1 - call.label_smoothing) * (log_sum - (s_label - reference(stat.max_s)));
      if (call.label_smoothing != 0) loss.ce += call.label_smoothing * (log_sum - stat.shift_s / double(columns));
    }
  }
  if constexpr (kSave) {
    const double scale_up =
        call.grad == DType::kFloat16 ? half_scale(row.kd_weight * row.inv_t + row.label_weight) : 1;
    write_grad<F, Policy, kTeacher, kHot>(call, row, stat, scratch, valid, scale_up, power);
    if (call.stream) fence();
    loss.grad_scale = 1 / scale_up;
  }
  return loss;
}

template <class F, class Policy, bool kTeacher, bool kHot>
KdRowLoss kd_row_grad(const KdCall& call, const KdRow& row, void* scratch) {
  return row.grad ? kd_row_as<F, Policy, kTeacher, kHot, true>(call, row, scratch)
                  : kd_row_as<F, Policy, kTeacher, kHot, false>(call, row, scratch);
}

template <class F, class Policy>
KdRowLoss kd_row(const KdCall& call, const KdRow& row, void* scratch) {
  if (!row.teacher) return kd_row_grad<F, Policy, false, false>(call, row, scratch);
  if (row.label_weight != 0 && row.inv_t != 1) return kd_row_grad<F, Policy, true, true>(call, row, scratch);
  return kd_row_grad<F, Policy, true, false>(call, row, scratch);
}

// The upstream gradient, applied to a saved gradient: one read, one write.
void kd_scale_row(const KdScale& call, const void* in, void* out, double factor) {
  with_dtype(call.dtype, [&](auto tag) __attribute__((always_inline)) {
    using S = decltype(tag);
    using F = std::conditional_t<__is_same(S, double), double, float>;
    const S* p = static_cast<const S*>(in);
    S* q = static_cast<S*>(out);
    int64_t i = 0;
    if (call.in_stride == 1 && call.out_stride == 1) {
      for (; i + kLanes<F> <= call.columns; i += kLanes<F>) {
        Memory<F, S>::store(q + i, Memory<F, S>::load(p + i) * F(factor));
      }
    }
    for (; i < call.columns; ++i) {
      store_partial<F, S>(q + i * call.out_stride, 1, load_partial<F, S>(p + i * call.in_stride, 1, S{}) * F(factor));
    }
  });
}

}  // namespace
}  // namespace ft::FT_ISA
