// Temperature-softmax distillation of rows of logits, with an optional label term and its gradient.
//
//   loss = kd_weight * D(q || p) + label_weight * CE(label, softmax(s)),   p = softmax(s/T), q = softmax(t/T)
//   grad_v = kd_weight/T * (p_v - q_v) + label_weight * (softmax(s)_v - (1-e) [v == label] - e/V)   for ForwardKL,
//   e = label_smoothing
//
// The statistic of a row and what it becomes are core/row_stat.h and core/divergence.h; which kernel runs is
// kd_plan.h. Passes over memory, and requested bytes per row of V logits of s bytes each (padded columns: s more for
// each; a row that is not counted: its options, and V s for a gradient of zeros):
//
//   kd_short.cuh  V <= 1024              3 s V + c         without a gradient 2 s V + c
//   kd_row.cuh    block or cluster       3 s V + c         without a gradient 2 s V + c
//   kd_sweep.cuh  two sweeps             5 s V + c         without a gradient 2 s V + c (one sweep)
//   kd_any.cuh    two sweeps, any types  2 (s + t) V + g V + c
//
//   c = 8 (its loss in double; 4 or 8 where losses are returned per row)
//     + per block of the cluster: 8 (label) + 4 or 8 (weight) + 4 or 8 (temperature) + s (the label's logit), each
//       where the call has it, and 16 for divisors that are on the device
//     + 4 for the scale of an fp16 gradient
//
// and beside the rows 8 per row for the sum of the losses; 8 (label) and 4 or 8 (weight) for a mean's divisors.
#pragma once

#include "cuda/kd_any.cuh"
#include "cuda/kd_plan.h"
#include "cuda/kd_row.cuh"
#include "cuda/kd_scale.cuh"
#include "cuda/kd_short.cuh"
#include "cuda/kd_sweep.cuh"
#include "cuda/kd_totals.cuh"

namespace ft::distill {

inline int bytes_in(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

inline KdShape shape_of(const KdCall& call) {
  const bool same = call.student.dtype == call.teacher.dtype;
  const bool is_double = call.student.dtype == DType::kFloat64 || call.teacher.dtype == DType::kFloat64;
  KdShape shape;
  shape.columns = call.columns;
  shape.element_bytes = same && !is_double ? bytes_in(call.student.dtype) : 0;
  shape.is_double = is_double;
  shape.gradient = call.grad.data != nullptr;
  shape.hot = call.labels && call.ce_part != 0 && call.kd_part != 0 &&
              (call.temperature.data || call.temperature.otherwise != 1);
  return shape;
}

// Whether every row of a view starts at a multiple of 16 bytes, its columns one after the other.
inline bool in_vectors(const View& view) {
  bool aligned = view.column_stride == 1 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int d = 0; d < view.rows.dims; ++d) aligned = aligned && view.rows.stride[d] % 16 == 0;
  return aligned;
}

template <class S>
void launch_short(const KdCall& call, const KdPlan& plan, Stream stream) {
  KdShortCall params{call, plan.lanes, in_vectors(call.student) && in_vectors(call.teacher), false};
  params.vector_grad = params.vector_in && in_vectors(call.grad);
  const int64_t rows_of_block = kShortThreads / plan.lanes, blocks = (call.rows + rows_of_block - 1) / rows_of_block;
  const Grid grid{blocks < kMostBlocks ? blocks : kMostBlocks, kShortThreads};
  if (plan.elements == 8) {
    launch(kd_short_kernel<S, 8>, grid, stream, params);
  } else {
    launch(kd_short_kernel<S, 32>, grid, stream, params);
  }
}

template <class S>
void launch_row(const KdCall& call, const KdPlan& plan, Stream stream) {
  const int64_t most = kMostBlocks / plan.cluster, rows = call.rows < most ? call.rows : most;
  const Grid grid{rows * plan.cluster, plan.threads, plan.cluster, plan.shared_bytes};
  const KdRowCall params{call, plan.slots};
  if (plan.keep) {
    launch(kd_row_kernel<S, true>, grid, stream, params);
  } else {
    launch(kd_row_kernel<S, false>, grid, stream, params);
  }
}

// One block per row; as many threads as there are steps for.
inline Grid sweep_grid(const KdCall& call, int64_t per_thread, int most_threads, int64_t shared_bytes) {
  int threads = kWarp;
  while (threads < most_threads && threads * per_thread < call.columns) threads *= 2;
  return {call.rows < kMostBlocks ? call.rows : kMostBlocks, threads, 1, shared_bytes};
}

template <class S>
void launch_as(const KdCall& call, const KdPlan& plan, Stream stream) {
  if (plan.path == KdPath::kShort) return launch_short<S>(call, plan, stream);
  if (plan.path == KdPath::kRow) return launch_row<S>(call, plan, stream);
  launch(kd_sweep_kernel<S>, sweep_grid(call, kSweepAtOnce * kLanes<S>, kSweepThreads, kHeader<float>), stream, call);
}

// The losses of the rows, and the gradient if call.grad.data is not null.
inline void launch_kd(const KdCall& call, Stream stream) {
  if (call.rows == 0) return;
  const KdShape shape = shape_of(call);
  KdPlan plan = plan_kd(shape, machine(), kHeader<float>);
  if (const char* told = std::getenv("FASTTRANSFER_KD_PLAN")) {
    plan = plan_as_told(plan, told, shape, machine(), kHeader<float>);
  }
  if (plan.path == KdPath::kAny) {
    if (shape.is_double) {
      return launch(kd_any_kernel<double>, sweep_grid(call, 2, kAnyThreads, kHeader<double>), stream, call);
    }
    return launch(kd_any_kernel<float>, sweep_grid(call, 2, kAnyThreads, kHeader<float>), stream, call);
  }
  if (call.student.dtype == DType::kFloat32) return launch_as<float>(call, plan, stream);
  if (call.student.dtype == DType::kBFloat16) return launch_as<BFloat16>(call, plan, stream);
  launch_as<Half>(call, plan, stream);
}

}  // namespace ft::distill
