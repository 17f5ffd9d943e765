// Distillation of rows from the k largest of the teacher's outputs: formulas and definitions are those of
// cpu/topk_kd.h, the schema fasttransfer/ops/topk_kd.py.
//
// One block per row, two sweeps over the student, one logit at a time. A row of bits in shared memory says which
// columns are of K; where there are more columns than bits, both sweeps go segment by segment. Bit v belongs to one
// thread, which also computes the entry that set it: the first of repeated indices, in the order of the row, with no
// atomic operation. Entries are computed in double.
//
// Requested bytes per row: 2 s V + g V (without a gradient s V), with k (8 or 4 for an index, v for a value) per
// sweep and segment.
#pragma once

#include "cuda/kd_any.cuh"

namespace ft::distill {

enum class TopkTail : int { kRenormalize, kZero, kBucket };

inline constexpr int kTopkThreads = 256;
inline constexpr int kTopkSums = 9;

struct TopkCall {
  KdCall kd;            // kd.teacher: the values [rows, entries]
  const void* indices;  // [rows, entries]
  bool wide_indices;    // int64, else int32
  TopkTail tail;
  int64_t entries;
  int64_t segment;  // columns that there are bits for, a multiple of 32
};

// What multiplies exponentials, and what those are relative to.
struct TopkFactors {
  double on_tail, on_1_tail, ref_tail;  // outside of K
  double on_p, on_1, ref_s;             // in K, the student's
  double on_q, ref_t, inv_q;            // and the teacher's
  double constant, label;
  bool valid;  // if not, the gradient is NaN
};

struct alignas(16) TopkShared {
  KdRow row;
  double label_logit;
  TopkFactors factors;
  double parts[kTopkThreads / kWarp][kTopkSums];
  double totals[kTopkSums];
  int64_t ids[kTopkThreads];
};
inline constexpr int64_t kTopkHeader = (int64_t(sizeof(TopkShared)) + 15) / 16 * 16;

// A bit per column of a segment.
struct Bits {
  uint32_t* words;
  int64_t begin, end;  // columns
  FT_DEVICE bool has(int64_t v) const { return words[(v - begin) / 32] >> ((v - begin) % 32) & 1; }
};

FT_DEVICE int64_t topk_index(const TopkCall& call, int64_t at) {
  return call.wide_indices ? load(static_cast<const int64_t*>(call.indices) + at)
                           : int64_t(load(static_cast<const int32_t*>(call.indices) + at));
}

// visit(v, t) for the entries of row i in the segment that exist, by the thread that owns the column's bit; they are
// marked. stray() for an index out of range, by one thread, in the first segment. All threads call.
template <class Visit, class Stray>
FT_DEVICE void each_entry(const TopkCall& call, int64_t i, const void* values, const Bits& bits, Visit visit,
                          Stray stray) {
  int64_t* const ids = shared<TopkShared>(0)->ids;
  const int64_t words = (bits.end - bits.begin + 31) / 32;
  for (int64_t w = thread(); w < words; w += threads()) bits.words[w] = 0;
  for (int64_t first = 0; first < call.entries; first += threads()) {
    barrier();
    if (first + thread() < call.entries) {
      ids[thread()] = topk_index(call, i * call.entries + first + thread());
      if (bits.begin == 0 && (ids[thread()] < -1 || ids[thread()] >= call.kd.columns)) stray();
    }
    barrier();
    const int64_t here = call.entries - first < threads() ? call.entries - first : threads();
    for (int64_t j = 0; j < here; ++j) {
      const int64_t v = ids[j];
      if (v < bits.begin || v >= bits.end || (v - bits.begin) / 32 % threads() != thread() || bits.has(v)) continue;
      const double t = element<double>(call.kd.teacher.dtype, values, (first + j) * call.kd.teacher.column_stride);
      if (t == neg_inf<double>()) continue;
      bits.words[(v - bits.begin) / 32] |= uint32_t(1) << ((v - bits.begin) % 32);
      visit(v, t);
    }
  }
  barrier();
}

// The columns outside of K that a thread has seen: sums relative to their maximum.
template <class A>
struct TopkTailSums {
  A top = neg_inf<A>(), exp = 0, exp_1 = 0;
  double total = 0;  // of their logits, for label smoothing
  bool odd = false;  // a NaN

