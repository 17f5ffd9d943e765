// How elementwise kernels over lists read and write: batches of U vectors of L elements per thread, all of them
// requested before the first is used, in the type that memory holds.
#pragma once

#include "cuda/table.cuh"

namespace ft::lists {

// The places of one batch of a thread: elements of their item.
template <int U>
struct Places {
  int64_t begin;  // of the piece
  int at[U];
  bool inside[U];
};

template <int U, class Span>
FT_DEVICE Places<U> places_of(const Span& span, int64_t begin, int k) {
  Places<U> places;
  places.begin = begin;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int step = k + u * kThreads;
    places.inside[u] = step < span.count;
    places.at[u] = span.at(step);
  }
  return places;
}

// A vector as memory holds it: one access of up to 16 bytes. 16-bit values stay in pairs until they are used: as
// values of their own the compiler unpacks them on arrival, and waits for one operand before it asks for the next.
template <class S, int L, bool kPairs = sizeof(S) == 2 && L % 2 == 0>
struct alignas(sizeof(S) * L) Raw {
  S values[L];

  FT_DEVICE S get(int l) const { return values[l]; }
  template <class F>
  FT_DEVICE void set(const F (&from)[L]) {
#pragma unroll
    for (int l = 0; l < L; ++l) device::narrow(from[l], values[l]);
  }
};
template <class S, int L>
struct alignas(sizeof(S) * L) Raw<S, L, true> {
  uint32_t pairs[L / 2];

  FT_DEVICE S get(int l) const { return S{uint16_t(pairs[l / 2] >> (l % 2 * 16))}; }
  template <class F>
  FT_DEVICE void set(const F (&from)[L]) {
#pragma unroll
    for (int l = 0; l < L; l += 2) {
      S low, high;
      device::narrow(from[l], low);
      device::narrow(from[l + 1], high);
      pairs[l / 2] = low.bits | uint32_t(high.bits) << 16;
    }
  }
};

template <class S, int L, int U>
struct Batch {
  Raw<S, L> raw[U];

  template <class F>
  FT_DEVICE F get(int u, int l) const {
    return F(device::widen(raw[u].get(l)));
  }
};

// Zero outside, and everywhere where there is no operand: in the predicate of each load, because a branch around them
// would end the stretch of code in which all of a batch's loads are requested before the first is used.
template <class S, int L, int U>
FT_DEVICE Batch<S, L, U> fetch(const S* p, const Places<U>& places, bool given = true) {
  Batch<S, L, U> batch = {};
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (!given || !places.inside[u]) continue;
    batch.raw[u] = device::load(reinterpret_cast<const Raw<S, L>*>(p + (places.begin + places.at[u])));
  }
  return batch;
}

template <class F, class S, int L, int U>
FT_DEVICE void put(S* p, const Places<U>& places, const F (&values)[U][L]) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
    Raw<S, L> raw;
    raw.set(values[u]);
    if (places.inside[u]) device::store(reinterpret_cast<Raw<S, L>*>(p + (places.begin + places.at[u])), raw);
  }
}

// Operands of a type known at compile time: S. Of any, asked at each batch, the same answer for all threads: Any<F>,
// converted to F as they arrive. fp64 only where F is.
template <class S>
struct Typed {
  template <int L, int U>
  static FT_DEVICE auto fetch_at(const void* p, DType, const Places<U>& places, bool given = true) {
    return fetch<S, L>(static_cast<const S*>(p), places, given);
  }
  template <class F, int L, int U>
  static FT_DEVICE void put_at(void* p, DType, const Places<U>& places, const F (&values)[U][L]) {
    put(static_cast<S*>(p), places, values);
  }
};

template <class F>
struct Any {
  template <int L, int U>
  static FT_DEVICE Batch<F, L, U> fetch_at(const void* p, DType dtype, const Places<U>& places, bool given = true) {
    Batch<F, L, U> converted = {};
    if (!given) return converted;
    with_type(dtype, [&](auto tag) {
      using S = decltype(tag);
      const Batch<S, L, U> batch = fetch<S, L>(static_cast<const S*>(p), places);
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int l = 0; l < L; ++l) converted.raw[u].values[l] = batch.template get<F>(u, l);
      }
    });
    return converted;
  }
  template <int L, int U>
  static FT_DEVICE void put_at(void* p, DType dtype, const Places<U>& places, const F (&values)[U][L]) {
    with_type(dtype, [&](auto tag) { put(static_cast<decltype(tag)*>(p), places, values); });
  }

 private:
  template <class Fn>
  static FT_DEVICE void with_type(DType dtype, Fn&& f) {
    if constexpr (sizeof(F) == 8) {
      if (dtype == DType::kFloat64) return f(double{});
    }
    if (dtype == DType::kBFloat16) return f(BFloat16{});
    if (dtype == DType::kFloat16) return f(Half{});
    f(float{});
  }
};

}  // namespace ft::lists
