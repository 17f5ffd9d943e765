// The storage types of tensors, without torch: 16-bit floats are bit patterns that only cpu/simd.h interprets.
#pragma once

#include <cstdint>

namespace ft {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// f(T{}) with the storage type of a DType.
template <class Fn>
inline __attribute__((always_inline)) auto with_dtype(DType dtype, Fn&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kFloat32:
      break;
  }
  return f(float{});
}

}  // namespace ft
