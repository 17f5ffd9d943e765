// Weighted sums of k + 1 tensors each, for a list of targets, rounded once.
//
//   out = sum_j coef_j x_j                                    as it stands, or, where the coefficients sum to 1,
//   out = x_b + sum_{j != b} coef_j (x_j - x_b)               around the x_b of the largest coefficient
//
// Around x_b: where all x_j agree the result is that value exactly (an average that has converged stays), and a
// coefficient of 1 beside zeros copies exactly. In fp32; fp64 where an operand is. A term whose coefficient is 0 is
// not read. Coefficients are constants, products in double that the host has ordered, or alpha and scale are in
// device memory: then each block works out the same from them.
//
// One pass for any k, with the next term on its way while one is added up. Requested bytes, fp32: 4 (k + 2) per
// element and nothing else; where coefficients are in device memory, 4 or 8 of each per thread and chunk, of which a
// block moves one sector.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/table.h"
#include "cuda/table_access.cuh"

namespace ft::lists {

struct BlendTerm {
  const void* data;
  double coef;
  DType dtype;
};

// Its terms follow it. Where BlendCoefs has nothing: the one of the largest coefficient first, zeros left out. Else
// the target first, and `coef` is what a value of BlendCoefs is multiplied by.
struct BlendItem : Item {
  void* out;         // or, of a dot product (blend_dot.cuh), what the sum is multiplied by
  int32_t index;     // of the target, in alpha and scale
  uint16_t terms;    // at least 1
  uint8_t out_type;  // a DType: with all of it an item would be 8 bytes longer
  bool convex;       // the coefficients, if they are known, sum to 1 (of a dot product: to 0)
};
constexpr int64_t blend_stride(int64_t terms) {
  return int64_t(sizeof(BlendItem)) + terms * int64_t(sizeof(BlendTerm));
}
constexpr int64_t kMostTerms = (kLargeTable - blend_stride(0)) / int64_t(sizeof(BlendTerm));

// Coefficients in device memory, one per target; absent ones are known, and in the terms.
struct BlendCoefs {
  Scalar alpha, scale;
  int64_t alpha_stride, scale_stride;
  bool complementary;  // scale = 1 - alpha
  FT_HD bool known() const { return !alpha.data && !scale.data; }
};

constexpr FT_HD bool sum_is_one(double sum) { return sum - 1 < 1e-12 && 1 - sum < 1e-12; }

template <int kBytes>
struct BlendCall {
  BlendCoefs coefs;
  Table<kBytes> table;
};
static_assert(sizeof(BlendCall<kSmallTable>) <= kSmallTable + kBeside);

// The terms of one item. The base and the one after it are kept at hand, which for one source is all of them; further
// ones are looked up in the table.
template <int kBytes>
struct Terms {
  const Table<kBytes>& table;
  int offset, count;   // of the first one in the table; of all
  double first, rest;  // the coefficient of the first one, and what those of the others are multiplied by
  bool convex;
  int base_at, second_at;
  BlendTerm base, second;  // with their coefficients; second only where second_at < count

  FT_DEVICE BlendTerm operator[](int j) const {
    BlendTerm term = table.template at<BlendTerm>(offset + j * int(sizeof(BlendTerm)));
    term.coef = j == 0 ? first : rest * term.coef;
    return term;
  }
  // The first one after j that adds something to the base.
  FT_DEVICE int after(int j) const {
    do ++j;
    while (j < count && (j == base_at || (*this)[j].coef == 0));
    return j;
  }
};

template <int kBytes>
FT_DEVICE Terms<kBytes> terms_of(const Table<kBytes>& table, int i, const BlendItem& item, const BlendCoefs& coefs) {
  Terms<kBytes> terms = {table, i * table.stride + int(sizeof(BlendItem)), item.terms, 0, 1, item.convex, 0, 0, {},
                         {}};
  terms.first = table.template at<BlendTerm>(terms.offset).coef;
  if (!coefs.known()) {
    if (coefs.alpha.data) terms.first = coefs.alpha.get(item.index * coefs.alpha_stride);
    if (coefs.complementary) terms.rest = 1 - terms.first;
    if (coefs.scale.data) terms.rest = coefs.scale.get(item.index * coefs.scale_stride);
    double sum = 0, largest = -1;
    for (int j = 0; j < terms.count; ++j) {
      const double coef = terms[j].coef, size = coef < 0 ? -coef : coef;
      sum += coef;
      if (size > largest) {
        largest = size;
        terms.base_at = j;
      }
    }
    terms.convex = sum_is_one(sum);
  }
  terms.base = terms[terms.base_at];
  terms.second_at = terms.after(-1);
  if (terms.second_at < terms.count) terms.second = terms[terms.second_at];
  return terms;
}

// What becomes of the sums of a batch: they are rounded and stored. kOfBase: they include the base that they are
// around.
struct Stored {
  static constexpr bool kOfBase = true;
  void* out;
  DType type;

