// torch.ops.fasttransfer.topk_kd, topk_kd_ for the CPU key: divisors, row pointers, threads. The row itself is
// cpu/topk_kd.h. Schemas, meanings of the options and the pure-torch twin: fasttransfer/ops/topk_kd.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/row_options.h"

namespace ft {
namespace {

using rows::Divisors;
using rows::Options;
using rows::OptTensor;
using rows::RowInputs;

TopkTail tail_of(const std::string& name) {
  if (name == "renormalize") return TopkTail::kRenormalize;
  if (name == "zero") return TopkTail::kZero;
  STD_TORCH_CHECK(name == "bucket", "fasttransfer::topk_kd: no tail '", name, "'");
  return TopkTail::kBucket;
}

// Writes the loss into a new tensor and the gradient into *grad if given: its rows are those of the logits.
std::tuple<Tensor, Tensor> run(const Tensor& student, const Tensor& values, const Tensor& indices,
                               const OptTensor& labels, const OptTensor& row_weight, const OptTensor& row_temperature,
                               const OptTensor& num_items, const Options& options, const std::string& tail,
                               const Tensor* grad) {
  STD_TORCH_CHECK(student.dim() >= 1 && student.dim() == values.dim() && student.dim() == indices.dim(),
                  "fasttransfer::topk_kd: student, values and indices must have the same leading dimensions");
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long || indices.scalar_type() == ScalarType::Int,
                  "fasttransfer::topk_kd: indices must be int32 or int64");
  const Tensor index_rows = torch::stable::contiguous(indices);  // k of them per row: small beside the logits
  const Rows student_rows(student), value_rows(values);
  const int64_t rows = student_rows.count(), columns = options.vocab_size, entries = value_rows.width();
  STD_TORCH_CHECK(value_rows.count() == rows && indices.numel() == rows * entries && columns <= student_rows.width(),
                  "fasttransfer::topk_kd: shapes of student, values and indices do not fit");
  const bool is_double = student.scalar_type() == ScalarType::Double || values.scalar_type() == ScalarType::Double;

  const auto sizes = student.sizes();
  const bool per_row = options.reduction == "none";
  const size_t loss_dims = per_row ? sizes.size() - 1 : 0;
  Tensor loss = torch::stable::new_empty(student, {sizes.data(), loss_dims},
                                         is_double ? ScalarType::Double : ScalarType::Float);
  const bool half_grad = grad && student.scalar_type() == ScalarType::Half;
  const int64_t scale_size = half_grad ? rows : 0;
  Tensor grad_scale = torch::stable::new_empty(student, {&scale_size, 1}, ScalarType::Float);
  float* const grad_scales = half_grad ? grad_scale.mutable_data_ptr<float>() : nullptr;

  const auto fits = [rows](const OptTensor& t) { return !t || t->numel() == rows; };
  STD_TORCH_CHECK(fits(labels) && fits(row_weight) && fits(row_temperature) && (!num_items || num_items->numel() > 0),
                  "fasttransfer::topk_kd: labels, row_weight and row_temperature must have one value per row");
  STD_TORCH_CHECK(!labels || labels->scalar_type() == ScalarType::Long,
                  "fasttransfer::topk_kd: labels must be int64");
  const RowInputs in(row_weight, row_temperature, labels, options);
  const Divisors inverse = inverse_divisors(in, options, num_items, rows, sizes.size() > 1 ? sizes[0] : 1);

  TopkCall call{};
  call.student = call.grad = dtype_of(student);
  call.values = dtype_of(values);
  call.wide_indices = indices.scalar_type() == ScalarType::Long;
  call.tail = tail_of(tail);
  call.entries = entries;
  call.columns = columns;
  call.grad_columns = student_rows.width();
  call.student_stride = student_rows.column_stride();
  call.value_stride = value_rows.column_stride();
  call.index_stride = 1;
  call.label_smoothing = options.label_smoothing;
  std::optional<Rows> grad_rows;
  if (grad) {
    grad_rows.emplace(*grad);
    call.grad_stride = grad_rows->column_stride();
    call.stream = bytes_of(call.grad) >= 4 && rows * call.grad_columns * bytes_of(call.grad) >= rows::kStreamBytes;
  }

