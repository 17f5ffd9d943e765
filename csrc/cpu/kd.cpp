// torch.ops.fasttransfer.kd, kd_, kd_scale, kd_scale_ for the CPU key: divisors, row pointers, threads. The row
// itself is cpu/kd.h. Schemas, meanings of the options and the pure-torch twin: fasttransfer/ops/kd.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
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
using rows::RowValues;

// Writes the loss into a new tensor and the gradient into *grad if given: its rows are those of the logits.
std::tuple<Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, const OptTensor& labels,
                               const OptTensor& row_weight, const OptTensor& row_temperature,
                               const OptTensor& num_items, const Options& options, const Tensor* grad) {
  STD_TORCH_CHECK(student.dim() >= 1 && student.dim() == teacher.dim(),
                  "fasttransfer::kd: student and teacher logits must have the same leading dimensions");
  const Rows student_rows(student), teacher_rows(teacher);
  const int64_t rows = student_rows.count(), columns = options.vocab_size;
  STD_TORCH_CHECK(teacher_rows.count() == rows && columns <= student_rows.width() && columns <= teacher_rows.width(),
                  "fasttransfer::kd: shapes of student and teacher logits do not fit");
  const bool is_double = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
  const ScalarType loss_type = is_double ? ScalarType::Double : ScalarType::Float;

  const auto sizes = student.sizes();
  const bool per_row = options.reduction == "none";
  const size_t loss_dims = per_row ? sizes.size() - 1 : 0;
  Tensor loss = torch::stable::new_empty(student, {sizes.data(), loss_dims}, loss_type);
  const bool half_grad = grad && student.scalar_type() == ScalarType::Half;
  const int64_t scale_size = half_grad ? rows : 0;
  Tensor grad_scale = torch::stable::new_empty(student, {&scale_size, 1}, ScalarType::Float);
  float* const grad_scales = half_grad ? grad_scale.mutable_data_ptr<float>() : nullptr;

  const auto fits = [rows](const OptTensor& t) { return !t || t->numel() == rows; };
  STD_TORCH_CHECK(fits(labels) && fits(row_weight) && fits(row_temperature) && (!num_items || num_items->numel() > 0),
                  "fasttransfer::kd: labels, row_weight and row_temperature must have one value per row");
  STD_TORCH_CHECK(!labels || labels->scalar_type() == ScalarType::Long, "fasttransfer::kd: labels must be int64");
  const RowInputs in(row_weight, row_temperature, labels, options);
  const Divisors inverse = inverse_divisors(in, options, num_items, rows, sizes.size() > 1 ? sizes[0] : 1);

  KdCall call{};
  call.student = dtype_of(student);
  call.teacher = dtype_of(teacher);
  call.grad = call.student;
  call.columns = columns;
  call.grad_columns = student_rows.width();
  call.student_stride = student_rows.column_stride();
  call.teacher_stride = teacher_rows.column_stride();
  call.label_smoothing = options.label_smoothing;
  std::optional<Rows> grad_rows;
  if (grad) {
    grad_rows.emplace(*grad);
    call.grad_stride = grad_rows->column_stride();
    call.stream = bytes_of(call.grad) >= 4 && rows * call.grad_columns * bytes_of(call.grad) >= rows::kStreamBytes;
  }

  const char* const s = static_cast<const char*>(student.const_data_ptr());
  const char* const t = static_cast<const char*>(teacher.const_data_ptr());
  char* const g = grad ? static_cast<char*>(grad->mutable_data_ptr()) : nullptr;
  const double ce_part = labels ? options.label_weight : 0, kd_part = 1 - ce_part;
  const Kernels& kernel = kernels();
  const auto kd_row = is_double ? kernel.kd_row_double : kernel.kd_row_float;
  const int64_t scratch_bytes = kernel.kd_scratch_bytes(columns, is_double);
  std::vector<double> losses(rows);

  const int64_t grain = std::max<int64_t>(1, rows::kGrainLogits / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    thread_local ThreadScratch scratch;
    void* const memory = scratch.at_least(scratch_bytes);
    for (int64_t i = begin; i < end; ++i) {
      char* const grad_row = grad ? g + grad_rows->offset(i) : nullptr;
      const bool counted = in.counted(i, options);
      const double temperature = in.temperature_of(i), weight = counted ? in.weight[i] : 0;
      KdRow row{};
      row.student = s + student_rows.offset(i);
      row.grad = grad_row;
      row.inv_t = 1 / temperature;
      row.label_weight = counted && in.has_label(i, options) ? ce_part * weight * inverse.ce : 0;
      row.kd_weight = counted ? kd_part * weight * inverse.kd : 0;
      if (options.scale_by_t2) row.kd_weight *= temperature * temperature;
      row.teacher = row.kd_weight != 0 ? t + teacher_rows.offset(i) : nullptr;
      row.label = row.label_weight != 0 ? in.labels[i] : -1;
      KdRowLoss result{0, 0, 1};
      if (row.kd_weight != 0 || row.label_weight != 0) {
        result = kd_row(call, row, memory);
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

std::tuple<Tensor, Tensor, Tensor> kd(const Tensor& student, const Tensor& teacher, const OptTensor& labels,
                                      const OptTensor& row_weight, const OptTensor& row_temperature,
                                      const OptTensor& num_items, std::vector<double> num_items_constant,
                                      double temperature, double label_weight, double label_smoothing,
                                      int64_t ignore_index, bool distill_ignored, int64_t vocab_size,
                                      std::string reduction, bool scale_by_t2, bool want_grad) {
  const Options options{temperature,     label_weight, label_smoothing,      ignore_index,
                        distill_ignored, vocab_size,   std::move(reduction), std::move(num_items_constant),
                        scale_by_t2};
  const auto sizes = student.sizes();
  const int64_t none = 0;
  Tensor grad = want_grad ? torch::stable::new_empty(student, {sizes.data(), sizes.size()})
                          : torch::stable::new_empty(student, {&none, 1});
  auto [loss, grad_scale] =
      run(student, teacher, labels, row_weight, row_temperature, num_items, options, want_grad ? &grad : nullptr);
  return {loss, grad, grad_scale};
}

// The gradient overwrites the student's logits: a row has been read whole before its gradient is written.
std::tuple<Tensor, Tensor> kd_(const Tensor& student, const Tensor& teacher, const OptTensor& labels,
                               const OptTensor& row_weight, const OptTensor& row_temperature,
                               const OptTensor& num_items, std::vector<double> num_items_constant, double temperature,
                               double label_weight, double label_smoothing, int64_t ignore_index,
                               bool distill_ignored, int64_t vocab_size, std::string reduction, bool scale_by_t2) {
  const Options options{temperature,     label_weight, label_smoothing,      ignore_index,
                        distill_ignored, vocab_size,   std::move(reduction), std::move(num_items_constant),
                        scale_by_t2};
  return run(student, teacher, labels, row_weight, row_temperature, num_items, options, &student);
}

// out = grad * upstream * grad_scale, row by row; upstream holds one value or one per row.
void scale_rows(const Tensor& grad, const Tensor& upstream, const Tensor& grad_scale, const Tensor& out) {
  const Rows in_rows(grad), out_rows(out);
  const RowValues up(upstream, 1), scale(grad_scale.numel() ? OptTensor(grad_scale) : std::nullopt, 1);
  const bool per_row = upstream.numel() > 1;
  const int64_t rows = in_rows.count();
  STD_TORCH_CHECK(
      (upstream.numel() == 1 || upstream.numel() == rows) && (grad_scale.numel() == 0 || grad_scale.numel() == rows),
      "fasttransfer::kd_scale: upstream and grad_scale must have one value, or one per row");
  const bool in_place = grad.const_data_ptr() == out.const_data_ptr();
  const KdScale call{dtype_of(grad), in_rows.width(), in_rows.column_stride(), out_rows.column_stride()};
  const char* const p = static_cast<const char*>(grad.const_data_ptr());
  char* const q = static_cast<char*>(out.mutable_data_ptr());
  const Kernels& kernel = kernels();
  const int64_t grain = std::max<int64_t>(1, rows::kGrainLogits / std::max<int64_t>(1, call.columns));
  // The usual case, loss.backward(): nothing to do, and no thread woken to find that out.
  if (in_place && !per_row && grad_scale.numel() == 0 && (rows == 0 || up[0] == 1)) return;
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double factor = up[per_row ? i : 0] * scale[i];
      if (in_place && factor == 1) continue;
      kernel.kd_scale_row(call, p + in_rows.offset(i), q + out_rows.offset(i), factor);
    }
  });
}

Tensor kd_scale(const Tensor& grad, const Tensor& upstream, const Tensor& grad_scale) {
  const auto sizes = grad.sizes();
  Tensor out = torch::stable::new_empty(grad, {sizes.data(), sizes.size()});
  scale_rows(grad, upstream, grad_scale, out);
  return out;
}

void kd_scale_(const Tensor& grad, const Tensor& upstream, const Tensor& grad_scale) {
  scale_rows(grad, upstream, grad_scale, grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttransfer, CPU, m) {
  m.impl("kd", TORCH_BOX(&kd));
  m.impl("kd_", TORCH_BOX(&kd_));
  m.impl("kd_scale", TORCH_BOX(&kd_scale));
  m.impl("kd_scale_", TORCH_BOX(&kd_scale_));
}

}  // namespace ft
