// A row that a block, or a cluster of blocks, works on together: its options, maxima and sums, shared.
//
// Every block of a cluster writes its part of a maximum or of a sum into the shared memory of all of them, and one
// cluster barrier later each has the whole: no block reads another's memory, so none must wait for others to exit.
#pragma once

#include "cuda/kd_finish.cuh"

namespace ft::distill {

inline constexpr int kMostCluster = 8;
inline constexpr int kMostWarps = 32;
// Warps of a cluster: 8 blocks of 16 (kd_row.cuh), or one of 32 (kd_sweep.cuh).
inline constexpr int kMostClusterWarps = 128;

template <class A>
struct alignas(16) BlockShared {
  KdRow row;
  double label_logit;
  Factors factors;
  double parts[kMostWarps][kSums];
  double sums[kMostCluster][kSums];  // of each block of the cluster
  double totals[kSums];
  A tops_s[kMostClusterWarps], tops_t[kMostClusterWarps];
};

template <class A>
inline constexpr int64_t kHeader = (int64_t(sizeof(BlockShared<A>)) + 15) / 16 * 16;

template <class A>
FT_DEVICE BlockShared<A>& block_shared() {
  return *shared<BlockShared<A>>(0);
}

FT_DEVICE double sum_over(int lanes, double x) {
  for (int l = lanes / 2; l > 0; l /= 2) x += shuffle_xor(kAllLanes, x, l);
  return x;
}
template <class A>
FT_DEVICE A top_over(int lanes, A x) {
  for (int l = lanes / 2; l > 0; l /= 2) x = higher(x, shuffle_xor(kAllLanes, x, l));
  return x;
}
// All lanes call; the sum is over each group of this many.
FT_DEVICE Totals sum_over(int lanes, Totals x) {
  return {sum_over(lanes, x.exp_s), sum_over(lanes, x.exp_t), sum_over(lanes, x.exp_1),
          sum_over(lanes, x.gap),   sum_over(lanes, x.cross), sum_over(lanes, x.shift_s)};
}

// The logit of a row's label, or 0 where there is none to read. Read before an in-place gradient overwrites it.
template <class Element>
FT_DEVICE double label_logit(const KdCall& call, const KdRow& row, Element element) {
  if (row.label_weight == 0 || row.label < 0 || row.label >= call.columns) return 0;
  return element(row.label);
}

// The maxima of all threads of the cluster.
template <class A>
FT_DEVICE Refs<A> row_tops(BlockShared<A>& block, Refs<A> top, int rank, int size) {
  top = {top_over(kWarp, top.s), top_over(kWarp, top.t)};
  const int warps = threads() / kWarp;
  if (lane() < size) {
    *in_block(&block.tops_s[rank * warps + warp()], lane()) = top.s;
    *in_block(&block.tops_t[rank * warps + warp()], lane()) = top.t;
  }
  if (size > 1) {
    cluster_barrier();
  } else {
    barrier();
  }
  top = {neg_inf<A>(), neg_inf<A>()};
  for (int k = lane(); k < size * warps; k += kWarp) {
    top.s = higher(top.s, block.tops_s[k]);
    top.t = higher(top.t, block.tops_t[k]);
  }
  return {top_over(kWarp, top.s), top_over(kWarp, top.t)};
}

// From each thread's sums to block.factors, and to what is stored of the row beside its gradient.
template <class A>
FT_DEVICE void finish_row(const KdCall& call, int64_t i, BlockShared<A>& block, Totals totals, const RowMath<A>& m,
                          Refs<A> top, int rank, int size) {
  totals = sum_over(kWarp, totals);
  if (lane() == 0) *reinterpret_cast<Totals*>(block.parts[warp()]) = totals;
  barrier();
  if (warp() == 0 && lane() < kSums) {
    double sum = 0;
    for (int w = 0; w < threads() / kWarp; ++w) sum += block.parts[w][lane()];
    for (int r = 0; r < size; ++r) *in_block(&block.sums[rank][lane()], r) = sum;
  }
  if (size > 1) cluster_barrier();
  if (warp() == 0) {
    if (lane() < kSums) {
      double sum = 0;  // by this lane if the block is alone: no barrier is needed then
      for (int r = 0; r < size; ++r) sum += block.sums[r][lane()];
      block.totals[lane()] = sum;
    }
    warp_barrier(kAllLanes);
  }
  if (thread() == 0) {
    const auto& whole = *reinterpret_cast<const Totals*>(block.totals);
    block.factors = factors_of(call, block.row, m, stat_of(whole, m, top.s, top.t, call.columns));
  }
  barrier();
  if (thread() == 0 && rank == 0) {
    const auto& whole = *reinterpret_cast<const Totals*>(block.totals);
    store_results(call, i, block.row, m, stat_of(whole, m, top.s, top.t, call.columns), block.label_logit);
  }
}

}  // namespace ft::distill
