// Short rows, V <= 1024: a group of 1 to 32 lanes has a row in its registers, a warp has 32 rows to 1. Read once,
// written once, no shared memory, no barrier.
//
// Where every row of both inputs starts at a multiple of 16 bytes, a lane loads vectors; else lane g of G has columns
// g, g + G, g + 2 G, ... and a warp's loads lie one beside the other.
#pragma once

#include "cuda/kd_block.cuh"

namespace ft::distill {

inline constexpr int kShortThreads = 128;

struct KdShortCall {
  KdCall call;
  int lanes;         // per row, a power of two
  bool vector_in;    // both inputs
  bool vector_grad;  // and the gradient
};

// What stands where a row has no column. Less than the maximum of a row, so without mass; and finite on both sides,
// so that differences of it are 0. A row whose maximum is no greater is computed with checks.
inline constexpr float kNoColumn = -1e30f;

// Which columns a lane has: kLanes<S> elements, number l of them at first(q) + l step, for each q. One description of
// both layouts, of which a comparison per element is all that is left in a kernel.
template <class S>
struct ShortRow {
  static constexpr int N = kLanes<S>;
  int begin, stride_q, log_step, columns;
  bool vector;

  FT_DEVICE ShortRow(int lanes, int log_lanes, int lane, bool vector_, int columns_)
      : begin(vector_ ? lane * N : lane),
        stride_q(lanes * N),
        log_step(vector_ ? 0 : log_lanes),
        columns(columns_),
        vector(vector_) {}

  FT_DEVICE int first(int q) const { return begin + q * stride_q; }
  FT_DEVICE int step() const { return 1 << log_step; }
  // Elements of q that are columns: those below this number.
  FT_DEVICE int count(int q) const { return (columns - first(q) + step() - 1) >> log_step; }
  // The element of q that is this column; not in [0, N) if none is.
  FT_DEVICE int element(int q, int column) const {
    const int past = column - first(q);
    return past < 0 || (past & (step() - 1)) != 0 ? -1 : past >> log_step;
  }

  FT_DEVICE void load(const S* row, int64_t stride, int q, float (&x)[N]) const {
    const int n = count(q);
    if (vector && n >= N) {
      unpack<S>(load_once(reinterpret_cast<const Pack*>(row + first(q))), x);
      return;
    }
    const S* p = row + first(q) * stride;
#pragma unroll
    for (int l = 0; l < N; ++l) {
      x[l] = kNoColumn;
      if (l < n) x[l] = widen(load_once(p));
      p += step() * stride;
    }
  }

  FT_DEVICE void store(S* row, int64_t stride, int q, const float (&x)[N], bool vector_grad) const {
    const int n = count(q);
    if (vector_grad && n >= N) {
      device::store(reinterpret_cast<Pack*>(row + first(q)), packed<S>(x));
      return;
    }
    S* p = row + first(q) * stride;
#pragma unroll
    for (int l = 0; l < N; ++l) {
      S rounded;
      narrow(x[l], rounded);
      if (l < n) device::store(p, rounded);
      p += step() * stride;
    }
  }
};

// The leader's row, for all lanes of its group.
FT_DEVICE KdRow row_of(const KdRow& row, int leader) {
  return {shuffle(kAllLanes, row.inv_t, leader), shuffle(kAllLanes, row.kd_weight, leader),
          shuffle(kAllLanes, row.label_weight, leader), shuffle(kAllLanes, row.label, leader)};
}

// The sums of this lane's columns; their exponentials take the place of the logits.
template <class S, int Q>
FT_DEVICE Sums<float> sum_short(const RowMath<float>& m, const Refs<float>& ref, const ShortRow<S>& row, bool care,
                                float (&s)[Q][kLanes<S>], float (&t)[Q][kLanes<S>]) {
  constexpr int N = kLanes<S>;
  Sums<float> sums = {};
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    const int n = row.count(q);
    float es[N], et[N];
    sums.add(sum_vector(m, ref, s[q], t[q], care, [n](int l) { return l < n; }, es, et));
#pragma unroll
    for (int l = 0; l < N; ++l) {
      // A third exponential is computed again from the difference, so that is what stays.
      s[q][l] = m.hot && !m.power ? s[q][l] - ref.s : es[l];
      t[q][l] = et[l];
    }
  }
  return sums;
}

template <class S, int Q>
FT_DEVICE void write_short(const KdCall& call, S* grad, bool vector_grad, const RowMath<float>& m,
                           const Factors& factors, int label, const ShortRow<S>& row, const float (&s)[Q][kLanes<S>],
                           const float (&t)[Q][kLanes<S>]) {
  constexpr int N = kLanes<S>;
  const GradFactors<float> f(factors);
  const bool difference = m.hot && !m.power;
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    float es[N], e1[N], g[N];
#pragma unroll
    for (int l = 0; l < N; ++l) {
      es[l] = difference ? exp_of(s[q][l], m.c) : s[q][l];
      e1[l] = difference ? exp_of(s[q][l], m.c_1) : raised(es[l], m.power);
    }
    gradient(m, f, factors, row.element(q, label), es, t[q], e1, g);
    row.store(grad, call.grad.column_stride, q, g, vector_grad);
  }
}

