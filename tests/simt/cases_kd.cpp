// cuda/kd.cuh: the machine's own choice among the kernels, and what FASTTRANSFER_KD_PLAN says instead.
#include "cuda/kd.cuh"
#include "simt/kd_variants.h"

namespace {

using namespace ft;
using namespace ft::cases;
using namespace ft::distill;

void run(const KdSpec& spec) {
  solve(spec, [](const KdCall& call) { launch_kd(call, {}); });
}
void run_as(const char* plan, const KdSpec& spec) {
  setenv("FASTTRANSFER_KD_PLAN", plan, 1);
  run(spec);
  unsetenv("FASTTRANSFER_KD_PLAN");
}

void all(const char* name) {
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
  for (const KdSpec& mixed : variants(DType::kFloat32, DType::kBFloat16, 70)) run(mixed);
  for (const KdSpec& mixed : variants(DType::kFloat64, DType::kBFloat16, 70)) run(mixed);
}

}  // namespace

int main(int count, char** arguments) { return main_of(count, arguments, {"tiny", "sm_80", "sm_90"}, all); }
