// Distillation of one row from the k largest of the teacher's outputs, with an optional label term.
//
//   K: the columns that the teacher names, q_v its mass there; p = softmax(s/T) over all V columns
//   loss = kd_weight * [ sum_K q_v (log q_v - log p_v)  +  q_rest (log q_rest - log p_rest) ]  +  the label term of
//   kd.h grad_v = kd_weight/T * (M p_v - q_v)                    in K,      M = sum_K q + q_rest grad_v = kd_weight/T
//   * (M p_v - q_rest p_v/p_rest)      outside
//
// q_rest is 0 but for the bucket. The columns outside of K (the tail) have a sum of exponentials of their own,
// relative to a maximum of their own, and those of K are computed apart, in double: p_rest is exact where the tail is
// tiny, with no 1 - sum anywhere on the student's side.
//
// Passes over memory: one. Columns of K, marked in a row of bits, become -inf on their way into the exponentials of
// the tail, which are kept in scratch (L2) until their sum is known, as in kd.h. Bytes per logit: read s, write grad
// = 8 (fp32), 4 (16 bit); per entry of the teacher, its value and its index.
#pragma once

#include <cmath>

#include "cpu/kd.h"
#include "cpu/kernels.h"

namespace ft::FT_ISA {
namespace {

constexpr int64_t kTopkBlock = 2048;  // columns

FT_HD int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class F>
struct TopkScratch {
  F *exp, *exp_1, *staged;    // [columns] of the tail, relative to each block's `top`; [kTopkBlock]
  double* top;                // [blocks]
  double *s, *t, *e_s, *e_t;  // [entries]: the student's and the teacher's values in K, and their exponentials
  double* e_1;                // [entries]
  int64_t* index;             // [entries]
  uint64_t* in_k;             // [columns] bits

