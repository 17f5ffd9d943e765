// The calls that the standalone cases of each kd kernel are run on.
#pragma once

#include "simt/kd_problem.h"

namespace ft::cases {

// What changes a row's way through a kernel, beside its length.
inline std::vector<KdSpec> variants(DType student, DType teacher, int64_t columns) {
  KdSpec plain;
  plain.student = student;
  plain.teacher = teacher;
  plain.columns = columns;
  std::vector<KdSpec> list(12, plain);
  list[1].gap = 1;  // rows that start anywhere in a vector, alike in both
  list[1].temperature = 2;
  list[1].label_weight = 0.25;  // a third exponential
  list[1].rows = 6;
  list[2].offset_s = 3;  // and not alike
  list[2].gap = 2;
  list[2].label_weight = 0.5;
  list[2].smoothing = 0.1;
  list[2].divisors = true;
  list[3].stride = 2;
  list[3].row_temperature = list[3].row_weight = list[3].double_values = true;
  list[3].rows = 5;
  list[3].inner = 2;
  list[3].loss = 1;
  list[4].padding = 5;
  list[4].in_place = true;
  list[4].row_weight = true;
  list[4].rows = 5;
  list[5].gradient = false;
  list[5].temperature = 4;
  list[5].gap = 3;
  list[6].gradient = false;
  list[6].label_weight = 1;  // the teacher is not read
  list[6].loss = 2;
  list[7].special = true;
  list[7].rows = 12;
  list[7].label_weight = 0.5;
  list[7].temperature = 3;
  list[7].distill_ignored = true;
  list[8].label_weight = 1;
  list[8].offset_g = 1;
  list[8].rows = 2;
  list[8].scale_by_t2 = false;
  list[9].rows = 1;
  list[9].offset_s = list[9].offset_t = list[9].offset_g = 1;
  list[9].row_temperature = true;
  // The last elements before a boundary first, and exponentials that need their maximum.
  list[10].rows = 1;
  list[10].offset_s = int(16 / size_of(student)) - 1;
  list[10].offset_t = int(16 / size_of(teacher)) - 1;
  list[10].scale = 2000;
  list[11].rows = 2;
  list[11].label_weight = 0.5;
  list[11].smoothing = 0.2;
  return list;
}

// f(a value of the storage type)
template <class Fn>
void for_each_type(const Fn& f) {
  f(float{});
  f(BFloat16{});
  f(Half{});
}
template <class S>
constexpr DType kTypeOf = sizeof(S) == 8                ? DType::kFloat64
                          : sizeof(S) == 4              ? DType::kFloat32
                          : std::is_same_v<S, BFloat16> ? DType::kBFloat16
                                                        : DType::kFloat16;

}  // namespace ft::cases
