// torch.ops.fasttransfer.distill, distill_ for the CUDA key: the divergence, the teacher's gradient and statistics;
// what they have in common with kd is kd_tensors.h. The kernels are cuda/distill.cuh. Schemas, meanings of the
// options and the pure-torch twin: fasttransfer/ops/distill.py.
#include "cuda/distill.cuh"

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "cuda/kd_tensors.h"

namespace ft {
namespace {

using namespace rows;
using distill::DistillCall;
using distill::Divergence;
using rows::Rows;

// What distill has beside the options of its rows.
struct Around {
  std::string divergence;
  std::vector<double> args, softcap;
  bool standardize, want_teacher_grad, want_stats;
};

Divergence divergence_of(const Around& around, bool has_labels) {
  const struct {
    const char* name;
    Divergence divergence;
    size_t args;
  } all[] = {{"forward_kl", Divergence::kForwardKL, 0},
             {"reverse_kl", Divergence::kReverseKL, 0},
             {"jsd", Divergence::kJsd, 1},
             {"tvd", Divergence::kTvd, 0},
             {"decoupled", Divergence::kDecoupled, 2}};
  for (const auto& one : all) {
    if (around.divergence != one.name) continue;
    STD_TORCH_CHECK(around.args.size() == one.args && (one.divergence != Divergence::kDecoupled || has_labels),
                    "fasttransfer::distill: wrong arguments of the divergence");
    return one.divergence;
  }
  STD_TORCH_CHECK(false, "fasttransfer::distill: no such divergence");
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Loss, the student gradient's factors, the teacher's gradient and its factors, statistics.
Results run(const Tensor& student, const Tensor& teacher, const OptTensor& labels, const OptTensor& row_weight,
            const OptTensor& row_temperature, const OptTensor& num_items, const Options& options,
            const Around& around, const Tensor* grad) {
  STD_TORCH_CHECK(around.softcap.size() == 2 && options.vocab_size > 0,
                  "fasttransfer::distill: a softcap for each side, and at least one column");
  const Divergence divergence = divergence_of(around, labels.has_value());
  RowsCall inputs(student, teacher, labels, row_weight, row_temperature, num_items, options);
  const Tensor teacher_grad = new_gradient(teacher, around.want_teacher_grad);
  const int64_t count = inputs.call.rows, stats_size[] = {around.want_stats ? count : 0, distill::kStats};
  const Tensor stats = torch::stable::new_empty(student, {stats_size, 2}, inputs.loss().scalar_type());
  const Tensor grad_scale = new_scales(student, grad, count);
  const Tensor teacher_scale = new_scales(student, around.want_teacher_grad ? &teacher_grad : nullptr, count);
  if (grad) inputs.call.grad = writable(*grad);
  inputs.call.grad_scales = pointer_to(grad_scale);

  const device::Stream stream = current_stream(student);
  inputs.begin(stream);
  DistillCall call = {};
  call.kd = inputs.call;
  if (around.want_teacher_grad) {
    call.teacher_grad = writable(teacher_grad);
    call.teacher_columns = Rows(teacher_grad).width;
  }
  call.teacher_scales = pointer_to(teacher_scale);
  if (around.want_stats) call.stats = stats.mutable_data_ptr();
  call.cap_s = around.softcap[0];
  call.cap_t = around.softcap[1];
  call.standardize = around.standardize;
  for (size_t k = 0; k < around.args.size(); ++k) call.args[k] = around.args[k];
  distill::launch_distill(call, divergence, stream);
  inputs.end(stream);
  return {inputs.loss(), grad_scale, teacher_grad, teacher_scale, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> distill_rows(
    const Tensor& student, const Tensor& teacher, const OptTensor& labels, const OptTensor& row_weight,
    const OptTensor& row_temperature, const OptTensor& num_items, std::vector<double> num_items_constant,
    double temperature, double label_weight, double label_smoothing, int64_t ignore_index, bool distill_ignored,
    int64_t vocab_size, std::string reduction, bool scale_by_t2, std::string divergence,
    std::vector<double> divergence_args, bool standardize, std::vector<double> softcap, bool want_teacher_grad,
    bool want_stats, bool want_grad) {
  const DeviceGuard guard(student);
  const Options options{temperature,     label_weight, label_smoothing,      ignore_index,
                        distill_ignored, vocab_size,   std::move(reduction), std::move(num_items_constant),
                        scale_by_t2};
  const Around around{std::move(divergence), std::move(divergence_args), std::move(softcap),
                      standardize,           want_teacher_grad,          want_stats};
  const Tensor grad = new_gradient(student, want_grad);
  const auto [loss, scale, teacher_grad, teacher_scale, stats] = run(
      student, teacher, labels, row_weight, row_temperature, num_items, options, around, want_grad ? &grad : nullptr);
  return {loss, grad, scale, teacher_grad, teacher_scale, stats};
}

// The gradient overwrites the student's logits: what a row's gradient overwrites has been read before.
Results distill_rows_(const Tensor& student, const Tensor& teacher, const OptTensor& labels,
                      const OptTensor& row_weight, const OptTensor& row_temperature, const OptTensor& num_items,
                      std::vector<double> num_items_constant, double temperature, double label_weight,
                      double label_smoothing, int64_t ignore_index, bool distill_ignored, int64_t vocab_size,
                      std::string reduction, bool scale_by_t2, std::string divergence,
                      std::vector<double> divergence_args, bool standardize, std::vector<double> softcap,
                      bool want_teacher_grad, bool want_stats) {
  const DeviceGuard guard(student);
  const Options options{temperature,     label_weight, label_smoothing,      ignore_index,
                        distill_ignored, vocab_size,   std::move(reduction), std::move(num_items_constant),
                        scale_by_t2};
  const Around around{std::move(divergence), std::move(divergence_args), std::move(softcap),
                      standardize,           want_teacher_grad,          want_stats};
  return run(student, teacher, labels, row_weight, row_temperature, num_items, options, around, &student);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FT_NAMESPACE, FT_KEY, m) {
  m.impl("distill", TORCH_BOX(&distill_rows));
  m.impl("distill_", TORCH_BOX(&distill_rows_));
}

}  // namespace ft
