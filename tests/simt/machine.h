// csrc/cuda/device.cuh on the CPU: every name that a kernel uses, one fiber per CUDA thread. The machine itself is
// machine.cpp; how to build with it and what it finds: README.md. Stricter than a GPU wherever the programming guide
// leaves something undefined: what it cannot prove right is an error, thrown by launch() as std::runtime_error.
#pragma once

#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#define FT_KERNEL
#define FT_DEVICE inline __attribute__((always_inline))
#define FT_BOUNDS(threads, blocks)
#define FT_PARAMS(T) const T&  // constant memory: a table of 32 KB on every fiber's stack would be slow

namespace ft::simt {

using Where = std::source_location;

// What a thread may ask about itself.
struct Self {
  int thread, rank;  // in its block; of its block in the cluster
  int64_t block;
};
struct Launch {
  device::Grid grid{1, device::kWarp};
  int64_t loaded = 0, stored = 0;  // requested bytes of global memory, with FT_SIMT_COUNT
  const void* kernel = nullptr;
};
extern const Self* self;  // of the running fiber
extern Launch current_launch;

enum class Collective { kNone, kShuffle, kShuffleXor, kBallot, kWarpBarrier };

[[noreturn]] void fail(const char* what, const Where& where);
void block_barrier(const Where& where);
void cluster_barrier(const Where& where);
// `value` of lane `from` of the warp (shuffles), or the lanes of the mask whose value is not 0 (ballot).
uint64_t collective(Collective kind, uint32_t mask, uint64_t value, int bytes, int from, const Where& where);
void* shared_at(int64_t offset, int64_t alignment, const Where& where);
void* mapped_to(void* p, int rank, const Where& where);
void run(const device::Grid& grid, const void* kernel, const void* params, void (*call)(const void*, const void*));
const device::Machine& machine();
float rough_exp2(float x);

template <class V>
FT_DEVICE void check_access(const V* p, const Where& where) {
  constexpr auto size = sizeof(V);
  static_assert(size == 1 || size == 2 || size == 4 || size == 8 || size == 16, "a value of 1, 2, 4, 8 or 16 bytes");
  static_assert(alignof(V) == size, "alignas(sizeof): nvcc would split the access");
  static_assert(std::is_trivially_copyable_v<V>);
  if (reinterpret_cast<uintptr_t>(p) % size != 0) fail("global memory access that is not aligned to its size", where);
}

template <class T>
FT_DEVICE T shuffled(Collective kind, uint32_t mask, T value, int from, const Where& where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = collective(kind, mask, bits, sizeof(T), from, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace ft::simt

namespace ft::device {

FT_DEVICE int thread() { return simt::self->thread; }
FT_DEVICE int threads() { return simt::current_launch.grid.threads; }
FT_DEVICE int64_t block() { return simt::self->block; }
FT_DEVICE int64_t blocks() { return simt::current_launch.grid.blocks; }
FT_DEVICE int lane() { return thread() % kWarp; }
FT_DEVICE int warp() { return thread() / kWarp; }

FT_DEVICE void barrier(const simt::Where& where = simt::Where::current()) { simt::block_barrier(where); }
FT_DEVICE void warp_barrier(uint32_t mask, const simt::Where& where = simt::Where::current()) {
  simt::collective(simt::Collective::kWarpBarrier, mask, 0, 0, 0, where);
}

template <class T>
FT_DEVICE T shuffle_xor(uint32_t mask, T value, int lanes, const simt::Where& where = simt::Where::current()) {
  return simt::shuffled(simt::Collective::kShuffleXor, mask, value, lane() ^ lanes, where);
}
template <class T>
FT_DEVICE T shuffle(uint32_t mask, T value, int from, const simt::Where& where = simt::Where::current()) {
  return simt::shuffled(simt::Collective::kShuffle, mask, value, from, where);
}
FT_DEVICE uint32_t ballot(uint32_t mask, bool value, const simt::Where& where = simt::Where::current()) {
  return uint32_t(simt::collective(simt::Collective::kBallot, mask, value, 0, 0, where));
}

template <class T>
FT_DEVICE T* shared(int64_t offset, const simt::Where& where = simt::Where::current()) {
  return static_cast<T*>(simt::shared_at(offset, alignof(T), where));
}

FT_DEVICE int cluster_rank() { return simt::self->rank; }
FT_DEVICE int cluster_size() { return simt::current_launch.grid.cluster; }
FT_DEVICE void cluster_barrier(const simt::Where& where = simt::Where::current()) { simt::cluster_barrier(where); }
template <class T>
FT_DEVICE T* in_block(T* p, int rank, const simt::Where& where = simt::Where::current()) {
  return static_cast<T*>(simt::mapped_to(const_cast<std::remove_const_t<T>*>(p), rank, where));
}

template <class V>
FT_DEVICE V load(const V* p, const simt::Where& where = simt::Where::current()) {
  simt::check_access(p, where);
#if defined(FT_SIMT_COUNT)
  simt::current_launch.loaded += sizeof(V);
#endif
  return *p;
}
template <class V>
FT_DEVICE void store(V* p, std::type_identity_t<V> value, const simt::Where& where = simt::Where::current()) {
  simt::check_access(p, where);
#if defined(FT_SIMT_COUNT)
  simt::current_launch.stored += sizeof(V);
#endif
  *p = value;
}
template <class V>
FT_DEVICE V load_once(const V* p, const simt::Where& where = simt::Where::current()) {
  return load(p, where);
}
template <class V>
FT_DEVICE void store_once(V* p, std::type_identity_t<V> value, const simt::Where& where = simt::Where::current()) {
  store(p, value, where);
}

// ------------------------------------------------------------------------------------------------ host
using Stream = void*;

template <class K, class P>
void launch(void (*kernel)(K), const Grid& grid, Stream, const P& params) {
  static_assert(std::is_same_v<std::remove_cvref_t<K>, P>, "the kernel's parameters");
  static_assert(std::is_trivially_copyable_v<P> && sizeof(P) <= 32764, "what fits the constant bank of a launch");
  simt::run(grid, reinterpret_cast<const void*>(kernel), &params, [](const void* k, const void* p) {
    reinterpret_cast<void (*)(const P&)>(const_cast<void*>(k))(*static_cast<const P*>(p));
  });
}

inline const Machine& machine() { return simt::machine(); }

}  // namespace ft::device

#include "simt/numbers.h"