  TopkScratch(void* memory, int64_t columns, int64_t entries) {
    const int64_t padded = rounded_up(columns, kTopkBlock), room = rounded_up(entries, 8);
    exp = static_cast<F*>(memory);
    exp_1 = exp + padded;
    staged = exp_1 + padded;
    top = reinterpret_cast<double*>(staged + kTopkBlock);
    s = top + padded / kTopkBlock;
    t = s + room;
    e_s = t + room;
    e_t = e_s + room;
    e_1 = e_t + room;
    index = reinterpret_cast<int64_t*>(e_1 + room);
    in_k = reinterpret_cast<uint64_t*>(index + room);
  }
  static int64_t bytes(int64_t columns, int64_t entries) {
    const int64_t padded = rounded_up(columns, kTopkBlock);
    return int64_t(sizeof(F)) * (2 * padded + kTopkBlock) + 8 * (padded / kTopkBlock + 6 * rounded_up(entries, 8)) +
           padded / 8;
  }
};

int64_t topk_scratch_bytes(int64_t columns, int64_t entries, bool is_double) {
  return is_double ? TopkScratch<double>::bytes(columns, entries) : TopkScratch<float>::bytes(columns, entries);
}

template <class S>
FT_HD double as_double(const S* p) {
  if constexpr (sizeof(S) >= 4) {
    return double(*p);
  } else {
    return double(load_partial<float, S>(p, 1, S{})[0]);
  }
}

// What is known of the teacher's entries.
struct Heads {
  int64_t count = 0;
  bool valid = true;  // no NaN, no +inf, no index out of range
  double top_t = neg_inf<double>();
};

// The entries that exist: not index -1, not value -inf, not an index that was there before.
template <class F>
Heads read_heads(const TopkCall& call, const TopkRow& row, const TopkScratch<F>& scratch) {
  Heads heads;
  const int64_t words = rounded_up(call.columns, kTopkBlock) / 64;
  for (int64_t w = 0; w < words; ++w) scratch.in_k[w] = 0;
  if (!row.values) return heads;
  with_dtype(call.values, [&](auto tag) __attribute__((always_inline)) {
    using S = decltype(tag);
    const S* const values = static_cast<const S*>(row.values);
    for (int64_t j = 0; j < call.entries; ++j) {
      const int64_t at = j * call.index_stride;
      const int64_t v = call.wide_indices ? static_cast<const int64_t*>(row.indices)[at]
                                          : int64_t(static_cast<const int32_t*>(row.indices)[at]);
      if (v < -1 || v >= call.columns) heads.valid = false;
      if (v < 0 || v >= call.columns) continue;
      const double t = as_double(values + j * call.value_stride);
      const uint64_t bit = uint64_t{1} << (v % 64);
      if (t == neg_inf<double>() || (scratch.in_k[v / 64] & bit)) continue;
      scratch.in_k[v / 64] |= bit;
      if (!(t < __builtin_huge_val())) heads.valid = false;
      if (t > heads.top_t) heads.top_t = t;
      scratch.index[heads.count] = v;
      scratch.t[heads.count++] = t;
    }
  });
  return heads;
}

// The tail: sums relative to `top`, and what the whole row shows on the way.
struct Tail {
  double top = neg_inf<double>();
  double exp = 0, exp_1 = 0;
  double total = 0;   // sum of all logits, those of K too, if asked for
  bool valid = true;  // no NaN, no +inf
};

// The largest of the first columns outside of K: where exponentials are relative to until more is known.
template <class F, class S>
FT_HD double sample_tail(const S* s, int64_t n, const uint64_t* in_k) {
  if (!(in_k[0] | in_k[1])) return largest<F, S>(s, n);
  double top = neg_inf<double>();
  for (int64_t v = 0; v < n; ++v) {
    const double x = as_double(s + v);
    if (x > top && !(in_k[v / 64] >> (v % 64) & 1)) top = x;
  }
  return top;
}

// One block of the tail.
template <class F>
struct TailBlock {
  double exp, exp_1;
  F top, shift;  // the largest; sum (s - ref), which is NaN exactly when the block holds a NaN
};

template <class F>
struct TailSweep {
  F ref;
  ExpScale<F> scale, scale_1;
  int power;
  Lines next, grad;  // to be fetched beside the block: see Fetch of kd_sweep.h
};

template <class F, bool kHot>
struct TailVector {
  Vec<F> exp{}, exp_1{}, shift{}, top = splat<F>(neg_inf<F>());