  FT_DEVICE void add(const RowMath<A>& m, const A (&x)[kAnyAtOnce]) {
    const A highest = higher(top, highest_of(x));
    if (highest > top) {
      const A by = reference(top) - highest;  // of nothing: no sum to move
      exp = scaled(exp, exp_of(by, m.c));
      if (m.hot) exp_1 = scaled(exp_1, exp_of(by, m.c_1));
      top = highest;
    }
    const A ref = reference(top);
#pragma unroll
    for (int k = 0; k < kAnyAtOnce; ++k) {
      const A d = x[k] - ref, e = exp_of(d, m.c);
      exp += e;
      if (m.hot) exp_1 += exp_1_of(m, d, e);
      odd = odd || x[k] != x[k];
    }
  }
};

// The entries that a thread has computed; logits as they are, since all is double.
struct TopkEntrySums {
  double top_s = neg_inf<double>(), exp_s = 0, exp_1 = 0;
  double top_t = neg_inf<double>(), exp_t = 0, cross = 0;  // cross = sum exp_t (t inv_q - s inv_t)
  double total = 0, count = 0;
  bool odd = false;  // a NaN, a teacher's +inf, an index out of range

  FT_DEVICE void add(double s, double t, double inv_t, double inv_q, bool hot) {
    total += s;
    count += 1;
    odd = odd || s != s || !(t < __builtin_huge_val());
    if (odd) return;
    move(higher(top_s, s), higher(top_t, t), inv_t, inv_q, hot);
    if (s > neg_inf<double>()) {
      exp_s += exp((s - top_s) * inv_t);
      if (hot) exp_1 += exp(s - top_s);
    }
    const double mass = exp((t - top_t) * inv_q);
    exp_t += mass;
    if (mass > 0) cross += mass * (t * inv_q - s * inv_t);
  }
  // Relative to these maxima, which are not below its own.
  FT_DEVICE void move(double s, double t, double inv_t, double inv_q, bool hot) {
    if (s != top_s) {
      exp_s = scaled(exp_s, exp((top_s - s) * inv_t));
      if (hot) exp_1 = scaled(exp_1, exp(top_s - s));
      top_s = s;
    }
    if (t != top_t) {
      const double factor = exp((top_t - t) * inv_q);
      cross = moved(cross, exp_t, 0.0, factor);
      exp_t = scaled(exp_t, factor);
      top_t = t;
    }
  }
};

// Over the block, by way of `parts`; every thread has the result.
template <int N>
FT_DEVICE void topk_tops(TopkShared& block, double (&x)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    x[k] = top_over(kWarp, x[k]);
    if (lane() == 0) block.parts[warp()][k] = x[k];
  }
  barrier();
#pragma unroll
  for (int k = 0; k < N; ++k) {
    for (int w = 0; w < threads() / kWarp; ++w) x[k] = higher(x[k], block.parts[w][k]);
  }
  barrier();
}

FT_DEVICE void topk_sums(TopkShared& block, const double (&x)[kTopkSums]) {
#pragma unroll
  for (int k = 0; k < kTopkSums; ++k) {
    const double sum = sum_over(kWarp, x[k]);
    if (lane() == 0) block.parts[warp()][k] = sum;
  }
  barrier();
  if (thread() < kTopkSums) {
    double sum = 0;
    for (int w = 0; w < threads() / kWarp; ++w) sum += block.parts[w][thread()];
    block.totals[thread()] = sum;
  }
  barrier();
}

// exp((from - to) scale), 0 where there was nothing to be moved.
FT_DEVICE double topk_shift(double from, double to, double scale) {
  return from == neg_inf<double>() ? 0 : rescale(from, to, scale);
}

