// What a kernel of this package asks of the machine it runs on, and nothing else: ids, barriers, shuffles, shared
// memory, clusters, global loads and stores, a launch. Kernels (*.cuh) use these names only. Here they are CUDA; with
// FT_SIMT they are tests/simt/machine.h, which runs the same kernels on the CPU, one fiber or thread per CUDA thread.
//
// Rules that both sides rely on:
//   - blocks are one-dimensional, threads a multiple of kWarp;
//   - all shared memory is one dynamic arena, addressed by byte offset (a __shared__ variable could neither be
//   poisoned
//     nor mapped to another block of a cluster by the harness);
//   - all global memory is read and written by load*/store* with naturally aligned values of 1, 2, 4, 8 or 16 bytes
//     (the counting build of the harness counts requested bytes there);
//   - shuffles and ballots name the lanes that take part, and exactly those call;
//   - every block of a cluster reaches every cluster_barrier, and the last one comes after the last remote access.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "cpu/dtype.h"

namespace ft::device {
constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// The shape of a launch. shared_bytes: dynamic shared memory of each block.
struct Grid {
  int64_t blocks;  // a multiple of cluster; at most kMostBlocks: kernels loop over what is more
  int threads;
  int cluster = 1;
  int64_t shared_bytes = 0;
};
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;

// What a launch is planned by.
struct Machine {
  int multiprocessors;
  int64_t shared_per_block;           // the opt-in maximum
  int64_t shared_per_multiprocessor;  // of all resident blocks, 1 KiB of each taken by the system
  int most_cluster;                   // blocks per cluster: 1 before sm_90, 8 portable
};
}  // namespace ft::device

#if defined(FT_SIMT)
#include "simt/machine.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FT_KERNEL __global__
#define FT_DEVICE __device__ __forceinline__
#define FT_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define FT_PARAMS(T) const __grid_constant__ T  // stays in the constant bank: no copy to local memory

namespace ft::device {

FT_DEVICE int thread() { return int(threadIdx.x); }
FT_DEVICE int threads() { return int(blockDim.x); }
FT_DEVICE int64_t block() { return blockIdx.x; }
FT_DEVICE int64_t blocks() { return gridDim.x; }
FT_DEVICE int lane() { return thread() % kWarp; }
FT_DEVICE int warp() { return thread() / kWarp; }

FT_DEVICE void barrier() { __syncthreads(); }
FT_DEVICE void warp_barrier(uint32_t mask) { __syncwarp(mask); }

// T: of 4 or 8 bytes.
template <class T>
FT_DEVICE T shuffle_xor(uint32_t mask, T value, int lanes) {
  return __shfl_xor_sync(mask, value, lanes);
}
template <class T>
FT_DEVICE T shuffle(uint32_t mask, T value, int from) {
  return __shfl_sync(mask, value, from);
}
FT_DEVICE uint32_t ballot(uint32_t mask, bool value) { return __ballot_sync(mask, value); }

// The block's shared memory from this byte on; aligned to 16 if the offset is.
template <class T>
FT_DEVICE T* shared(int64_t offset) {
  extern __shared__ __align__(128) unsigned char arena[];
  return reinterpret_cast<T*>(arena + offset);
}

// Clusters: of 1 block unless the launch said otherwise.
FT_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
#else
  return 0;
#endif
}
FT_DEVICE int cluster_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return int(size);
#else
  return 1;
#endif
}
// A barrier of all threads of the cluster; what was written to shared memory before it is seen after it, also
// remotely.
FT_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
// The address in block `rank` of the cluster of what is at p in this block's shared memory.
template <class T>
FT_DEVICE T* in_block(T* p, int rank) {
#if __CUDA_ARCH__ >= 900
  return reinterpret_cast<T*>(__cluster_map_shared_rank(const_cast<void*>(static_cast<const void*>(p)), rank));
#else
  return p;
#endif
}

// Global memory. *_once: not worth keeping in the caches.
template <class V>
FT_DEVICE V load(const V* p) {
  return *p;
}
template <class V>
FT_DEVICE void store(V* p, V value) {
  *p = value;
}
template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using Type = uint8_t;
};
template <>
struct Word<2> {
  using Type = uint16_t;
};
template <>
struct Word<4> {
  using Type = uint32_t;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};
template <class V>
FT_DEVICE V load_once(const V* p) {
  using W = typename Word<sizeof(V)>::Type;
  W w = __ldcs(reinterpret_cast<const W*>(p));
  return reinterpret_cast<V&>(w);
}
template <class V>
FT_DEVICE void store_once(V* p, V value) {
  using W = typename Word<sizeof(V)>::Type;
  __stcs(reinterpret_cast<W*>(p), reinterpret_cast<W&>(value));
}

// 2^x within 2 units in the last place; 0 below the normal range.
FT_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FT_DEVICE float widen(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
FT_DEVICE float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
FT_DEVICE float widen(float x) { return x; }
FT_DEVICE double widen(double x) { return x; }
// To nearest even.
FT_DEVICE void narrow(float x, BFloat16& y) { y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
FT_DEVICE void narrow(float x, Half& y) { y.bits = __half_as_ushort(__float2half_rn(x)); }
template <class F>
FT_DEVICE void narrow(F x, float& y) {
  y = float(x);
}
template <class F>
FT_DEVICE void narrow(F x, double& y) {
  y = double(x);
}

// Two 16-bit values in a word, the first in its low half, by one instruction: narrowed, and the greater of each (of a
// NaN and a number, the number).
FT_DEVICE uint32_t narrow_pair(float a, float b, BFloat16) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<uint32_t&>(pair);
}
FT_DEVICE uint32_t narrow_pair(float a, float b, Half) {
  __half2 pair = __floats2half2_rn(a, b);
  return reinterpret_cast<uint32_t&>(pair);
}
FT_DEVICE uint32_t max_pair(uint32_t a, uint32_t b, BFloat16) {
  __nv_bfloat162 pair = __hmax2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
  return reinterpret_cast<uint32_t&>(pair);
}
FT_DEVICE uint32_t max_pair(uint32_t a, uint32_t b, Half) {
  __half2 pair = __hmax2(reinterpret_cast<__half2&>(a), reinterpret_cast<__half2&>(b));
  return reinterpret_cast<uint32_t&>(pair);
}

// ------------------------------------------------------------------------------------------------ host
using Stream = cudaStream_t;

// Throws std::runtime_error where CUDA does not launch.
template <class P>
void launch(void (*kernel)(P), const Grid& grid, Stream stream, const P& params);

// Of the current device; asked once per device.
const Machine& machine();

}  // namespace ft::device

#include "cuda/launch.cuh"
#endif
