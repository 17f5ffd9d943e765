// torch.ops.fasttransfer.l2sp_value, l2sp_grad, l2sp_add_grad_ and l2sp_add_grad_plain_ for the CPU key: the list of
// parameters in chunks over threads. The run itself is cpu/l2sp.h. Schemas and the pure-torch twins:
// fasttransfer/ops/l2sp.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/lists.h"
#include "cpu/plain_lists.h"

namespace ft {
namespace {

using OptTensor = std::optional<Tensor>;

// What is done to each parameter.
struct Step {
  double strength, factor;  // of the value, of the gradient
  bool accumulate;
};

// The parameters of a call.
class Items {
 public:
  explicit Items(size_t n) {
    items_.reserve(n);
    sizes_.reserve(n);
  }

  void add(const Flat& param, const Flat* start, const Flat* importance, const Flat* grad, const Step& step,
           int64_t n) {
    Item item;
    item.run.param = param.data;
    item.run.param_dtype = param.dtype;
    item.in_double = param.dtype == DType::kFloat64;
    if (start) {
      item.run.start = start->data;
      item.run.start_dtype = start->dtype;
      item.in_double = item.in_double || start->dtype == DType::kFloat64;
    }
    if (importance) {
      item.run.importance = importance->data;
      item.run.importance_dtype = importance->dtype;
      item.in_double = item.in_double || importance->dtype == DType::kFloat64;
    }
    if (grad) {
      item.run.grad = grad->data;
      item.run.grad_dtype = grad->dtype;
    }
    item.run.factor = step.factor;
    item.run.accumulate = step.accumulate;
    item.strength = step.strength;
    items_.push_back(item);
    sizes_.push_back(n);
    double_param_ = double_param_ || param.dtype == DType::kFloat64;
  }

  void add(Operands& operands, const Tensor& param, const OptTensor& start, const OptTensor& importance,
           const Tensor* grad, const Step& step) {
    Operand all[4] = {{&param, false}};
    Flat flats[4];
    size_t count = 1;
    if (start) all[count++] = {&*start, false};
    if (importance) all[count++] = {&*importance, false};
    if (grad) all[count++] = {grad, true};
    operands.flatten(all, flats, count);
    add(flats[0], start ? &flats[1] : nullptr, importance ? &flats[start ? 2 : 1] : nullptr,
        grad ? &flats[count - 1] : nullptr, step, param.numel());
  }

  // Where the value goes. Asked for before run(): what can fail comes before the first gradient is written.
  Tensor new_value() const {
    static const int32_t cpu = aoti_torch_device_type_cpu(),
                         codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64()};
    AtenTensorHandle value;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(0, nullptr, nullptr, codes[double_param_], cpu, 0, &value));
    return Tensor(value);
  }

  // sum_i strength_i sum F_i (p_i - p0_i)^2, and whatever the runs write.
  void run(const Tensor& value) const {
    std::vector<double> values(chunk_count(sizes_), 0.0);
    const Kernels& kernel = kernels();
    for_each_chunk(sizes_, [&](int64_t chunk, size_t i, int64_t begin, int64_t n) {
      L2spRun run = items_[i].run;
      run.param = advance(run.param, run.param_dtype, begin);
      run.start = advance(run.start, run.start_dtype, begin);
      run.importance = advance(run.importance, run.importance_dtype, begin);
      run.grad = const_cast<void*>(advance(run.grad, run.grad_dtype, begin));
      run.n = n;
      const auto kernel_run = items_[i].in_double ? kernel.l2sp_run_double : kernel.l2sp_run_float;
      values[chunk] += items_[i].strength * kernel_run(run);
    });
    // In the order of the list: the same sum whatever the number of threads.
    const double total = std::accumulate(values.begin(), values.end(), 0.0);
    if (double_param_) {
      *value.mutable_data_ptr<double>() = total;
    } else {
      *value.mutable_data_ptr<float>() = float(total);
    }
  }

 private:
  struct Item {
    L2spRun run{};
    bool in_double = false;
    double strength = 0;
  };

  static const void* advance(const void* p, DType dtype, int64_t elements) {
    return p ? static_cast<const char*>(p) + elements * bytes_of(dtype) : nullptr;
  }

  std::vector<Item> items_;
  std::vector<int64_t> sizes_;
  bool double_param_ = false;
};

void check_lists(size_t params, size_t start, size_t strength, size_t importance) {
  STD_TORCH_CHECK(params > 0 && start == params && (strength == params || strength == 1) &&
                      (importance == params || importance == 0),
                  "fasttransfer::l2sp: params and start must be lists of one length, at least 1, strength too or "
                  "one value for all, importance too or empty");
}

