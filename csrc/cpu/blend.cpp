// torch.ops.fasttransfer.blend and blend_ for the CPU key: coefficients, and the list of tensors in chunks over
// threads. The run itself is cpu/blend.h. Schemas and the pure-torch twin: fasttransfer/ops/blend.py.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/lists.h"

namespace ft {
namespace {

using OptTensor = std::optional<Tensor>;

// One value per target, from constants or a tensor.
class Values {
 public:
  Values(const std::vector<double>& constants, const OptTensor& tensor, size_t n) {
    if (tensor) {
      const Tensor t = torch::stable::contiguous(*tensor);
      STD_TORCH_CHECK(size_t(t.numel()) == n && (is_double(t) || t.scalar_type() == ScalarType::Float),
                      "fasttransfer::blend: a tensor of coefficients must be float32 or float64, one per target");
      for (size_t i = 0; i < n; ++i) {
        values_.push_back(is_double(t) ? t.const_data_ptr<double>()[i] : double(t.const_data_ptr<float>()[i]));
      }
    } else {
      values_ = constants;
      STD_TORCH_CHECK(values_.empty() || values_.size() == n, "fasttransfer::blend: one coefficient per target");
    }
  }
  bool given() const { return !values_.empty(); }
  double operator[](size_t i) const { return values_[i]; }

 private:
  std::vector<double> values_;
};

// One target with its sources; its terms are in one list for all items.
struct Item {
  BlendRun run{};
  size_t first_term = 0;
  bool in_double = false;
};

// The largest coefficient first, zeros left out; returns how many are left.
int order_terms(BlendTerm* terms, size_t count) {
  const auto larger = [](const BlendTerm& a, const BlendTerm& b) { return std::abs(a.coef) < std::abs(b.coef); };
  std::swap(terms[0], *std::max_element(terms, terms + count, larger));
  return int(std::remove_if(terms + 1, terms + count, [](const BlendTerm& t) { return t.coef == 0; }) - terms);
}

void run(const std::vector<Tensor>& outs, const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
         const std::vector<double>& alpha, const OptTensor& alpha_tensor, const std::vector<double>& scale,
         const OptTensor& scale_tensor, const std::vector<double>& weights) {
  const size_t n = targets.size(), k = weights.size();
  STD_TORCH_CHECK(k > 0 && sources.size() == n * k, "fasttransfer::blend: one source per target and weight");
  const Values alphas(alpha, alpha_tensor, n), scales(scale, scale_tensor, n);
  STD_TORCH_CHECK(n == 0 || alphas.given(), "fasttransfer::blend: alpha is missing");
  Operands operands;
  std::vector<Operand> item_operands(k + 2);  // output, target, sources
  std::vector<BlendTerm> terms(n * (k + 1));  // target, sources of each item
  std::vector<Item> items(n);
  std::vector<int64_t> sizes(n);
  for (size_t i = 0; i < n; ++i) {
    const double source_scale = scales.given() ? scales[i] : 1 - alphas[i];
    item_operands[0] = {&outs[i], true};
    item_operands[1] = {&targets[i], false};
    for (size_t j = 0; j < k; ++j) item_operands[2 + j] = {&sources[i * k + j], false};
    operands.flatten(item_operands.data(), k + 2);
    Item& item = items[i];
    item.first_term = i * (k + 1);
    BlendTerm* own = &terms[item.first_term];
    double sum = 0;
    for (size_t j = 0; j <= k; ++j) {
      const Operand& x = item_operands[1 + j];
      own[j] = {x.data, x.dtype, j == 0 ? alphas[i] : source_scale * weights[j - 1]};
      sum += own[j].coef;
      item.in_double = item.in_double || x.dtype == DType::kFloat64;
    }
    item.run.count = order_terms(own, k + 1);
    item.run.out = item_operands[0].data;
    item.run.out_dtype = item_operands[0].dtype;
    item.run.convex = std::abs(sum - 1) < 1e-12;
    sizes[i] = targets[i].numel();
  }
  const Kernels& kernel = kernels();
  for_each_chunk(sizes, [&](int64_t, size_t i, int64_t begin, int64_t count) {
    BlendRun r = items[i].run;
    r.terms = &terms[items[i].first_term];
    r.begin = begin;
    r.n = count;
    (items[i].in_double ? kernel.blend_run_double : kernel.blend_run_float)(r);
  });
  operands.finish();
}

std::vector<Tensor> blend(std::vector<Tensor> targets, std::vector<Tensor> sources, std::vector<double> alpha,
                          const OptTensor& alpha_tensor, std::vector<double> scale, const OptTensor& scale_tensor,
                          std::vector<double> weights) {
  std::vector<Tensor> outs;
  for (const Tensor& t : targets) outs.push_back(torch::stable::empty_like(t));
  run(outs, targets, sources, alpha, alpha_tensor, scale, scale_tensor, weights);
  return outs;
}

void blend_(std::vector<Tensor> targets, std::vector<Tensor> sources, std::vector<double> alpha,
            const OptTensor& alpha_tensor, std::vector<double> scale, const OptTensor& scale_tensor,
            std::vector<double> weights) {
  run(targets, targets, sources, alpha, alpha_tensor, scale, scale_tensor, weights);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttransfer, CPU, m) {
  m.impl("blend", TORCH_BOX(&blend));
  m.impl("blend_", TORCH_BOX(&blend_));
}

}  // namespace ft
