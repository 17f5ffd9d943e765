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
  Operands operands;  // parameter, then start and gradient where there are
  L2spRun run{};
  bool in_double = false;
  double strength = 0;
};

Item make_item(const Tensor& param, const OptTensor& start, const Tensor* grad, double strength, double factor,
               bool accumulate) {
  std::vector<Tensor> tensors{param};
  if (start) tensors.push_back(*start);
  if (grad) tensors.push_back(*grad);
  for (const Tensor& t : tensors) {
    STD_TORCH_CHECK(t.numel() == param.numel() && t.dim() == param.dim(),
                    "fasttransfer::l2sp: a parameter, its start and its gradient differ in shape");
  }
  Item item{Operands(std::move(tensors))};
  const Tensor& p = item.operands[0];
  item.run.param = p.const_data_ptr();
  item.run.param_dtype = dtype_of(p);
  item.in_double = is_double(param) || (start && is_double(*start));
  if (start) {
    item.run.start = item.operands[1].const_data_ptr();
    item.run.start_dtype = dtype_of(item.operands[1]);
  }
  if (grad) {
    const Tensor& g = item.operands[start ? 2 : 1];
    item.run.grad = g.mutable_data_ptr();
    item.run.grad_dtype = dtype_of(g);
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
  STD_TORCH_CHECK(params > 0 && start == params && strength == params,
                  "fasttransfer::l2sp: params, start and strength must be lists of one length, at least 1");
}

Tensor scalar(const std::vector<Tensor>& params, double value) {
  const bool as_double = std::any_of(params.begin(), params.end(), is_double);
  Tensor t = torch::stable::new_empty(params[0], {}, as_double ? ScalarType::Double : ScalarType::Float);
  if (as_double) {
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
  std::vector<Item> items;
  for (size_t i = 0; i < params.size(); ++i) {
    items.push_back(make_item(params[i], start[i], nullptr, strength[i], 0, false));
  }
  return scalar(params, run_all(items));
}

std::vector<Tensor> l2sp_grad(std::vector<Tensor> params, std::vector<OptTensor> start, std::vector<double> strength,
                              const Tensor& upstream) {
  check_lists(params.size(), start.size(), strength.size());
  const double up = read_scalar(upstream);
  std::vector<Tensor> grads;
  std::vector<Item> items;
  for (size_t i = 0; i < params.size(); ++i) {
    grads.push_back(torch::stable::empty_like(params[i]));
    items.push_back(make_item(params[i], start[i], &grads[i], strength[i], 2 * strength[i] * up, false));
  }
  run_all(items);
  for (size_t i = 0; i < params.size(); ++i) items[i].operands.finish(start[i] ? 2 : 1);
  return grads;
}

Tensor l2sp_add_grad_(std::vector<Tensor> params, std::vector<OptTensor> start, std::vector<Tensor> grads,
                      std::vector<double> strength, std::vector<int64_t> accumulate, double grad_scale,
                      const OptTensor& grad_scale_tensor) {
  check_lists(params.size(), start.size(), strength.size());
  STD_TORCH_CHECK(grads.size() == params.size() && accumulate.size() == params.size(),
                  "fasttransfer::l2sp_add_grad_: one gradient and one flag per parameter");
  const double scale = grad_scale_tensor ? read_scalar(*grad_scale_tensor) : grad_scale;
  std::vector<Item> items;
  for (size_t i = 0; i < params.size(); ++i) {
    items.push_back(
        make_item(params[i], start[i], &grads[i], strength[i], 2 * strength[i] * scale, accumulate[i] != 0));
  }
  const double value = run_all(items);
  for (size_t i = 0; i < params.size(); ++i) items[i].operands.finish(start[i] ? 2 : 1);
  return scalar(params, value);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttransfer, CPU, m) {
  m.impl("l2sp_value", TORCH_BOX(&l2sp_value));
  m.impl("l2sp_grad", TORCH_BOX(&l2sp_grad));
  m.impl("l2sp_add_grad_", TORCH_BOX(&l2sp_add_grad_));
}

}  // namespace ft