const OptTensor kNone;
const OptTensor& importance_of(const std::vector<OptTensor>& importance, size_t i) {
  return importance.empty() ? kNone : importance[i];
}

double read_scalar(const Tensor& t) {
  STD_TORCH_CHECK(t.numel() == 1 && (is_double(t) || t.scalar_type() == ScalarType::Float),
                  "fasttransfer::l2sp: a scale must be one float32 or float64 value");
  return is_double(t) ? *t.const_data_ptr<double>() : double(*t.const_data_ptr<float>());
}

Tensor l2sp_value(std::vector<Tensor> params, std::vector<OptTensor> start, std::vector<double> strength,
                  std::vector<OptTensor> importance) {
  check_lists(params.size(), start.size(), strength.size(), importance.size());
  Operands operands;
  Items items(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    items.add(operands, params[i], start[i], importance_of(importance, i), nullptr,
              {value_of(strength, i), 0, false});
  }
  Tensor value = items.new_value();
  items.run(value);
  return value;
}

std::vector<Tensor> l2sp_grad(std::vector<Tensor> params, std::vector<OptTensor> start, std::vector<double> strength,
                              std::vector<OptTensor> importance, const Tensor& upstream) {
  check_lists(params.size(), start.size(), strength.size(), importance.size());
  const double up = read_scalar(upstream);
  std::vector<Tensor> grads;
  grads.reserve(params.size());
  for (const Tensor& p : params) grads.push_back(torch::stable::empty_like(p));
  Operands operands;
  Items items(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const double weight = value_of(strength, i);
    items.add(operands, params[i], start[i], importance_of(importance, i), &grads[i],
              {weight, 2 * weight * up, false});
  }
  items.run(items.new_value());
  operands.finish();
  return grads;
}

Tensor l2sp_add_grad_(std::vector<Tensor> params, std::vector<OptTensor> start, std::vector<Tensor> grads,
                      std::vector<double> strength, std::vector<OptTensor> importance,
                      std::vector<int64_t> accumulate, double grad_scale, const OptTensor& grad_scale_tensor) {
  check_lists(params.size(), start.size(), strength.size(), importance.size());
  STD_TORCH_CHECK(grads.size() == params.size() && (accumulate.size() == params.size() || accumulate.size() == 1),
                  "fasttransfer::l2sp_add_grad_: one gradient per parameter, and one flag for each or for all");
  const double scale = grad_scale_tensor ? read_scalar(*grad_scale_tensor) : grad_scale;
  Operands operands;
  Items items(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const double weight = value_of(strength, i);
    const bool add = accumulate[accumulate.size() == 1 ? 0 : i] != 0;
    items.add(operands, params[i], start[i], importance_of(importance, i), &grads[i],
              {weight, 2 * weight * scale, add});
  }
  Tensor value = items.new_value();
  items.run(value);
  operands.finish();
  return value;
}

// None, with nothing written, unless all lie in memory as their parameters do, without gaps, and no gradient is there
// twice.
OptTensor run_plain(const Handles& params, const Handles& start, const Handles& grads, double strength,
                    double grad_scale) {
  const size_t n = params.size();
  if (n == 0 || start.size() != n || grads.size() != n) return std::nullopt;
  Items items(n);
  Ranges ranges(n);
  for (size_t i = 0; i < n; ++i) {
    Plain param, point, grad;
    const bool fine = look(params[i], false, param) && look(start[i], false, point) && look(grads[i], true, grad) &&
                      same_layout(point, param) && same_layout(grad, param);
    // Ranges do not tell whether an empty tensor is there twice.
    if (!fine || param.numel == 0) return std::nullopt;
    ranges.set(i, grad, true);
    items.add(param.flat, &point.flat, nullptr, &grad.flat, {strength, 2 * strength * grad_scale, true}, param.numel);
  }
  if (!ranges.separate()) return std::nullopt;
  Tensor value = items.new_value();
  items.run(value);
  return value;
}

// By hand what TORCH_BOX does, to take the lists as they come.
void l2sp_add_grad_plain_(StableIValue* stack, uint64_t, uint64_t) {
  namespace boxing = torch::stable::detail;
  const Handles params(stack[0]), start(stack[1]), grads(stack[2]);
  const auto strength = boxing::to<double>(stack[3]), grad_scale = boxing::to<double>(stack[4]);
  stack[0] = boxing::from(run_plain(params, start, grads, strength, grad_scale));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttransfer, CPU, m) {
  m.impl("l2sp_value", TORCH_BOX(&l2sp_value));
  m.impl("l2sp_grad", TORCH_BOX(&l2sp_grad));
  m.impl("l2sp_add_grad_", TORCH_BOX(&l2sp_add_grad_));
  m.impl("l2sp_add_grad_plain_", &l2sp_add_grad_plain_);
}

}  // namespace ft