// Blocks per multiprocessor: one more of each, and some architecture spills.
template <class S, int kElements>
inline constexpr int kShortBlocks = kElements == 8   ? 4
                                    : sizeof(S) == 4 ? 2
                                                     : 3;

template <class S, int kElements>
FT_KERNEL void FT_BOUNDS(kShortThreads, (kShortBlocks<S, kElements>)) kd_short_kernel(FT_PARAMS(KdShortCall) params) {
  constexpr int N = kLanes<S>, Q = kElements / N;
  const KdCall& call = params.call;
  const int lanes = params.lanes, rows_of_warp = kWarp / lanes, lane_of_row = lane() % lanes;
  int log_lanes = 0;
  while (1 << log_lanes < lanes) ++log_lanes;
  const ShortRow<S> row(lanes, log_lanes, lane_of_row, params.vector_in, int(call.columns));
  const int64_t step = blocks() * (threads() / kWarp) * rows_of_warp;
  // All lanes of a warp take every turn, also those whose row is past the last one.
  for (int64_t first = (block() * (threads() / kWarp) + warp()) * rows_of_warp; first < call.rows; first += step) {
    const int64_t i = first + lane() / lanes;
    const bool here = i < call.rows;
    KdRow options = {1, 0, 0, 0};
    float logit = 0;
    if (here && lane_of_row == 0) {
      options = read_row(call, i);
      const S* const s = call.student.row<S>(i);
      logit = float(
          label_logit(call, options, [&](int64_t v) { return widen(load(s + v * call.student.column_stride)); }));
    }
    options = row_of(options, lane() - lane_of_row);
    const bool counted = options.counted();
    const RowMath<float> m = row_math<float>(call, options);
    float s[Q][N], t[Q][N];
#pragma unroll
    for (int q = 0; q < Q; ++q) {
#pragma unroll
      for (int l = 0; l < N; ++l) s[q][l] = t[q][l] = kNoColumn;
    }
    if (counted) {
      const S* const from = call.student.row<S>(i);
#pragma unroll
      for (int q = 0; q < Q; ++q) row.load(from, call.student.column_stride, q, s[q]);
    }
    if (m.teacher) {
      const S* const from = call.teacher.row<S>(i);
#pragma unroll
      for (int q = 0; q < Q; ++q) row.load(from, call.teacher.column_stride, q, t[q]);
    }
    Refs<float> top = {kNoColumn, kNoColumn};
#pragma unroll
    for (int q = 0; q < Q; ++q) {
#pragma unroll
      for (int l = 0; l < N; ++l) {
        top.s = higher(top.s, s[q][l]);
        top.t = higher(top.t, t[q][l]);
      }
    }
    top = {top_over(lanes, top.s), top_over(lanes, top.t)};
    // Of this row: its neighbours in the warp are not to change its roundings.
    const bool care = counted && (m.smooth || !(top.s > kNoColumn) || (m.teacher && !(top.t > kNoColumn)));
    if (ballot(kAllLanes, care) != 0) {
      Refs<float> real = {neg_inf<float>(), neg_inf<float>()};
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const int n = row.count(q);
#pragma unroll
        for (int l = 0; l < N; ++l) {
          if (l >= n) continue;
          real.s = higher(real.s, s[q][l]);
          real.t = higher(real.t, t[q][l]);
        }
      }
      real = {top_over(lanes, real.s), top_over(lanes, real.t)};
      if (care) top = real;
    }
    const Refs<float> ref = {reference(top.s), reference(top.t)};
    Sums<float> sums = {};
    if (counted) sums = sum_short<S, Q>(m, ref, row, care, s, t);
    const Totals totals = sum_over(lanes, totals_of(sums));
    if (!here) continue;
    S* const grad = call.grad.data ? call.grad.row<S>(i) : nullptr;
    if (!counted) {
      if (lane_of_row == 0) store_nothing(call, i);
      if (grad) fill_columns(grad, call.grad.column_stride, 0, call.grad_columns, 0.0f, lane_of_row, lanes);
      continue;
    }
    const RowStat<double> stat = stat_of(totals, m, top.s, top.t, call.columns);
    // Before the gradient: the statistic then needs no registers beside it.
    if (lane_of_row == 0) store_results(call, i, options, m, stat, logit);
    if (grad) {
      const Factors factors = factors_of(call, options, m, stat);
      if (factors.valid) {
        write_short<S, Q>(call, grad, params.vector_grad, m, factors, int(label_column(options)), row, s, t);
      } else {
        fill_columns(grad, call.grad.column_stride, 0, call.columns, float(__builtin_nan("")), lane_of_row, lanes);
      }
      fill_columns(grad, call.grad.column_stride, call.columns, call.grad_columns, 0.0f, lane_of_row, lanes);
    }
  }
}

}  // namespace ft::distill