// By one thread: the row's loss, and the factors of its gradient.
template <class A>
FT_DEVICE void finish_topk(const TopkCall& call, int64_t i, TopkShared& block, const RowMath<A>& m, double top_tail,
                           double top_s, double top_t) {
  const KdRow& row = block.row;
  const double tail = block.totals[0], tail_1 = m.hot ? block.totals[1] : tail, total = block.totals[2];
  const double exp_t = block.totals[5], cross = block.totals[6], count = block.totals[7];
  const double inv_t = inv_t_of(row), columns = double(call.kd.columns), smoothing = call.kd.smoothing;
  const double top = higher(top_tail, top_s), ref = reference(top), ref_tail = reference(top_tail);
  const double to_ref = topk_shift(top_tail, ref, inv_t), to_ref_1 = topk_shift(top_tail, ref, 1.0);
  const double from_s = topk_shift(top_s, ref, inv_t), from_s_1 = topk_shift(top_s, ref, 1.0);
  const double sum = tail * to_ref + block.totals[3] * from_s;
  const double sum_1 = m.hot ? tail_1 * to_ref_1 + block.totals[4] * from_s_1 : sum;
  const bool renormalize = call.tail == TopkTail::kRenormalize, labelled = row.label_weight != 0;

  TopkFactors f = {};
  f.ref_tail = ref_tail;
  f.ref_s = ref;
  f.ref_t = reference(top_t);
  f.inv_q = renormalize ? inv_t : 1.0;
  f.valid = block.totals[8] == 0 && sum > 0 && top < __builtin_huge_val() &&
            (!m.teacher || !renormalize || count > 0) &&
            (!labelled || (row.label >= 0 && row.label < call.kd.columns));
  double mass = 1, rest = 0, scale_q = 0, value = 0;
  if (m.teacher && f.valid) {
    const double log_sum = ref * inv_t + log(sum);
    if (renormalize) {
      scale_q = 1 / exp_t;
      value = cross * scale_q - (f.ref_t * inv_t + log(exp_t)) + log_sum;
    } else {
      scale_q = exp(f.ref_t);
      mass = exp_t * scale_q;
      if (call.tail == TopkTail::kBucket && count < columns && mass < 1) rest = 1 - mass;
      value = cross * scale_q + (mass > 0 ? mass * log_sum : 0);
    }
    if (rest > 0) {
      // A tail of -inf has no mass: the loss is +inf.
      const double log_tail = tail > 0 ? ref_tail * inv_t + log(tail) : neg_inf<double>();
      value += rest * (log(rest) - (log_tail - log_sum));
      mass = 1;
    }
  }
  double loss = __builtin_nan("");
  if (f.valid) {
    loss = m.teacher ? row.kd_weight * value : 0;
    if (labelled) {
      const double log_sum = log(sum_1);
      double ce = 0;  // 0 * inf = 0, at both ends of label_smoothing
      if (smoothing != 1) ce = (1 - smoothing) * (log_sum - (block.label_logit - ref));
      if (smoothing != 0) ce += smoothing * (log_sum - (total / columns - ref));
      loss += row.label_weight * ce;
    }
  }
  store_loss(call.kd, i, loss);

  const int up = call.kd.grad_scales ? half_exponent(row.kd_weight * inv_t + row.label_weight) : 0;
  if (call.kd.grad_scales) store(call.kd.grad_scales + i, float(power_of_two(-up)));
  const double scale = power_of_two(up), kd = row.kd_weight * inv_t * scale, label = row.label_weight * scale;
  f.on_p = m.teacher ? kd * mass / sum : 0;
  f.on_1 = label / sum_1;
  f.on_q = kd * scale_q;
  f.on_tail = f.on_p * to_ref - (rest > 0 && tail > 0 ? kd * rest / tail : 0);
  f.on_1_tail = f.on_1 * to_ref_1;
  f.constant = labelled ? -label * smoothing / columns : 0;
  f.label = label * (1 - smoothing);
  block.factors = f;
}

template <class A>
FT_DEVICE void write_topk(const TopkCall& call, int64_t i, const void* s, const void* t, void* grad,
                          const RowMath<A>& m, TopkShared& block, Bits bits) {
  const TopkFactors& f = block.factors;
  const View& out = call.kd.grad;
  const double inv_t = inv_t_of(block.row);
  const int64_t label = label_column(block.row);
  const A ref = A(f.ref_tail), constant = A(f.constant), on_tail = A(f.on_tail), on_1 = A(f.on_1_tail);
  const auto student = [&](int64_t v) {
    return element<double>(call.kd.student.dtype, s, v * call.kd.student.column_stride);
  };
  for (bits.begin = 0; bits.begin < call.kd.columns; bits.begin += call.segment) {
    bits.end = bits.begin + call.segment < call.kd.columns ? bits.begin + call.segment : call.kd.columns;
    if (t) {
      each_entry(
          call, i, t, bits,
          [&](int64_t v, double x) {
            const double d = student(v) - f.ref_s, e = exp(d * inv_t);
            double g = f.on_p * e - f.on_q * exp((x - f.ref_t) * f.inv_q) + f.constant;
            g += f.on_1 * (m.hot ? exp(d) : e);
            put_element(out.dtype, grad, v * out.column_stride, v == label ? g - f.label : g);
          },
          [] {});
    }
    for (int64_t v = bits.begin + thread(); v < bits.end; v += threads()) {
      if (t && bits.has(v)) continue;
      const A d = element<A>(call.kd.student.dtype, s, v * call.kd.student.column_stride) - ref, e = exp_of(d, m.c);
      const A e1 = m.hot ? exp_1_of(m, d, e) : e;
      // The label's own logit: one rounding of the whole value.
      const A g = v == label ? A(f.on_tail * e + f.on_1_tail * e1 + f.constant - f.label)
                             : e * on_tail + e1 * on_1 + constant;
      put_element(out.dtype, grad, v * out.column_stride, g);
    }
    barrier();
  }
}

