// torch.ops.fasttransfer.distill, distill_ for the CPU key: divisors, row pointers, threads. The row itself is
// cpu/distill.h. Schemas, meanings of the options and the pure-torch twin: fasttransfer/ops/distill.py.
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

constexpr int64_t kStats = 5;

// What the operation has beside kd's options.
struct DistillOptions {
  std::string divergence;
  std::vector<double> args;
  bool standardize;
  std::vector<double> softcap;
  bool want_teacher_grad, want_stats;
};

Divergence divergence_of(const std::string& name) {
  if (name == "forward_kl") return Divergence::kForwardKL;
  if (name == "reverse_kl") return Divergence::kReverseKL;
  if (name == "jsd") return Divergence::kJsd;
  if (name == "tvd") return Divergence::kTvd;
  STD_TORCH_CHECK(name == "decoupled", "fasttransfer::distill: no divergence '", name, "'");
  return Divergence::kDecoupled;
}

// One side: its logits, its gradient if it is wanted, the factors of an fp16 gradient.
struct Side {
  Rows logits;
  std::optional<Rows> grad_rows;
  const char* data;
  char* grad = nullptr;
  Tensor scale;
  float* scales = nullptr;

  Side(const Tensor& tensor, const Tensor* grad_tensor, double softcap, DistillSide& call)
      : logits(tensor), data(static_cast<const char*>(tensor.const_data_ptr())) {
    call.dtype = dtype_of(tensor);
    call.stride = logits.column_stride();
    call.softcap = softcap;
    const int64_t rows = logits.count();
    const int64_t scale_size = grad_tensor && call.dtype == DType::kFloat16 ? rows : 0;
    scale = torch::stable::new_empty(tensor, {&scale_size, 1}, ScalarType::Float);
    if (scale_size) scales = scale.mutable_data_ptr<float>();
    if (!grad_tensor) return;
    grad_rows.emplace(*grad_tensor);
    grad = static_cast<char*>(grad_tensor->mutable_data_ptr());
    call.grad_stride = grad_rows->column_stride();
    call.grad_columns = logits.width();
    call.stream = bytes_of(call.dtype) >= 4 && rows * call.grad_columns * bytes_of(call.dtype) >= rows::kStreamBytes;
  }

  void zero(int64_t row, const DistillSide& call) const {
    if (grad)
      rows::zero_row(grad + grad_rows->offset(row), call.grad_columns, call.grad_stride, bytes_of(call.dtype));
  }
};

