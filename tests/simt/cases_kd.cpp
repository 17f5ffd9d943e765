// cuda/kd.cuh: the machine's own choice among the kernels, and what FASTTRANSFER_KD_PLAN says instead.
#include "cuda/kd.cuh"
#include "simt/kd_variants.h"

namespace {

using namespace ft;
using namespace ft::cases;
using namespace ft::distill;

// As many threads as there is work for.
void expect_grid(const KdSpec& spec, const Launched& launched) {
  const KdShape shape = cases::shape_of(spec);
  const KdPlan plan = plan_kd(shape, machine(), kHeader<float>);
  if (plan.path == KdPath::kShort) {
    const int64_t at_once = kShortThreads / plan.lanes;
    expect((launched.blocks - 1) * at_once < spec.rows && launched.blocks * at_once >= spec.rows, "blocks");
  } else if (plan.path != KdPath::kRow) {
    const bool any = plan.path == KdPath::kAny;
    const int64_t most = any ? kAnyThreads : kSweepThreads;
    const int64_t each = any ? 2 : kSweepAtOnce * 16 / shape.element_bytes;
    expect(launched.threads <= most, "no more threads than the kernel is bound to");
    expect(launched.threads == most || launched.threads * each >= spec.columns, "threads enough");
    expect(launched.threads == kWarp || launched.threads / 2 * each < spec.columns, "no idle threads");
  }
}

void run(const KdSpec& spec) {
  const Counted counted;
  solve(spec, [](const KdCall& call) { launch_kd(call, {}); });
  if (Counted::kCounts && !std::getenv("FASTTRANSFER_KD_PLAN")) expect_grid(spec, counted.launches()[0]);
}
void run_as(const char* plan, const KdSpec& spec) {
  setenv("FASTTRANSFER_KD_PLAN", plan, 1);
  run(spec);
  unsetenv("FASTTRANSFER_KD_PLAN");
}

// What lies behind the dimensions of a view says nothing.
void vectors() {
  alignas(16) static char memory[16];
  View view = {};
  view.data = memory;
  view.column_stride = 1;
  view.rows.dims = 1;
  view.rows.stride[0] = 32;
  view.rows.stride[1] = 2;
  expect(in_vectors(view), "rows at multiples of 16 bytes");
  view.rows.dims = 2;
  expect(!in_vectors(view), "rows at any address");
}

void all(const char* name) {
  vectors();
  const bool tiny = std::strcmp(name, "tiny") == 0;
  for_each_type([&](auto tag) {
    const DType dtype = kTypeOf<decltype(tag)>;
    // On the smallest machine: registers, one block, a cluster, two sweeps.
    for (int64_t columns : {2, 256, 257, 1024, 1025, 1900, 3000, 4500}) {
      if (!tiny && columns != 1024 && columns != 1900) continue;
      for (const KdSpec& spec : variants(dtype, dtype, columns)) run(spec);
    }
  });
  const KdSpec spec = variants(DType::kBFloat16, DType::kBFloat16, 300)[0];
  for (const char* plan : {"path=short", "path=sweep", "path=any", "path=row,cluster=1,threads=32,keep=0"}) {
    run_as(plan, spec);
  }
  for (int64_t columns : {70, 256, 600}) {
    for (const KdSpec& mixed : variants(DType::kFloat32, DType::kBFloat16, columns)) run(mixed);
  }
  for (const KdSpec& mixed : variants(DType::kFloat64, DType::kBFloat16, 70)) run(mixed);
}

}  // namespace

int main(int count, char** arguments) { return main_of(count, arguments, {"tiny", "sm_80", "sm_90"}, all); }
