// torch.ops.fasttransfer.blend, blend_, blend_plain_ and blend_dot for the CPU key: coefficients, and the list of
// tensors in chunks over threads. The run itself is cpu/blend.h. Schemas and the pure-torch twins:
// fasttransfer/ops/blend.py.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/lists.h"
#include "cpu/plain_lists.h"

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

// The largest coefficient first, zeros left out; returns how many are left.
int order_terms(BlendTerm* terms, size_t count) {
  const auto larger = [](const BlendTerm& a, const BlendTerm& b) { return std::abs(a.coef) < std::abs(b.coef); };
  std::swap(terms[0], *std::max_element(terms, terms + count, larger));
  return int(std::remove_if(terms + 1, terms + count, [](const BlendTerm& t) { return t.coef == 0; }) - terms);
}

// Targets with their sources.
class Items {
 public:
  Items(size_t n, const std::vector<double>& weights) : weights_(weights) {
    terms_.reserve(n * (weights.size() + 1));  // the items point into it
    items_.reserve(n);
    sizes_.reserve(n);
  }

  // out = alpha * operands[0] + scale * sum_j weights[j] * operands[1 + j], each of n elements
  void add(const Flat& out, const Flat* operands, double alpha, double scale, int64_t n) {
    Item item;
    BlendTerm* own = terms_.data() + terms_.size();
    double sum = 0;
    for (size_t j = 0; j <= weights_.size(); ++j) {
      const double coef = j == 0 ? alpha : scale * weights_[j - 1];
      terms_.push_back({operands[j].data, operands[j].dtype, coef});
      sum += coef;
      item.in_double = item.in_double || operands[j].dtype == DType::kFloat64;
    }
    item.run.terms = own;
    item.run.count = order_terms(own, weights_.size() + 1);
    item.run.out = out.data;
    item.run.out_dtype = out.dtype;
    item.run.around = std::abs(sum - 1) < 1e-12;
    items_.push_back(item);
    sizes_.push_back(n);
  }

  void run() const {
    const Kernels& kernel = kernels();
    for_each_chunk(sizes_, [&](int64_t, size_t i, int64_t begin, int64_t count) {
      BlendRun r = items_[i].run;
      r.begin = begin;
      r.n = count;
      (items_[i].in_double ? kernel.blend_run_double : kernel.blend_run_float)(r);
    });
  }

 private:
  struct Item {
    BlendRun run{};
    bool in_double = false;
  };

  const std::vector<double>& weights_;
  std::vector<BlendTerm> terms_;
  std::vector<Item> items_;
  std::vector<int64_t> sizes_;
};

