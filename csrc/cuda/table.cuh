// A whole list of tensors as one launch: its items travel as a table inside the kernel's argument, and the list is
// cut into chunks of which a block takes one after the other.
//
// Why in the argument, also for lists that need several launches: a table in device memory needs a copy from pinned
// memory whose lifetime someone must guard, a cache that compares entries (gradients move at each step), and has no
// meaning that survives CUDA-graph capture once that memory is used again. An argument is copied by the launch itself
// and is part of a captured graph. 32 KB are 509 parameters with gradients: one launch for nearly every model, and a
// list that needs more of them keeps the device busy for longer than the next launch takes to arrive.
//
// Why chunks that end with their tensor: all operands of a piece then share one alignment, one dtype and one path.
// Block b takes chunks b, b + blocks, ...: borders and owners do not depend on the device, so neither do sums.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace ft::lists {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 16384;      // elements; a multiple of every vector's
constexpr int64_t kMostBlocks = 8192;  // of a launch: several waves of any device, and few partial sums

// How an item's elements are read and written.
enum class Way : uint8_t {
  kFloat32,         // all operands, in vectors of 16 bytes
  kBFloat16,        //
  kFloat16,         //
  kMixed,           // of fp32, bf16 and fp16, in vectors of 4 elements
  kMixedDouble,     // with fp64 among them, in vectors of 2
  kElements,        // one at a time: operands that no head brings to a common alignment
  kElementsDouble,  //
};

constexpr FT_HD int lanes_of(Way way) {
  switch (way) {
    case Way::kFloat32:
    case Way::kMixed:
      return 4;
    case Way::kBFloat16:
    case Way::kFloat16:
      return 8;
    case Way::kMixedDouble:
      return 2;
    default:
      return 1;
  }
}

// What every item of a table begins with; operations derive theirs.
struct Item {
  int64_t n;             // elements, at least 1
  uint32_t first_chunk;  // of this item; they ascend
  Way way;
  uint8_t head;  // elements before the first whole vector, at most n; 0 for kElements*
};

constexpr FT_HD int64_t chunks_of(int64_t n, int head) {
  const int64_t body = n - head;
  return body > kChunk ? (body + kChunk - 1) / kChunk : 1;
}

// Items of one launch, `stride` bytes apart.
template <int kBytes>
struct Table {
  int32_t items, stride;
  uint32_t chunks;
  alignas(8) unsigned char bytes[kBytes];

  template <class T>
  FT_HD const T& at(int offset) const {
    return *reinterpret_cast<const T*>(bytes + offset);
  }
  template <class T>
  FT_HD const T& item(int i) const {
    return at<T>(i * stride);
  }
};

// Arguments hold 4 KB everywhere; 32764 bytes since CUDA 12.1, on sm_70 and later. Two sizes because a launch pays
// for the bytes of its argument. kBeside of them are left for what is not the table.
constexpr int kBeside = 128;
constexpr int kSmallTable = 4096 - kBeside;
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kLargeTable = kSmallTable;
#else
constexpr int kLargeTable = 32760 - kBeside;
#endif

// The item that a chunk of the table belongs to: the last one that does not begin after it.
template <int kBytes>
FT_DEVICE int item_of(const Table<kBytes>& table, uint32_t chunk) {
  int first = 0, end = table.items;
  while (end - first > 1) {
    const int middle = (first + end) / 2;
    if (table.template item<Item>(middle).first_chunk <= chunk) {
      first = middle;
    } else {
      end = middle;
    }
  }
  return first;
}

// A chunk's part of its item. Places count from `begin`, where the vectors begin.
struct Piece {
  int64_t begin;
  int vectors;  // elements in whole vectors
  int head, tail;
};

FT_DEVICE Piece piece_of(const Item& item, uint32_t chunk) {
  const uint32_t k = chunk - item.first_chunk;
  Piece piece;
  piece.begin = item.head + k * kChunk;
  const int64_t rest = item.n - piece.begin;
  const int n = int(rest < kChunk ? rest : kChunk);
  const int lanes = lanes_of(item.way);
  piece.vectors = lanes == 1 ? 0 : n / lanes * lanes;
  piece.head = k == 0 ? item.head : 0;
  piece.tail = n - piece.vectors;
  return piece;
}

// Work for the threads of a block: `count` steps, step k at the place at(k).
template <int L>
struct Vectors {
  int count;
  FT_DEVICE explicit Vectors(const Piece& piece) : count(piece.vectors / L) {}
  FT_DEVICE int at(int k) const { return k * L; }
};
// Head and tail, or all of a kElements piece.
struct Edges {
  int count, head, vectors;
  FT_DEVICE explicit Edges(const Piece& piece)
      : count(piece.head + piece.tail), head(piece.head), vectors(piece.vectors) {}
  FT_DEVICE int at(int k) const { return k < head ? k - head : k - head + vectors; }
};

// The sum over the block, in thread 0; the arena's first kThreads / kWarp doubles are used.
constexpr int64_t kSumBytes = kThreads / device::kWarp * sizeof(double);
FT_DEVICE double block_sum(double x) {
  for (int lanes = device::kWarp / 2; lanes > 0; lanes /= 2) x += device::shuffle_xor(device::kAllLanes, x, lanes);
  double* sums = device::shared<double>(0);
  if (device::lane() == 0) sums[device::warp()] = x;
  device::barrier();
  double total = 0;
  if (device::thread() == 0) {
    for (int w = 0; w < kThreads / device::kWarp; ++w) total += sums[w];
  }
  return total;
}

// A number of the call: known to the host, or fp32 or fp64 in device memory.
struct Scalar {
  const void* data;  // null: value
  double value;
  bool is_double;

  FT_DEVICE double get(int64_t i = 0) const {
    if (!data) return value;
    return is_double ? device::load(static_cast<const double*>(data) + i)
                     : double(device::load(static_cast<const float*>(data) + i));
  }
};

}  // namespace ft::lists
