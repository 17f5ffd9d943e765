// The kernels of cuda/kd_totals.cuh and cuda/kd_scale.cuh: sums over rows, and saved gradients times the upstream
// one.
#include "cuda/kd_scale.cuh"
#include "cuda/kd_totals.cuh"
#include "simt/cases.h"

namespace {

using namespace ft;
using namespace ft::cases;
using namespace ft::distill;

void totals() {
  for (const auto [rows, blocks] : {std::pair<int64_t, int64_t>{0, 1},
                                    {1, 1},
                                    {kTotalRows, 1},
                                    {kTotalRows + 1, 2},
                                    {512 * kTotalRows, 512},
                                    {600 * kTotalRows, 512}}) {
    expect(total_blocks(rows) == blocks, "blocks for " + std::to_string(rows) + " rows");
  }
  for (int64_t count : {int64_t{1}, int64_t{5}, int64_t{700}, kTotalRows, kTotalRows + 1, 2 * kTotalRows + 77}) {
    Random random(count);
    Buffer numbers(DType::kFloat64, count), weights(DType::kFloat32, count), labels(DType::kFloat64, count);
    const int64_t blocks = total_blocks(count);
    double sum = 0, kd = 0, ce = 0;
    for (int64_t i = 0; i < count; ++i) {
      numbers.set(i, random.normal());
      weights.set(i, i % 3 ? random.uniform() : 0);
      labels.as<int64_t>()[i] = i % 4 == 1 ? -100 : 7;
      sum += numbers.get(i);
      kd += weights.get(i);
      ce += i % 4 == 1 ? 0 : weights.get(i);
    }
    Buffer partials(DType::kFloat64, 2 * blocks), out(DType::kFloat32, 1), pair(DType::kFloat64, 2);
    TotalCall call = {};
    call.count = count;
    call.numbers = numbers.as<double>();
    call.width = 1;
    call.loss = out.data();
    launch_totals(call, partials.as<double>(), {});
    expect_close(out.get(0), sum, 1e-6 * (1 + std::fabs(sum)), "total of " + std::to_string(count));

    TotalCall divisors = {};
    divisors.count = count;
    divisors.width = 2;
    divisors.weight = {weights.data(), false, 1};
    divisors.labels = labels.as<int64_t>();
    divisors.ignore_index = -100;
    divisors.distill_ignored = true;
    divisors.partials = pair.as<double>();
    launch_totals(divisors, partials.as<double>(), {});
    expect_close(pair.get(0), kd, 1e-12 * kd, "kd divisor of " + std::to_string(count));
    expect_close(pair.get(1), ce, 1e-12 * ce, "ce divisor of " + std::to_string(count));
    expect(partials.intact() && out.intact() && pair.intact(), "memory beside the totals");
  }
}

void scale_case(DType dtype, int64_t rows, int64_t columns, int gap, int stride, int offset, bool in_place,
                bool per_row, bool with_scales, double factor) {
  Random random(columns);
  const int64_t pitch = (columns - 1) * stride + 1 + gap, elements = (rows - 1) * pitch + (columns - 1) * stride + 1;
  Buffer in(dtype, elements, 1), out(dtype, elements, offset), upstream(DType::kFloat32, per_row ? rows : 1);
  Buffer scales(DType::kFloat32, rows);
  std::vector<double> before(elements);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t v = 0; v < columns; ++v) in.set(i * pitch + v * stride, random.normal());
    scales.set(i, i % 3 ? 0.25 : 1);
  }
  for (int64_t e = 0; e < elements; ++e) before[e] = in.get(e);
  for (int64_t i = 0; i < upstream.size(); ++i) upstream.set(i, per_row && i % 2 ? 1 : factor);
  ScaleCall call = {};
  const auto view = [&](Buffer& b) {
    View v = {};
    v.data = b.data();
    v.rows.dims = 1;
    v.rows.size[0] = rows;
    v.rows.stride[0] = pitch * size_of(dtype);
    v.column_stride = stride;
    v.dtype = dtype;
    return v;
  };
  Buffer& result = in_place ? in : out;
  call.in = view(in);
  call.out = view(result);
  call.rows = rows;
  call.columns = columns;
  call.upstream = {upstream.data(), false, 1};
  call.upstream_per_row = per_row;
  call.in_place = in_place;
  call.grad_scales = with_scales ? scales.as<float>() : nullptr;
  const Counted counted;
  launch_kd_scale(call, {});
  const std::string text =
      std::string("kd_scale ") + cases::name_of(dtype) + " " + std::to_string(rows) + "x" + std::to_string(columns);
  // A warp for each piece of a row, the first of which may begin before it.
  const int64_t vectors = columns * size_of(dtype) / 16 + 2, pieces = (vectors + kScalePiece - 1) / kScalePiece;
  const int64_t needed = (rows * pieces + 7) / 8, most = machine().multiprocessors * 8;
  if (Counted::kCounts) expect(counted.launches()[0].blocks == std::min(needed, most), text + ": blocks");
  for (int64_t i = 0; i < rows; ++i) {
    const double f = upstream.get(per_row ? i : 0) * (with_scales ? scales.get(i) : 1);
    for (int64_t v = 0; v < columns; ++v) {
      const int64_t e = i * pitch + v * stride;
      expect_rounded(result, e, before[e] * f, 1e-7 * std::fabs(before[e] * f), text);
    }
  }
  expect(in.intact() && out.intact(), text + ": memory beside it");
}

void scales() {
  for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    for (int64_t columns : {1, 2, 9, 64, 504, 600, 1500}) {  // 504: no vector is left over
      scale_case(dtype, 3, columns, 0, 1, 1, false, false, false, 0.5);
      scale_case(dtype, 5, columns, 3, 1, 2, false, true, true, 3);
      scale_case(dtype, 4, columns, 1, 2, 0, true, true, false, 0.5);
      scale_case(dtype, 4, columns, 1, 1, 0, true, false, true, 1);
      scale_case(dtype, 2, columns, 0, 1, 0, true, false, false, 1);
      scale_case(dtype, 40, columns, 0, 1, 0, true, false, false, 2);
      if (columns == 64) scale_case(dtype, 300, columns, 0, 1, 0, true, false, false, 2);  // blocks take several
    }
  }
}

void all(const char*) {
  totals();
  scales();
}

}  // namespace

int main(int count, char** arguments) { return main_of(count, arguments, {"tiny"}, all); }
