// torch.ops.fasttransfer.topk_kd, topk_kd_ for the CUDA key: checks, divisors, views, launches. The kernel is
// cuda/topk_kd.cuh; the same on the CPU is cpu/topk_kd.cpp. Schemas, meanings of the options and the pure-torch twin:
// fasttransfer/ops/topk_kd.py.
//
// Nothing waits for the device and all memory is torch's, so a CUDA graph can capture a call.
#include "cuda/topk_kd.cuh"

#include <tuple>

#include "cuda/row_options.h"

namespace ft {
namespace {

using distill::TopkCall;
using distill::TopkTail;
using rows::Options;
using rows::OptTensor;
using rows::readable;
using rows::Rows;
using rows::RowValues;
using rows::view_of;
using torch::stable::contiguous;

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
  for (const Tensor* t : {&student, &values, &indices}) rows::check_device(*t, student);
  const Rows student_rows(student), value_rows(values);
  const int64_t rows = student_rows.count, columns = options.vocab_size, entries = value_rows.width;
  STD_TORCH_CHECK(value_rows.count == rows && indices.numel() == rows * entries && columns <= student_rows.width,
                  "fasttransfer::topk_kd: shapes of student, values and indices do not fit");
  const auto fits = [rows](const OptTensor& t) { return !t || t->numel() == rows; };
  STD_TORCH_CHECK(fits(labels) && fits(row_weight) && fits(row_temperature) && (!num_items || num_items->numel() > 0),
                  "fasttransfer::topk_kd: labels, row_weight and row_temperature must have one value per row");
  STD_TORCH_CHECK(!labels || labels->scalar_type() == ScalarType::Long,
                  "fasttransfer::topk_kd: labels must be int64");

  TopkCall topk = {};
  distill::KdCall& call = topk.kd;
  call.loss_is_double = student.scalar_type() == ScalarType::Double || values.scalar_type() == ScalarType::Double;
  const auto sizes = student.sizes();
  const bool per_row = options.reduction == "none";
  const size_t loss_dims = per_row ? sizes.size() - 1 : 0;
  const Tensor loss = torch::stable::new_empty(student, {sizes.data(), loss_dims},
                                               call.loss_is_double ? ScalarType::Double : ScalarType::Float);
  const bool half_grad = grad && student.scalar_type() == ScalarType::Half;
  const int64_t scale_size = half_grad ? rows : 0;
  const Tensor grad_scale = torch::stable::new_empty(student, {&scale_size, 1}, ScalarType::Float);

  const Tensor s = readable(student), t = readable(values), ids = contiguous(indices);
  call.student = view_of(s, Rows(s));
  call.teacher = view_of(t, Rows(t));
  topk.indices = ids.const_data_ptr();
  topk.wide_indices = indices.scalar_type() == ScalarType::Long;
  topk.tail = tail_of(tail);
  topk.entries = entries;
  if (grad) {
    const Rows grad_rows(*grad);
    STD_TORCH_CHECK(grad_rows.fits(), "fasttransfer::topk_kd_: more leading dimensions than can be written in place");
    call.grad = view_of(*grad, grad_rows);
  }
  call.rows = rows;
  call.columns = columns;
  call.grad_columns = student_rows.width;

  const RowValues weight(row_weight, 1, student), temperature(row_temperature, options.temperature, student);
  const RowValues items(num_items, 0, student);
  call.weight = weight.values();
  call.temperature = temperature.values();
  OptTensor label_tensor;
  if (labels) {
    rows::check_device(*labels, student);
    label_tensor = contiguous(*labels);
    call.labels = label_tensor->const_data_ptr<int64_t>();
  }
  call.ce_part = labels ? options.label_weight : 0;
  call.kd_part = 1 - call.ce_part;
  call.smoothing = options.label_smoothing;
  call.ignore_index = options.ignore_index;
  call.distill_ignored = options.distill_ignored;
  call.scale_by_t2 = options.scale_by_t2;
  if (half_grad) call.grad_scales = static_cast<float*>(grad_scale.mutable_data_ptr());
  rows::set_divisors(call, options, num_items, items, sizes.size() > 1 ? sizes[0] : 1);

  const device::Stream stream = current_stream(student);
  const bool count = !num_items && rows > 0 && rows::divisors_on_device(call, options);
  const bool direct = per_row || rows == 1;  // a row's loss is the loss
  std::optional<rows::Workspace> space;
  if (count || !direct) space.emplace(student, rows);
  if (count) rows::compute_divisors(call, *space, stream);
  if (direct) {
    call.loss = loss.mutable_data_ptr();
  } else {
    call.losses = space->losses;
  }
  distill::launch_topk_kd(topk, stream);
  if (!direct) rows::sum_losses(call, loss, *space, stream);
  return {loss, grad_scale};
}

std::tuple<Tensor, Tensor, Tensor> topk_kd(const Tensor& student, const Tensor& values, const Tensor& indices,
                                           const OptTensor& labels, const OptTensor& row_weight,
                                           const OptTensor& row_temperature, const OptTensor& num_items,
                                           std::vector<double> num_items_constant, double temperature,
                                           double label_weight, double label_smoothing, int64_t ignore_index,
                                           bool distill_ignored, int64_t vocab_size, std::string reduction,
                                           bool scale_by_t2, std::string tail, bool want_grad) {
  const DeviceGuard guard(student);
  const Options options{temperature,     label_weight, label_smoothing,      ignore_index,
                        distill_ignored, vocab_size,   std::move(reduction), std::move(num_items_constant),
                        scale_by_t2};
  const auto sizes = student.sizes();
  const int64_t none = 0;
  const Tensor grad = want_grad ? torch::stable::new_empty(student, {sizes.data(), sizes.size()})
                                : torch::stable::new_empty(student, {&none, 1});
  const auto [loss, grad_scale] = run(student, values, indices, labels, row_weight, row_temperature, num_items,
                                      options, tail, want_grad ? &grad : nullptr);
  return {loss, grad, grad_scale};
}

// The gradient overwrites the student's logits: each by the thread that has read it last.
std::tuple<Tensor, Tensor> topk_kd_(const Tensor& student, const Tensor& values, const Tensor& indices,
                                    const OptTensor& labels, const OptTensor& row_weight,
                                    const OptTensor& row_temperature, const OptTensor& num_items,
                                    std::vector<double> num_items_constant, double temperature, double label_weight,
                                    double label_smoothing, int64_t ignore_index, bool distill_ignored,
                                    int64_t vocab_size, std::string reduction, bool scale_by_t2, std::string tail) {
  const DeviceGuard guard(student);
  const Options options{temperature,     label_weight, label_smoothing,      ignore_index,
                        distill_ignored, vocab_size,   std::move(reduction), std::move(num_items_constant),
                        scale_by_t2};
  return run(student, values, indices, labels, row_weight, row_temperature, num_items, options, tail, &student);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FT_NAMESPACE, FT_KEY, m) {
  m.impl("topk_kd", TORCH_BOX(&topk_kd));
  m.impl("topk_kd_", TORCH_BOX(&topk_kd_));
}

}  // namespace ft
