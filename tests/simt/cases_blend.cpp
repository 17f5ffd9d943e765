// The kernels of cuda/blend.cuh and blend_dot.cuh on lists that reach each way of reading, any number of sources,
// coefficients that the host knows and ones in device memory, zeros among them, and outputs that are an operand's
// memory.
#include "cuda/blend.cuh"

#include "cuda/blend_dot.cuh"
#include "simt/cases.h"

namespace {

using namespace ft;
using namespace ft::cases;
using lists::BlendCall;
using lists::BlendCoefs;
using lists::BlendItem;
using lists::BlendTerm;
using lists::Items;
using lists::Run;
using lists::Scalar;
using lists::Slice;

struct Spec {
  std::vector<DType> types;  // of the target, then of the sources
  DType out;
  int64_t n;
  std::vector<int> offsets;  // of the output, the target, the sources; repeated where too short
  bool in_place = false;     // the output is the target's memory
  bool agree = false;        // all operands hold the same values

  int offset(size_t i) const { return offsets[i % offsets.size()]; }
};

enum class Known { kAll, kAlphaInMemory, kBothInMemory, kBothInDouble, kScaleInMemory };

// alpha target + scale sum_j weights[j] source_j
struct Mix {
  double alpha, scale;
  std::vector<double> weights;
};

struct Operands {
  std::unique_ptr<Buffer> out;  // null: in place
  std::vector<std::unique_ptr<Buffer>> terms;
  std::vector<std::vector<double>> before;
  Buffer& result() { return out ? *out : *terms[0]; }
};

std::string text_of(const Spec& s, const Mix& mix, Known known) {
  std::string text = "blend ";
  for (DType t : s.types) text += std::string(cases::name_of(t)) + " ";
  return text + "to " + cases::name_of(s.out) + " n=" + std::to_string(s.n) + " alpha " + std::to_string(mix.alpha) +
         " scale " + std::to_string(mix.scale) + " known " + std::to_string(int(known));
}

// As cuda/blend.cu orders the terms of coefficients that are known: the largest first, zeros left out.
void order(std::vector<BlendTerm>& terms) {
  const auto larger = [](const BlendTerm& a, const BlendTerm& b) { return std::fabs(a.coef) < std::fabs(b.coef); };
  std::swap(terms[0], *std::max_element(terms.begin(), terms.end(), larger));
  terms.erase(std::remove_if(terms.begin() + 1, terms.end(), [](const BlendTerm& t) { return t.coef == 0; }),
              terms.end());
}

void run(const std::vector<Spec>& specs, const Mix& mix, Known known, int few_blocks = 0) {
  Random random(specs.size() * 31 + specs[0].n + int(known));
  const size_t k = mix.weights.size();
  const bool in_memory = known != Known::kAll;
  const DType coef_type = known == Known::kBothInDouble ? DType::kFloat64 : DType::kFloat32;
  const int64_t count = int64_t(specs.size());
  // Alpha per target, the scale one for all.
  Buffer alphas(coef_type, count), scales(coef_type, 1);
  for (int64_t i = 0; i < count; ++i) alphas.set(i, mix.alpha);
  scales.set(0, mix.scale);
  double sum = mix.alpha;
  for (double w : mix.weights) sum += mix.scale * w;

  int64_t loaded = 0, stored = 0;
  std::vector<Operands> list;
  Items items(lists::blend_stride(int64_t(k) + 1), specs.size());
  for (int64_t i = 0; i < count; ++i) {
    const Spec& s = specs[i];
    Operands o;
    if (!s.in_place) o.out = std::make_unique<Buffer>(s.out, s.n, s.offset(0));
    std::vector<BlendTerm> terms;
    std::vector<Run> runs;
    for (size_t j = 0; j <= k; ++j) {
      o.terms.push_back(std::make_unique<Buffer>(s.types[j % s.types.size()], s.n, s.offset(j + 1)));
      Buffer& b = *o.terms.back();
      const double weight = j == 0 ? 1 : mix.weights[j - 1], coef = weight * (j == 0 ? mix.alpha : mix.scale);
      if (s.agree) {
        for (int64_t e = 0; e < s.n; ++e) b.set(e, std::sin(double(e + i)));
      } else if (coef != 0) {
        b.fill(random, 1);  // else NaN, which must not be read
      }
      o.before.emplace_back(s.n);
      for (int64_t e = 0; e < s.n; ++e) o.before.back()[e] = coef != 0 ? b.get(e) : 0;
      // In memory: what a value of BlendCoefs is multiplied by, or the coefficient itself where it has none.
      const double alpha = known == Known::kScaleInMemory ? mix.alpha : 0;
      terms.push_back({b.data(), in_memory ? j == 0 ? alpha : weight : coef, b.dtype()});
    }
    if (!in_memory) order(terms);
    BlendItem item = {};
    item.out = o.result().data();
    item.index = int32_t(i);
    item.out_type = uint8_t(o.result().dtype());
    item.terms = uint16_t(terms.size());
    item.convex = std::fabs(sum - 1) < 1e-12;
    runs.push_back({item.out, o.result().dtype()});
    for (const BlendTerm& t : terms) runs.push_back({t.data, t.dtype});
    for (const BlendTerm& t : terms) loaded += s.n * size_of(t.dtype);
    stored += s.n * size_of(o.result().dtype());
    lists::choose_way(item, runs.data(), runs.size(), s.n);
    unsigned char* const at = items.add();
    std::memcpy(at, &item, sizeof item);
    std::memcpy(at + sizeof item, terms.data(), terms.size() * sizeof(BlendTerm));
    list.push_back(std::move(o));
  }
  BlendCoefs coefs = {};
  const bool is_double = coef_type == DType::kFloat64;
  if (in_memory && known != Known::kScaleInMemory) {
    coefs.alpha = {alphas.data(), 0, is_double};
    coefs.alpha_stride = 1;
  }
  if (known == Known::kAlphaInMemory) coefs.complementary = true;
  if (in_memory && known != Known::kAlphaInMemory) coefs.scale = {scales.data(), 0, is_double};
  const std::vector<Slice> slices = items.cut();
  const Counted counted;
  if (few_blocks) {
    lists::with_table_size(items, slices[0], [&](auto bytes) {
      BlendCall<bytes()> call;
      call.coefs = coefs;
      items.copy(slices[0], call.table);
      device::launch(lists::blend_kernel<bytes()>, {few_blocks, lists::kThreads}, {}, call);
    });
  } else {
    lists::launch_blend(items, slices, coefs, {});
  }
  if (!in_memory) counted.expect_bytes(loaded, stored, "blend of " + std::to_string(count));

  for (int64_t i = 0; i < count; ++i) {
    const Spec& s = specs[i];
    Operands& o = list[i];
    const std::string text = text_of(s, mix, known);
    bool in_double = s.out == DType::kFloat64;
    for (DType t : s.types) in_double = in_double || t == DType::kFloat64;
    const double unit = roundoff(in_double ? DType::kFloat64 : DType::kFloat32);
    for (int64_t e = 0; e < s.n; ++e) {
      double exact = 0, size = 0;
      for (size_t j = 0; j <= k; ++j) {
        const double coef = j == 0 ? mix.alpha : mix.scale * mix.weights[j - 1];
        exact += coef * o.before[j][e];
        size += std::max(1.0, std::fabs(coef)) * std::fabs(o.before[j][e]);
      }
      const double first = o.before[0][e];
      if (s.agree) {
        expect(o.result().get(e) == first, text + ": where all agree, exactly that");
      } else if (mix.alpha == 0.5 && mix.scale == 0.5 && k == 1 && s.out == DType::kFloat32) {
        // Around the first of two that weigh the same.
        const float around = float(first) + 0.5f * (float(o.before[1][e]) - float(first));
        expect(o.result().get(e) == double(around), text + ": around the target");
      } else {
        expect_rounded(o.result(), e, exact, (4.0 + double(k)) * unit * size, text);
      }
    }
    expect(o.result().intact(), text + ": memory beside it");
  }
}

// Dot products of the list with sums of `coefs.size()` terms. Of each Spec: `out` is the type of what they meet.
void run_dots(const std::vector<Spec>& specs, const std::vector<double>& coefs, int few_blocks = 0) {
  Random random(specs.size() * 37 + specs[0].n);
  const size_t k = coefs.size();
  const int64_t count = int64_t(specs.size());
  double sum = 0;
  for (double c : coefs) sum += c;
  int64_t loaded = 0;
  std::vector<Operands> list;
  Items items(lists::blend_stride(int64_t(k)), specs.size());
  for (int64_t i = 0; i < count; ++i) {
    const Spec& s = specs[i];
    Operands o;
    o.out = std::make_unique<Buffer>(s.out, s.n, s.offset(0));
    o.out->fill(random, 1);
    std::vector<BlendTerm> terms;
    for (size_t j = 0; j < k; ++j) {
      o.terms.push_back(std::make_unique<Buffer>(s.types[j % s.types.size()], s.n, s.offset(j + 1)));
      Buffer& b = *o.terms.back();
      if (coefs[j] != 0) b.fill(random, 1);  // else NaN, which must not be read
      terms.push_back({b.data(), coefs[j], b.dtype()});
    }
    order(terms);
    BlendItem item = {};
    item.out = o.out->data();
    item.index = int32_t(count - 1 - i);
    item.out_type = uint8_t(s.out);
    item.terms = uint16_t(terms.size());
    item.convex = std::fabs(sum) < 1e-12;
    std::vector<Run> runs = {{item.out, s.out}};
    for (const BlendTerm& t : terms) runs.push_back({t.data, t.dtype});
    for (const Run& r : runs) loaded += s.n * size_of(r.dtype);
    lists::choose_way(item, runs.data(), runs.size(), s.n);
    unsigned char* const at = items.add();
    std::memcpy(at, &item, sizeof item);
    std::memcpy(at + sizeof item, terms.data(), terms.size() * sizeof(BlendTerm));
    list.push_back(std::move(o));
  }
  const std::vector<Slice> slices = items.cut();
  const int64_t chunks = lists::count_chunks(slices);
  Buffer partials(DType::kFloat64, chunks), dots(DType::kFloat64, count);
  const Counted counted;
  if (few_blocks) {
    lists::with_table_size(items, slices[0], [&](auto bytes) {
      lists::BlendDotCall<bytes()> call;
      call.partials = partials.as<double>();
      call.dots = dots.as<double>();
      items.copy(slices[0], call.table);
      const device::Grid grid = {few_blocks, lists::kThreads, 1, lists::kSumBytes};
      device::launch(lists::blend_dot_kernel<bytes()>, grid, {}, call);
      const device::Grid totals = {slices[0].count, lists::kThreads, 1, lists::kSumBytes};
      device::launch(lists::blend_dot_total_kernel<bytes()>, totals, {}, call);
    });
  } else {
    lists::launch_blend_dot(items, slices, partials.as<double>(), dots.as<double>(), {});
  }
  counted.expect_bytes(loaded + 8 * chunks, 8 * chunks + 8 * count, "dots of " + std::to_string(count));
  for (int64_t i = 0; i < count; ++i) {
    Operands& o = list[i];
    bool in_double = specs[i].out == DType::kFloat64;
    double exact = 0, size = 0;
    for (size_t j = 0; j < k; ++j) {
      in_double = in_double || (coefs[j] != 0 && o.terms[j]->dtype() == DType::kFloat64);
      for (int64_t e = 0; coefs[j] != 0 && e < specs[i].n; ++e) {
        const double product = coefs[j] * o.terms[j]->get(e) * o.out->get(e);
        exact += product;
        size += std::fabs(product);
      }
    }
    const std::string text = text_of(specs[i], {coefs[0], 0, {}}, Known::kAll) + ": dot of " + std::to_string(k);
    const double unit = roundoff(in_double ? DType::kFloat64 : DType::kFloat32);
    expect_close(dots.get(count - 1 - i), exact, (20.0 + double(k)) * unit * size, text);
    expect(o.out->intact(), text + ": memory beside it");
  }
  expect(partials.intact() && dots.intact(), "memory beside the dots");
}

// The host's arithmetic, where running what it plans would take too long.
void plans() {
  const int64_t chunk = lists::kChunk, most = int64_t{1} << 31;
  for (int64_t chunks : {1, 2, 3}) {
    for (int head : {0, 3}) {
      expect(lists::chunks_of(chunks * chunk + head, head) == chunks, "no chunk without elements");
      expect(lists::chunks_of(chunks * chunk + head + 1, head) == chunks + 1, "a chunk for the last element");
    }
  }
  Items items(lists::blend_stride(4));
  const Slice full = {0, lists::kSmallTable / items.stride(), 1};
  expect(full.count * items.stride() == lists::kSmallTable, "items that fill the table exactly");
  lists::with_table_size(items, full, [](auto bytes) { expect(bytes == lists::kSmallTable, "the smaller table"); });
  for (int64_t n : {most / 2 * chunk, most / 2 * chunk, chunk}) {
    BlendItem item = {};
    item.n = n;
    std::memcpy(items.add(), &item, sizeof item);
  }
  const std::vector<Slice> slices = items.cut();
  expect(slices.size() == 2 && slices[0].count == 2 && slices[0].chunks == most, "2^31 chunks are one launch");
}

void all(const char*) {
  plans();
  constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  const Mix two = {0.75, 0.25, {1}}, sum = {1, 1, {1}}, three = {0.25, 0.75, {0.5, 0.5}};
  const Mix five = {0.5, 0.5, {0.25, 0.125, 0.375, 0.25}}, gaps = {0.125, 0.875, {0, 0.25, 0, 0.75, 0}};
  const Mix last = {0, 1, {0, 0, 1}}, keep = {1, 0, {1, 1}}, nothing = {0, 0, {1, 1}}, minus = {1.5, -0.5, {1}};
  std::vector<Spec> list;
  for (DType t : kTypes) {
    for (int64_t n : {1, 2, 3, 7, 8, 9, 31, 33, 1000}) {
      for (int offset : {0, 1, 3}) list.push_back({{t}, t, n, {offset}, n % 2 == 0});
    }
  }
  for (const Mix& mix : {two, sum, three, five, gaps, last, keep, minus, nothing}) run(list, mix, Known::kAll);
  run(list, three, Known::kAll, 5);  // blocks take several chunks
  for (const Mix& mix : {two, three, gaps, last, keep}) run(list, mix, Known::kAlphaInMemory);
  for (const Mix& mix : {two, sum, gaps, minus, nothing}) run(list, mix, Known::kBothInMemory);
  run(list, five, Known::kBothInDouble);
  run(list, five, Known::kScaleInMemory, 3);
  for (Known known : {Known::kAll, Known::kAlphaInMemory}) run(list, {0.5, 0.5, {1}}, known);
  const std::vector<double> difference = {1, -1}, soup = {1, -0.25, 0, -0.5, -0.25}, one = {1};
  for (const auto& coefs : {difference, soup, one, {0.5, 0, 0.25}, {0, 0}}) run_dots(list, coefs);
  run_dots(list, soup, 5);  // blocks take several chunks
  for (Spec& s : list) s.agree = true;
  for (Known known : {Known::kAll, Known::kAlphaInMemory, Known::kBothInDouble}) run(list, {0.7, 0.3, {1}}, known);

  // A table with no room for a further term: the last one's is the end of the argument.
  const int64_t stride = lists::blend_stride(3), fitting = lists::kSmallTable / stride;
  expect(lists::kSmallTable - fitting * stride < int64_t(sizeof(BlendTerm)), "the table is full");
  list.assign(size_t(fitting), {{DType::kFloat32}, DType::kFloat32, 9, {0}});
  for (const Mix& mix : {three, keep}) run(list, mix, Known::kAlphaInMemory);

  list.clear();
  for (DType a : kTypes) {
    for (DType b : kTypes) {
      for (DType out : kTypes) {
        list.push_back({{a, b}, out, 77, {0}});
        list.push_back({{a, b}, out, 45, {1}});
        list.push_back({{a, b}, out, 300, {0, 1, 2}});
      }
    }
  }
  run(list, two, Known::kAll);
  run(list, five, Known::kAlphaInMemory);
  run_dots(list, difference);
  run_dots(list, {1, 0.5, 2});

  const int64_t chunk = lists::kChunk;
  list.clear();
  for (DType t : kTypes) {
    for (int64_t n : {chunk - 1, chunk, chunk + 1, 2 * chunk + 5}) list.push_back({{t}, t, n, {int(n % 3)}});
  }
  run(list, two, Known::kAll);
  run_dots(list, difference);
  run_dots(list, difference, 3);
  // More chunks than the threads that add them up.
  run_dots({{{DType::kBFloat16}, DType::kBFloat16, 7, {0}}, {{DType::kBFloat16}, DType::kBFloat16, 260 * chunk, {0}}},
           one);
  list.clear();
  for (int i = 0; i < 1200; ++i) list.push_back({{DType::kFloat32}, DType::kFloat32, 1 + i % 3, {0}});
  run(list, three, Known::kAll);
  run_dots(list, difference);
}

}  // namespace

// One machine: the list is cut alike for all.
int main(int count, char** arguments) { return main_of(count, arguments, {"sm_90"}, all); }
