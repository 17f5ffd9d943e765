// A row that is read once: it lies in the shared memory of a block, or spread over those of a cluster.
//
//   1. load: each thread brings vectors of both rows into shared memory, and takes their maxima;   -> maxima of the
//   row
//   2. sum: the exponentials relative to the row's maxima, their sums (kd_sums.cuh);               -> sums of the row
//   3. gradient: from the exponentials, one store per vector.
//
// A vector is loaded, summed and stored by the same thread: shared memory serves as a larger register file, and only
// maxima and sums cross between threads. While one block waits for memory in 1 or for a barrier, the others of its
// multiprocessor compute: kd_plan.h gives a block a third of the shared memory where that is possible.
//
// kKeep: the exponentials stay in shared memory, 8 bytes per pair of logits (for fp32 in the place of the logits),
// and 3 is two multiplications per logit. Else 16-bit logits stay, 4 bytes per pair, and 3 computes the exponentials
// again; so it does for a label term at T != 1, which needs a third one.
//
// Planes: vector j's i-th 16 bytes lie at plane i, slot j, so that the threads of a warp meet no bank conflicts.
#pragma once

#include "cuda/kd_block.cuh"

namespace ft::distill {

// At most: with the registers that this leaves, a multiprocessor has 16 warps; they have 8 loads in flight each.
inline constexpr int kRowThreads = 512;
// Loads in flight per thread and side.
inline constexpr int kAtOnce = 4;

// Planes of 16 bytes per vector: fp32 logits are as large as their exponentials.
template <class S, bool kKeep>
inline constexpr int kPlanes = kKeep && sizeof(S) == 2 ? 4 : 2;

struct KdRowCall {
  KdCall call;
  int slots;  // vectors that fit a block
};

// How a row is cut into vectors: number j holds columns [j N - phase, j N - phase + N).
struct Cut {
  int phase, begin, end;     // vectors of this block
  int full_begin, full_end;  // those that are loaded whole
  int columns;
  FT_DEVICE bool full(int j) const { return j >= full_begin && j < full_end; }
};

template <class S>
FT_DEVICE Cut cut_row(const KdCall& call, const S* s, const S* t, int rank, int size) {
  constexpr int N = kLanes<S>;
  const bool whole =
      call.student.column_stride == 1 && (!t || (call.teacher.column_stride == 1 && phase_of(t) == phase_of(s)));
  Cut cut;
  cut.columns = int(call.columns);
  cut.phase = whole ? phase_of(s) : 0;
  const int vectors = (cut.phase + cut.columns + N - 1) / N, share = (vectors + size - 1) / size;
  cut.begin = rank * share < vectors ? rank * share : vectors;
  cut.end = cut.begin + share < vectors ? cut.begin + share : vectors;
  cut.full_begin = whole ? int(cut.phase > 0) : vectors;
  cut.full_end = whole ? (cut.phase + cut.columns) / N : vectors;
  return cut;
}

template <class S, bool kKeep>
struct RowMemory {
  int slots, first;  // the vector in slot 0
  FT_DEVICE Pack* at(int plane, int j) const {
    return shared<Pack>(kHeader<float> + (int64_t(plane) * slots + (j - first)) * 16);
  }
  FT_DEVICE Pack* student(int j) const { return at(0, j); }
  FT_DEVICE Pack* teacher(int j) const { return at(kPlanes<S, kKeep> / 2, j); }
  // Exponentials of one side, from its plane on.
  FT_DEVICE void put(int plane, int j, const float (&x)[kLanes<S>]) const {
#pragma unroll
    for (int h = 0; h < kLanes<S> / 4; ++h) {
      const float four[4] = {x[4 * h], x[4 * h + 1], x[4 * h + 2], x[4 * h + 3]};
      *at(plane + h, j) = packed<float>(four);
    }
  }
  FT_DEVICE void get(int plane, int j, float (&x)[kLanes<S>]) const {
#pragma unroll
    for (int h = 0; h < kLanes<S> / 4; ++h) {
      float four[4];
      unpack<float>(*at(plane + h, j), four);
#pragma unroll
      for (int k = 0; k < 4; ++k) x[4 * h + k] = four[k];
    }
  }
};

template <class S, bool kKeep>
FT_DEVICE Refs<float> load_row(const KdCall& call, const S* s, const S* t, const Cut& cut,
                               const RowMemory<S, kKeep>& memory) {
  constexpr int N = kLanes<S>;
  Pack top_s = splat<S>(neg_inf<float>()), top_t = top_s;
  const int step = threads();
  // Where vector 0 would lie: whole vectors are then at multiples of 16 bytes from here.
  const Pack* const from_s = reinterpret_cast<const Pack*>(s - cut.phase);
  const Pack* const from_t = t ? reinterpret_cast<const Pack*>(t - cut.phase) : nullptr;
  for (int j = cut.begin + thread(); j < cut.end; j += kAtOnce * step) {
    Pack x[kAtOnce], y[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int k = j + u * step;
      if (k < cut.end && cut.full(k)) {
        x[u] = load_once(from_s + k);
        if (from_t) y[u] = load_once(from_t + k);
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int k = j + u * step;
      if (k < cut.end && cut.full(k)) {
        *memory.student(k) = x[u];
        raise<S>(top_s, x[u]);
        if (t) {
          *memory.teacher(k) = y[u];
          raise<S>(top_t, y[u]);
        }
      }
    }
  }
  if (cut.begin < cut.full_begin || cut.end > cut.full_end) {
    for (int j = cut.begin + thread(); j < cut.end; j += step) {
      if (cut.full(j)) continue;
      const int first = j * N - cut.phase;
      const Pack x = load_some(s, call.student.column_stride, first, cut.columns);
      *memory.student(j) = x;
      raise<S>(top_s, x);
      if (t) {
        const Pack y = load_some(t, call.teacher.column_stride, first, cut.columns);
        *memory.teacher(j) = y;
        raise<S>(top_t, y);
      }
    }
  }
  return {highest<S>(top_s), highest<S>(top_t)};
}

template <class S, bool kKeep>
FT_DEVICE Sums<float> sum_row(const RowMath<float>& m, const Refs<float>& ref, const Cut& cut,
                              const RowMemory<S, kKeep>& memory) {
  constexpr int N = kLanes<S>;
  Sums<float> sums = {};
  for (int j = cut.begin + thread(); j < cut.end; j += threads()) {
    float s[N], t[N], es[N], et[N];
    unpack<S>(*memory.student(j), s);
    if (m.teacher) unpack<S>(*memory.teacher(j), t);
    const int first = j * N - cut.phase;
    const auto counted = [&](int k) { return first + k >= 0 && first + k < cut.columns; };
    sums.add(sum_vector(m, ref, s, t, !cut.full(j), counted, es, et));
    if constexpr (kKeep) {
      memory.put(0, j, es);
      if (m.teacher) memory.put(kPlanes<S, kKeep> / 2, j, et);
    }
  }
  return sums;
}

template <class S, bool kKeep>
FT_DEVICE void write_row(const KdCall& call, S* grad, const RowMath<float>& m, const Refs<float>& ref,
                         const Factors& factors, int label, const Cut& cut, const RowMemory<S, kKeep>& memory) {
  constexpr int N = kLanes<S>;
  const GradFactors<float> f(factors);
  const bool whole = call.grad.column_stride == 1 && phase_of(grad) == cut.phase;
  for (int j = cut.begin + thread(); j < cut.end; j += threads()) {
    float es[N], et[N], e1[N], g[N];
    if constexpr (kKeep) {
      memory.get(0, j, es);
      if (m.teacher) memory.get(kPlanes<S, kKeep> / 2, j, et);
    } else {
      float s[N], t[N];
      unpack<S>(*memory.student(j), s);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        es[k] = exp_of(s[k] - ref.s, m.c);
        if (m.hot) e1[k] = exp_1_of(m, s[k] - ref.s, es[k]);
      }
      if (m.teacher) {
        unpack<S>(*memory.teacher(j), t);
#pragma unroll
        for (int k = 0; k < N; ++k) et[k] = exp_of(t[k] - ref.t, m.c);
      }
    }
    const int first = j * N - cut.phase;
    gradient(m, f, factors, label - first, es, et, e1, g);
    if (whole && cut.full(j)) {
      store(reinterpret_cast<Pack*>(grad + first), packed<S>(g));
    } else {
      store_some(grad, call.grad.column_stride, first, cut.columns, g);
    }
  }
}

template <class S, bool kKeep>
FT_DEVICE void work_on_row(const KdCall& call, int64_t i, int slots, BlockShared<float>& block, S* grad, int rank,
                           int size) {
  RowMath<float> m = row_math<float>(call, block.row);
  if constexpr (kKeep) m.hot = false;  // such a launch is planned without kKeep
  const S* const s = call.student.row<S>(i);
  const S* const t = m.teacher ? call.teacher.row<S>(i) : nullptr;
  const Cut cut = cut_row(call, s, t, rank, size);
  const RowMemory<S, kKeep> memory{slots, cut.begin};
  const Refs<float> top = row_tops(block, load_row<S, kKeep>(call, s, t, cut, memory), rank, size);
  const Refs<float> ref = {reference(top.s), reference(top.t)};
  finish_row(call, i, block, totals_of(sum_row<S, kKeep>(m, ref, cut, memory)), m, top, rank, size);
  if (!grad) return;
  const int id = rank * threads() + thread(), count = size * threads();
  if (block.factors.valid) {
    write_row<S, kKeep>(call, grad, m, ref, block.factors, int(label_column(block.row)), cut, memory);
  } else {
    fill_columns(grad, call.grad.column_stride, 0, call.columns, float(__builtin_nan("")), id, count);
  }
  fill_columns(grad, call.grad.column_stride, call.columns, call.grad_columns, 0.0f, id, count);
}

template <class S, bool kKeep>
FT_KERNEL void FT_BOUNDS(kRowThreads, 1) kd_row_kernel(FT_PARAMS(KdRowCall) params) {
  const KdCall& call = params.call;
  BlockShared<float>& block = block_shared<float>();
  const int rank = cluster_rank(), size = cluster_size();
  if (size > 1) cluster_barrier();  // nobody writes to a block that has not started
  for (int64_t i = device::block() / size; i < call.rows; i += blocks() / size) {
    if (thread() == 0) {
      block.row = read_row(call, i);
      const S* const s = call.student.row<S>(i);
      block.label_logit =
          label_logit(call, block.row, [&](int64_t v) { return widen(load(s + v * call.student.column_stride)); });
    }
    barrier();
    S* const grad = call.grad.data ? call.grad.row<S>(i) : nullptr;
    if (block.row.counted()) {
      work_on_row<S, kKeep>(call, i, params.slots, block, grad, rank, size);
    } else {
      if (thread() == 0 && rank == 0) store_nothing(call, i);
      if (grad) {
        fill_columns(grad, call.grad.column_stride, 0, call.grad_columns, 0.0f, rank * threads() + thread(),
                     size * threads());
      }
    }
    barrier();  // before the next row's options take the place of this one's
  }
}

}  // namespace ft::distill