// Loss, the student gradient's factors, the teacher's gradient and its factors, statistics; the student's gradient is
// written into *grad if given.
using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Result run(const Tensor& student, const Tensor& teacher, const OptTensor& labels, const OptTensor& row_weight,
           const OptTensor& row_temperature, const OptTensor& num_items, const Options& options,
           const DistillOptions& distill, const Tensor* grad) {
  STD_TORCH_CHECK(student.dim() >= 1 && student.dim() == teacher.dim(),
                  "fasttransfer::distill: student and teacher logits must have the same leading dimensions");
  const auto sizes = student.sizes(), teacher_sizes = teacher.sizes();
  const int64_t none = 0;
  Tensor teacher_grad = distill.want_teacher_grad
                            ? torch::stable::new_empty(teacher, {teacher_sizes.data(), teacher_sizes.size()})
                            : torch::stable::new_empty(teacher, {&none, 1});
  STD_TORCH_CHECK(distill.softcap.size() == 2, "fasttransfer::distill: softcap must have one value per side");
  DistillCall call{};
  Side sides[2] = {{student, grad, distill.softcap[0], call.side[0]},
                   {teacher, distill.want_teacher_grad ? &teacher_grad : nullptr, distill.softcap[1], call.side[1]}};
  const int64_t rows = sides[0].logits.count(), columns = options.vocab_size;
  STD_TORCH_CHECK(
      sides[1].logits.count() == rows && columns <= sides[0].logits.width() && columns <= sides[1].logits.width(),
      "fasttransfer::distill: shapes of student and teacher logits do not fit");
  call.divergence = divergence_of(distill.divergence);
  const size_t args = call.divergence == Divergence::kDecoupled ? 2 : call.divergence == Divergence::kJsd ? 1 : 0;
  STD_TORCH_CHECK(distill.args.size() == args, "fasttransfer::distill: '", distill.divergence, "' takes ", args,
                  " divergence_args");
  std::copy(distill.args.begin(), distill.args.end(), call.args);
  call.standardize = distill.standardize;
  call.want_stats = distill.want_stats;
  call.columns = columns;
  call.label_smoothing = options.label_smoothing;

  const auto fits = [rows](const OptTensor& t) { return !t || t->numel() == rows; };
  STD_TORCH_CHECK(fits(labels) && fits(row_weight) && fits(row_temperature) && (!num_items || num_items->numel() > 0),
                  "fasttransfer::distill: labels, row_weight and row_temperature must have one value per row");
  STD_TORCH_CHECK(labels || call.divergence != Divergence::kDecoupled,
                  "fasttransfer::distill: 'decoupled' needs labels");
  STD_TORCH_CHECK(!labels || labels->scalar_type() == ScalarType::Long,
                  "fasttransfer::distill: labels must be int64");
  const RowInputs in(row_weight, row_temperature, labels, options);
  const Divisors inverse = inverse_divisors(in, options, num_items, rows, sizes.size() > 1 ? sizes[0] : 1);

  const bool is_double = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
  const ScalarType loss_type = is_double ? ScalarType::Double : ScalarType::Float;
  const bool per_row = options.reduction == "none";
  Tensor loss = torch::stable::new_empty(student, {sizes.data(), per_row ? sizes.size() - 1 : 0}, loss_type);
  const int64_t stats_sizes[] = {distill.want_stats ? rows : 0, kStats};
  Tensor stats = torch::stable::new_empty(student, {stats_sizes, 2}, loss_type);

  const double ce_part = labels ? options.label_weight : 0, kd_part = 1 - ce_part;
  const Kernels& kernel = kernels();
  const auto distill_row = is_double ? kernel.distill_row_double : kernel.distill_row_float;
  const int64_t scratch_bytes = kernel.distill_scratch_bytes(columns, is_double);
  std::vector<double> losses(rows);
  double* const stats_double = is_double ? stats.mutable_data_ptr<double>() : nullptr;
  float* const stats_float = is_double ? nullptr : stats.mutable_data_ptr<float>();

  const int64_t grain = std::max<int64_t>(1, rows::kGrainLogits / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    thread_local ThreadScratch scratch;
    void* const memory = scratch.at_least(scratch_bytes);
    for (int64_t i = begin; i < end; ++i) {
      const bool counted = in.counted(i, options);
      const double temperature = in.temperature_of(i), weight = counted ? in.weight[i] : 0;
      DistillRow row{};
      row.inv_t = 1 / temperature;
      row.labelled = counted && in.has_label(i, options);
      row.label = row.labelled ? in.labels[i] : -1;
      row.label_weight = row.labelled ? ce_part * weight * inverse.ce : 0;
      row.kd_weight = counted ? kd_part * weight * inverse.kd : 0;
      if (options.scale_by_t2) row.kd_weight *= temperature * temperature;
      DistillResult result{};
      result.grad_scale[0] = result.grad_scale[1] = 1;
      if (row.kd_weight != 0 || row.label_weight != 0) {
        row.logits[0] = sides[0].data + sides[0].logits.offset(i);
        // What is looked at only for the statistics is looked at all the same.
        if (row.kd_weight != 0 || call.want_stats) row.logits[1] = sides[1].data + sides[1].logits.offset(i);
        for (int k = 0; k < 2; ++k) {
          if (sides[k].grad) row.grad[k] = sides[k].grad + sides[k].grad_rows->offset(i);
        }
        result = distill_row(call, row, memory);
      } else {
        // Not counted: zero gradients, whatever the row holds.
        for (int k = 0; k < 2; ++k) sides[k].zero(i, call.side[k]);
      }
      losses[i] = result.loss;
      for (int k = 0; k < 2; ++k) {
        if (sides[k].scales) sides[k].scales[i] = float(result.grad_scale[k]);
      }
      for (int64_t k = 0; call.want_stats && k < kStats; ++k) {
        if (is_double) {
          stats_double[i * kStats + k] = result.stats[k];
        } else {
          stats_float[i * kStats + k] = float(result.stats[k]);
        }
      }
    }
  });

  rows::store_losses(loss, losses, per_row);
  return {loss, sides[0].scale, teacher_grad, sides[1].scale, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> distill(
    const Tensor& student, const Tensor& teacher, const OptTensor& labels, const OptTensor& row_weight,
    const OptTensor& row_temperature, const OptTensor& num_items, std::vector<double> num_items_constant,
    double temperature, double label_weight, double label_smoothing, int64_t ignore_index, bool distill_ignored,
    int64_t vocab_size, std::string reduction, bool scale_by_t2, std::string divergence,
    std::vector<double> divergence_args, bool standardize, std::vector<double> softcap, bool want_teacher_grad,
    bool want_stats, bool want_grad) {
  const Options options{temperature,     label_weight, label_smoothing,      ignore_index,
                        distill_ignored, vocab_size,   std::move(reduction), std::move(num_items_constant),
                        scale_by_t2};
  const DistillOptions of{std::move(divergence), std::move(divergence_args), standardize,
                          std::move(softcap),    want_teacher_grad,          want_stats};
  const auto sizes = student.sizes();
  const int64_t none = 0;
  Tensor grad = want_grad ? torch::stable::new_empty(student, {sizes.data(), sizes.size()})
                          : torch::stable::new_empty(student, {&none, 1});
  auto [loss, scale, teacher_grad, teacher_scale, stats] =
      run(student, teacher, labels, row_weight, row_temperature, num_items, options, of, want_grad ? &grad : nullptr);
  return {loss, grad, scale, teacher_grad, teacher_scale, stats};
}

// The gradient overwrites the student's logits: a row has been read whole before its gradient is written.
Result distill_(const Tensor& student, const Tensor& teacher, const OptTensor& labels, const OptTensor& row_weight,
                const OptTensor& row_temperature, const OptTensor& num_items, std::vector<double> num_items_constant,
                double temperature, double label_weight, double label_smoothing, int64_t ignore_index,
                bool distill_ignored, int64_t vocab_size, std::string reduction, bool scale_by_t2,
                std::string divergence, std::vector<double> divergence_args, bool standardize,
                std::vector<double> softcap, bool want_teacher_grad, bool want_stats) {
  const Options options{temperature,     label_weight, label_smoothing,      ignore_index,
                        distill_ignored, vocab_size,   std::move(reduction), std::move(num_items_constant),
                        scale_by_t2};
  const DistillOptions of{std::move(divergence), std::move(divergence_args), standardize,
                          std::move(softcap),    want_teacher_grad,          want_stats};
  return run(student, teacher, labels, row_weight, row_temperature, num_items, options, of, &student);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttransfer, CPU, m) {
  m.impl("distill", TORCH_BOX(&distill));
  m.impl("distill_", TORCH_BOX(&distill_));
}

}  // namespace ft
