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

// One target with its sources.
struct Item {
  Operands operands;  // output, target, sources; the output first, since it is the one that is written
  std::vector<BlendTerm> terms;
  BlendRun run{};
  bool in_double = false;
};

// The largest coefficient first, zeros left out.
void order_terms(std::vector<BlendTerm>& terms) {
  const auto larger = [](const BlendTerm& a, const BlendTerm& b) { return std::abs(a.coef) < std::abs(b.coef); };
  std::swap(terms[0], *std::max_element(terms.begin(), terms.end(), larger));
  terms.erase(std::remove_if(terms.begin() + 1, terms.end(), [](const BlendTerm& t) { return t.coef == 0; }),
              terms.end());
}

Item make_item(const Tensor& out, const Tensor& target, const Tensor* sources, const std::vector<double>& weights,
               double alpha, std::optional<double> scale) {
  std::vector<Tensor> tensors{out, target};
  tensors.insert(tensors.end(), sources, sources + weights.size());
  Item item{Operands(std::move(tensors))};
  const double source_scale = scale ? *scale : 1 - alpha;
  double sum = alpha;
  item.terms.push_back({item.operands[1].const_data_ptr(), dtype_of(target), alpha});
  item.in_double = is_double(target);
  for (size_t j = 0; j < weights.size(); ++j) {
    STD_TORCH_CHECK(sources[j].numel() == target.numel() && sources[j].dim() == target.dim(),
                    "fasttransfer::blend: a target and a source differ in shape");
    const double coef = source_scale * weights[j];
    item.terms.push_back({item.operands[2 + j].const_data_ptr(), dtype_of(sources[j]), coef});
    item.in_double = item.in_double || is_double(sources[j]);
    sum += coef;
  }
  order_terms(item.terms);
  item.run.out = item.operands[0].mutable_data_ptr();
  item.run.out_dtype = dtype_of(out);
  item.run.convex = std::abs(sum - 1) < 1e-12;
  item.run.n = target.numel();
  return item;
}

void run(const std::vector<Tensor>& outs, const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
         const std::vector<double>& alpha, const OptTensor& alpha_tensor, const std::vector<double>& scale,
         const OptTensor& scale_tensor, const std::vector<double>& weights) {
  const size_t n = targets.size();
  STD_TORCH_CHECK(!weights.empty() && sources.size() == n * weights.size(),
                  "fasttransfer::blend: one source per target and weight");
  const Values alphas(alpha, alpha_tensor, n), scales(scale, scale_tensor, n);
  STD_TORCH_CHECK(n == 0 || alphas.given(), "fasttransfer::blend: alpha is missing");
  std::vector<Item> items;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < n; ++i) {
    items.push_back(make_item(outs[i], targets[i], &sources[i * weights.size()], weights, alphas[i],
                              scales.given() ? std::optional<double>(scales[i]) : std::nullopt));
    sizes.push_back(items.back().run.n);
  }
  const Kernels& kernel = kernels();
  for_each_chunk(sizes, [&](int64_t, size_t i, int64_t begin, int64_t count) {
    std::vector<BlendTerm> terms = items[i].terms;
    for (BlendTerm& term : terms) term.data = static_cast<const char*>(term.data) + begin * bytes_of(term.dtype);
    BlendRun r = items[i].run;
    r.out = static_cast<char*>(r.out) + begin * bytes_of(r.out_dtype);
    r.terms = terms.data();
    r.count = int(terms.size());
    r.n = count;
    (items[i].in_double ? kernel.blend_run_double : kernel.blend_run_float)(r);
  });
  for (Item& item : items) item.operands.finish(0);
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
