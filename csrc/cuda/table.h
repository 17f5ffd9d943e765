// The host's part of table.cuh: items are collected, given a way, and cut into launches. Without torch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cuda/table.cuh"

namespace ft::lists {

struct Run {
  const void* data;
  DType dtype;
};

constexpr int64_t bytes_of_element(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Elements from this address to the next one where a vector of `lanes` may begin.
inline int64_t elements_to_vector(const Run& run, int lanes) {
  const int64_t size = bytes_of_element(run.dtype), vector = size * lanes;
  const auto past = int64_t(reinterpret_cast<uintptr_t>(run.data) % uintptr_t(vector));
  return (vector - past) % vector / size;
}

// Sets n, way and head for operands that belong together element by element. in_double: whatever their types are.
inline void choose_way(Item& item, const Run* runs, size_t count, int64_t n, bool in_double = false) {
  bool alike = true;
  for (size_t i = 0; i < count; ++i) {
    alike = alike && runs[i].dtype == runs[0].dtype;
    in_double = in_double || runs[i].dtype == DType::kFloat64;
  }
  const Way typed = runs[0].dtype == DType::kFloat32    ? Way::kFloat32
                    : runs[0].dtype == DType::kBFloat16 ? Way::kBFloat16
                                                        : Way::kFloat16;
  item.n = n;
  item.way = in_double ? Way::kMixedDouble : alike ? typed : Way::kMixed;
  const int lanes = lanes_of(item.way);
  const int64_t head = elements_to_vector(runs[0], lanes);
  item.head = uint8_t(std::min(head, n));
  for (size_t i = 1; i < count; ++i) {
    if (elements_to_vector(runs[i], lanes) == head) continue;
    item.way = in_double ? Way::kElementsDouble : Way::kElements;
    item.head = 0;
  }
}

// Items of one launch.
struct Slice {
  int64_t first, count, chunks;
  int64_t blocks() const { return std::min(chunks, kMostBlocks); }
};

inline int64_t count_blocks(const std::vector<Slice>& slices) {
  int64_t total = 0;
  for (const Slice& s : slices) total += s.blocks();
  return total;
}

// Items of one size, as the tables take them.
class Items {
 public:
  explicit Items(int64_t stride, size_t expected = 0) : stride_(stride) { bytes_.reserve(expected * size_t(stride)); }

  // The next item, `stride` bytes to be written: valid until the next call.
  unsigned char* add() {
    bytes_.resize(bytes_.size() + size_t(stride_));
    return bytes_.data() + bytes_.size() - stride_;
  }

  int64_t count() const { return int64_t(bytes_.size()) / stride_; }
  int64_t stride() const { return stride_; }
  bool fits(int64_t count, int bytes) const { return count * stride_ <= bytes; }

  // Cuts the list into launches, and numbers the chunks of each.
  std::vector<Slice> cut() {
    std::vector<Slice> slices;
    const int64_t most = kLargeTable / stride_;
    for (int64_t i = 0; i < count(); ++i) {
      Item& item = *reinterpret_cast<Item*>(bytes_.data() + i * stride_);
      const int64_t chunks = chunks_of(item.n, item.head);
      if (slices.empty() || slices.back().count == most || slices.back().chunks + chunks > kMostChunks) {
        slices.push_back({i, 0, 0});
      }
      item.first_chunk = uint32_t(slices.back().chunks);
      slices.back().count += 1;
      slices.back().chunks += chunks;
    }
    return slices;
  }

  template <int kBytes>
  void copy(const Slice& slice, Table<kBytes>& table) const {
    table.items = int32_t(slice.count);
    table.stride = int32_t(stride_);
    table.chunks = uint32_t(slice.chunks);
    std::memcpy(table.bytes, bytes_.data() + slice.first * stride_, size_t(slice.count * stride_));
  }

 private:
  static constexpr int64_t kMostChunks = int64_t{1} << 31;

  int64_t stride_;
  std::vector<unsigned char> bytes_;
};

// f(std::integral_constant<int, the bytes of the table>)
template <class Fn>
void with_table_size(const Items& items, const Slice& slice, Fn&& f) {
  if (items.fits(slice.count, kSmallTable)) {
    f(std::integral_constant<int, kSmallTable>{});
  } else {
    f(std::integral_constant<int, kLargeTable>{});
  }
}

}  // namespace ft::lists