  FT_HD void add(Vec<F> s, const TailSweep<F>& call, F* kept, F* kept_1) {
    const Vec<F> d = s - call.ref;
    const Vec<F> e = exp_scaled<F>(d, call.scale);
    top = vmax(s, top);
    shift += d;
    exp += e;
    Memory<F, F>::store(kept, e);
    if constexpr (kHot) {
      const Vec<F> e1 = call.power ? raised<F>(e, call.power) : exp_scaled<F>(d, call.scale_1);
      exp_1 += e1;
      if (!call.power) Memory<F, F>::store(kept_1, e1);
    }
  }
};

// -inf in the lanes of `bits`.
template <class F>
__attribute__((noinline)) Vec<F> without(Vec<F> s, uint64_t bits) {
  F lanes[kLanes<F>];
  Memory<F, F>::store(lanes, s);
  for (; bits; bits &= bits - 1) lanes[__builtin_ctzll(bits)] = neg_inf<F>();
  return Memory<F, F>::load(lanes);
}

// Columns [0, n) at s, of which those in `in_k` have no mass.
template <class F, class S, bool kHot>
FT_HD TailBlock<F> sweep_tail_block(const S* s, int64_t n, const uint64_t* in_k, const TailSweep<F>& call, F* exp,
                                    F* exp_1) {
  constexpr int L = kLanes<F>;
  constexpr int64_t kFlush = 32 * L;  // sums run in F over so many columns, then in double
  constexpr uint64_t kLaneBits = ~uint64_t{0} >> (64 - L);
  DoubleSum<F> all, all_1, shift;
  Vec<F> top = splat<F>(neg_inf<F>());
  for (int64_t begin = 0; begin < n; begin += kFlush) {
    const int64_t stop = begin + kFlush < n ? begin + kFlush : n;
    TailVector<F, kHot> sum;
    int64_t i = begin;
    for (; i + L <= stop; i += L) {
      prefetch_near(call.next.at(i));
      prefetch_near(call.grad.at(i));
      Vec<F> x = Memory<F, S>::load(s + i);
      const uint64_t bits = in_k[i / 64] >> (i % 64) & kLaneBits;
      if (__builtin_expect(bits != 0, 0)) x = without<F>(x, bits);
      sum.add(x, call, exp + i, exp_1 + i);
    }
    if (i < stop) {
      const Vec<F> x = load_partial<F, S>(s + i, stop - i, s[i]);
      const uint64_t there = kLaneBits >> (L - (stop - i));
      sum.add(without<F>(x, (in_k[i / 64] >> (i % 64) | ~there) & kLaneBits), call, exp + i, exp_1 + i);
    }
    all.add(sum.exp);
    shift.add(sum.shift);
    if constexpr (kHot) all_1.add(sum.exp_1);
    top = vmax(sum.top, top);
  }
  return {all.total(), kHot ? all_1.total() : all.total(), horizontal_max<F>(top), F(shift.total())};
}

// The sum of all logits of a block, for label smoothing.
template <class F>
__attribute__((noinline)) double total_of(const F* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double(x[i]);
  return sum;
}

template <class F, bool kHot>
struct TailRow {
  const TopkCall& call;
  const TopkRow& row;
  const TopkScratch<F>& scratch;
  double inv_t;
  TailSweep<F> args;
  double most;  // how far a block's maximum may be above what its exponentials are relative to
  Tail tail;

  template <class S>
  __attribute__((noinline)) void block(const S* s, int64_t begin, int64_t n) {
    const uint64_t* const in_k = scratch.in_k + begin / 64;
    if (begin == 0) tail.top = sample_tail<F>(s, n < kSample ? n : kSample, in_k);
    double ref = tail.top;
    TailBlock<F> block;
    for (;;) {
      args.ref = F(reference(ref));
      block = sweep_tail_block<F, S, kHot>(s, n, in_k, args, scratch.exp + begin, scratch.exp_1 + begin);
      const double top = block.top;
      if (top == neg_inf<double>() || (ref != neg_inf<double>() && !(top - ref > most))) break;
      ref = top;
      if (top == __builtin_huge_val()) break;
    }
    if (block.shift != block.shift || block.top == __builtin_huge_val()) tail.valid = false;
    scratch.top[begin / kTopkBlock] = ref;
    const double top = block.top > tail.top ? block.top : tail.top, from = begin == 0 ? ref : tail.top;
    tail.exp = tail.exp * to_row(from, top, inv_t) + block.exp * to_row(ref, top, inv_t);
    tail.exp_1 = tail.exp_1 * to_row(from, top, 1.0) + block.exp_1 * to_row(ref, top, 1.0);
    tail.top = top;
  }

