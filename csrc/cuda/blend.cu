// torch.ops.fasttransfer.blend, blend_ and blend_dot for the CUDA key: checks, coefficients, the table of targets,
// launches. The kernels are cuda/blend.cuh and blend_dot.cuh. Schemas and the pure-torch twins:
// fasttransfer/ops/blend.py.
//
// Nothing waits for the device: coefficients that are there stay there. A CUDA graph can capture a call.
#include "cuda/blend.cuh"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "cuda/blend_dot.cuh"
#include "cuda/runtime.h"
#include "cuda/table_tensors.h"

namespace ft {
namespace {

using lists::BlendCoefs;
using lists::BlendItem;
using lists::BlendTerm;
using lists::Numbers;
using lists::OptTensor;

// One value per target, from constants or a tensor.
class Values {
 public:
  Values(const std::vector<double>& constants, const OptTensor& tensor, size_t n, const Tensor& like)
      : constants_(constants) {
    if (tensor) {
      numbers_.emplace(*tensor, int64_t(n), like,
                       "fasttransfer::blend: a tensor of coefficients must be float32 or float64, one per target");
    } else {
      STD_TORCH_CHECK(constants.empty() || constants.size() == n, "fasttransfer::blend: one coefficient per target");
    }
  }
  bool given() const { return numbers_ || !constants_.empty(); }
  bool on_device() const { return numbers_ && numbers_->on_device(); }
  lists::Scalar scalar() const { return on_device() ? numbers_->scalar() : lists::Scalar{nullptr, 0, false}; }
  int64_t stride() const { return on_device() ? numbers_->stride() : 0; }
  double operator[](size_t i) const { return numbers_ ? numbers_->at(int64_t(i)) : constants_[i]; }

 private:
  const std::vector<double>& constants_;
  std::optional<Numbers> numbers_;
};

// The largest coefficient first, zeros left out; returns how many are left.
size_t order_terms(BlendTerm* terms, size_t count) {
  const auto larger = [](const BlendTerm& a, const BlendTerm& b) { return std::abs(a.coef) < std::abs(b.coef); };
  std::swap(terms[0], *std::max_element(terms, terms + count, larger));
  return std::remove_if(terms + 1, terms + count, [](const BlendTerm& t) { return t.coef == 0; }) - terms;
}

// The targets of a call with their sources.
class Targets {
 public:
  Targets(size_t n, const std::vector<double>& weights, const Values& alpha, const Values& scale)
      : weights_(weights),
        alpha_(alpha),
        scale_(scale),
        items_(lists::blend_stride(int64_t(weights.size()) + 1), n),
        terms_(weights.size() + 1),
        runs_(weights.size() + 2) {
    coefs_ = {alpha.scalar(), scale.scalar(), alpha.stride(), scale.stride(), !scale.given()};
  }

  // Target i; runs: output, target, sources, each of n elements.
  void add(size_t i, const lists::Run* runs, int64_t n) {
    if (n == 0) return;
    BlendItem item = {};
    const size_t count = set_coefs(i, runs + 1, item);
    bool in_double = false;
    for (size_t j = 0; j < terms_.size(); ++j) in_double = in_double || runs[1 + j].dtype == DType::kFloat64;
    runs_[0] = runs[0];
    for (size_t j = 0; j < count; ++j) runs_[1 + j] = {terms_[j].data, terms_[j].dtype};
    lists::choose_way(item, runs_.data(), count + 1, n, in_double);
    item.out = const_cast<void*>(runs[0].data);
    item.out_type = uint8_t(runs[0].dtype);
    item.index = int32_t(i);
    item.terms = uint16_t(count);
    unsigned char* to = items_.add();
    std::memcpy(to, &item, sizeof item);
    std::memcpy(to + sizeof item, terms_.data(), count * sizeof(BlendTerm));
  }

  void run(device::Stream stream) { lists::launch_blend(items_, items_.cut(), coefs_, stream); }

 private:
  // The terms of target i; how many of them count.
  size_t set_coefs(size_t i, const lists::Run* operands, BlendItem& item) {
    const double alpha = alpha_.on_device() ? 0 : alpha_[i];
    const bool scale_on_device = scale_.given() ? scale_.on_device() : alpha_.on_device();
    const double scale = scale_on_device ? 1 : scale_.given() ? scale_[i] : 1 - alpha;
    double sum = 0;
    for (size_t j = 0; j < terms_.size(); ++j) {
      terms_[j] = {operands[j].data, j == 0 ? alpha : scale * weights_[j - 1], operands[j].dtype};
      sum += terms_[j].coef;
    }
    if (!coefs_.known()) return terms_.size();
    item.convex = lists::sum_is_one(sum);
    return order_terms(terms_.data(), terms_.size());
  }

