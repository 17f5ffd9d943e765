// A row that is not kept on chip: one sweep for its statistic, and for a gradient a second one, which reads the
// logits again and computes their exponentials again. The second goes backwards: what the first read last is still in
// the L2 cache. Blocks are large and one has a multiprocessor to itself, so that few rows are under way at once.
//
// The statistic is online: a thread's sums are relative to the maxima of the columns that it has seen, and move when
// those rise (twice or three times in a row of random logits); at the end all move to the maxima of the row, in
// double.
//
//   kd_sweep_kernel<S>   student and teacher of one type, 16-byte vectors where addresses allow
//   kd_any_kernel<A>     any types, any strides, one logit at a time; A = double where one of them is
#pragma once

#include "cuda/kd_block.cuh"

namespace ft::distill {

inline constexpr int kSweepThreads = 512;
inline constexpr int kAnyThreads = 256;
inline constexpr int kSweepAtOnce = 2;  // vectors per side in flight: 16k columns per step of a block in 16 bits
inline constexpr int kAnyAtOnce = 4;    // logits per side

template <class A>
FT_DEVICE void move_sums(Sums<A>& sum, A count, A by_s, A by_t, A factor_s, A factor_t, A factor_1, A difference) {
  // A gap as large as its sides holds no more than they do: core/row_stat.h.
  const A relative = sum.gap / sum.exp_t;
  sum.gap = relative > A(-0.5) && relative < A(0.5) ? factor_s * sum.gap + difference * sum.exp_t
                                                    : scaled(sum.exp_s, factor_s) - scaled(sum.exp_t, factor_t);
  sum.cross = moved(sum.cross, sum.exp_t, by_t - by_s, Policy::cross_of(factor_s, factor_t));
  sum.exp_s = scaled(sum.exp_s, factor_s);
  sum.exp_t = scaled(sum.exp_t, factor_t);
  sum.exp_1 = scaled(sum.exp_1, factor_1);
  sum.shift_s += count * by_s;
}

template <class A>
struct Online {
  Refs<A> top = {neg_inf<A>(), neg_inf<A>()};
  Sums<A> sum = {};
  A count = 0;

  FT_DEVICE Refs<A> ref() const { return {reference(top.s), reference(top.t)}; }

  // Before columns with these maxima are added.
  FT_DEVICE void raise(const RowMath<A>& m, A s, A t) {
    s = higher(top.s, s);
    t = higher(top.t, t);
    if (s == top.s && t == top.t) return;
    const Refs<A> old = ref();
    top = {s, t};
    const A by_s = old.s - ref().s, by_t = old.t - ref().t;
    A factor_s = by_s == 0 ? A(1) : exp_of(by_s, m.c);
    const A factor_t = by_t == 0 ? A(1) : exp_of(by_t, m.c),
            factor_1 = m.hot && by_s != 0 ? exp_of(by_s, m.c_1) : A(1);
    A difference = factor_s - factor_t;
    if constexpr (sizeof(A) == 4) {
      // As for a gap of two exponentials: kd_sums.cuh.
      const A x = (by_t - by_s) * m.minus_inv_t;
      if (x >= -kSmall && x <= kSmall) {
        difference = factor_t * x * expm1_ratio(x);
        factor_s = factor_t + difference;
      }
    }
    move_sums(sum, count, by_s, by_t, factor_s, factor_t, factor_1, difference);
  }

  // What this thread has, relative to the maxima of the row.
  FT_DEVICE Totals totals(const RowMath<A>& m, const Refs<A>& row_top, double inv_t) const {
    Sums<double> all = {double(sum.exp_s), double(sum.exp_t), double(sum.exp_1),
                        double(sum.gap),   double(sum.cross), double(sum.shift_s)};
    if (top.s != row_top.s || top.t != row_top.t) {
      const double by_s = double(ref().s) - double(reference(row_top.s));
      const double by_t = double(ref().t) - double(reference(row_top.t));
      const double factor_s = by_s == 0 ? 1.0 : exp(by_s * inv_t), factor_t = by_t == 0 ? 1.0 : exp(by_t * inv_t);
      const double factor_1 = m.hot && by_s != 0 ? exp(by_s) : 1.0;
      move_sums(all, double(count), by_s, by_t, factor_s, factor_t, factor_1, factor_s - factor_t);
    }
    return totals_of(all);
  }
};

// ------------------------------------------------------------------------------------------ one type, vectors

// Vector j holds columns [j N - phase, j N - phase + N).
struct SweepCut {
  int64_t phase, vectors, full_begin, full_end, columns;
  bool grad_whole;
};

template <class S>
FT_DEVICE SweepCut cut_sweep(const KdCall& call, const S* s, const S* t, const S* grad) {
  constexpr int N = kLanes<S>;
  const bool whole =
      call.student.column_stride == 1 && (!t || (call.teacher.column_stride == 1 && phase_of(t) == phase_of(s)));
  SweepCut cut;
  cut.columns = call.columns;
  cut.phase = whole ? phase_of(s) : 0;
  cut.vectors = (cut.phase + call.columns + N - 1) / N;
  cut.full_begin = whole ? int64_t(cut.phase > 0) : cut.vectors;
  cut.full_end = whole ? (cut.phase + call.columns) / N : cut.vectors;
  cut.grad_whole = call.grad.column_stride == 1 && phase_of(grad) == cut.phase;
  return cut;
}

template <class S>
FT_DEVICE Pack load_whole(const S* p, int64_t column) {
  return load(reinterpret_cast<const Pack*>(p + column));
}

template <class S>
FT_DEVICE Online<float> sweep_row(const KdCall& call, const S* s, const S* t, const RowMath<float>& m,
                                  const SweepCut& cut) {
  constexpr int N = kLanes<S>, U = kSweepAtOnce;
  Online<float> online;
  float a[N], b[N], es[N], et[N];
  for (int64_t j = cut.full_begin + thread(); j < cut.full_end; j += U * threads()) {
    Pack x[U], y[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t k = j + u * threads();
      x[u] = y[u] = splat<S>(neg_inf<float>());
      if (k < cut.full_end) {
        x[u] = load_whole(s, k * N - cut.phase);
        if (t) y[u] = load_whole(t, k * N - cut.phase);
      }
    }
    Pack top_s = x[0], top_t = y[0];
#pragma unroll
    for (int u = 1; u < U; ++u) {
      distill::raise<S>(top_s, x[u]);
      distill::raise<S>(top_t, y[u]);
    }
    online.raise(m, highest<S>(top_s), highest<S>(top_t));
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (j + u * threads() >= cut.full_end) continue;
      unpack<S>(x[u], a);
      unpack<S>(y[u], b);
      online.sum.add(sum_vector(m, online.ref(), a, b, false, [](int) { return true; }, es, et));
      online.count += N;
    }
  }
  // The ends of the row, or all of it: whole vectors are skipped in one step.
  for (int64_t j = thread(); j < cut.vectors; j += threads()) {
    if (j >= cut.full_begin && j < cut.full_end) {
      j += (cut.full_end - 1 - j) / threads() * threads();
      continue;
    }
    const int64_t first = j * N - cut.phase;
    const Pack x = load_some(s, call.student.column_stride, first, cut.columns);
    const Pack y = t ? load_some(t, call.teacher.column_stride, first, cut.columns) : splat<S>(neg_inf<float>());
    online.raise(m, highest<S>(x), highest<S>(y));
    unpack<S>(x, a);
    unpack<S>(y, b);
    const auto counted = [&](int k) { return first + k >= 0 && first + k < cut.columns; };
    online.sum.add(sum_carefully(m, online.ref(), a, b, counted, es, et));
    for (int k = 0; k < N; ++k) online.count += counted(k);
  }
  return online;
}