  const char* const s = static_cast<const char*>(student.const_data_ptr());
  const char* const t = static_cast<const char*>(values.const_data_ptr());
  const char* const ids = static_cast<const char*>(index_rows.const_data_ptr());
  const int64_t id_bytes = entries * (call.wide_indices ? 8 : 4);
  char* const g = grad ? static_cast<char*>(grad->mutable_data_ptr()) : nullptr;
  const double ce_part = labels ? options.label_weight : 0, kd_part = 1 - ce_part;
  const Kernels& kernel = kernels();
  const auto topk_row = is_double ? kernel.topk_row_double : kernel.topk_row_float;
  const int64_t scratch_bytes = kernel.topk_scratch_bytes(columns, entries, is_double);
  std::vector<double> losses(rows);

  const int64_t grain = std::max<int64_t>(1, rows::kGrainLogits / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    thread_local ThreadScratch scratch;
    void* const memory = scratch.at_least(scratch_bytes);
    for (int64_t i = begin; i < end; ++i) {
      char* const grad_row = grad ? g + grad_rows->offset(i) : nullptr;
      const bool counted = in.counted(i, options);
      const double temperature = in.temperature_of(i), weight = counted ? in.weight[i] : 0;
      TopkRow row{};
      row.student = s + student_rows.offset(i);
      row.grad = grad_row;
      row.inv_t = 1 / temperature;
      row.label_weight = counted && in.has_label(i, options) ? ce_part * weight * inverse.ce : 0;
      row.kd_weight = counted ? kd_part * weight * inverse.kd : 0;
      if (options.scale_by_t2) row.kd_weight *= temperature * temperature;
      row.values = row.kd_weight != 0 ? t + value_rows.offset(i) : nullptr;
      row.indices = ids + i * id_bytes;
      row.label = row.label_weight != 0 ? in.labels[i] : -1;
      KdRowLoss result{0, 0, 1};
      if (row.kd_weight != 0 || row.label_weight != 0) {
        result = topk_row(call, row, memory);
      } else if (grad) {
        // Not counted: a zero gradient, whatever the row holds.
        rows::zero_row(grad_row, call.grad_columns, call.grad_stride, bytes_of(call.grad));
      }
      losses[i] = (row.kd_weight != 0 ? row.kd_weight * result.kd : 0) +
                  (row.label_weight != 0 ? row.label_weight * result.ce : 0);
      if (grad_scales) grad_scales[i] = float(result.grad_scale);
    }
  });

  rows::store_losses(loss, losses, per_row);
  return {loss, grad_scale};
}

std::tuple<Tensor, Tensor, Tensor> topk_kd(const Tensor& student, const Tensor& values, const Tensor& indices,
                                           const OptTensor& labels, const OptTensor& row_weight,
                                           const OptTensor& row_temperature, const OptTensor& num_items,
                                           std::vector<double> num_items_constant, double temperature,
                                           double label_weight, double label_smoothing, int64_t ignore_index,
                                           bool distill_ignored, int64_t vocab_size, std::string reduction,
                                           bool scale_by_t2, std::string tail, bool want_grad) {
  const Options options{temperature,     label_weight, label_smoothing,      ignore_index,
                        distill_ignored, vocab_size,   std::move(reduction), std::move(num_items_constant),
                        scale_by_t2};
  const auto sizes = student.sizes();
  const int64_t none = 0;
  Tensor grad = want_grad ? torch::stable::new_empty(student, {sizes.data(), sizes.size()})
                          : torch::stable::new_empty(student, {&none, 1});
  auto [loss, grad_scale] = run(student, values, indices, labels, row_weight, row_temperature, num_items, options,
                                tail, want_grad ? &grad : nullptr);
  return {loss, grad, grad_scale};
}

// The gradient overwrites the student's logits: a row has been read whole before its gradient is written.
std::tuple<Tensor, Tensor> topk_kd_(const Tensor& student, const Tensor& values, const Tensor& indices,
                                    const OptTensor& labels, const OptTensor& row_weight,
                                    const OptTensor& row_temperature, const OptTensor& num_items,
                                    std::vector<double> num_items_constant, double temperature, double label_weight,
                                    double label_smoothing, int64_t ignore_index, bool distill_ignored,
                                    int64_t vocab_size, std::string reduction, bool scale_by_t2, std::string tail) {
  const Options options{temperature,     label_weight, label_smoothing,      ignore_index,
                        distill_ignored, vocab_size,   std::move(reduction), std::move(num_items_constant),
                        scale_by_t2};
  return run(student, values, indices, labels, row_weight, row_temperature, num_items, options, tail, &student);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttransfer, CPU, m) {
  m.impl("topk_kd", TORCH_BOX(&topk_kd));
  m.impl("topk_kd_", TORCH_BOX(&topk_kd_));
}

}  // namespace ft
