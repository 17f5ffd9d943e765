// What kd.cu and distill.cu share on torch's side: a call over rows of a student's and a teacher's logits, from its
// checks to the sum of its losses, and its gradients. The options of the rows: row_options.h.
//
// Nothing waits for the device and all memory is torch's, so a CUDA graph can capture a call.
#pragma once

#include <optional>

#include "cuda/row_options.h"

namespace ft::rows {

// The inputs of a call, checked, as a kernel is told of them, and its loss. Keeps what `call` points to. The caller
// adds gradients, and launches between begin() and end().
class RowsCall {
 public:
  RowsCall(const Tensor& student, const Tensor& teacher, const OptTensor& labels, const OptTensor& row_weight,
           const OptTensor& row_temperature, const OptTensor& num_items, const Options& options)
      : like_(student),
        s_(check_rows(student, teacher, labels, row_weight, row_temperature, num_items, options)),
        t_(readable(teacher)),
        loss_(new_loss(student, teacher, options)),
        weight_(row_weight, 1, student),
        temperature_(row_temperature, options.temperature, student),
        items_(num_items, 0, student) {
    const Rows rows(student);
    call.loss_is_double = loss_.scalar_type() == ScalarType::Double;
    call.student = view_of(s_, Rows(s_));
    call.teacher = view_of(t_, Rows(t_));
    call.rows = rows.count;
    call.columns = options.vocab_size;
    call.grad_columns = rows.width;
    call.weight = weight_.values();
    call.temperature = temperature_.values();
    if (labels) {
      check_device(*labels, student);
      labels_ = contiguous(*labels);
      call.labels = labels_->const_data_ptr<int64_t>();
    }
    call.ce_part = labels ? options.label_weight : 0;
    call.kd_part = 1 - call.ce_part;
    call.smoothing = options.label_smoothing;
    call.ignore_index = options.ignore_index;
    call.distill_ignored = options.distill_ignored;
    call.scale_by_t2 = options.scale_by_t2;
    set_divisors(call, options, num_items, items_, student.dim() > 1 ? student.sizes()[0] : 1);
    count_ = !num_items && call.rows > 0 && divisors_on_device(call, options);
    direct_ = options.reduction == "none" || call.rows == 1;  // a row's loss is the loss
  }
  RowsCall(const RowsCall&) = delete;
  RowsCall& operator=(const RowsCall&) = delete;

  KdCall call = {};

  const Tensor& loss() const { return loss_; }

  // The divisors, and where the losses of the rows go.
  void begin(device::Stream stream) {
    if (count_ || !direct_) space_.emplace(like_, call.rows);
    if (count_) compute_divisors(call, *space_, stream);
    if (direct_) {
      call.loss = loss_.mutable_data_ptr();
    } else {
      call.losses = space_->losses;
    }
  }
  void end(device::Stream stream) {
    if (!direct_) sum_losses(call, loss_, *space_, stream);
  }

 private:
  // The student's logits as they are read.
  static Tensor check_rows(const Tensor& student, const Tensor& teacher, const OptTensor& labels,
                           const OptTensor& row_weight, const OptTensor& row_temperature, const OptTensor& num_items,
                           const Options& options) {
    STD_TORCH_CHECK(student.dim() >= 1 && student.dim() == teacher.dim(),
                    "fasttransfer: student and teacher logits must have the same leading dimensions");
    check_device(student, student);
    check_device(teacher, student);
    const Rows student_rows(student), teacher_rows(teacher);
    const int64_t rows = student_rows.count, columns = options.vocab_size;
    STD_TORCH_CHECK(teacher_rows.count == rows && columns <= student_rows.width && columns <= teacher_rows.width,
                    "fasttransfer: shapes of student and teacher logits do not fit");
    const auto fits = [rows](const OptTensor& t) { return !t || t->numel() == rows; };
    STD_TORCH_CHECK(
        fits(labels) && fits(row_weight) && fits(row_temperature) && (!num_items || num_items->numel() > 0),
        "fasttransfer: labels, row_weight and row_temperature must have one value per row");
    STD_TORCH_CHECK(!labels || labels->scalar_type() == ScalarType::Long, "fasttransfer: labels must be int64");
    return readable(student);
  }
  static Tensor new_loss(const Tensor& student, const Tensor& teacher, const Options& options) {
    const bool in_double = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
    const auto sizes = student.sizes();
    const size_t dims = options.reduction == "none" ? sizes.size() - 1 : 0;
    return torch::stable::new_empty(student, {sizes.data(), dims},
                                    in_double ? ScalarType::Double : ScalarType::Float);
  }

  Tensor like_, s_, t_, loss_;
  RowValues weight_, temperature_, items_;
  OptTensor labels_;
  std::optional<Workspace> space_;
  bool count_, direct_;
};

// Where a gradient is written.
inline View writable(const Tensor& grad) {
  const Rows rows(grad);
  STD_TORCH_CHECK(rows.fits(), "fasttransfer: more leading dimensions than can be written in place");
  return view_of(grad, rows);
}

// Factors of a gradient's rows: of fp16 ones only, else empty.
inline Tensor new_scales(const Tensor& like, const Tensor* grad, int64_t rows) {
  const int64_t size = grad && grad->scalar_type() == ScalarType::Half ? rows : 0;
  return torch::stable::new_empty(like, {&size, 1}, ScalarType::Float);
}
inline float* pointer_to(const Tensor& scales) {
  return scales.numel() > 0 ? static_cast<float*>(scales.mutable_data_ptr()) : nullptr;
}

// A new tensor like this one, or an empty one.
inline Tensor new_gradient(const Tensor& logits, bool wanted) {
  const auto sizes = logits.sizes();
  const int64_t none = 0;
  return wanted ? torch::stable::new_empty(logits, {sizes.data(), sizes.size()})
                : torch::stable::new_empty(logits, {&none, 1});
}

}  // namespace ft::rows
