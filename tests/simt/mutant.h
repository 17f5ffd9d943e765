// What a mutated copy of csrc/cuda asks at each place that mutate.py changes: is this the mutant that runs? All of
// them are in one program; FT_MUTANT=<number> chooses one. FT_MUTANT=census changes nothing, and says at exit which
// of them were reached, and which would have made a difference there: no other can be told from the original.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/macros.h"

namespace ft::mutant {

constexpr int kCensus = 0;
extern const int active;  // const: no sanitizer looks at it
void note(int id, bool differs);

// A constant expression stays what it was.
template <class T>
constexpr FT_HD T choose(int id, T original, T changed) {
  if (std::is_constant_evaluated()) return original;
  if (active == id) return changed;
  if (active == kCensus) note(id, original != changed);
  return original;
}

constexpr FT_HD bool on(int id) { return choose(id, false, true); }
constexpr FT_HD int one(int id) { return choose(id, 1, 0); }
constexpr FT_HD uint32_t mask(int id, uint32_t lanes) { return choose(id, lanes, lanes >> 1); }

template <class A, class B>
FT_HD std::common_type_t<A, B> least(int id, A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return choose<T>(id, std::fmin(a, b), std::fmax(a, b));
  return choose<T>(id, T(a) < T(b) ? a : b, T(a) < T(b) ? b : a);
}
template <class A, class B>
FT_HD std::common_type_t<A, B> greatest(int id, A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return choose<T>(id, std::fmax(a, b), std::fmin(a, b));
  return choose<T>(id, T(a) < T(b) ? b : a, T(a) < T(b) ? a : b);
}

// An operator with a name: in `a < Compare<...>() > b` operands keep their precedence.
enum class Op { kLess, kLessEqual, kGreater, kGreaterEqual };

template <Op kOp, class A, class B>
constexpr FT_HD bool holds(A a, B b) {
  if constexpr (kOp == Op::kLess) return a < b;
  if constexpr (kOp == Op::kLessEqual) return a <= b;
  if constexpr (kOp == Op::kGreater) return a > b;
  return a >= b;
}

template <int kId, Op kOriginal, Op kChanged>
struct Compare {};
template <class Operator, class A>
struct Left {
  A a;
};

template <class A, int kId, Op kOriginal, Op kChanged>
constexpr FT_HD Left<Compare<kId, kOriginal, kChanged>, A> operator<(A a, Compare<kId, kOriginal, kChanged>) {
  return {a};
}
template <class A, class B, int kId, Op kOriginal, Op kChanged>
constexpr FT_HD bool operator>(Left<Compare<kId, kOriginal, kChanged>, A> left, B b) {
  return choose(kId, holds<kOriginal>(left.a, b), holds<kChanged>(left.a, b));
}

}  // namespace ft::mutant
