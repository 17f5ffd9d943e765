// torch.ops.fasttransfer.kd, kd_, kd_scale, kd_scale_ for the CUDA key: checks, divisors, views, launches. The
// kernels are cuda/kd.cuh; the same on the CPU is cpu/kd.cpp. Schemas, meanings of the options and the pure-torch
// twin: fasttransfer/ops/kd.py.
//
// Nothing waits for the device and all memory is torch's, so a CUDA graph can capture a call.
#include "cuda/kd.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/tensors.h"
#include "cuda/runtime.h"

namespace ft {
namespace {

using OptTensor = std::optional<Tensor>;
using distill::KdCall;
using distill::ScaleCall;
using distill::TotalCall;
using distill::Values;
using distill::View;
using torch::stable::contiguous;

struct Options {
  double temperature, label_weight, label_smoothing;
  int64_t ignore_index;
  bool distill_ignored;
  int64_t vocab_size;
  std::string reduction;
  std::vector<double> num_items;
  bool scale_by_t2;
};

bool on_machine(const Tensor& t) {
#if defined(FT_SIMT)
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

void check_device(const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(on_machine(t) && t.get_device_index() == like.get_device_index(),
                  "fasttransfer::kd: expected all tensors on one CUDA device");
}

// Leading dimensions of [..., V] that do not lie one after the other, as kernels are told of them.
struct Rows {
  distill::RowMap map = {};
  int dims = 0;
  int64_t count = 1, width = 0, column_stride = 1;

  explicit Rows(const Tensor& t) {
    const auto sizes = t.sizes(), strides = t.strides();
    const int64_t leading = int64_t(sizes.size()) - 1, bytes = bytes_of(dtype_of(t));
    for (int64_t d = leading - 1; d >= 0; --d) {
      count *= sizes[d];
      if (sizes[d] == 1) continue;
      const int64_t stride = strides[d] * bytes;
      if (dims > 0 && dims <= distill::kMostDims && map.size[dims - 1] * map.stride[dims - 1] == stride) {
        map.size[dims - 1] *= sizes[d];
        continue;
      }
      if (dims < distill::kMostDims) {
        map.size[dims] = sizes[d];
        map.stride[dims] = stride;
      }
      ++dims;
    }
    map.dims = dims;
    width = sizes[leading];
    if (width > 1) column_stride = strides[leading];
  }
  bool fits() const { return dims <= distill::kMostDims; }
};

View view_of(const Tensor& t, const Rows& rows) {
  return {const_cast<void*>(t.const_data_ptr()), rows.map, rows.column_stride, dtype_of(t)};
}

// A tensor with more dimensions than a kernel can be told of is copied; nobody has one.
Tensor readable(const Tensor& t) { return Rows(t).fits() ? t : contiguous(t); }

// One value per row, or the same for all. Keeps what it points to.
class RowValues {
 public:
  RowValues(const OptTensor& t, double otherwise, const Tensor& like) : values_{nullptr, false, otherwise} {
    if (!t) return;
    check_device(*t, like);
    tensor_ = contiguous(*t);
    const ScalarType type = tensor_->scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float,
                    "fasttransfer::kd: a value per row must be float32 or float64");
    values_.data = tensor_->const_data_ptr();
    values_.is_double = type == ScalarType::Double;
  }
  const Values& values() const { return values_; }
  // Element i of them, for all rows.
  Values element(int64_t i) const {
    Values one = values_;
    one.data = static_cast<const char*>(one.data) + i * (one.is_double ? 8 : 4);
    return one;
  }

 private:
  OptTensor tensor_;
  Values values_;
};

// Memory of the device between the launches of a call: divisors, the losses of the rows, partial sums.
struct Workspace {
  Tensor tensor;
  double *divisors, *losses, *partials;

