// Sums over rows, in double and in the same order on every device: the divisors of reduction="mean" before the rows
// are computed, and the loss after. One block where there are few rows; else each of several leaves a partial sum,
// and one adds those. Requests 8 bytes per row for the loss, and labels and weights once for the divisors.
#pragma once

#include "cuda/kd_block.cuh"

namespace ft::distill {

inline constexpr int kTotalThreads = 512;
// Rows of a block: one reads this many in a few microseconds.
inline constexpr int64_t kTotalRows = 16384;

inline int64_t total_blocks(int64_t rows) {
  const int64_t blocks = (rows + kTotalRows - 1) / kTotalRows;
  return blocks < 1 ? 1 : blocks > 512 ? 512 : blocks;
}

// What is summed: pairs (kd, ce) of `count` rows, or of `pairs`; or single numbers.
struct TotalCall {
  int64_t count;
  const double* numbers;  // [count, width]; null: the weights of the rows
  int width;              // 1 or 2
  Values weight;
  const int64_t* labels;
  int64_t ignore_index;
  bool distill_ignored;
  double* partials;  // [blocks, width], or the total where there is one block; null: the total goes to `loss`
  void* loss;
  bool loss_is_double;
};

struct Pair {
  double kd, ce;
};

// What row i adds to the divisors.
FT_DEVICE Pair weights_of(const TotalCall& call, int64_t i) {
  const double weight = call.weight.at(i);
  const bool has_label = call.labels && load(call.labels + i) != call.ignore_index;
  const bool counted = weight != 0 && (!call.labels || call.distill_ignored || has_label);
  return {counted ? weight : 0, counted && has_label ? weight : 0};
}

FT_DEVICE Pair number_of(const TotalCall& call, int64_t i) {
  if (call.width == 1) return {load(call.numbers + i), 0};
  return {load(call.numbers + 2 * i), load(call.numbers + 2 * i + 1)};
}

template <int kThreads>
FT_KERNEL void FT_BOUNDS(kThreads, 1) kd_total_kernel(FT_PARAMS(TotalCall) call) {
  const int64_t share = (call.count + blocks() - 1) / blocks(), begin = device::block() * share;
  const int64_t end = begin + share < call.count ? begin + share : call.count;
  Pair sum = {0, 0};
  for (int64_t i = begin + thread(); i < end; i += threads()) {
    const Pair x = call.numbers ? number_of(call, i) : weights_of(call, i);
    sum.kd += x.kd;
    sum.ce += x.ce;
  }
  sum = {sum_over(kWarp, sum.kd), sum_over(kWarp, sum.ce)};
  Pair* const parts = shared<Pair>(0);
  if (lane() == 0) parts[warp()] = sum;
  barrier();
  if (warp() != 0) return;
  sum = {0, 0};
  if (lane() < threads() / kWarp) sum = parts[lane()];
  sum = {sum_over(kWarp, sum.kd), sum_over(kWarp, sum.ce)};
  if (lane() != 0) return;
  if (call.partials) {
    store(call.partials + device::block() * call.width, sum.kd);
    if (call.width == 2) store(call.partials + device::block() * call.width + 1, sum.ce);
  } else if (call.loss_is_double) {
    store(static_cast<double*>(call.loss), sum.kd);
  } else {
    store(static_cast<float*>(call.loss), float(sum.kd));
  }
}

inline void launch_total(TotalCall call, int64_t blocks, Stream stream) {
  const int64_t shared_bytes = kTotalThreads / kWarp * int64_t(sizeof(Pair));
  launch(kd_total_kernel<kTotalThreads>, Grid{blocks, kTotalThreads, 1, shared_bytes}, stream, call);
}

// The sums of `call`, whose result is where it says, by way of partials [total_blocks(call.count), width].
inline void launch_totals(const TotalCall& call, double* partials, Stream stream) {
  const int64_t blocks = total_blocks(call.count);
  if (blocks == 1) return launch_total(call, 1, stream);
  TotalCall first = call;
  first.partials = partials;
  launch_total(first, blocks, stream);
  TotalCall second = call;
  second.numbers = partials;
  second.count = blocks;
  launch_total(second, 1, stream);
}

}  // namespace ft::distill
