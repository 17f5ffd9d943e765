// The options of a loss of rows on torch's side: what each row is weighed by, and what the sum is divided by.
// Meanings: fasttransfer/ops/kd.py.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "cpu/tensors.h"

namespace ft::rows {

using OptTensor = std::optional<Tensor>;

// Rows are given to threads in pieces of at least this many logits: below, waking a thread costs more.
constexpr int64_t kGrainLogits = 16384;
// A gradient larger than this, with the logits twice as large beside it, leaves the last-level cache before backward
// reads it, so it is stored around it. (bf16, 256x32000, 15.6 MiB: 57 cycles per 16 logits, around the cache 49: AMD
// EPYC, Zen 4.)
constexpr int64_t kStreamBytes = int64_t{8} << 20;

struct Options {
  double temperature, label_weight, label_smoothing;
  int64_t ignore_index;
  bool distill_ignored;
  int64_t vocab_size;
  std::string reduction;
  std::vector<double> num_items;
  bool scale_by_t2;
};

// A per-row argument, contiguous, as doubles on demand.
class RowValues {
 public:
  RowValues(const OptTensor& t, double otherwise) : otherwise_(otherwise) {
    if (!t) return;
    tensor_ = torch::stable::contiguous(*t);
    is_double_ = tensor_->scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(is_double_ || tensor_->scalar_type() == ScalarType::Float,
                    "fasttransfer: a value per row must be float32 or float64");
    data_ = tensor_->const_data_ptr();
  }
  double operator[](int64_t i) const {
    if (!data_) return otherwise_;
    return is_double_ ? static_cast<const double*>(data_)[i] : static_cast<const float*>(data_)[i];
  }

 private:
  OptTensor tensor_;
  const void* data_ = nullptr;
  bool is_double_ = false;
  double otherwise_;
};

struct RowInputs {
  RowValues weight, temperature;
  OptTensor label_tensor;
  const int64_t* labels = nullptr;

  RowInputs(const OptTensor& row_weight, const OptTensor& row_temperature, const OptTensor& labels_,
            const Options& options)
      : weight(row_weight, 1.0), temperature(row_temperature, options.temperature) {
    if (!labels_) return;
    label_tensor = torch::stable::contiguous(*labels_);
    labels = label_tensor->const_data_ptr<int64_t>();
  }
  // Python refuses one that is not positive where it sees it; under torch.compile it does not: NaN, and so is its
  // row.
  double temperature_of(int64_t i) const {
    const double t = temperature[i];
    return t > 0 ? t : std::numeric_limits<double>::quiet_NaN();
  }
  bool has_label(int64_t i, const Options& options) const { return labels && labels[i] != options.ignore_index; }
  // A row that is not counted is not read.
  bool counted(int64_t i, const Options& options) const {
    return weight[i] != 0 && (!labels || options.distill_ignored || has_label(i, options));
  }
};

// 1/divisor of the distillation part and of the label part.
struct Divisors {
  double kd = 1, ce = 1;
};

inline Divisors inverse_divisors(const RowInputs& in, const Options& options, const OptTensor& num_items,
                                 int64_t rows, int64_t first_dimension) {
  if (options.reduction == "sum" || options.reduction == "none") return {};
  double kd = 0, ce = 0;
  if (num_items) {
    const RowValues items(num_items, 0);
    kd = items[0];
    ce = items[num_items->numel() > 1 ? 1 : 0];
  } else if (!options.num_items.empty()) {
    kd = options.num_items.front();
    ce = options.num_items.back();
  } else if (options.reduction == "batchmean") {
    kd = ce = double(first_dimension);
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      if (!in.counted(i, options)) continue;
      kd += in.weight[i];
      if (in.has_label(i, options)) ce += in.weight[i];
    }
  }
  return {1 / kd, 1 / ce};
}

inline void store_scalar(const Tensor& t, int64_t i, double value) {
  if (t.scalar_type() == ScalarType::Double) {
    t.mutable_data_ptr<double>()[i] = value;
  } else {
    t.mutable_data_ptr<float>()[i] = float(value);
  }
}

// The rows' losses as they are, or their sum.
inline void store_losses(const Tensor& loss, const std::vector<double>& losses, bool per_row) {
  if (per_row) {
    for (size_t i = 0; i < losses.size(); ++i) store_scalar(loss, int64_t(i), losses[i]);
    return;
  }
  // In the order of the rows: the same sum whatever the number of threads.
  double sum = 0;
  for (const double x : losses) sum += x;
  store_scalar(loss, 0, sum);
}

// `columns` zeros of `bytes` each, `stride` elements apart.
inline void zero_row(char* row, int64_t columns, int64_t stride, int64_t bytes) {
  if (stride == 1) {
    std::memset(row, 0, columns * bytes);
    return;
  }
  for (int64_t v = 0; v < columns; ++v) std::memset(row + v * stride * bytes, 0, bytes);
}

}  // namespace ft::rows