  Workspace(const Tensor& like, int64_t rows) {
    const int64_t size = 2 + rows + 2 * distill::total_blocks(rows);
    tensor = torch::stable::new_empty(like, {&size, 1}, ScalarType::Double);
    divisors = static_cast<double*>(tensor.mutable_data_ptr());
    losses = divisors + 2;
    partials = losses + rows;
  }
};

// A mean's divisors depend on values on the device only where rows are ignored or weighted.
bool divisors_on_device(const KdCall& call, const Options& options) {
  return options.reduction == "mean" && options.num_items.empty() && (call.labels || call.weight.data);
}

void set_divisors(KdCall& call, const Options& options, const OptTensor& num_items, const RowValues& items,
                  int64_t first_dimension) {
  const auto constants = [&](double kd, double ce) {
    call.kd_divisor = {nullptr, false, kd};
    call.ce_divisor = {nullptr, false, ce};
  };
  if (options.reduction == "sum" || options.reduction == "none") return constants(1, 1);
  if (num_items) {
    call.kd_divisor = items.element(0);
    call.ce_divisor = items.element(num_items->numel() > 1 ? 1 : 0);
  } else if (!options.num_items.empty()) {
    constants(options.num_items.front(), options.num_items.back());
  } else if (options.reduction == "batchmean") {
    constants(double(first_dimension), double(first_dimension));
  } else {
    constants(double(call.rows), double(call.rows));
  }
}

void compute_divisors(KdCall& call, const Workspace& space, device::Stream stream) {
  TotalCall totals = {};
  totals.count = call.rows;
  totals.width = 2;
  totals.weight = call.weight;
  totals.labels = call.labels;
  totals.ignore_index = call.ignore_index;
  totals.distill_ignored = call.distill_ignored;
  totals.partials = space.divisors;
  distill::launch_totals(totals, space.partials, stream);
  call.kd_divisor = {space.divisors, true, 1};
  call.ce_divisor = {space.divisors + 1, true, 1};
}

void sum_losses(const KdCall& call, const Tensor& loss, const Workspace& space, device::Stream stream) {
  TotalCall totals = {};
  totals.count = call.rows;
  totals.numbers = space.losses;
  totals.width = 1;
  totals.loss = loss.mutable_data_ptr();
  totals.loss_is_double = call.loss_is_double;
  distill::launch_totals(totals, space.partials, stream);
}

// Writes the loss into a new tensor and the gradient into *grad if given: its rows are those of the logits.
std::tuple<Tensor, Tensor> run(const Tensor& student, const Tensor& teacher, const OptTensor& labels,
                               const OptTensor& row_weight, const OptTensor& row_temperature,
                               const OptTensor& num_items, const Options& options, const Tensor* grad) {
  STD_TORCH_CHECK(student.dim() >= 1 && student.dim() == teacher.dim(),
                  "fasttransfer::kd: student and teacher logits must have the same leading dimensions");
  check_device(student, student);
  check_device(teacher, student);
  const Rows student_rows(student), teacher_rows(teacher);
  const int64_t rows = student_rows.count, columns = options.vocab_size;
  STD_TORCH_CHECK(teacher_rows.count == rows && columns <= student_rows.width && columns <= teacher_rows.width,
                  "fasttransfer::kd: shapes of student and teacher logits do not fit");
  const auto fits = [rows](const OptTensor& t) { return !t || t->numel() == rows; };
  STD_TORCH_CHECK(fits(labels) && fits(row_weight) && fits(row_temperature) && (!num_items || num_items->numel() > 0),
                  "fasttransfer::kd: labels, row_weight and row_temperature must have one value per row");
  STD_TORCH_CHECK(!labels || labels->scalar_type() == ScalarType::Long, "fasttransfer::kd: labels must be int64");

  KdCall call = {};
  call.loss_is_double = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
  const auto sizes = student.sizes();
  const bool per_row = options.reduction == "none";
  const size_t loss_dims = per_row ? sizes.size() - 1 : 0;
  const ScalarType loss_type = call.loss_is_double ? ScalarType::Double : ScalarType::Float;
  const Tensor loss = torch::stable::new_empty(student, {sizes.data(), loss_dims}, loss_type);
  const bool half_grad = grad && student.scalar_type() == ScalarType::Half;
  const int64_t scale_size = half_grad ? rows : 0;
  const Tensor grad_scale = torch::stable::new_empty(student, {&scale_size, 1}, ScalarType::Float);

  const Tensor s = readable(student), t = readable(teacher);
  call.student = view_of(s, Rows(s));
  call.teacher = view_of(t, Rows(t));
  if (grad) {
    const Rows grad_rows(*grad);
    STD_TORCH_CHECK(grad_rows.fits(), "fasttransfer::kd_: more leading dimensions than can be written in place");
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
    check_device(*labels, student);
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
  set_divisors(call, options, num_items, items, sizes.size() > 1 ? sizes[0] : 1);

  const device::Stream stream = current_stream(student);
  const bool count = !num_items && rows > 0 && divisors_on_device(call, options);
  const bool direct = per_row || rows == 1;  // a row's loss is the loss
  std::optional<Workspace> space;
  if (count || !direct) space.emplace(student, rows);
  if (count) compute_divisors(call, *space, stream);
  if (direct) {
    call.loss = loss.mutable_data_ptr();
  } else {
    call.losses = space->losses;
  }
  distill::launch_kd(call, stream);
  if (!direct) sum_losses(call, loss, *space, stream);
  return {loss, grad_scale};
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
  const auto sizes = student.sizes();
  const int64_t none = 0;
  const Tensor grad = want_grad ? torch::stable::new_empty(student, {sizes.data(), sizes.size()})
                                : torch::stable::new_empty(student, {&none, 1});
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
