// cuda/kd_short.cuh: rows in registers, by vectors and by elements, in groups of 1 to 32 lanes.
#include "cuda/kd_short.cuh"
#include "simt/kd_variants.h"

namespace {

using namespace ft;
using namespace ft::cases;
using namespace ft::distill;

bool in_vectors(const View& v) {
  const bool rows = v.rows.dims == 0 || v.rows.stride[0] % 16 == 0;
  return v.column_stride == 1 && reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && rows;
}

// few: one block for all rows.
template <class S>
void run(const KdSpec& spec, bool few = false) {
  solve(spec, [&](const KdCall& call) {
    const KdPlan plan = short_plan(cases::shape_of(spec));
    KdShortCall params{call, plan.lanes, in_vectors(call.student) && in_vectors(call.teacher), false};
    params.vector_grad = params.vector_in && in_vectors(call.grad);
    const int64_t rows = kShortThreads / plan.lanes, blocks = (call.rows + rows - 1) / rows;
    const Grid grid{few ? 1 : blocks, kShortThreads};
    plan.elements == 8 ? launch(kd_short_kernel<S, 8>, grid, {}, params)
                       : launch(kd_short_kernel<S, 32>, grid, {}, params);
  });
}

void all(const char*) {
  for_each_type([](auto tag) {
    using S = decltype(tag);
    for (int64_t columns : {2, 3, 7, 8, 9, 16, 31, 100, 256, 257, 520, 1000, 1023, 1024}) {
      for (KdSpec spec : variants(kTypeOf<S>, kTypeOf<S>, columns)) {
        run<S>(spec);
        if (columns > 100) continue;
        spec.rows = 150;  // several warps, and turns of a block
        run<S>(spec, true);
      }
      // Rows that all start at a multiple of 16 bytes.
      for (int64_t row : {8, 64, 320, 1024}) {
        if (columns > row) continue;
        KdSpec spec;
        spec.student = spec.teacher = kTypeOf<S>;
        spec.columns = columns;
        spec.rows = 5;
        spec.gap = row - columns;
        spec.label_weight = 0.5;
        run<S>(spec);
        spec.offset_g = 1;
        spec.temperature = 2;
        run<S>(spec);
      }
    }
  });
}

}  // namespace

int main(int count, char** arguments) { return main_of(count, arguments, {"tiny"}, all); }
