// The upstream gradient, applied to a saved gradient: out = in * upstream * grad_scale, one read and one write per
// element; where it is 1 and in place, which is what loss.backward() asks for, nothing is touched. Upstream is on the
// device, so the kernel is launched in any case: few blocks, which then return at once.
//
// A warp has a piece of a row, kScalePiece vectors. Requested bytes: 2 s per element, and 4 to 12 per piece for
// factors.
#pragma once

#include "cuda/kd_block.cuh"

namespace ft::distill {

inline constexpr int kScaleThreads = 256;
inline constexpr int kScaleAtOnce = 4;  // vectors in flight per lane
inline constexpr int64_t kScalePiece = kWarp * kScaleAtOnce;

struct ScaleCall {
  View in, out;
  int64_t rows, columns;
  Values upstream;
  bool upstream_per_row, in_place;
  const float* grad_scales;  // [rows], or null
};

template <class S>
FT_DEVICE void scale_piece(const ScaleCall& call, const S* in, S* out, int64_t piece, Value<S> factor) {
  constexpr int N = kLanes<S>;
  const bool whole = call.in.column_stride == 1 && call.out.column_stride == 1 && phase_of(in) == phase_of(out);
  const int64_t phase = whole ? phase_of(in) : 0;
  const auto first_of = [&](int u) { return ((piece * kScaleAtOnce + u) * kWarp + lane()) * N - phase; };
  const auto is_full = [&](int64_t first) { return whole && first >= 0 && first + N <= call.columns; };
  Pack x[kScaleAtOnce];
#pragma unroll
  for (int u = 0; u < kScaleAtOnce; ++u) {
    if (is_full(first_of(u))) x[u] = load_once(reinterpret_cast<const Pack*>(in + first_of(u)));
  }
#pragma unroll
  for (int u = 0; u < kScaleAtOnce; ++u) {
    const int64_t first = first_of(u);
    Value<S> y[N];
    if (is_full(first)) {
      unpack<S>(x[u], y);
#pragma unroll
      for (int k = 0; k < N; ++k) y[k] *= factor;
      store(reinterpret_cast<Pack*>(out + first), packed<S>(y));
    } else if (first + N > 0 && first < call.columns) {
      unpack<S>(load_some(in, call.in.column_stride, first, call.columns), y);
#pragma unroll
      for (int k = 0; k < N; ++k) y[k] *= factor;
      store_some(out, call.out.column_stride, first, call.columns, y);
    }
  }
}

template <class S>
FT_KERNEL void FT_BOUNDS(kScaleThreads, 3) kd_scale_kernel(FT_PARAMS(ScaleCall) call) {
  double factor = 1;
  if (!call.upstream_per_row) {
    if (lane() == 0) factor = call.upstream.at(0);
    factor = shuffle(kAllLanes, factor, 0);
    if (call.in_place && !call.grad_scales && factor == 1) return;
  }
  // A row's first vector may begin before it: one more vector.
  const int64_t vectors = call.columns / kLanes<S> + 2, pieces = (vectors + kScalePiece - 1) / kScalePiece;
  const int64_t warps = blocks() * (threads() / kWarp), items = call.rows * pieces;
  for (int64_t item = device::block() * (threads() / kWarp) + warp(); item < items; item += warps) {
    const int64_t i = item / pieces;
    double of_row = factor;
    if (lane() == 0) {
      if (call.upstream_per_row) of_row = call.upstream.at(i);
      if (call.grad_scales) of_row *= double(load(call.grad_scales + i));
    }
    if (call.upstream_per_row || call.grad_scales) of_row = shuffle(kAllLanes, of_row, 0);
    if (call.in_place && of_row == 1) continue;
    scale_piece(call, call.in.row<const S>(i), call.out.row<S>(i), item - i * pieces, Value<S>(of_row));
  }
}

template <class S>
void launch_scale_as(const ScaleCall& call, Stream stream) {
  const int64_t vectors = call.columns / kLanes<S> + 2, pieces = (vectors + kScalePiece - 1) / kScalePiece;
  const int64_t warps = kScaleThreads / kWarp, needed = (call.rows * pieces + warps - 1) / warps;
  const int64_t most = int64_t(machine().multiprocessors) * 8;
  launch(kd_scale_kernel<S>, Grid{needed < most ? needed : most, kScaleThreads}, stream, call);
}

inline void launch_kd_scale(const ScaleCall& call, Stream stream) {
  if (call.rows == 0 || call.columns == 0) return;
  switch (call.in.dtype) {
    case DType::kFloat64:
      return launch_scale_as<double>(call, stream);
    case DType::kBFloat16:
      return launch_scale_as<BFloat16>(call, stream);
    case DType::kFloat16:
      return launch_scale_as<Half>(call, stream);
    case DType::kFloat32:
      break;
  }
  launch_scale_as<float>(call, stream);
}

}  // namespace ft::distill
