// torch.ops.fasttransfer.kd, kd_, kd_scale, kd_scale_ for the CUDA key: checks, divisors, views, launches. The
// kernels are cuda/kd.cuh; the same on the CPU is cpu/kd.cpp. Schemas, meanings of the options and the pure-torch
// twin: fasttransfer/ops/kd.py.
//
// What the calls of distill.cu share with these: kd_tensors.h.
#include "cuda/kd.cuh"

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "cuda/kd_tensors.h"

namespace ft {
namespace {

using namespace rows;
using distill::ScaleCall;
using rows::Rows;

// Writes the loss into a new tensor and the gradient into *grad if given: its rows are those of the logits.
std::tuple<Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, const OptTensor& labels,
                               const OptTensor& row_weight, const OptTensor& row_temperature,
                               const OptTensor& num_items, const Options& options, const Tensor* grad) {
  RowsCall inputs(student, teacher, labels, row_weight, row_temperature, num_items, options);
  const Tensor grad_scale = new_scales(student, grad, inputs.call.rows);
  if (grad) inputs.call.grad = writable(*grad);
  inputs.call.grad_scales = pointer_to(grad_scale);
  const device::Stream stream = current_stream(student);
  inputs.begin(stream);
  distill::launch_kd(inputs.call, stream);
  inputs.end(stream);
  return {inputs.loss(), grad_scale};
}

std::tuple<Tensor, Tensor, Tensor> kd(const Tensor& student, const Tensor& teacher, const OptTensor& labels,
                                      const OptTensor& row_weight, const OptTensor& row_temperature,
                                      const OptTensor& num_items, std::vector<double> num_items_constant,
                                      double temperature, double label_weight, double label_smoothing,
                                      int64_t ignore_index, bool distill_ignored, int64_t vocab_size,
                                      std::string reduction, bool scale_by_t2, bool want_grad) {
  const DeviceGuard guard(student);
  const Options options{temperature,     label_weight, label_smoothing,      ignore_index,
                        distill_ignored, vocab_size,   std::move(reduction), std::move(num_items_constant),
                        scale_by_t2};
  const Tensor grad = new_gradient(student, want_grad);
  const auto [loss, grad_scale] =
      run(student, teacher, labels, row_weight, row_temperature, num_items, options, want_grad ? &grad : nullptr);
  return {loss, grad, grad_scale};
}

// The gradient overwrites the student's logits: what a row's gradient overwrites has been read before.
std::tuple<Tensor, Tensor> kd_(const Tensor& student, const Tensor& teacher, const OptTensor& labels,
                               const OptTensor& row_weight, const OptTensor& row_temperature,
                               const OptTensor& num_items, std::vector<double> num_items_constant, double temperature,
                               double label_weight, double label_smoothing, int64_t ignore_index,
                               bool distill_ignored, int64_t vocab_size, std::string reduction, bool scale_by_t2) {
  const DeviceGuard guard(student);
  const Options options{temperature,     label_weight, label_smoothing,      ignore_index,
                        distill_ignored, vocab_size,   std::move(reduction), std::move(num_items_constant),
                        scale_by_t2};
  return run(student, teacher, labels, row_weight, row_temperature, num_items, options, &student);
}

// out = grad * upstream * grad_scale, row by row; upstream holds one value or one per row.
void scale_rows(const Tensor& grad, const Tensor& upstream, const Tensor& grad_scale, const Tensor& out) {
  check_device(grad, grad);
  const Tensor in = readable(grad);
  const Rows in_rows(in), out_rows(out);
  const int64_t rows = in_rows.count;
  STD_TORCH_CHECK(
      (upstream.numel() == 1 || upstream.numel() == rows) && (grad_scale.numel() == 0 || grad_scale.numel() == rows),
      "fasttransfer::kd_scale: upstream and grad_scale must have one value, or one per row");
  STD_TORCH_CHECK(out_rows.fits(), "fasttransfer::kd_scale_: more leading dimensions than can be written in place");
  if (grad.numel() == 0) return;
  const RowValues up(upstream, 1, grad);
  OptTensor scales;
  if (grad_scale.numel() > 0) {
    check_device(grad_scale, grad);
    STD_TORCH_CHECK(grad_scale.scalar_type() == ScalarType::Float,
                    "fasttransfer::kd_scale: grad_scale must be float32");
    scales = contiguous(grad_scale);
  }
  ScaleCall call = {};
  call.in = view_of(in, in_rows);
  call.out = view_of(out, out_rows);
  call.rows = rows;
  call.columns = in_rows.width;
  call.upstream = up.values();
  call.upstream_per_row = upstream.numel() > 1;
  call.in_place = in.const_data_ptr() == out.const_data_ptr();
  if (scales) call.grad_scales = static_cast<const float*>(scales->const_data_ptr());
  if (!call.upstream_per_row && !scales && in.is_contiguous() && out.is_contiguous()) {
    // One long row.
    call.in.rows.dims = call.out.rows.dims = 0;
    call.rows = 1;
    call.columns = in.numel();
  }
  distill::launch_kd_scale(call, current_stream(grad));
}

Tensor kd_scale(const Tensor& grad, const Tensor& upstream, const Tensor& grad_scale) {
  const DeviceGuard guard(grad);
  const auto sizes = grad.sizes();
  Tensor out = torch::stable::new_empty(grad, {sizes.data(), sizes.size()});
  scale_rows(grad, upstream, grad_scale, out);
  return out;
}

void kd_scale_(const Tensor& grad, const Tensor& upstream, const Tensor& grad_scale) {
  const DeviceGuard guard(grad);
  scale_rows(grad, upstream, grad_scale, grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FT_NAMESPACE, FT_KEY, m) {
  m.impl("kd", TORCH_BOX(&kd));
  m.impl("kd_", TORCH_BOX(&kd_));
  m.impl("kd_scale", TORCH_BOX(&kd_scale));
  m.impl("kd_scale_", TORCH_BOX(&kd_scale_));
}

}  // namespace ft
