// The L2-SP penalty of a list of parameters, and its gradient.
//
//   value = sum_i strength_i sum F_i (p_i - p0_i)^2    p0 = 0 where there is no start point, F = 1 where no
//   importance grad_i (+)= 2 strength_i scale F_i (p_i - p0_i)    scale: a constant, or one value in device memory
//
// In fp32 over one batch of a thread (at most 16 elements), then in double; fp64 where an operand is. Two kernels:
// l2sp_kernel reads every operand once and leaves one partial sum per block, l2sp_total_kernel adds those in their
// order, so that the value has the same bits at every run and on every device.
//
// Requested bytes, fp32: 16 per parameter (read p, p0, grad, write grad), 8 for the value alone, 12 where the
// gradient is written and not added to; 4 more with an importance. Beside that 16 per block for its partial sum
// (written and read; none where no value is asked for), at most min(chunks, kMostBlocks) blocks per launch, a chunk
// being kChunk elements or a tensor's last ones: 0.006% of the bytes of full chunks; 4 or 8 for the value; and where
// the scale is in device memory, 4 or 8 of it per thread, of which a block moves one sector.
#pragma once

#include <cstdint>

#include "cuda/table.h"
#include "cuda/table_access.cuh"

namespace ft::lists {

struct L2spItem : Item {
  const void* param;
  const void* start;       // null: 0
  const void* importance;  // null: 1
  void* grad;              // null: the value alone
  double strength;
  DType param_dtype : 8, start_dtype : 8, importance_dtype : 8, grad_dtype : 8;
  bool accumulate;  // add to grad, or write it
};
static_assert(sizeof(L2spItem) == 64, "the fewer bytes, the fewer launches");

template <int kBytes>
struct L2spCall {
  Scalar scale;
  double* partials;  // [blocks of the launch]; null: the gradients alone
  Table<kBytes> table;
};
static_assert(sizeof(L2spCall<kSmallTable>) <= kSmallTable + kBeside);

// One thread's part of the sum of squares.
template <class Access, class F, int L, int U, bool kImportance, class Span>
FT_DEVICE double l2sp_span(const L2spItem& item, const Span& span, int64_t begin, F factor) {
  double total = 0;
  for (int k = device::thread(); k < span.count; k += kThreads * U) {
    const Places<U> places = places_of<U>(span, begin, k);
    const bool add = item.grad && item.accumulate;
    const auto p = Access::template fetch_at<L>(item.param, item.param_dtype, places);
    const auto p0 = Access::template fetch_at<L>(item.start, item.start_dtype, places, item.start != nullptr);
    Batch<F, L, U> weights;
    if constexpr (kImportance) {
      weights = Any<F>::template fetch_at<L>(item.importance, item.importance_dtype, places);
    }
    const auto old = Access::template fetch_at<L>(item.grad, item.grad_dtype, places, add);
    F sum = 0, grad[U][L];
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int l = 0; l < L; ++l) {
        const F d = p.template get<F>(u, l) - p0.template get<F>(u, l);
        F weighed = d;
        if constexpr (kImportance) weighed *= weights.template get<F>(u, l);
        sum += weighed * d;
        grad[u][l] = old.template get<F>(u, l) + factor * weighed;
      }
    }
    if (item.grad) Access::put_at(item.grad, item.grad_dtype, places, grad);
    total += double(sum);
  }
  return total;
}

template <class Access, class F, int L, int U>
FT_DEVICE double l2sp_vectors(const L2spItem& item, const Piece& piece, double factor) {
  return l2sp_span<Access, F, L, U, false>(item, Vectors<L>(piece), piece.begin, F(factor));
}
template <class F>
FT_DEVICE double l2sp_edges(const L2spItem& item, const Piece& piece, double factor) {
  return l2sp_span<Any<F>, F, 1, 4, false>(item, Edges(piece), piece.begin, F(factor));
}
// With an importance every operand may be of any type: one way for all, by a vector at a time (registers).
template <class F, int L>
FT_DEVICE double l2sp_weighed(const L2spItem& item, const Piece& piece, double factor) {
  double sum = 0;
  if (piece.vectors) sum = l2sp_span<Any<F>, F, L, 1, true>(item, Vectors<L>(piece), piece.begin, F(factor));
  return sum + l2sp_span<Any<F>, F, 1, 1, true>(item, Edges(piece), piece.begin, F(factor));
}

