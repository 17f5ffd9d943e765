// cuda/topk_kd.cuh: each tail, rows of one segment and of several, repeated indices, padding, in place.
#include "cuda/topk_kd.cuh"

#include <algorithm>
#include <map>

#include "simt/cases.h"

namespace {

using namespace ft;
using namespace ft::cases;
using namespace ft::distill;

struct Spec {
  DType student, values;
  int64_t rows, columns, padding, entries;
  TopkTail tail;
  double temperature = 1, label_weight = 0, smoothing = 0;
  bool gradient = true, in_place = false, wide = true;
  int64_t segment = 0;  // 0: as the launch chooses
};

double log_sum(const std::vector<double>& z) {
  double top = -INFINITY, sum = 0;
  for (const double x : z) top = std::max(top, x);
  for (const double x : z) sum += std::exp(x - top);
  return top + std::log(sum);
}

View view(Buffer& b, int64_t rows, int64_t pitch) {
  View v = {};
  v.data = b.data();
  v.rows.dims = rows == 1 ? 0 : 1;
  v.rows.size[0] = rows;
  v.rows.stride[0] = pitch * size_of(b.dtype());
  v.column_stride = 1;
  v.dtype = b.dtype();
  return v;
}

void solve(const Spec& spec) {
  const int64_t R = spec.rows, V = spec.columns, W = V + spec.padding, k = spec.entries;
  Random random(V * 31 + k);
  Buffer student(spec.student, R * W), grad(spec.student, R * W), values(spec.values, R * k);
  Buffer losses(DType::kFloat64, R), scales(DType::kFloat32, R), labels(DType::kFloat64, R);
  Buffer ids(spec.wide ? DType::kFloat64 : DType::kFloat32, R * k);
  student.fill(random, 3);
  std::vector<std::vector<double>> s(R, std::vector<double>(V));
  std::vector<std::map<int64_t, double>> entries(R);
  for (int64_t i = 0; i < R; ++i) {
    for (int64_t v = 0; v < V; ++v) s[i][v] = student.get(i * W + v);
    labels.as<int64_t>()[i] = i % 2 ? V - 1 : int64_t(random.uniform() * double(V));
    for (int64_t j = 0; j < k; ++j) {
      int64_t v = int64_t(random.uniform() * double(V));
      if (j == 0 && i % 2) v = V - 1;
      if (j == 2) v = -1;
      if (j == 4) v = spec.wide ? ids.as<int64_t>()[i * k] : ids.as<int32_t>()[i * k];
      if (spec.wide) {
        ids.as<int64_t>()[i * k + j] = v;
      } else {
        ids.as<int32_t>()[i * k + j] = int32_t(v);
      }
      values.set(i * k + j, j == 3 ? -INFINITY : -std::log(double(k)) - 0.3 - random.uniform());
      const double t = values.get(i * k + j);
      if (v >= 0 && t != -INFINITY) entries[i].emplace(v, t);
    }
  }

  TopkCall call = {};
  call.kd.student = view(student, R, W);
  call.kd.teacher = view(values, R, k);
  call.kd.grad = spec.in_place ? call.kd.student : view(grad, R, W);
  if (!spec.gradient) call.kd.grad.data = nullptr;
  call.kd.rows = R;
  call.kd.columns = V;
  call.kd.grad_columns = W;
  call.kd.labels = spec.label_weight != 0 ? labels.as<int64_t>() : nullptr;
  call.kd.weight = {nullptr, false, 1};
  call.kd.temperature = {nullptr, false, spec.temperature};
  call.kd.kd_divisor = call.kd.ce_divisor = {nullptr, false, 2};
  call.kd.ce_part = spec.label_weight;
  call.kd.kd_part = 1 - spec.label_weight;
  call.kd.smoothing = spec.smoothing;
  call.kd.ignore_index = -100;
  call.kd.losses = losses.as<double>();
  call.kd.grad_scales = spec.gradient && spec.student == DType::kFloat16 ? scales.as<float>() : nullptr;
  call.indices = ids.data();
  call.wide_indices = spec.wide;
  call.tail = spec.tail;
  call.entries = k;
  launch_topk_kd(call, {}, spec.segment);

  const bool renormalize = spec.tail == TopkTail::kRenormalize;
  const bool in_double = spec.student == DType::kFloat64 || spec.values == DType::kFloat64;
  const double T = spec.temperature, kd = (1 - spec.label_weight) / 2, ce = spec.label_weight / 2;
  for (int64_t i = 0; i < R; ++i) {
    const std::string text = std::string("topk ") + name_of(spec.student) + " " + std::to_string(V) + " k " +
                             std::to_string(k) + " tail " + std::to_string(int(spec.tail)) + " segment " +
                             std::to_string(spec.segment) + " row " + std::to_string(i);
    std::vector<double> hot(V), outside, t;
    for (int64_t v = 0; v < V; ++v) hot[v] = s[i][v] / T;
    for (int64_t v = 0; v < V; ++v) {
      if (!entries[i].count(v)) outside.push_back(hot[v]);
    }
    for (const auto& entry : entries[i]) t.push_back(entry.second / T);
    const double lse = log_sum(hot), lse_1 = log_sum(s[i]), lse_t = renormalize ? log_sum(t) : 0;
    double loss = 0, mass = 0, rest = 0, lse_rest = 0;
    for (const auto& [v, x] : entries[i]) {
      const double log_q = renormalize ? x / T - lse_t : x, q = std::exp(log_q);
      loss += kd * q * (log_q - (hot[v] - lse));
      mass += q;
    }
    if (spec.tail == TopkTail::kBucket && !outside.empty() && mass < 1) {
      rest = 1 - mass;
      mass = 1;
      lse_rest = log_sum(outside);
      loss += kd * rest * (std::log(rest) - (lse_rest - lse));
    }
    const int64_t label = labels.as<int64_t>()[i];
    std::vector<double> g(V), size(V);
    for (int64_t v = 0; v < V; ++v) {
      const auto entry = entries[i].find(v);
      const bool in = entry != entries[i].end();
      const double p = std::exp(hot[v] - lse), p_1 = std::exp(s[i][v] - lse_1);
      const double q = in         ? std::exp(renormalize ? entry->second / T - lse_t : entry->second)
                       : rest > 0 ? rest * std::exp(hot[v] - lse_rest)
                                  : 0;
      const double target = ce ? spec.smoothing / double(V) + (v == label ? 1 - spec.smoothing : 0) : 0;
      g[v] = kd / T * (mass * p - q) + ce * (p_1 - target);
      size[v] = kd / T * (mass * p + q) + ce * (p_1 + target);
      if (target != 0) loss += ce * target * (lse_1 - s[i][v]);
    }
    expect_close(losses.get(i), loss, (in_double ? 1e-12 : 4e-6) * (1 + std::fabs(loss)), text + " loss");
    if (!spec.gradient) continue;
    const double scale = call.kd.grad_scales ? scales.get(i) : 1;
    Buffer& out = spec.in_place ? student : grad;
    for (int64_t v = 0; v < W; ++v) {
      const double exact = v < V ? g[v] : 0, slack = v < V ? (in_double ? 1e-12 : 1e-5) * size[v] : 0;
      const double step = std::max(roundoff(out.dtype()) * std::fabs(exact), smallest_step(out.dtype()) * scale);
      expect_close(out.get(i * W + v) * scale, exact, slack + 1.01 * step, text, v);
    }
  }
  for (const Buffer* b : {&student, &grad, &values, &losses, &scales, &ids}) expect(b->intact(), "memory beside");
}

// Rows that differ from a plain one in one thing, over two segments of 32 columns; what comes out: a number, NaN,
// inf.
// Without labels the distillation part alone.
void special_rows(TopkTail tail, bool labelled) {
  const int64_t V = 64, k = 4, R = 19;
  const bool renormalize = tail == TopkTail::kRenormalize, bucket = tail == TopkTail::kBucket;
  const float inf = INFINITY;
  Buffer student(DType::kFloat32, R * V), grad(DType::kFloat32, R * V), values(DType::kFloat32, R * k);
  Buffer losses(DType::kFloat64, R), labels(DType::kFloat64, R), ids(DType::kFloat64, R * k);
  const int64_t columns[] = {0, 31, 32, 63};
  const float logs[] = {-1, -2, -1.5f, -3};
  for (int64_t i = 0; i < R; ++i) {
    for (int64_t v = 0; v < V; ++v) student.set(i * V + v, 0.1 * double(v % 17) - 3);
    for (int64_t j = 0; j < k; ++j) ids.as<int64_t>()[i * k + j] = columns[j], values.set(i * k + j, logs[j]);
    labels.as<int64_t>()[i] = 5;
  }
  const auto all_students = [&](int64_t i, double x, bool entries_too) {
    for (int64_t v = 0; v < V; ++v) {
      if (entries_too || !std::count(columns, columns + k, v)) student.set(i * V + v, x);
    }
  };
  std::string expected = "f";
  const auto row = [&](char what) {
    expected += what;
    return int64_t(expected.size()) - 1;
  };
  ids.as<int64_t>()[row('n') * k + 1] = V;
  ids.as<int64_t>()[row('n') * k + 3] = -2;
  values.set(row('n') * k + 2, inf);
  labels.as<int64_t>()[row(labelled ? 'n' : 'f')] = V;
  labels.as<int64_t>()[row(labelled ? 'n' : 'f')] = -1;
  labels.as<int64_t>()[row('f')] = 0;
  student.set(row('i') * V + 31, -inf);  // which has the teacher's mass
  student.set(row('f') * V + 10, -inf);
  student.set(row('n') * V + 40, inf);
  student.set(row('n') * V + 32, NAN);
  all_students(row('n'), -inf, true);
  const int64_t neither = row('n');  // no softmax, and no entry that would say so
  all_students(neither, -inf, true);
  for (int64_t j = 0; j < k; ++j) ids.as<int64_t>()[neither * k + j] = -1;
  const int64_t nothing = row(renormalize ? 'n' : 'f');
  for (int64_t j = 0; j < k; ++j) ids.as<int64_t>()[nothing * k + j] = -1;
  const int64_t empty = row(renormalize ? 'n' : 'f');
  for (int64_t j = 0; j < k; ++j) values.set(empty * k + j, -inf);
  student.set(row(labelled ? 'i' : 'f') * V + 5, -inf);  // the label
  student.set(row('i') * V + 0, -inf);                   // the first that a thread sees
  const int64_t underflow = row('f');
  student.set(underflow * V + 31, -inf);
  values.set(underflow * k + 1, -1e4);
  const int64_t alone = row(bucket ? 'i' : 'f');
  all_students(alone, -inf, false);
  labels.as<int64_t>()[alone] = 63;
  expect(int64_t(expected.size()) == R, "as many rows as are named");

  TopkCall call = {};
  call.kd.student = view(student, R, V);
  call.kd.teacher = view(values, R, k);
  call.kd.grad = view(grad, R, V);
  call.kd.rows = R;
  call.kd.columns = call.kd.grad_columns = V;
  call.kd.labels = labelled ? labels.as<int64_t>() : nullptr;
  call.kd.weight = {nullptr, false, 1};
  call.kd.temperature = {nullptr, false, 1};
  call.kd.kd_divisor = call.kd.ce_divisor = {nullptr, false, 1};
  call.kd.kd_part = labelled ? 0.5 : 1;
  call.kd.ce_part = 1 - call.kd.kd_part;
  call.kd.ignore_index = -100;
  call.kd.losses = losses.as<double>();
  call.indices = ids.data();
  call.wide_indices = true;
  call.tail = tail;
  call.entries = k;
  launch_topk_kd(call, {}, 32);

  for (int64_t i = 0; i < R; ++i) {
    const std::string text = "topk tail " + std::to_string(int(tail)) + (labelled ? " labelled" : "") +
                             " special row " + std::to_string(i);
    const double loss = losses.get(i);
    const bool is_nan = std::isnan(loss), is_inf = loss == INFINITY;
    expect(expected[i] == 'n' ? is_nan : expected[i] == 'i' ? is_inf : !is_nan && !is_inf, text + " loss");
    for (int64_t v = 0; v < V; ++v) {
      expect(std::isnan(grad.get(i * V + v)) == (expected[i] == 'n'), text + " gradient");
    }
    if (expected[i] != 'f') continue;
    std::vector<double> s(V), outside, t;
    std::map<int64_t, double> entries;
    for (int64_t v = 0; v < V; ++v) s[v] = student.get(i * V + v);
    for (int64_t j = 0; j < k; ++j) {
      const int64_t v = ids.as<int64_t>()[i * k + j];
      if (v >= 0 && values.get(i * k + j) != -INFINITY) entries[v] = values.get(i * k + j);
    }
    for (const auto& entry : entries) t.push_back(entry.second);
    for (int64_t v = 0; v < V; ++v) {
      if (!entries.count(v)) outside.push_back(s[v]);
    }
    const double lse = log_sum(s), lse_t = renormalize ? log_sum(t) : 0;
    double exact = labelled ? 0.5 * (lse - s[labels.as<int64_t>()[i]]) : 0, mass = 0;
    const double share = call.kd.kd_part;
    for (const auto& [v, x] : entries) {
      const double q = std::exp(x - lse_t);
      if (q != 0) exact += share * q * (x - lse_t - (s[v] - lse));
      mass += q;
    }
    if (bucket) exact += share * (1 - mass) * (std::log(1 - mass) - (log_sum(outside) - lse));
    expect_close(loss, exact, 4e-6 * (1 + std::fabs(exact)), text + " value");
  }
}

// The entries are all columns, with less than all of the mass: there is no tail for a bucket.
void covered() {
  const int64_t V = 5;
  Buffer student(DType::kFloat32, V), values(DType::kFloat32, V), losses(DType::kFloat64, 1), ids(DType::kFloat64, V);
  std::vector<double> s(V);
  double exact = 0;
  for (int64_t v = 0; v < V; ++v) {
    student.set(v, 0.3 * double(v));
    s[v] = student.get(v);
    values.set(v, -2 - 0.1 * double(v));
    ids.as<int64_t>()[v] = V - 1 - v;
  }
  for (int64_t v = 0; v < V; ++v) {
    const double log_q = values.get(V - 1 - v);
    exact += std::exp(log_q) * (log_q - (s[v] - log_sum(s)));
  }
  TopkCall call = {};
  call.kd.student = view(student, 1, V);
  call.kd.teacher = view(values, 1, V);
  call.kd.rows = 1;
  call.kd.columns = call.kd.grad_columns = V;
  call.kd.weight = {nullptr, false, 1};
  call.kd.temperature = {nullptr, false, 1};
  call.kd.kd_divisor = call.kd.ce_divisor = {nullptr, false, 1};
  call.kd.kd_part = 1;
  call.kd.ignore_index = -100;
  call.kd.losses = losses.as<double>();
  call.indices = ids.data();
  call.wide_indices = true;
  call.tail = TopkTail::kBucket;
  call.entries = V;
  launch_topk_kd(call, {});
  expect_close(losses.get(0), exact, 1e-6, "topk of all columns");
}

void all(const char*) {
  const DType f32 = DType::kFloat32, f64 = DType::kFloat64, bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  for (const TopkTail tail : {TopkTail::kRenormalize, TopkTail::kZero, TopkTail::kBucket}) {
    solve({f32, f32, 2, 5, 0, 6, tail});
    solve({f32, bf16, 3, 2500, 3, 9, tail});
    solve({bf16, f32, 2, 700, 0, 300, tail, 1, 0.3, 0.1, true, true, false});
    solve({f64, f32, 2, 1025, 1, 7, tail, 1, 0.5});
    solve({f16, f16, 2, 2049, 2, 5, tail, 1, 0.25, 0, true, false, true, 96});
    solve({f32, f32, 3, 1100, 0, 270, tail, 1, 0.4, 0.2, true, true, true, 512});
    solve({f32, f32, 1, 999, 0, 1, tail, 1, 0, 0, false});
  }
  for (const TopkTail tail : {TopkTail::kRenormalize, TopkTail::kZero, TopkTail::kBucket}) {
    special_rows(tail, false);
    special_rows(tail, true);
  }
  covered();
  solve({f32, f32, 1, 200'000, 0, 4, TopkTail::kZero, 1, 0, 0, false});  // more bits than "tiny" has room for
  solve({f32, f32, 2, 1500, 0, 8, TopkTail::kRenormalize, 2, 0.3});
  solve({f64, f64, 2, 300, 0, 8, TopkTail::kRenormalize, 3.5, 0.3, 0.1, true, false, true, 32});
  solve({f32, f32, 2, 300, 0, 8, TopkTail::kRenormalize, 1, 1.0});  // the teacher is not read
}

}  // namespace

int main(int count, char** arguments) { return main_of(count, arguments, {"tiny", "sm_90"}, all); }