  FT_HD void run() {
    const bool wants_total = row.label_weight != 0 && call.label_smoothing != 0;
    for (int64_t begin = 0; begin < call.columns; begin += kTopkBlock) {
      const int64_t n = call.columns - begin < kTopkBlock ? call.columns - begin : kTopkBlock;
      with_dtype(call.student, [&](auto tag) __attribute__((always_inline)) {
        using S = decltype(tag);
        const auto lines = [&](const void* data, int64_t stride, int64_t column) __attribute__((always_inline)) {
          const int64_t step = stride * int64_t(sizeof(S));
          return Lines{static_cast<const char*>(data) + column * step, step};
        };
        const S* const s = static_cast<const S*>(row.student) + begin * call.student_stride;
        args.next = lines(row.student, call.student_stride, begin + kTopkBlock);
        args.grad = row.grad && !call.stream ? lines(row.grad, call.grad_stride, begin)
                                             : Lines{reinterpret_cast<const char*>(scratch.exp), 0};
        // fp64 arithmetic on other logits is rare: no sweep of its own for it.
        constexpr bool kInPlace = __is_same(F, double) == __is_same(S, double);
        if (wants_total || call.student_stride != 1 || !kInPlace) {
          stage<F, S>(s, call.student_stride, n, scratch.staged);
          if (wants_total) tail.total += total_of(scratch.staged, n);
          block<F>(scratch.staged, begin, n);
        } else if constexpr (kInPlace) {
          block<S>(s, begin, n);
        }
      });
    }
  }
};

template <class F, bool kHot>
Tail sweep_tail(const TopkCall& call, const TopkRow& row, const TopkScratch<F>& scratch, double inv_t, int power) {
  TailRow<F, kHot> swept{
      .call = call,
      .row = row,
      .scratch = scratch,
      .inv_t = inv_t,
      .args = {.ref = 0,
               .scale = exp_scale<F>(inv_t),
               .scale_1 = exp_scale<F>(1.0),
               .power = power,
               .next = {},
               .grad = {}},
      .most = kHeadroom / 1.4426950408889634074 / (kHot && inv_t < 1 ? 1 : inv_t),
      .tail = {},
  };
  swept.run();
  return swept.tail;
}

// out[i] = exp(x[i] - ref, scaled), for n values with room up to a whole vector; their sum.
FT_HD double exp_heads(const double* x, int64_t n, double ref, double inv_t, double* out) {
  constexpr int L = kLanes<double>;
  const ExpScale<double> scale = exp_scale<double>(inv_t);
  double sum = 0;
  for (int64_t i = 0; i < n; i += L) {
    Memory<double, double>::store(out + i, exp_scaled<double>(Memory<double, double>::load(x + i) - ref, scale));
  }
  for (int64_t i = 0; i < n; ++i) sum += out[i];
  return sum;
}

// Everything that a row's loss and its gradient are made of.
struct TopkStat {
  double top, ref;        // of all logits
  double exp, exp_1;      // their sums relative to it
  double q_scale, log_q;  // q = e_t q_scale, log q = (t - top_t)/T' + log_q
  double mass, rest;      // M and q_rest
  bool nan;               // in K, on the student's side
};

template <class F>
FT_HD TopkStat topk_stat(const TopkCall& call, const TopkRow& row, const TopkScratch<F>& scratch, const Heads& heads,
                         const Tail& tail, double inv_t, bool hot) {
  TopkStat stat{};
  const int64_t n = heads.count;
  double top = tail.top;
  with_dtype(call.student, [&](auto tag) __attribute__((always_inline)) {
    const auto* s = static_cast<const decltype(tag)*>(row.student);
    for (int64_t j = 0; j < n; ++j) {
      scratch.s[j] = as_double(s + scratch.index[j] * call.student_stride);
      if (scratch.s[j] > top) top = scratch.s[j];
      if (scratch.s[j] != scratch.s[j]) stat.nan = true;
    }
  });
  for (int64_t j = n; j < rounded_up(n, 8); ++j) scratch.s[j] = scratch.t[j] = 0;
  stat.top = top;
  stat.ref = reference(top);
  stat.exp = tail.exp * to_row(tail.top, stat.ref, inv_t) + exp_heads(scratch.s, n, stat.ref, inv_t, scratch.e_s);
  stat.exp_1 = stat.exp;
  if (hot) {
    stat.exp_1 = tail.exp_1 * to_row(tail.top, stat.ref, 1.0) + exp_heads(scratch.s, n, stat.ref, 1.0, scratch.e_1);
  }
  if (!row.values) return stat;
  const double ref_t = reference(heads.top_t);
  const double sum_t = exp_heads(scratch.t, n, ref_t, call.tail == TopkTail::kRenormalize ? inv_t : 1.0, scratch.e_t);
  if (call.tail == TopkTail::kRenormalize) {
    stat.q_scale = 1 / sum_t;
    stat.log_q = -log(sum_t);
    stat.mass = 1;
  } else {
    stat.q_scale = exp(ref_t);
    stat.log_q = ref_t;
    stat.mass = sum_t * stat.q_scale;
    if (call.tail == TopkTail::kBucket && n < call.columns && stat.mass < 1) {
      stat.rest = 1 - stat.mass;
      stat.mass = 1;
    }
  }
  return stat;
}

// sum_K q (log q - log p) + q_rest (log q_rest - log p_rest)
template <class F>
FT_HD double topk_value(const TopkCall& call, const TopkScratch<F>& scratch, const Heads& heads, const Tail& tail,
                        const TopkStat& stat, double inv_t) {
  const double log_sum = log(stat.exp), inv_q = call.tail == TopkTail::kRenormalize ? inv_t : 1.0;
  const double ref_t = reference(heads.top_t);
  double sum = 0;
  for (int64_t j = 0; j < heads.count; ++j) {
    if (scratch.e_t[j] == 0) continue;  // no mass times an infinite difference is nothing
    const double log_q = (scratch.t[j] - ref_t) * inv_q + stat.log_q;
    const double log_p = (scratch.s[j] - stat.ref) * inv_t - log_sum;
    sum += scratch.e_t[j] * stat.q_scale * (log_q - log_p);
  }
  if (stat.rest > 0) {
    // A tail of -inf has no mass: the loss is +inf.
    const double log_p = tail.exp == 0 ? neg_inf<double>() : (tail.top - stat.ref) * inv_t + log(tail.exp) - log_sum;
    sum += stat.rest * (log(stat.rest) - log_p);
  }
  return sum;
}

template <class F, bool kHot>
FT_HD void topk_grad(const TopkCall& call, const TopkRow& row, const TopkScratch<F>& scratch, const Heads& heads,
                     const Tail& tail, const TopkStat& stat, bool valid, double inv_t, double up, int power) {
  const double kd = row.kd_weight * inv_t * up, label = row.label_weight * up;
  const double smoothing = row.label_weight != 0 ? call.label_smoothing : 0;
  const double constant = -label * smoothing / double(call.columns);
  const double on_p = kd * stat.mass / stat.exp, on_1 = label / stat.exp_1;  // of exponentials relative to stat.ref
  const double tail_to_ref = to_row(tail.top, stat.ref, inv_t), tail_to_ref_1 = to_row(tail.top, stat.ref, 1.0);
  // Of those relative to tail.top. A tail without mass has no direction: finite, where the loss is infinite.
  const double on_tail = on_p * tail_to_ref - (stat.rest > 0 && tail.exp > 0 ? kd * stat.rest / tail.exp : 0);

  with_dtype(call.grad, [&](auto tag) __attribute__((always_inline)) {
    using S = decltype(tag);
    S* const grad = static_cast<S*>(row.grad);
    if (!valid) {
      fill<F>(grad, 0, call.columns, call.grad_stride, F(quiet_nan()));
    } else {
      for (int64_t begin = 0, b = 0; begin < call.columns; begin += kTopkBlock, ++b) {
        const int64_t n = call.columns - begin < kTopkBlock ? call.columns - begin : kTopkBlock;
        const double to_tail = to_row(scratch.top[b], tail.top, inv_t);
        const double one = on_1 * tail_to_ref_1 * to_row(scratch.top[b], tail.top, 1.0);
        const GradFactors<F> f{F(on_tail * to_tail + (kHot ? 0 : one)), F(0), F(kHot ? one : 0), F(constant), power};
        grad_block<F, S, false, kHot>(f, scratch.exp + begin, scratch.exp, scratch.exp_1 + begin, n,
                                      grad + begin * call.grad_stride, call.grad_stride, call.stream);
      }
      const auto put = [&](int64_t v, double g)
                           __attribute__((always_inline)) { fill<F>(grad, v, v + 1, call.grad_stride, F(g)); };
      const double hit = label * (1 - smoothing);
      const bool labelled = row.label_weight != 0;
      if (labelled && !(scratch.in_k[row.label / 64] >> (row.label % 64) & 1)) {
        // The label's own logit: one rounding of the whole value, not a correction of a rounded one.
        const int64_t v = row.label;
        const double top = scratch.top[v / kTopkBlock], e = scratch.exp[v];
        const double e1 = !kHot ? e : power ? raised<F>(splat(scratch.exp[v]), power)[0] : scratch.exp_1[v];
        put(v, on_tail * to_row(top, tail.top, inv_t) * e + on_1 * tail_to_ref_1 * to_row(top, tail.top, 1.0) * e1 +
                   constant - hit);
      }
      for (int64_t j = 0; j < heads.count; ++j) {
        double g = on_p * scratch.e_s[j] - kd * stat.q_scale * scratch.e_t[j] + constant;
        if (labelled) g += on_1 * (kHot ? scratch.e_1[j] : scratch.e_s[j]);
        if (labelled && scratch.index[j] == row.label) g -= hit;
        put(scratch.index[j], g);
      }
    }
    fill<F>(grad, call.columns, call.grad_columns, call.grad_stride, F(0));
  });
}

template <class F, bool kHot>
KdRowLoss topk_row_as(const TopkCall& call, const TopkRow& row, void* memory) {
  const TopkScratch<F> scratch(memory, call.columns, call.entries);
  // Without a teacher only the label term is left, at T = 1.
  const double inv_t = row.values ? row.inv_t : 1.0;
  const int power =
      __is_same(F, float) && (inv_t == 0.5 || inv_t == 1.0 / 3 || inv_t == 0.25) ? int(1 / inv_t + 0.5) : 0;
  const Heads heads = read_heads<F>(call, row, scratch);
  const Tail tail = sweep_tail<F, kHot>(call, row, scratch, inv_t, power);
  const TopkStat stat = topk_stat<F>(call, row, scratch, heads, tail, inv_t, kHot);

  const bool labelled = row.label_weight != 0;
  const bool valid = heads.valid && tail.valid && !stat.nan && stat.exp != 0 && stat.top < __builtin_huge_val() &&
                     (!row.values || heads.count > 0 || call.tail != TopkTail::kRenormalize) &&
                     (!labelled || (row.label >= 0 && row.label < call.columns));
  KdRowLoss loss{0, 0, 1};
  if (!valid) {
    loss.kd = row.values ? quiet_nan() : 0;
    loss.ce = labelled ? quiet_nan() : 0;
  } else {
    if (row.values) loss.kd = topk_value<F>(call, scratch, heads, tail, stat, inv_t);
    if (labelled) {
      const double s_label = with_dtype(call.student, [&](auto tag) __attribute__((always_inline)) {
        return as_double(static_cast<const decltype(tag)*>(row.student) + row.label * call.student_stride);
      });
      const double log_sum = log(stat.exp_1), smoothing = call.label_smoothing;
      // 0 * inf = 0, at both ends of label_smoothing.
      if (smoothing != 1) loss.ce = (1 - smoothing) * (log_sum - (s_label - stat.ref));
      if (smoothing != 0) loss.ce += smoothing * (log_sum - (tail.total / double(call.columns) - stat.ref));
    }
  }
  if (row.grad) {
    const double up = call.grad == DType::kFloat16 ? half_scale(row.kd_weight * inv_t + row.label_weight) : 1;
    topk_grad<F, kHot>(call, row, scratch, heads, tail, stat, valid, inv_t, up, power);
    if (call.stream) fence();
    loss.grad_scale = 1 / up;
  }
  return loss;
}

template <class F>
KdRowLoss topk_row(const TopkCall& call, const TopkRow& row, void* scratch) {
  const bool hot = row.values && row.label_weight != 0 && row.inv_t != 1;
  return hot ? topk_row_as<F, true>(call, row, scratch) : topk_row_as<F, false>(call, row, scratch);
}

}  // namespace
}  // namespace ft::FT_ISA