  const std::vector<double>& weights_;
  const Values &alpha_, &scale_;
  BlendCoefs coefs_;
  lists::Items items_;
  std::vector<BlendTerm> terms_;
  std::vector<lists::Run> runs_;
};

void run(const std::vector<Tensor>& outs, const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
         const std::vector<double>& alpha, const OptTensor& alpha_tensor, const std::vector<double>& scale,
         const OptTensor& scale_tensor, const std::vector<double>& weights) {
  const size_t n = targets.size(), k = weights.size();
  STD_TORCH_CHECK(k > 0 && sources.size() == n * k, "fasttransfer::blend: one source per target and weight");
  if (n == 0) return;
  STD_TORCH_CHECK(int64_t(k) < lists::kMostTerms, "fasttransfer::blend: at most ", lists::kMostTerms - 1,
                  " sources at once on a CUDA device, got ", k);
  const Values alphas(alpha, alpha_tensor, n, targets[0]), scales(scale, scale_tensor, n, targets[0]);
  STD_TORCH_CHECK(alphas.given(), "fasttransfer::blend: alpha is missing");
  lists::Flattened operands(targets[0]);
  std::vector<lists::Operand> own(k + 2);  // output, target, sources
  std::vector<lists::Run> runs(k + 2);
  Targets list(n, weights, alphas, scales);
  for (size_t i = 0; i < n; ++i) {
    own[0] = {&outs[i], true};
    own[1] = {&targets[i], false};
    for (size_t j = 0; j < k; ++j) own[2 + j] = {&sources[i * k + j], false};
    operands.flatten(own.data(), runs.data(), k + 2);
    list.add(i, runs.data(), targets[i].numel());
  }
  list.run(current_stream(targets[0]));
  operands.finish();
}

std::vector<Tensor> blend(std::vector<Tensor> targets, std::vector<Tensor> sources, std::vector<double> alpha,
                          const OptTensor& alpha_tensor, std::vector<double> scale, const OptTensor& scale_tensor,
                          std::vector<double> weights) {
  std::vector<Tensor> outs;
  if (targets.empty()) return outs;
  const DeviceGuard guard(targets[0]);
  outs.reserve(targets.size());
  for (const Tensor& t : targets) outs.push_back(torch::stable::empty_like(t));
  run(outs, targets, sources, alpha, alpha_tensor, scale, scale_tensor, weights);
  return outs;
}

void blend_(std::vector<Tensor> targets, std::vector<Tensor> sources, std::vector<double> alpha,
            const OptTensor& alpha_tensor, std::vector<double> scale, const OptTensor& scale_tensor,
            std::vector<double> weights) {
  if (targets.empty()) return;
  const DeviceGuard guard(targets[0]);
  run(targets, targets, sources, alpha, alpha_tensor, scale, scale_tensor, weights);
}

// Dot product i: of upstream[i] with sum_j coefs[j] terms[i * k + j].
Tensor blend_dot(std::vector<Tensor> upstream, std::vector<Tensor> terms, std::vector<double> coefs) {
  const size_t n = upstream.size(), k = coefs.size();
  STD_TORCH_CHECK(n > 0 && k > 0 && terms.size() == n * k && int64_t(k) <= lists::kMostTerms,
                  "fasttransfer::blend_dot: at least one tensor, one term per tensor and coefficient, at most ",
                  lists::kMostTerms, " coefficients");
  const DeviceGuard guard(upstream[0]);
  const double sum = std::accumulate(coefs.begin(), coefs.end(), 0.0);
  lists::Flattened operands(upstream[0]);
  std::vector<lists::Operand> own(k + 1);
  std::vector<lists::Run> runs(k + 1);
  std::vector<BlendTerm> kept(k);
  lists::Items items(lists::blend_stride(int64_t(k)), n);
  for (size_t i = 0; i < n; ++i) {
    own[0] = {&upstream[i], false};
    for (size_t j = 0; j < k; ++j) own[1 + j] = {&terms[i * k + j], false};
    operands.flatten(own.data(), runs.data(), k + 1);
    if (upstream[i].numel() == 0) continue;
    for (size_t j = 0; j < k; ++j) kept[j] = {runs[1 + j].data, coefs[j], runs[1 + j].dtype};
    BlendItem item = {};
    item.out = const_cast<void*>(runs[0].data);
    item.out_type = uint8_t(runs[0].dtype);
    item.index = int32_t(i);
    item.convex = lists::sum_is_one(sum + 1);
    const size_t count = order_terms(kept.data(), k);
    item.terms = uint16_t(count);
    bool in_double = false;
    for (const lists::Run& run : runs) in_double = in_double || run.dtype == DType::kFloat64;
    for (size_t j = 0; j < count; ++j) runs[1 + j] = {kept[j].data, kept[j].dtype};
    lists::choose_way(item, runs.data(), count + 1, upstream[i].numel(), in_double);
    unsigned char* to = items.add();
    std::memcpy(to, &item, sizeof item);
    std::memcpy(to + sizeof item, kept.data(), count * sizeof(BlendTerm));
  }
  const std::vector<lists::Slice> slices = items.cut();
  Tensor dots = torch::stable::new_zeros(upstream[0], {int64_t(n)}, ScalarType::Double);
  const Tensor partials = torch::stable::new_empty(upstream[0], {lists::count_chunks(slices)}, ScalarType::Double);
  lists::launch_blend_dot(items, slices, static_cast<double*>(partials.mutable_data_ptr()),
                          static_cast<double*>(dots.mutable_data_ptr()), current_stream(upstream[0]));
  return dots;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FT_NAMESPACE, FT_KEY, m) {
  m.impl("blend", TORCH_BOX(&blend));
  m.impl("blend_", TORCH_BOX(&blend_));
  m.impl("blend_dot", TORCH_BOX(&blend_dot));
}

}  // namespace ft