template <class A>
FT_DEVICE void topk_row(const TopkCall& call, int64_t i, const void* s, void* grad, TopkShared& block, Bits bits) {
  const RowMath<A> m = row_math<A>(call.kd, block.row);
  const void* const t = m.teacher ? call.kd.teacher.row<char>(i) : nullptr;
  const double inv_t = inv_t_of(block.row), inv_q = call.tail == TopkTail::kRenormalize ? inv_t : 1.0;
  const View& student = call.kd.student;
  TopkTailSums<A> tail;
  TopkEntrySums entries;
  for (bits.begin = 0; bits.begin < call.kd.columns; bits.begin += call.segment) {
    bits.end = bits.begin + call.segment < call.kd.columns ? bits.begin + call.segment : call.kd.columns;
    if (t) {
      each_entry(
          call, i, t, bits,
          [&](int64_t v, double x) {
            entries.add(element<double>(student.dtype, s, v * student.column_stride), x, inv_t, inv_q, m.hot);
          },
          [&] { entries.odd = true; });
    }
    for (int64_t first = bits.begin + thread(); first < bits.end; first += kAnyAtOnce * threads()) {
      A x[kAnyAtOnce];
#pragma unroll
      for (int k = 0; k < kAnyAtOnce; ++k) {
        const int64_t v = first + int64_t(k) * threads();
        const bool counts = v < bits.end && !(t && bits.has(v));
        x[k] = counts ? element<A>(student.dtype, s, v * student.column_stride) : neg_inf<A>();
        if (m.smooth && counts) tail.total += double(x[k]);
      }
      tail.add(m, x);
    }
    barrier();
  }
  double tops[3] = {double(tail.top), entries.top_s, entries.top_t};
  topk_tops(block, tops);
  entries.move(tops[1], tops[2], inv_t, inv_q, m.hot);
  const double move = topk_shift(double(tail.top), reference(tops[0]), inv_t);
  const double move_1 = m.hot ? topk_shift(double(tail.top), reference(tops[0]), 1.0) : 0;
  topk_sums(block, {double(tail.exp) * move, double(tail.exp_1) * move_1, tail.total + entries.total, entries.exp_s,
                    entries.exp_1, entries.exp_t, entries.cross, entries.count, tail.odd || entries.odd ? 1.0 : 0.0});
  if (thread() == 0) finish_topk(call, i, block, m, tops[0], tops[1], tops[2]);
  barrier();
  if (!grad) return;
  if (block.factors.valid) {
    write_topk(call, i, s, t, grad, m, block, bits);
  } else {
    fill_any(call.kd, grad, 0, call.kd.columns, A(__builtin_nan("")));
  }
  fill_any(call.kd, grad, call.kd.columns, call.kd.grad_columns, A(0));
}

template <class A>
FT_KERNEL void FT_BOUNDS(kTopkThreads, 1) topk_kd_kernel(FT_PARAMS(TopkCall) call) {
  TopkShared& block = *shared<TopkShared>(0);
  const Bits bits = {shared<uint32_t>(kTopkHeader), 0, 0};
  for (int64_t i = device::block(); i < call.kd.rows; i += blocks()) {
    const void* const s = call.kd.student.row<char>(i);
    void* const grad = call.kd.grad.data ? call.kd.grad.row<char>(i) : nullptr;
    if (thread() == 0) {
      block.row = read_row(call.kd, i);
      block.label_logit = label_logit(call.kd, block.row, [&](int64_t v) {
        return element<double>(call.kd.student.dtype, s, v * call.kd.student.column_stride);
      });
    }
    barrier();
    if (block.row.counted()) {
      topk_row<A>(call, i, s, grad, block, bits);
    } else {
      if (thread() == 0) store_nothing(call.kd, i);
      if (grad) fill_any(call.kd, grad, 0, call.kd.grad_columns, A(0));
    }
    barrier();
  }
}

// The losses of the rows, and the gradient if call.kd.grad.data is not null. Bits for as many columns as fit beside
// the rest in what a block may have without asking, or in all that it may have; `segment`, a multiple of 32: for
// these.
inline void launch_topk_kd(TopkCall call, Stream stream, int64_t segment = 0) {
  if (call.kd.rows == 0) return;
  int64_t most = machine().shared_per_block;
  if (most > int64_t{48} << 10) most = int64_t{48} << 10;
  const int64_t room = (most - kTopkHeader) / 4, words = (call.kd.columns + 31) / 32;
  const int64_t some = segment ? segment / 32 : words < room ? words : room;
  call.segment = 32 * some;
  const Grid grid{call.kd.rows < kMostBlocks ? call.kd.rows : kMostBlocks, kTopkThreads, 1, kTopkHeader + 4 * some};
  const bool is_double = call.kd.student.dtype == DType::kFloat64 || call.kd.teacher.dtype == DType::kFloat64;
  if (is_double) return launch(topk_kd_kernel<double>, grid, stream, call);
  launch(topk_kd_kernel<float>, grid, stream, call);
}

}  // namespace ft::distill
