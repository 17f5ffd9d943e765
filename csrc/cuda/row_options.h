// The options of a loss of rows on torch's side of the CUDA kernels, as cpu/row_options.h: values per row, views,
// divisors and the sum of the losses, all without waiting for the device.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/tensors.h"
#include "cuda/kd_totals.cuh"
#include "cuda/runtime.h"

namespace ft::rows {

using distill::KdCall;
using distill::TotalCall;
using distill::Values;
using distill::View;
using torch::stable::contiguous;
using OptTensor = std::optional<Tensor>;

struct Options {
  double temperature, label_weight, label_smoothing;
  int64_t ignore_index;
  bool distill_ignored;
  int64_t vocab_size;
  std::string reduction;
  std::vector<double> num_items;
  bool scale_by_t2;
};

inline bool on_machine(const Tensor& t) {
#if defined(FT_SIMT)
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

inline void check_device(const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(on_machine(t) && t.get_device_index() == like.get_device_index(),
                  "fasttransfer: expected all tensors on one CUDA device");
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

inline View view_of(const Tensor& t, const Rows& rows) {
  return {const_cast<void*>(t.const_data_ptr()), rows.map, rows.column_stride, dtype_of(t)};
}

// A tensor with more dimensions than a kernel can be told of is copied; nobody has one.
inline Tensor readable(const Tensor& t) { return Rows(t).fits() ? t : contiguous(t); }

// One value per row, or the same for all. Keeps what it points to.
class RowValues {
 public:
  RowValues(const OptTensor& t, double otherwise, const Tensor& like) : values_{nullptr, false, otherwise} {
    if (!t) return;
    check_device(*t, like);
    tensor_ = contiguous(*t);
    const ScalarType type = tensor_->scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float,
                    "fasttransfer: a value per row must be float32 or float64");
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
inline bool divisors_on_device(const KdCall& call, const Options& options) {
  return options.reduction == "mean" && options.num_items.empty() && (call.labels || call.weight.data);
}

inline void set_divisors(KdCall& call, const Options& options, const OptTensor& num_items, const RowValues& items,
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

inline void compute_divisors(KdCall& call, const Workspace& space, device::Stream stream) {
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

inline void sum_losses(const KdCall& call, const Tensor& loss, const Workspace& space, device::Stream stream) {
  TotalCall totals = {};
  totals.count = call.rows;
  totals.numbers = space.losses;
  totals.width = 1;
  totals.loss = loss.mutable_data_ptr();
  totals.loss_is_double = call.loss_is_double;
  distill::launch_totals(totals, space.partials, stream);
}

}  // namespace ft::rows
