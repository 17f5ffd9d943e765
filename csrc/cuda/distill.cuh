// Distillation of rows of logits by any divergence, with standardization, softcap, a label term, the gradients of
// both sides and statistics. Forward KL with nothing around it is kd.cuh, which is faster.
//
//   z = c tanh(raw/c)      x = (z - mean z)/(deviation z + 1e-7)     each where asked for
//   loss = kd_weight D(softmax(x_t/T), softmax(x_s/T)) + label_weight CE(label, softmax(z_s))
//
//   forward_kl  sum q (log q - log p)      gradient of s: (p - q)/T     of t: q (f - sum q f)/T, f = log q - log p
//   reverse_kl  sum p (log p - log q)      the same with the sides exchanged
//   jsd, tvd    core/terms.h               p (f - sum p f)/T            q (h - sum q h)/T
//   decoupled   a KL of two outcomes, label or not, and the forward KL of the other columns
//
// A block has a row and reads it several times, from the second time on out of the L2 cache where rows are not too
// many: sweeps, each of both sides, one logit at a time, whatever their types and strides:
//
//   1 maxima (and means)          all
//   2 deviations                  standardize
//   3 sums                        all
//   4 terms                       jsd, tvd: they need the sums
//   5 the gradients' part along x standardize with a gradient
//   6 the greatest gradient       where a gradient is of fp16
//   7 the gradients               with a gradient
//
// Requested bytes per row, for n of these sweeps, logits of s and t bytes and gradients of the same:
//
//   n (s + t) V + s V (the student's gradient) + t V (the teacher's) + c      plain KL and decoupled: n = 2, 3 with a
//                                                                             gradient; jsd and tvd: 3, 4
//   c = 8 (its loss in double; 4 or 8 where losses are returned per row) + s + t (each side where the other is
//       greatest) + 8 (label) + 4 or 8 (weight) + 4 or 8 (temperature) + 16 for divisors on the device
//     + s (the logit of a label that has a term), + t (decoupled: the teacher's)
//     + 4 for each scale of an fp16 gradient, + 5 of 4 or 8 for the statistics
//
// A row without a divergence reads only the student; a row that is not counted its options, and is written zeros; one
// that holds no logits is read once, and is written NaN.
//
// Sums are in double and their order is that of the threads alone: with or without gradients the loss is the same to
// the last bit.
#pragma once

#include "cuda/distill_grad.cuh"

namespace ft::distill {

template <class A, Divergence D>
FT_DEVICE void distill_row(const DistillCall& call, int64_t i, DistillShared<A>& block) {
  find_tops<A, D>(call, block);
  if (!block.valid) {
    const A nan = A(__builtin_nan(""));
    if (thread() == 0) {
      store_loss(call.kd, i, double(nan));
      if (call.stats) store_stats<A>(call, i, double(nan));
      if (call.kd.grad_scales) store(call.kd.grad_scales + i, 1.0f);
      if (call.teacher_scales) store(call.teacher_scales + i, 1.0f);
    }
    return fill_gradients(call, i, nan);
  }
  const bool pair = block.constants.pair;
  if (call.standardize && pair) find_deviations(call, block);
  if (thread() == 0 && pair) set_at<A, D>(block);
  barrier();
  sum_row<A, D>(call, block);
  if (!kIsKl<D> && pair) {
    if (thread() == 0) set_term_constants<A, D>(call, block);
    barrier();
    sum_terms<A, D>(call, block);
  }
  if (thread() == 0) finish_distilled<A, D>(call, i, block);
  barrier();
  if (!call.kd.grad.data && !call.teacher_grad.data) return;
  if (call.standardize && pair) find_slopes<A, D>(call, block);
  if (call.kd.grad_scales || call.teacher_scales) {
    find_powers<A, D>(call, i, block);
  }
  write_gradients<A, D>(call, i, block);
}

template <class A, Divergence D>
FT_KERNEL void FT_BOUNDS((kDistillThreads<A, D>), 1) distill_kernel(FT_PARAMS(DistillCall) call) {
  DistillShared<A>& block = *shared<DistillShared<A>>(0);
  for (int64_t i = device::block(); i < call.kd.rows; i += blocks()) {
    if (thread() == 0) begin_row<A, D>(call, i, block);
    barrier();
    if (block.row.counted()) {
      distill_row<A, D>(call, i, block);
    } else {
      if (thread() == 0) {
        store_nothing(call.kd, i);
        if (call.stats) store_stats<A>(call, i, 0.0);
        if (call.teacher_scales) store(call.teacher_scales + i, 1.0f);
      }
      fill_gradients(call, i, A(0));
    }
    fill_padding<A>(call, i);
    barrier();
  }
}

// One block per row; as many threads as there are steps for.
template <class A, Divergence D>
void launch_with(const DistillCall& call, Stream stream) {
  constexpr int kMost = kDistillThreads<A, D>;
  int threads = kWarp;
  while (threads < kMost && threads * 2 < call.kd.columns) threads *= 2;
  const Grid grid{call.kd.rows < kMostBlocks ? call.kd.rows : kMostBlocks, threads < kMost ? threads : kMost, 1,
                  int64_t(sizeof(DistillShared<A>))};
  launch(distill_kernel<A, D>, grid, stream, call);
}

template <class A>
void launch_divergence(const DistillCall& call, Divergence divergence, Stream stream) {
  switch (divergence) {
    case Divergence::kForwardKL:
      return launch_with<A, Divergence::kForwardKL>(call, stream);
    case Divergence::kReverseKL:
      return launch_with<A, Divergence::kReverseKL>(call, stream);
    case Divergence::kJsd:
      return launch_with<A, Divergence::kJsd>(call, stream);
    case Divergence::kTvd:
      return launch_with<A, Divergence::kTvd>(call, stream);
    case Divergence::kDecoupled:
      return launch_with<A, Divergence::kDecoupled>(call, stream);
  }
}

// The losses of the rows, the gradients and statistics that `call` has places for.
inline void launch_distill(const DistillCall& call, Divergence divergence, Stream stream) {
  if (call.kd.rows == 0) return;
  if (call.kd.loss_is_double) return launch_divergence<double>(call, divergence, stream);
  launch_divergence<float>(call, divergence, stream);
}

}  // namespace ft::distill