FT_DEVICE double l2sp_piece(const L2spItem& item, const Piece& piece, double factor) {
  if (item.importance) {
    const bool in_double = item.way == Way::kMixedDouble || item.way == Way::kElementsDouble;
    return in_double ? l2sp_weighed<double, 2>(item, piece, factor) : l2sp_weighed<float, 4>(item, piece, factor);
  }
  double sum = 0;
  switch (item.way) {
    case Way::kFloat32:
      sum = l2sp_vectors<Typed<float>, float, 4, 2>(item, piece, factor);
      break;
    case Way::kBFloat16:
      sum = l2sp_vectors<Typed<BFloat16>, float, 8, 2>(item, piece, factor);
      break;
    case Way::kFloat16:
      sum = l2sp_vectors<Typed<Half>, float, 8, 2>(item, piece, factor);
      break;
    case Way::kMixed:
      sum = l2sp_vectors<Any<float>, float, 4, 2>(item, piece, factor);
      break;
    case Way::kMixedDouble:
      sum = l2sp_vectors<Any<double>, double, 2, 2>(item, piece, factor);
      break;
    default:
      break;
  }
  const bool in_double = item.way == Way::kMixedDouble || item.way == Way::kElementsDouble;
  return sum + (in_double ? l2sp_edges<double>(item, piece, factor) : l2sp_edges<float>(item, piece, factor));
}

template <int kBytes>
FT_KERNEL void FT_BOUNDS(kThreads, 4) l2sp_kernel(FT_PARAMS(L2spCall<kBytes>) call) {
  const double scale = call.scale.get();
  double total = 0;
  for (int64_t chunk = device::block(); chunk < call.table.chunks; chunk += device::blocks()) {
    const L2spItem item = call.table.template item<L2spItem>(item_of(call.table, uint32_t(chunk)));
    total += item.strength * l2sp_piece(item, piece_of(item, uint32_t(chunk)), 2 * item.strength * scale);
  }
  if (!call.partials) return;
  total = block_sum(total);
  if (device::thread() == 0) device::store(call.partials + device::block(), total);
}

template <class Value>
struct L2spTotal {
  const double* partials;  // [count]
  int64_t count;
  Value* value;  // fp32 or fp64
};

// One block.
template <class Value>
FT_KERNEL void FT_BOUNDS(kThreads, 1) l2sp_total_kernel(FT_PARAMS(L2spTotal<Value>) call) {
  double total = 0;
#pragma unroll 4
  for (int64_t i = device::thread(); i < call.count; i += kThreads) total += device::load(call.partials + i);
  total = block_sum(total);
  if (device::thread() == 0) device::store(call.value, Value(total));
}

// ------------------------------------------------------------------------------------------------ host
// partials: [count_blocks(slices)]; null: the gradients alone.
inline void launch_l2sp(const Items& items, const std::vector<Slice>& slices, const Scalar& scale, double* partials,
                        device::Stream stream) {
  for (const Slice& slice : slices) {
    with_table_size(items, slice, [&](auto bytes) {
      L2spCall<bytes()> call;
      call.scale = scale;
      call.partials = partials;
      items.copy(slice, call.table);
      device::launch(l2sp_kernel<bytes()>, {slice.blocks(), kThreads, 1, kSumBytes}, stream, call);
    });
    if (partials) partials += slice.blocks();
  }
}

template <class Value>
void launch_l2sp_total(const double* partials, int64_t count, Value* value, device::Stream stream) {
  const L2spTotal<Value> call = {partials, count, value};
  device::launch(l2sp_total_kernel<Value>, {1, kThreads, 1, kSumBytes}, stream, call);
}

}  // namespace ft::lists
