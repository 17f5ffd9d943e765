// torch.ops.fasttransfer.l2sp_value, l2sp_grad and l2sp_add_grad_ for the CUDA key: checks, the table of parameters,
// launches. The kernels are cuda/l2sp.cuh. Schemas and the pure-torch twins: fasttransfer/ops/l2sp.py.
//
// Nothing waits for the device, and all memory is torch's, so a CUDA graph can capture a call; what it replays then
// is the pointers of that call, as with any op.
#include "cuda/l2sp.cuh"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <vector>

#include "cuda/runtime.h"
#include "cuda/table_tensors.h"

namespace ft {
namespace {

using lists::L2spItem;
using lists::Numbers;
using lists::OptTensor;
using lists::Scalar;

// The parameters of a call.
class Parameters {
 public:
  Parameters(const Tensor& like, size_t n) : like_(like), operands_(like), items_(sizeof(L2spItem), n) {}

  void add(const Tensor& param, const OptTensor& start, const OptTensor& importance, const Tensor* grad,
           double strength, bool accumulate) {
    lists::Operand all[4] = {{&param, false}};
    lists::Run runs[4];
    size_t count = 1;
    if (start) all[count++] = {&*start, false};
    if (importance) all[count++] = {&*importance, false};
    if (grad) all[count++] = {grad, true};
    operands_.flatten(all, runs, count);
    double_param_ = double_param_ || runs[0].dtype == DType::kFloat64;
    if (param.numel() == 0) return;
    L2spItem item = {};
    lists::choose_way(item, runs, count, param.numel());
    item.param = runs[0].data;
    item.param_dtype = runs[0].dtype;
    if (start) {
      item.start = runs[1].data;
      item.start_dtype = runs[1].dtype;
    }
    if (importance) {
      const lists::Run& run = runs[start ? 2 : 1];
      item.importance = run.data;
      item.importance_dtype = run.dtype;
    }
    if (grad) {
      item.grad = const_cast<void*>(runs[count - 1].data);
      item.grad_dtype = runs[count - 1].dtype;
    }
    item.strength = strength;
    item.accumulate = accumulate;
    std::memcpy(items_.add(), &item, sizeof item);
  }

  void run_grads(const Scalar& scale) {
    lists::launch_l2sp(items_, items_.cut(), scale, nullptr, current_stream(like_));
    operands_.finish();
  }

  // sum_i strength_i sum F_i (p_i - p0_i)^2
  Tensor run(const Scalar& scale) {
    const std::vector<lists::Slice> slices = items_.cut();
    const int64_t blocks = lists::count_blocks(slices);
    // What can fail comes before the first gradient is written.
    const auto type = double_param_ ? ScalarType::Double : ScalarType::Float;
    Tensor value = torch::stable::new_empty(like_, {}, type);
    const Tensor partials = torch::stable::new_empty(like_, {blocks}, ScalarType::Double);
    auto* const sums = static_cast<double*>(partials.mutable_data_ptr());
    const device::Stream stream = current_stream(like_);
    lists::launch_l2sp(items_, slices, scale, sums, stream);
    if (double_param_) {
      lists::launch_l2sp_total(sums, blocks, static_cast<double*>(value.mutable_data_ptr()), stream);
    } else {
      lists::launch_l2sp_total(sums, blocks, static_cast<float*>(value.mutable_data_ptr()), stream);
    }
    operands_.finish();
    return value;
  }

 private:
  const Tensor& like_;
  lists::Flattened operands_;
  lists::Items items_;
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

Numbers scale_of(const Tensor& t, const Tensor& like) {
  return Numbers(t, 1, like, "fasttransfer::l2sp: a scale must be one float32 or float64 value");
}

Tensor l2sp_value(std::vector<Tensor> params, std::vector<OptTensor> start, std::vector<double> strength,
                  std::vector<OptTensor> importance) {
  check_lists(params.size(), start.size(), strength.size(), importance.size());
  const DeviceGuard guard(params[0]);
  Parameters parameters(params[0], params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    parameters.add(params[i], start[i], importance_of(importance, i), nullptr, lists::value_of(strength, i), false);
  }
  return parameters.run({nullptr, 1, false});
}

std::vector<Tensor> l2sp_grad(std::vector<Tensor> params, std::vector<OptTensor> start, std::vector<double> strength,
                              std::vector<OptTensor> importance, const Tensor& upstream) {
  check_lists(params.size(), start.size(), strength.size(), importance.size());
  const DeviceGuard guard(params[0]);
  const Numbers scale = scale_of(upstream, params[0]);
  std::vector<Tensor> grads;
  grads.reserve(params.size());
  for (const Tensor& p : params) grads.push_back(torch::stable::empty_like(p));
  Parameters parameters(params[0], params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    parameters.add(params[i], start[i], importance_of(importance, i), &grads[i], lists::value_of(strength, i), false);
  }
  parameters.run_grads(scale.scalar());
  return grads;
}

Tensor l2sp_add_grad_(std::vector<Tensor> params, std::vector<OptTensor> start, std::vector<Tensor> grads,
                      std::vector<double> strength, std::vector<OptTensor> importance,
                      std::vector<int64_t> accumulate, double grad_scale, const OptTensor& grad_scale_tensor) {
  check_lists(params.size(), start.size(), strength.size(), importance.size());
  STD_TORCH_CHECK(grads.size() == params.size() && (accumulate.size() == params.size() || accumulate.size() == 1),
                  "fasttransfer::l2sp_add_grad_: one gradient per parameter, and one flag for each or for all");
  const DeviceGuard guard(params[0]);
  std::optional<Numbers> scale;
  if (grad_scale_tensor) scale = scale_of(*grad_scale_tensor, params[0]);
  Parameters parameters(params[0], params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    parameters.add(params[i], start[i], importance_of(importance, i), &grads[i], lists::value_of(strength, i),
                   lists::value_of(accumulate, i) != 0);
  }
  return parameters.run(scale ? scale->scalar() : Scalar{nullptr, grad_scale, false});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FT_NAMESPACE, FT_KEY, m) {
  m.impl("l2sp_value", TORCH_BOX(&l2sp_value));
  m.impl("l2sp_grad", TORCH_BOX(&l2sp_grad));
  m.impl("l2sp_add_grad_", TORCH_BOX(&l2sp_add_grad_));
}

}  // namespace ft