void run(const std::vector<Tensor>& outs, const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
         const std::vector<double>& alpha, const OptTensor& alpha_tensor, const std::vector<double>& scale,
         const OptTensor& scale_tensor, const std::vector<double>& weights) {
  const size_t n = targets.size(), k = weights.size();
  STD_TORCH_CHECK(k > 0 && sources.size() == n * k, "fasttransfer::blend: one source per target and weight");
  const Values alphas(alpha, alpha_tensor, n), scales(scale, scale_tensor, n);
  STD_TORCH_CHECK(n == 0 || alphas.given(), "fasttransfer::blend: alpha is missing");
  Operands operands;
  std::vector<Operand> own(k + 2);  // output, target, sources
  std::vector<Flat> flats(k + 2);
  Items items(n, weights);
  for (size_t i = 0; i < n; ++i) {
    own[0] = {&outs[i], true};
    own[1] = {&targets[i], false};
    for (size_t j = 0; j < k; ++j) own[2 + j] = {&sources[i * k + j], false};
    operands.flatten(own.data(), flats.data(), k + 2);
    items.add(flats[0], &flats[1], alphas[i], scales.given() ? scales[i] : 1 - alphas[i], targets[i].numel());
  }
  items.run();
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

// False, with nothing written, unless all lie in memory as their targets do, without gaps, and no target
// touches anything else. The sources of one model after those of the other.
bool run_plain(const Handles& targets, const Handles& sources, double alpha, const std::vector<double>& weights) {
  const size_t n = targets.size(), k = weights.size();
  if (k == 0 || sources.size() != n * k) return false;
  Items items(n, weights);
  Ranges ranges(n * (k + 1));
  std::vector<Flat> operands(k + 1);
  for (size_t i = 0; i < n; ++i) {
    Plain target, source;
    if (!look(targets[i], true, target)) return false;
    ranges.set(i, target, true);
    operands[0] = target.flat;
    for (size_t j = 0; j < k; ++j) {
      if (!look(sources[j * n + i], false, source) || !same_layout(source, target)) return false;
      ranges.set((1 + j) * n + i, source, false);
      operands[1 + j] = source.flat;
    }
    items.add(target.flat, operands.data(), alpha, 1 - alpha, target.numel);
  }
  if (!ranges.separate()) return false;
  items.run();
  return true;
}

// Tensors with their terms: out[i] = sum over the elements of with_i * sum_j coefs[j] terms[j]_i.
Tensor blend_dot(std::vector<Tensor> with, std::vector<Tensor> terms, std::vector<double> coefs) {
  const size_t n = with.size(), k = coefs.size();
  STD_TORCH_CHECK(n > 0 && k > 0 && terms.size() == n * k,
                  "fasttransfer::blend_dot: at least one tensor, and one term per tensor and coefficient");
  const bool around = std::abs(std::accumulate(coefs.begin(), coefs.end(), 0.0)) < 1e-12;
  Operands operands;
  std::vector<Operand> own(k + 1);
  std::vector<Flat> flats(k + 1);
  std::vector<BlendTerm> kept(n * k);
  std::vector<BlendDotRun> runs(n);
  std::vector<uint8_t> in_double(n);
  std::vector<int64_t> sizes(n);
  for (size_t i = 0; i < n; ++i) {
    own[0] = {&with[i], false};
    for (size_t j = 0; j < k; ++j) own[1 + j] = {&terms[i * k + j], false};
    operands.flatten(own.data(), flats.data(), k + 1);
    BlendTerm* to = &kept[i * k];
    for (size_t j = 0; j < k; ++j) to[j] = {flats[1 + j].data, flats[1 + j].dtype, coefs[j]};
    for (const Flat& flat : flats) in_double[i] = in_double[i] || flat.dtype == DType::kFloat64;
    runs[i].terms = to;
    runs[i].count = order_terms(to, k);
    runs[i].around = around;
    runs[i].with = flats[0].data;
    runs[i].with_dtype = flats[0].dtype;
    sizes[i] = with[i].numel();
  }
  // One sum for each piece of a tensor in a chunk, added up in their order: the same whatever the number of threads.
  // From one piece to the next chunk or tensor ascend, so their sum numbers the pieces.
  const int64_t chunks = chunk_count(sizes);
  std::vector<double> sums(size_t(chunks) + n, 0.0);
  const Kernels& kernel = kernels();
  for_each_chunk(sizes, [&](int64_t chunk, size_t i, int64_t begin, int64_t count) {
    BlendDotRun r = runs[i];
    r.begin = begin;
    r.n = count;
    sums[size_t(chunk) + i] = (in_double[i] ? kernel.blend_dot_run_double : kernel.blend_dot_run_float)(r);
  });
  Tensor out = torch::stable::new_zeros(with[0], {int64_t(n)}, ScalarType::Double);
  double* dots = out.mutable_data_ptr<double>();
  int64_t at = 0;  // in the list, as if it were one array
  for (size_t i = 0; i < n; at += sizes[i], ++i) {
    if (sizes[i] == 0) continue;
    const int64_t last = (at + sizes[i] - 1) / kChunk;
    for (int64_t chunk = at / kChunk; chunk <= last; ++chunk) dots[i] += sums[size_t(chunk) + i];
  }
  return out;
}

// By hand what TORCH_BOX does, to take the lists as they come.
void blend_plain_(StableIValue* stack, uint64_t, uint64_t) {
  const Handles targets(stack[0]), sources(stack[1]);
  const auto alpha = torch::stable::detail::to<double>(stack[2]);
  const auto weights = torch::stable::detail::to<std::vector<double>>(stack[3]);
  stack[0] = torch::stable::detail::from(run_plain(targets, sources, alpha, weights));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttransfer, CPU, m) {
  m.impl("blend", TORCH_BOX(&blend));
  m.impl("blend_", TORCH_BOX(&blend_));
  m.impl("blend_plain_", &blend_plain_);
  m.impl("blend_dot", TORCH_BOX(&blend_dot));
}

}  // namespace ft