// Backwards. A vector is read before its gradient is written, by the same thread: in place it is the same memory.
template <class S>
FT_DEVICE void write_swept(const KdCall& call, const S* s, const S* t, S* grad, const RowMath<float>& m,
                           const Refs<float>& ref, const Factors& factors, int64_t label, const SweepCut& cut) {
  constexpr int N = kLanes<S>;
  const GradFactors<float> f(factors);
  for (int64_t back = thread(); back < cut.vectors; back += threads()) {
    const int64_t j = cut.vectors - 1 - back, first = j * N - cut.phase;
    const bool full = j >= cut.full_begin && j < cut.full_end;
    float a[N], es[N], et[N], e1[N], g[N];
    unpack<S>(full ? load_whole(s, first) : load_some(s, call.student.column_stride, first, cut.columns), a);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      es[k] = exp_of(a[k] - ref.s, m.c);
      if (m.hot) e1[k] = exp_1_of(m, a[k] - ref.s, es[k]);
    }
    if (t) {
      unpack<S>(full ? load_whole(t, first) : load_some(t, call.teacher.column_stride, first, cut.columns), a);
#pragma unroll
      for (int k = 0; k < N; ++k) et[k] = exp_of(a[k] - ref.t, m.c);
    }
    gradient(m, f, factors, hit_of(label, first, N), es, et, e1, g);
    if (full && cut.grad_whole) {
      store(reinterpret_cast<Pack*>(grad + first), packed<S>(g));
    } else {
      store_some(grad, call.grad.column_stride, first, cut.columns, g);
    }
  }
}

template <class S>
FT_KERNEL void FT_BOUNDS(kSweepThreads, 1) kd_sweep_kernel(FT_PARAMS(KdCall) call) {
  BlockShared<float>& block = block_shared<float>();
  for (int64_t i = device::block(); i < call.rows; i += blocks()) {
    const S* const s = call.student.row<S>(i);
    S* const grad = call.grad.data ? call.grad.row<S>(i) : nullptr;
    if (thread() == 0) {
      block.row = read_row(call, i);
      block.label_logit =
          label_logit(call, block.row, [&](int64_t v) { return widen(load(s + v * call.student.column_stride)); });
    }
    barrier();
    if (block.row.counted()) {
      const RowMath<float> m = row_math<float>(call, block.row);
      const S* const t = m.teacher ? call.teacher.row<S>(i) : nullptr;
      const SweepCut cut = cut_sweep(call, s, t, grad);
      const Online<float> online = sweep_row(call, s, t, m, cut);
      const Refs<float> top = row_tops(block, online.top, 0, 1);
      finish_row(call, i, block, online.totals(m, top, inv_t_of(block.row)), m, top, 0, 1);
      if (grad) {
        if (block.factors.valid) {
          const Refs<float> ref = {reference(top.s), reference(top.t)};
          write_swept(call, s, t, grad, m, ref, block.factors, label_column(block.row), cut);
        } else {
          fill_columns(grad, call.grad.column_stride, 0, call.columns, float(__builtin_nan("")), thread(), threads());
        }
        fill_columns(grad, call.grad.column_stride, call.columns, call.grad_columns, 0.0f, thread(), threads());
      }
    } else {
      if (thread() == 0) store_nothing(call, i);
      if (grad) fill_columns(grad, call.grad.column_stride, 0, call.grad_columns, 0.0f, thread(), threads());
    }
    barrier();
  }
}

}  // namespace ft::distill
