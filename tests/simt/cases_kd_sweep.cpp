// cuda/kd_sweep.cuh and cuda/kd_any.cuh: two sweeps over rows of any length, of one type or of any two.
#include "cuda/kd_any.cuh"
#include "cuda/kd_sweep.cuh"
#include "simt/kd_variants.h"

namespace {

using namespace ft;
using namespace ft::cases;
using namespace ft::distill;

// blocks: with fewer than rows, each takes several.
template <class S>
void sweep(const KdSpec& spec, int threads, int64_t blocks) {
  solve(spec, [&](const KdCall& call) {
    launch(kd_sweep_kernel<S>, Grid{std::min(call.rows, blocks), threads, 1, kHeader<float>}, {}, call);
  });
}
template <class A>
void any(const KdSpec& spec, int threads, int64_t blocks) {
  solve(spec, [&](const KdCall& call) {
    launch(kd_any_kernel<A>, Grid{std::min(call.rows, blocks), threads, 1, kHeader<A>}, {}, call);
  });
}

void all(const char*) {
  for_each_type([](auto tag) {
    using S = decltype(tag);
    for (int64_t columns : {2, 9, 130, 700, 2050}) {
      for (const KdSpec& spec : variants(kTypeOf<S>, kTypeOf<S>, columns)) {
        sweep<S>(spec, 64, spec.rows);
        if (columns < 1000) sweep<S>(spec, 96, 2);
        if (columns < 1000) any<float>(spec, 64, 2);
      }
    }
  });
  constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  for (DType student : kTypes) {
    for (DType teacher : kTypes) {
      const bool in_double = student == DType::kFloat64 || teacher == DType::kFloat64;
      if (student == teacher && !in_double) continue;
      for (int64_t columns : {2, 33, 300}) {
        for (const KdSpec& spec : variants(student, teacher, columns)) {
          in_double ? any<double>(spec, 64, spec.rows) : any<float>(spec, 64, spec.rows);
        }
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) { return main_of(count, arguments, {"sm_80"}, all); }
