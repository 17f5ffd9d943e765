// The conversions and approximations of csrc/cuda/device.cuh, bit by bit. Included by machine.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace ft::device {

FT_DEVICE float exp2_fast(float x) { return simt::rough_exp2(x); }

FT_DEVICE float widen(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
FT_DEVICE float widen(Half x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13, sign = uint32_t(x.bits & 0x8000u) << 16;
  // The multiplication re-biases the exponent and normalises subnormals; infinity and NaN keep theirs.
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>(bits | sign);
}
FT_DEVICE float widen(float x) { return x; }
FT_DEVICE double widen(double x) { return x; }
FT_DEVICE void narrow(float x, BFloat16& y) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  y.bits = x == x ? uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16) : uint16_t(0x7fff);
}
FT_DEVICE void narrow(float x, Half& y) {
  const uint32_t u = std::bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000u;
  const float a = std::fabs(x);
  uint32_t bits;
  if (x != x) {
    y.bits = 0x7fff;
    return;
  }
  if (a >= 65520.0f) {
    bits = 0x7c00u;
  } else if (a < 0x1p-14f) {
    bits = uint32_t(std::nearbyint(a * 0x1p24f));  // subnormal, or the smallest normal number
  } else {
    const uint32_t v = (u & 0x7fffffffu) - (112u << 23);
    bits = (v + 0x0fffu + ((v >> 13) & 1u)) >> 13;
  }
  y.bits = uint16_t(bits | sign);
}
template <class F>
FT_DEVICE void narrow(F x, float& y) {
  y = float(x);
}
template <class F>
FT_DEVICE void narrow(F x, double& y) {
  y = double(x);
}

template <class S>
FT_DEVICE uint32_t narrow_pair(float a, float b, S) {
  S low, high;
  narrow(a, low);
  narrow(b, high);
  return low.bits | uint32_t(high.bits) << 16;
}
// The greater one; of a NaN and a number, the number; 0 is greater than -0.
template <class S>
FT_DEVICE uint16_t max_of(uint16_t a, uint16_t b) {
  const float x = widen(S{a}), y = widen(S{b});
  if (x != x) return y != y ? uint16_t(0x7fff) : b;
  if (y != y) return a;
  return x > y || (x == y && b >> 15) ? a : b;
}
template <class S>
FT_DEVICE uint32_t max_pair(uint32_t a, uint32_t b, S) {
  return max_of<S>(uint16_t(a), uint16_t(b)) | uint32_t(max_of<S>(uint16_t(a >> 16), uint16_t(b >> 16))) << 16;
}

}  // namespace ft::device
