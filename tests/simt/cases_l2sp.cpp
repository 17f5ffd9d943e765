// The kernels of cuda/l2sp.cuh on lists that reach each way of reading: alike and mixed types, aligned, misaligned
// and differently aligned operands, heads, tails, several chunks, several launches, blocks that take several chunks.
#include "cuda/l2sp.cuh"
#include "simt/cases.h"

namespace {

using namespace ft;
using namespace ft::cases;
using lists::Item;
using lists::Items;
using lists::L2spCall;
using lists::L2spItem;
using lists::Run;
using lists::Scalar;
using lists::Slice;

struct Spec {
  DType param, start, grad;
  int64_t n;
  int offset_param, offset_start, offset_grad;
  bool has_start, has_grad, accumulate;
  bool has_importance = false;
  DType importance = DType::kFloat32;
};

struct Operands {
  Spec spec;
  Buffer param, start, grad, before, importance;
  double strength;
  Operands(const Spec& s, Random& random)
      : spec(s),
        param(s.param, s.n, s.offset_param),
        start(s.start, s.n, s.offset_start),
        grad(s.grad, s.n, s.offset_grad),
        before(DType::kFloat64, s.n),
        importance(s.importance, s.n, s.offset_start),
        strength(0.25 + random.uniform()) {
    param.fill(random, 1);
    start.fill(random, 1);
    importance.fill(random, 1);
    for (int64_t i = 0; i < s.n; ++i) importance.set(i, std::fabs(importance.get(i)));
    if (s.accumulate) grad.fill(random, 1);  // else NaN, which must not be read
    for (int64_t i = 0; i < s.n; ++i) before.set(i, s.accumulate ? grad.get(i) : 0);
  }
};

std::string text_of(const Spec& s) {
  return std::string("l2sp ") + cases::name_of(s.param) + " " + cases::name_of(s.start) + " " +
         cases::name_of(s.grad) + " n=" + std::to_string(s.n) + " offsets " + std::to_string(s.offset_param) +
         std::to_string(s.offset_start) + std::to_string(s.offset_grad) + (s.has_start ? "" : " no start") +
         (s.has_grad ? s.accumulate ? " add" : " write" : " no gradient");
}

// One list in one call. few_blocks: so many per launch, or 0: as the host chooses.
void run(const std::vector<Spec>& specs, double scale, int scale_kind, int few_blocks, bool value_wanted) {
  Random random(specs.size() * 31 + specs[0].n + scale_kind);
  std::vector<std::unique_ptr<Operands>> list;
  Items items(sizeof(L2spItem), specs.size());
  for (const Spec& s : specs) {
    list.push_back(std::make_unique<Operands>(s, random));
    const Operands& o = *list.back();
    L2spItem item = {};
    item.param = o.param.data();
    item.param_dtype = s.param;
    item.start = s.has_start ? o.start.data() : nullptr;
    item.start_dtype = s.start;
    item.importance = s.has_importance ? o.importance.data() : nullptr;
    item.importance_dtype = s.importance;
    item.grad = s.has_grad ? o.grad.data() : nullptr;
    item.grad_dtype = s.grad;
    item.strength = o.strength;
    item.accumulate = s.accumulate;
    Run runs[4];
    size_t count = 0;
    runs[count++] = {o.param.data(), s.param};
    if (s.has_start) runs[count++] = {o.start.data(), s.start};
    if (s.has_importance) runs[count++] = {o.importance.data(), s.importance};
    if (s.has_grad) runs[count++] = {o.grad.data(), s.grad};
    lists::choose_way(item, runs, count, s.n);
    std::memcpy(items.add(), &item, sizeof item);
  }
  const std::vector<Slice> slices = items.cut();
  const int64_t blocks = few_blocks ? few_blocks : lists::count_blocks(slices);
  Buffer partials(DType::kFloat64, blocks), value32(DType::kFloat32, 1), value64(DType::kFloat64, 1);
  Buffer scale_in_memory(scale_kind == 2 ? DType::kFloat64 : DType::kFloat32, 1);
  scale_in_memory.set(0, scale);
  const Scalar scalar = {scale_kind ? scale_in_memory.data() : nullptr, scale_kind ? NAN : scale, scale_kind == 2};
  double* const sums = value_wanted ? partials.as<double>() : nullptr;
  if (few_blocks) {
    lists::with_table_size(items, slices[0], [&](auto bytes) {
      L2spCall<bytes()> call;
      call.scale = scalar;
      call.partials = sums;
      items.copy(slices[0], call.table);
      device::launch(lists::l2sp_kernel<bytes()>, {few_blocks, lists::kThreads, 1, lists::kSumBytes}, {}, call);
    });
  } else {
    lists::launch_l2sp(items, slices, scalar, sums, {});
  }
  if (value_wanted) {
    lists::launch_l2sp_total(partials.as<double>(), blocks, value32.as<float>(), {});
    lists::launch_l2sp_total(partials.as<double>(), blocks, value64.as<double>(), {});
  }

  double exact = 0;
  bool all_double = true;
  for (const auto& o : list) {
    const Spec& s = o->spec;
    const std::string text = text_of(s);
    const bool in_double = s.param == DType::kFloat64 || (s.has_start && s.start == DType::kFloat64) ||
                           (s.has_grad && s.grad == DType::kFloat64) ||
                           (s.has_importance && s.importance == DType::kFloat64);
    all_double = all_double && in_double;
    const double unit = roundoff(in_double ? DType::kFloat64 : DType::kFloat32);
    double sum = 0;
    for (int64_t i = 0; i < s.n; ++i) {
      const double d = o->param.get(i) - (s.has_start ? o->start.get(i) : 0);
      const double weighed = s.has_importance ? o->importance.get(i) * d : d;
      sum += weighed * d;
      if (!s.has_grad) continue;
      const double added = 2 * o->strength * scale * weighed, before = o->before.get(i);
      expect_rounded(o->grad, i, before + added, 4 * unit * (1.5 * std::fabs(added) + std::fabs(before)), text);
    }
    exact += o->strength * sum;
    expect(o->param.intact() && o->start.intact() && o->grad.intact(), text + ": memory beside it");
  }
  if (!value_wanted) return;
  const double tolerance = all_double ? 1e-13 : 1e-6;
  expect_close(value32.get(0), exact, 1e-6 * exact, "value in fp32");
  expect_close(value64.get(0), exact, tolerance * exact, "value in fp64");
  expect(partials.intact() && value32.intact() && value64.intact(), "memory beside the value");
}

Spec alike(DType t, int64_t n, int offset = 0) { return {t, t, t, n, offset, offset, offset, true, true, true}; }

void all(const char*) {
  constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  const int64_t chunk = lists::kChunk;
  std::vector<Spec> list;
  for (DType t : kTypes) {
    for (int64_t n : {1, 2, 3, 7, 8, 9, 31, 33, 1000}) {
      for (int offset : {0, 1, 3}) list.push_back(alike(t, n, offset));
    }
  }
  run(list, 1.5, 0, 0, true);
  run(list, 1.5, 0, 5, true);  // blocks take several chunks
  for (Spec& s : list) s.accumulate = false;
  run(list, -0.5, 1, 0, true);
  for (Spec& s : list) s.has_start = false;
  run(list, 0.75, 2, 0, true);
  for (Spec& s : list) s.has_grad = false;
  run(list, 1, 0, 0, true);

  list.clear();
  for (DType p : kTypes) {
    for (DType s : kTypes) {
      for (DType g : kTypes) {
        // fp64 arithmetic is for a parameter or a start point of that type.
        list.push_back({p, s, g, 77, 0, 0, 0, true, true, true});
        list.push_back({p, s, g, 45, 1, 1, 1, true, true, false});  // heads where the sizes agree
        list.push_back({p, s, g, 300, 0, 1, 2, true, true, true});  // no common alignment
      }
    }
  }
  run(list, 1.25, 0, 0, true);
  run(list, 1.25, 1, 0, false);

  for (Spec& s : list) s.has_importance = true;
  run(list, 1.25, 0, 0, true);
  for (Spec& s : list) s.importance = s.start;
  run(list, 1.25, 1, 7, false);
  for (Spec& s : list) s.has_grad = s.has_start = false;
  run(list, 1, 0, 0, true);

  for (DType t : kTypes) {
    run({alike(t, chunk - 1), alike(t, chunk), alike(t, chunk + 1, 1), alike(t, 2 * chunk + 5, 3)}, 1, 0, 0, true);
  }
  run({alike(DType::kBFloat16, 3 * chunk + 9, 1)}, 1, 0, 2, true);
  list.clear();
  for (int i = 0; i < 1200; ++i) list.push_back(alike(DType::kFloat32, 1 + i % 3));
  run(list, 1, 0, 0, true);  // three launches
}

}  // namespace

// One machine: the list is cut alike for all.
int main(int count, char** arguments) { return main_of(count, arguments, {"sm_90"}, all); }