  template <class Access, int L, int U>
  FT_DEVICE int fetch(const Places<U>&) const {
    return 0;  // nothing
  }
  template <class Access, class F, int L, int U>
  FT_DEVICE void take(const Places<U>& places, int, const F (&sums)[U][L]) const {
    Access::put_at(out, type, places, sums);
  }
};

template <class Access, class F, int L, int U, class Span, class Terms, class Result>
FT_DEVICE void blend_span(const Terms& terms, Result& result, const Span& span, int64_t begin) {
  const F base_coef = F(terms.base.coef);
  for (int k = device::thread(); k < span.count; k += kThreads * U) {
    const Places<U> places = places_of<U>(span, begin, k);
    const auto fetch_term = [&](const BlendTerm& term, bool given) {
      return Access::template fetch_at<L>(term.data, term.dtype, places, given);
    };
    int j = terms.second_at;
    const auto met = result.template fetch<Access, L>(places);
    const auto base = fetch_term(terms.base, true);
    auto x = fetch_term(terms.second, j < terms.count);
    F coef = F(terms.second.coef);
    F around[U][L], total[U][L];
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int l = 0; l < L; ++l) {
        const F b = base.template get<F>(u, l);
        around[u][l] = terms.convex ? b : F(0);
        // A coefficient of 0 does not look at its operand; that of the base is 0 only where all are.
        total[u][l] = terms.convex ? (Result::kOfBase ? b : F(0)) : base_coef == F(0) ? F(0) : base_coef * b;
      }
    }
    while (j < terms.count) {
      j = terms.after(j);
      const BlendTerm next = terms[j < terms.count ? j : 0];
      const auto ahead = fetch_term(next, j < terms.count);
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int l = 0; l < L; ++l) total[u][l] += coef * (x.template get<F>(u, l) - around[u][l]);
      }
      x = ahead;
      coef = F(next.coef);
    }
    result.template take<Access>(places, met, total);
  }
}

template <class Access, class F, int L, int U, class Terms, class Result>
FT_DEVICE void blend_vectors(const Terms& terms, Result& result, const Piece& piece) {
  blend_span<Access, F, L, U>(terms, result, Vectors<L>(piece), piece.begin);
}
template <class F, class Terms, class Result>
FT_DEVICE void blend_edges(const Terms& terms, Result& result, const Piece& piece) {
  blend_span<Any<F>, F, 1, 4>(terms, result, Edges(piece), piece.begin);
}

template <class Terms, class Result>
FT_DEVICE void blend_piece(Way way, const Terms& terms, Result& result, const Piece& piece) {
  switch (way) {
    case Way::kFloat32:
      blend_vectors<Typed<float>, float, 4, 2>(terms, result, piece);
      break;
    case Way::kBFloat16:
      blend_vectors<Typed<BFloat16>, float, 8, 2>(terms, result, piece);
      break;
    case Way::kFloat16:
      blend_vectors<Typed<Half>, float, 8, 2>(terms, result, piece);
      break;
    case Way::kMixed:
      blend_vectors<Any<float>, float, 4, 2>(terms, result, piece);
      break;
    case Way::kMixedDouble:
      blend_vectors<Any<double>, double, 2, 2>(terms, result, piece);
      break;
    default:
      break;
  }
  if (way == Way::kMixedDouble || way == Way::kElementsDouble) {
    blend_edges<double>(terms, result, piece);
  } else {
    blend_edges<float>(terms, result, piece);
  }
}

template <int kBytes>
FT_KERNEL void FT_BOUNDS(kThreads, 4) blend_kernel(FT_PARAMS(BlendCall<kBytes>) call) {
  for (int64_t chunk = device::block(); chunk < call.table.chunks; chunk += device::blocks()) {
    const int i = item_of(call.table, uint32_t(chunk));
    const BlendItem item = call.table.template item<BlendItem>(i);
    Stored result = {item.out, DType(item.out_type)};
    blend_piece(item.way, terms_of(call.table, i, item, call.coefs), result, piece_of(item, uint32_t(chunk)));
  }
}

// ------------------------------------------------------------------------------------------------ host
inline void launch_blend(const Items& items, const std::vector<Slice>& slices, const BlendCoefs& coefs,
                         device::Stream stream) {
  for (const Slice& slice : slices) {
    with_table_size(items, slice, [&](auto bytes) {
      BlendCall<bytes()> call;
      call.coefs = coefs;
      items.copy(slice, call.table);
      device::launch(blend_kernel<bytes()>, {slice.blocks(), kThreads}, stream, call);
    });
  }
}

}  // namespace ft::lists
