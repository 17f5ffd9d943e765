// cuda/kd_row.cuh: rows in the shared memory of a block, and of clusters; exponentials kept, or computed again.
#include "cuda/kd_row.cuh"
#include "simt/kd_variants.h"

namespace {

using namespace ft;
using namespace ft::cases;
using namespace ft::distill;

template <class S>
void run(const KdSpec& spec, int threads, int cluster, bool keep, int64_t most_clusters) {
  if (keep && (!spec.gradient || is_hot(spec))) return;
  const KdPlan plan = row_plan(cases::shape_of(spec), cluster, keep, kHeader<float>);
  if (plan.shared_bytes > machine().shared_per_block) return;
  const Counted counted;
  solve(spec, [&](const KdCall& call) {
    const Grid grid{std::min(call.rows, most_clusters) * cluster, threads, cluster, plan.shared_bytes};
    const KdRowCall params{call, plan.slots};
    keep ? launch(kd_row_kernel<S, true>, grid, {}, params) : launch(kd_row_kernel<S, false>, grid, {}, params);
  });
  if (!spec.bare()) return;
  const int64_t bytes = sizeof(S), beside = 8 + (spec.student == DType::kFloat16 ? 4 : 0);
  counted.expect_bytes(spec.rows * 2 * bytes * spec.columns,
                       spec.rows * (bytes * (spec.columns + spec.padding) + beside), text_of(spec));
}

void all(const char*) {
  for_each_type([](auto tag) {
    using S = decltype(tag);
    for (int64_t columns : {2, 9, 13, 130, 1100}) {
      for (const KdSpec& spec : variants(kTypeOf<S>, kTypeOf<S>, columns)) {
        for (bool keep : {false, true}) {
          run<S>(spec, 64, 1, keep, spec.rows);
          run<S>(spec, 96, 2, keep, 2);  // clusters take several rows
          run<S>(spec, 32, 1, keep, 1);
          if (columns < 1000) run<S>(spec, 32, 8, keep, 1);
        }
      }
    }
  });
  run<float>(KdSpec{}, 512, 8, true, 1);  // as many warps as a cluster has
}

}  // namespace

int main(int count, char** arguments) { return main_of(count, arguments, {"sm_90"}, all); }
