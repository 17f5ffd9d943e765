// What a launch of a kd kernel is told, and what it asks first of each row: its temperature, weights and label.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace ft::distill {

using namespace device;

// Leading dimensions of a view, after those that lie one after the other have been merged.
inline constexpr int kMostDims = 12;

// Where row i of a [..., V] tensor starts, in bytes: views such as logits[:, :-1] are read where they are.
struct RowMap {
  int dims;
  int64_t size[kMostDims], stride[kMostDims];  // innermost first
  FT_DEVICE int64_t offset(int64_t i) const {
    if (dims == 0) return 0;
    int64_t bytes = 0;
#pragma unroll 1
    for (int d = 0; d + 1 < dims; ++d) {
      const int64_t outer = i / size[d];
      bytes += (i - outer * size[d]) * stride[d];
      i = outer;
    }
    return bytes + i * stride[dims - 1];
  }
};

struct View {
  void* data;
  RowMap rows;
  int64_t column_stride;  // elements
  DType dtype;
  template <class S>
  FT_DEVICE S* row(int64_t i) const {
    return reinterpret_cast<S*>(static_cast<char*>(data) + rows.offset(i));
  }
};

// One value per row, or the same for all.
struct Values {
  const void* data;  // fp32 or fp64; null: `otherwise`
  bool is_double;
  double otherwise;
  FT_DEVICE double at(int64_t i) const {
    if (!data) return otherwise;
    return is_double ? load(static_cast<const double*>(data) + i) : double(load(static_cast<const float*>(data) + i));
  }
};

struct KdCall {
  View student, teacher, grad;  // grad.data null: the loss alone
  int64_t rows, columns;
  int64_t grad_columns;   // the gradient's width: columns past V are zero
  const int64_t* labels;  // null: none
  Values weight, temperature;
  Values kd_divisor, ce_divisor;  // of the distillation part and of the label part: element 0
  double kd_part, ce_part, smoothing;
  int64_t ignore_index;
  bool distill_ignored, scale_by_t2;
  double* losses;  // [rows], to be summed; null: they go to `loss`
  void* loss;      // [rows]
  bool loss_is_double;
  float* grad_scales;  // [rows] for fp16: the stored gradient times this is the gradient
};

struct KdRow {
  double inv_t;
  double kd_weight;     // d loss / d divergence: row weight, T^2 and divisor
  double label_weight;  // d loss / d cross entropy; 0 for a row without a label term
  int64_t label;
  // A row that is not counted is not read.
  FT_DEVICE bool counted() const { return kd_weight != 0 || label_weight != 0; }
};

// Requests at most 8 + 8 + 8 + 16 bytes: the caller lets one thread do it.
FT_DEVICE KdRow read_row(const KdCall& call, int64_t i) {
  const double weight = call.weight.at(i), temperature = call.temperature.at(i);
  const int64_t label = call.labels ? load(call.labels + i) : call.ignore_index;
  const double kd_divisor = call.kd_divisor.at(0), ce_divisor = call.ce_divisor.at(0);
  const bool has_label = call.labels && label != call.ignore_index;
  const bool counted = weight != 0 && (!call.labels || call.distill_ignored || has_label);
  KdRow row;
  row.inv_t = 1 / temperature;
  row.kd_weight = counted ? call.kd_part * weight * (1 / kd_divisor) : 0;
  if (call.scale_by_t2) row.kd_weight *= temperature * temperature;
  row.label_weight = counted && has_label ? call.ce_part * weight * (1 / ce_divisor) : 0;
  row.label = label;
  return row;
}

FT_DEVICE void store_loss(const KdCall& call, int64_t i, double value) {
  if (call.losses) {
    store(call.losses + i, value);
  } else if (call.loss_is_double) {
    store(static_cast<double*>(call.loss) + i, value);
  } else {
    store(static_cast<float*>(call.loss) + i, float(value));
  }
}

// A row that is not counted: what belongs to it beside a gradient of zeros.
FT_DEVICE void store_nothing(const KdCall& call, int64_t i) {
  store_loss(call, i, 0);
  if (call.grad_scales) store(call.grad_scales + i, 1.0f);
}

}  // namespace ft::distill
