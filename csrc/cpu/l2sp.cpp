// torch.ops.fasttransfer.l2sp_value, l2sp_grad and l2sp_add_grad_ for the CPU key: the list of parameters in chunks
// over threads. The run itself is cpu/l2sp.h. Schemas and the pure-torch twin: fasttransfer/ops/l2sp.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/lists.h"

namespace ft {
namespace {

using OptTensor = std::optional<Tensor>;

// One parameter of the list, as its run's template.
struct Item {
  L2spRun run{};
  bool in_double = false;
  double strength = 0;
};

Item make_item(Operands& operands, const Tensor& param, const OptTensor& start, const Tensor* grad, double strength,
               double factor, bool accumulate) {
  Operand all[3] = {{&param, false}};
  size_t count = 1;
  if (start) all[count++] = {&*start, false};
  if (grad) all[count++] = {grad, true};
  operands.flatten(all, count);
  Item item;
  item.run.param = all[0].data;
  item.run.param_dtype = all[0].dtype;
  item.in_double = all[0].dtype == DType::kFloat64;
  if (start) {
    item.run.start = all[1].data;
    item.run.start_dtype = all[1].dtype;
    item.in_double = item.in_double || all[1].dtype == DType::kFloat64;
  }
  if (grad) {
    item.run.grad = all[count - 1].data;
    item.run.grad_dtype = all[count - 1].dtype;
  }
  item.run.factor = factor;
  item.run.accumulate = accumulate;
  item.run.n = param.numel();
  item.strength = strength;
  return item;
}

const void* advance(const void* p, DType dtype, int64_t elements) {
  return p ? static_cast<const char*>(p) + elements * bytes_of(dtype) : nullptr;
}

// sum_i strength_i ||p_i - p0_i||^2, and whatever the runs write.
double run_all(const std::vector<Item>& items) {
  std::vector<int64_t> sizes;
  sizes.reserve(items.size());
  for (const Item& item : items) sizes.push_back(item.run.n);
  std::vector<double> values(chunk_count(sizes), 0.0);
  const Kernels& kernel = kernels();
  for_each_chunk(sizes, [&](int64_t chunk, size_t i, int64_t begin, int64_t n) {
    L2spRun run = items[i].run;
    run.param = advance(run.param, run.param_dtype, begin);
    run.start = advance(run.start, run.start_dtype, begin);
    run.grad = const_cast<void*>(advance(run.grad, run.grad_dtype, begin));
    run.n = n;
    values[chunk] += items[i].strength * (items[i].in_double ? kernel.l2sp_run_double : kernel.l2sp_run_float)(run);
  });
  // In the order of the list: the same sum whatever the number of threads.
  return std::accumulate(values.begin(), values.end(), 0.0);
}

void check_lists(size_t params, size_t start, size_t strength) {
  STD_TORCH_CHECK(params > 0 && start == params && (strength == params || strength == 1),
                  "fasttransfer::l2sp: params and start must be lists of one length, at least 1, strength too or "
                  "one value for all");
}

Tensor new_scalar(const std::vector<Tensor>& params) {
  const bool as_double =
      std::any_of(params.begin(), params.end(), [](const Tensor& t) { return storage_of(t) == DType::kFloat64; });
  return torch::stable::new_empty(params[0], {}, as_double ? ScalarType::Double : ScalarType::Float);
}

Tensor& write_scalar(Tensor& t, double value) {
  if (storage_of(t) == DType::kFloat64) {
    *t.mutable_data_ptr<double>() = value;
  } else {
    *t.mutable_data_ptr<float>() = float(value);
  }
  return t;
}

double read_scalar(const Tensor& t) {
  STD_TORCH_CHECK(t.numel() == 1 && (is_double(t) || t.scalar_type() == ScalarType::Float),
                  "fasttransfer::l2sp: a scale must be one float32 or float64 value");
  return is_double(t) ? *t.const_data_ptr<double>() : double(*t.const_data_ptr<float>());
}

Tensor l2sp_value(std::vector<Tensor> params, std::vector<OptTensor> start, std::vector<double> strength) {
  check_lists(params.size(), start.size(), strength.size());
  Operands operands;
  std::vector<Item> items;
  items.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    items.push_back(make_item(operands, params[i], start[i], nullptr, value_of(strength, i), 0, false));
  }
  Tensor value = new_scalar(params);
  return write_scalar(value, run_all(items));
}

std::vector<Tensor> l2sp_grad(std::vector<Tensor> params, std::vector<OptTensor> start, std::vector<double> strength,
                              const Tensor& upstream) {
  check_lists(params.size(), start.size(), strength.size());
  const double up = read_scalar(upstream);
  std::vector<Tensor> grads;
  grads.reserve(params.size());
  for (const Tensor& p : params) grads.push_back(torch::stable::empty_like(p));
  Operands operands;
  std::vector<Item> items;
  items.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const double weight = value_of(strength, i);
    items.push_back(make_item(operands, params[i], start[i], &grads[i], weight, 2 * weight * up, false));
  }
  run_all(items);
  operands.finish();
  return grads;
}

Tensor l2sp_add_grad_(std::vector<Tensor> params, std::vector<OptTensor> start, std::vector<Tensor> grads,
                      std::vector<double> strength, std::vector<int64_t> accumulate, double grad_scale,
                      const OptTensor& grad_scale_tensor) {
  check_lists(params.size(), start.size(), strength.size());
  STD_TORCH_CHECK(grads.size() == params.size() && (accumulate.size() == params.size() || accumulate.size() == 1),
                  "fasttransfer::l2sp_add_grad_: one gradient per parameter, and one flag for each or for all");
  const double scale = grad_scale_tensor ? read_scalar(*grad_scale_tensor) : grad_scale;
  Operands operands;
  std::vector<Item> items;
  items.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const double weight = value_of(strength, i);
    const bool add = accumulate[accumulate.size() == 1 ? 0 : i] != 0;
    items.push_back(make_item(operands, params[i], start[i], &grads[i], weight, 2 * weight * scale, add));
  }
  Tensor value = new_scalar(params);  // what can fail comes before the first gradient is written
  write_scalar(value, run_all(items));
  operands.finish();
  return value;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttransfer, CPU, m) {
  m.impl("l2sp_value", TORCH_BOX(&l2sp_value));
  m.impl("l2sp_grad", TORCH_BOX(&l2sp_grad));
  m.impl("l2sp_add_grad_", TORCH_BOX(&l2sp_add_grad_));
}

}  // namespace ft
