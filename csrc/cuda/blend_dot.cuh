// The dot product of each of a list of tensors with a weighted sum of others, which is never written anywhere: the
// gradient of a coefficient of blend.
//
//   dot_i = sum over the elements of with * (sum_j coef_j x_j)
//
// The sum as in blend.cuh; where the coefficients sum to 0 (target - sum_j w_j source_j) it is that of the
// differences from the base, of which nothing is lost where the operands are close. Products in fp32, fp64 where an
// operand is; added up over one batch of a thread (at most 16 elements), then in double. Two kernels:
// blend_dot_kernel reads every operand once and leaves one partial sum per chunk, blend_dot_total_kernel adds those
// of a tensor in their order, so that a dot product has the same bits at every run and on every device.
//
// Requested bytes, fp32: 4 (terms + 1) per element, 16 per chunk of at most kChunk elements for its partial sum
// (written and read), 8 per tensor.
#pragma once

#include <cstdint>

#include "cuda/blend.cuh"

namespace ft::lists {

// Sums are multiplied and added up, each thread its own.
struct Multiplied {
  static constexpr bool kOfBase = false;
  const void* with;
  DType type;
  double total;

  template <class Access, int L, int U>
  FT_DEVICE auto fetch(const Places<U>& places) const {
    return Access::template fetch_at<L>(with, type, places);
  }
  template <class Access, class F, int L, int U, class Met>
  FT_DEVICE void take(const Places<U>&, const Met& met, const F (&sums)[U][L]) {
    F part = 0;  // outside of the item both are zero
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int l = 0; l < L; ++l) part += met.template get<F>(u, l) * sums[u][l];
    }
    total += double(part);
  }
};

template <int kBytes>
struct BlendDotCall {
  double* partials;  // [chunks of the launch]
  double* dots;      // [index of an item]
  Table<kBytes> table;
};
static_assert(sizeof(BlendDotCall<kSmallTable>) <= kSmallTable + kBeside);

template <int kBytes>
FT_KERNEL void FT_BOUNDS(kThreads, 4) blend_dot_kernel(FT_PARAMS(BlendDotCall<kBytes>) call) {
  for (int64_t chunk = device::block(); chunk < call.table.chunks; chunk += device::blocks()) {
    const int i = item_of(call.table, uint32_t(chunk));
    const BlendItem item = call.table.template item<BlendItem>(i);
    Multiplied result = {item.out, DType(item.out_type), 0};
    blend_piece(item.way, terms_of(call.table, i, item, BlendCoefs{}), result, piece_of(item, uint32_t(chunk)));
    const double total = block_sum(result.total);
    if (device::thread() == 0) device::store(call.partials + chunk, total);
    device::barrier();  // thread 0 has read what the next chunk's sum overwrites
  }
}

// One block per item.
template <int kBytes>
FT_KERNEL void FT_BOUNDS(kThreads, 1) blend_dot_total_kernel(FT_PARAMS(BlendDotCall<kBytes>) call) {
  const int i = int(device::block());
  const BlendItem& item = call.table.template item<BlendItem>(i);
  const int64_t end =
      i + 1 < call.table.items ? call.table.template item<Item>(i + 1).first_chunk : call.table.chunks;
  double total = 0;
#pragma unroll 4
  for (int64_t k = item.first_chunk + device::thread(); k < end; k += kThreads) {
    total += device::load(call.partials + k);
  }
  total = block_sum(total);
  if (device::thread() == 0) device::store(call.dots + item.index, total);
}

// ------------------------------------------------------------------------------------------------ host
inline int64_t count_chunks(const std::vector<Slice>& slices) {
  int64_t total = 0;
  for (const Slice& s : slices) total += s.chunks;
  return total;
}

// partials: [count_chunks(slices)]; dots: one of each item, at its index. Coefficients are known.
inline void launch_blend_dot(const Items& items, const std::vector<Slice>& slices, double* partials, double* dots,
                             device::Stream stream) {
  for (const Slice& slice : slices) {
    with_table_size(items, slice, [&](auto bytes) {
      BlendDotCall<bytes()> call;
      call.partials = partials;
      call.dots = dots;
      items.copy(slice, call.table);
      device::launch(blend_dot_kernel<bytes()>, {slice.blocks(), kThreads, 1, kSumBytes}, stream, call);
      device::launch(blend_dot_total_kernel<bytes()>, {slice.count, kThreads, 1, kSumBytes}, stream, call);
    });
    partials += slice.chunks;
  }
}

}  // namespace ft::lists
