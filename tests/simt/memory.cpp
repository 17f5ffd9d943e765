// Shared memory: an arena per block of exactly the bytes of the launch, poisoned before the block runs, guarded on
// both sides, and closed when the block has exited.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "simt/state.h"

namespace ft::simt {
namespace {

constexpr int64_t kGuard = 256;
constexpr unsigned char kGuardByte = 0xa5, kPoison = 0xff;  // four or eight bytes 0xff are a NaN, two as well

struct Arena {
  unsigned char* memory = nullptr;  // guard, arena, guard
  int64_t bytes = 0;
};
std::vector<Arena> arenas, retired;

// Under ASan what lies beside the arena is its redzone; the guards serve the other builds.
#if defined(FT_SIMT_ASAN)
constexpr int64_t kBefore = 0, kAfter = 0;
#else
constexpr int64_t kBefore = kGuard, kAfter = kGuard;
#endif

Arena allocate(int64_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 128, std::max<int64_t>(1, kBefore + bytes + kAfter))) throw std::bad_alloc();
  auto* memory = static_cast<unsigned char*>(p);
  std::memset(memory, kGuardByte, kBefore);
  std::memset(memory + kBefore + bytes, kGuardByte, kAfter);
  return {memory, bytes};
}

void release(const Arena& a) {
  allow(a.memory, a.bytes);
  std::free(a.memory);
}

bool intact(const unsigned char* p, int64_t n) {
  return std::all_of(p, p + n, [](unsigned char c) { return c == kGuardByte; });
}

}  // namespace

void make_arenas() {
  const auto& grid = current_launch.grid;
#if defined(FT_SIMT_TSAN)
  // Memory used again would look like a race between a block and the one before it.
  retired.insert(retired.end(), arenas.begin(), arenas.end());
  arenas.clear();
#endif
  arenas.resize(grid.cluster);
  for (int rank = 0; rank < grid.cluster; ++rank) {
    Arena& a = arenas[rank];
    if (!a.memory) a = allocate(grid.shared_bytes);
    cluster.blocks[rank].arena = a.memory + kBefore;
    allow(a.memory + kBefore, a.bytes);
    std::memset(a.memory + kBefore, kPoison, a.bytes);
  }
}

// A remote access that no cluster_barrier orders before the exit is a race with this (TSan), a use of forbidden
// memory (ASan), or meets a NaN.
void close_arena(Block& block) {
  const int64_t bytes = current_launch.grid.shared_bytes;
  pretend_write(block.arena, bytes);
#if !defined(FT_SIMT_TSAN)
  std::memset(block.arena, kPoison, bytes);
#endif
  forbid(block.arena, bytes);
}

void check_arenas() {
  for (const Arena& a : arenas) {
    if (!intact(a.memory, kBefore) || !intact(a.memory + kBefore + a.bytes, kAfter)) {
      throw std::runtime_error("simt: shared memory was written outside its " + std::to_string(a.bytes) + " bytes");
    }
  }
}

void free_arenas() {
  for (const Arena& a : arenas) release(a);
  for (const Arena& a : retired) release(a);
  arenas.clear();
  retired.clear();
}

void* shared_at(int64_t offset, int64_t alignment, const Where& where) {
  const int64_t bytes = current_launch.grid.shared_bytes;
  if (offset < 0 || offset > bytes) {
    fail(("shared memory from byte " + std::to_string(offset) + " of " + std::to_string(bytes)).c_str(), where);
  }
  if (offset % alignment != 0) fail("shared memory that is not aligned to its type", where);
  return running_block().arena + offset;
}

void* mapped_to(void* p, int rank, const Where& where) {
  if (rank < 0 || rank >= current_launch.grid.cluster) fail("in_block of a rank outside the cluster", where);
  const int64_t offset = static_cast<unsigned char*>(p) - running_block().arena;
  if (offset < 0 || offset > current_launch.grid.shared_bytes)
    fail("in_block of a pointer outside shared memory", where);
  if (rank != self->rank && !cluster.meeting.once) {
    fail("in_block before any cluster_barrier, of a block that may not have started", where);
  }
  if (cluster.blocks[rank].live == 0) fail("in_block of a block that has exited", where);
  return cluster.blocks[rank].arena + offset;
}

char* Tokens::next() {
  if (used_ == kPage) {
    pages_.push_back(static_cast<char*>(std::malloc(kPage)));
    used_ = 0;
  }
  char* p = pages_.back() + used_;
  used_ += 8;
  return p;
}

void Tokens::clear() {
  for (char* p : pages_) std::free(p);
  pages_.clear();
  used_ = kPage;
}

}  // namespace ft::simt
