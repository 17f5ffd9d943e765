// One call of kd for the standalone cases: its operands in buffers of exact size, and what must come out, in double.
#pragma once

#include "cuda/kd_call.cuh"
#include "cuda/kd_plan.h"
#include "simt/cases.h"

namespace ft::cases {

using distill::KdCall;
using distill::Values;
using distill::View;

struct KdSpec {
  DType student = DType::kFloat32, teacher = DType::kFloat32;
  int64_t rows = 3, columns = 100;
  int64_t padding = 0;  // columns beside them, of which the gradient is zero
  int64_t gap = 0;      // elements between rows
  int64_t inner = 0;    // rows in two dimensions, the inner one of this size, 3 elements between them
  int stride = 1;       // of columns
  int offset_s = 0, offset_t = 0, offset_g = 0;
  bool gradient = true, in_place = false;
  double temperature = 1;
  bool row_temperature = false, row_weight = false, double_values = false;
  double label_weight = -1;  // without labels: -1
  double smoothing = 0;
  bool distill_ignored = false, scale_by_t2 = true;
  bool divisors = false;  // in device memory
  int loss = 0;           // to be summed, per row in fp32, per row in fp64
  double scale = 3;       // of the logits
  bool special = false;   // rows with -inf, NaN, huge values and labels out of range

  // Whether a row asks for nothing but its logits.
  bool bare() const {
    return gradient && label_weight < 0 && !row_temperature && !row_weight && !divisors && loss == 0;
  }
};

// Whether a row may need a third exponential: none are kept then.
inline bool is_hot(const KdSpec& s) {
  return s.label_weight > 0 && s.label_weight < 1 && (s.row_temperature || s.temperature != 1);
}

inline distill::KdShape shape_of(const KdSpec& s) {
  distill::KdShape shape;
  shape.columns = s.columns;
  shape.element_bytes = s.student == s.teacher && s.student != DType::kFloat64 ? int(size_of(s.student)) : 0;
  shape.is_double = s.student == DType::kFloat64 || s.teacher == DType::kFloat64;
  shape.gradient = s.gradient;
  shape.hot = is_hot(s);
  return shape;
}

inline std::string text_of(const KdSpec& s) {
  std::string text = std::string("kd ") + name_of(s.student) + " " + name_of(s.teacher) + " " +
                     std::to_string(s.rows) + "x" + std::to_string(s.columns) + "+" + std::to_string(s.padding);
  text += " gap " + std::to_string(s.gap) + " stride " + std::to_string(s.stride) + " offsets " +
          std::to_string(s.offset_s) + std::to_string(s.offset_t) + std::to_string(s.offset_g);
  text += s.gradient ? s.in_place ? " in place" : " gradient" : " loss";
  text += " T " + std::to_string(s.temperature) + " label_weight " + std::to_string(s.label_weight);
  return text;
}

class KdProblem {
 public:
  explicit KdProblem(const KdSpec& spec)
      : s_(spec),
        pitch_((spec.columns + spec.padding - 1) * spec.stride + 1 + spec.gap),
        student_(spec.student, elements(), spec.offset_s),
        teacher_(spec.teacher, elements(), spec.offset_t),
        grad_(spec.student, elements(), spec.offset_g),
        losses_(DType::kFloat64, spec.rows),
        loss_(spec.loss == 2 ? DType::kFloat64 : DType::kFloat32, spec.rows),
        grad_scales_(DType::kFloat32, spec.rows),
        weights_(value_type(), spec.rows),
        temperatures_(value_type(), spec.rows),
        divisors_(value_type(), 2),
        labels_(DType::kFloat64, spec.rows) {  // eight bytes each
    Random random(spec.columns * 7 + spec.rows);
    logits_s_ = fill(student_, random);
    logits_t_ = fill(teacher_, random);
    divisors_.set(0, 2.5);
    divisors_.set(1, 0.75);
    for (int64_t i = 0; i < spec.rows; ++i) {
      weights_.set(i, i % 5 == 3 ? 0 : 0.5 + random.uniform());
      temperatures_.set(i, i % 2 ? 1 : 0.5 + 3 * random.uniform());
      int64_t label = i % 4 == 2 ? -100 : int64_t(random.uniform() * double(spec.columns));
      if (i == 1) label = spec.columns - 1;
      if (i == 3) label = 0;
      if (spec.special && i == 0) label = -1;
      if (spec.special && (i == 4 || i + 1 == spec.rows)) label = spec.columns;
      labels_.as<int64_t>()[i] = label;
    }
    call_ = {};
    call_.student = view(student_);
    call_.teacher = view(teacher_);
    call_.grad = spec.in_place ? call_.student : view(grad_);
    if (!spec.gradient) call_.grad.data = nullptr;
    call_.rows = spec.rows;
    call_.columns = spec.columns;
    call_.grad_columns = spec.columns + spec.padding;
    const bool labelled = spec.label_weight >= 0;
    call_.labels = labelled ? labels_.as<int64_t>() : nullptr;
    call_.weight = values(spec.row_weight, weights_, 1);
    call_.temperature = values(spec.row_temperature, temperatures_, spec.temperature);
    call_.kd_divisor = values(spec.divisors, divisors_, 4);
    call_.ce_divisor = values(spec.divisors, divisors_, 5);
    if (spec.divisors) call_.ce_divisor.data = static_cast<char*>(divisors_.data()) + size_of(value_type());
    call_.ce_part = labelled ? spec.label_weight : 0;
    call_.kd_part = 1 - call_.ce_part;
    call_.smoothing = spec.smoothing;
    call_.ignore_index = -100;
    call_.distill_ignored = spec.distill_ignored;
    call_.scale_by_t2 = spec.scale_by_t2;
    call_.losses = spec.loss == 0 ? losses_.as<double>() : nullptr;
    call_.loss = spec.loss == 0 ? nullptr : loss_.data();
    call_.loss_is_double = spec.loss == 2;
    call_.grad_scales = spec.gradient && spec.student == DType::kFloat16 ? grad_scales_.as<float>() : nullptr;
  }

  const KdCall& call() const { return call_; }

  void check() {
    for (int64_t i = 0; i < s_.rows; ++i) check_row(i);
    for (const Buffer* b : {&student_, &teacher_, &grad_, &losses_, &loss_, &grad_scales_}) {
      expect(b->intact(), text_of(s_) + ": memory beside a buffer");
    }
  }

 private:
  int64_t elements() const { return at(s_.rows - 1, s_.columns + s_.padding - 1) + 1; }
  int64_t at(int64_t i, int64_t v) const { return i * pitch_ + (s_.inner ? i / s_.inner * 3 : 0) + v * s_.stride; }
  DType value_type() const { return s_.double_values ? DType::kFloat64 : DType::kFloat32; }
  bool in_double() const { return s_.student == DType::kFloat64 || s_.teacher == DType::kFloat64; }

  // Rows that are not counted, padding and gaps stay NaN.
  std::vector<double> fill(Buffer& b, Random& random) {
    std::vector<double> logits(s_.rows * s_.columns);
    for (int64_t i = 0; i < s_.rows; ++i) {
      for (int64_t v = 0; v < s_.columns; ++v) {
        double x = s_.scale * random.normal();
        if (s_.special && i % 8 == 5 && v % 64 < 40) x = -INFINITY;
        if (s_.special && i % 8 == 6 && v == s_.columns / 2) x = NAN;
        if (s_.special && i % 8 == 7 && &b == &teacher_ && v != s_.columns - 1) x = -INFINITY;
        if (s_.special && i == (&b == &student_ ? 8 : 9)) x = -INFINITY;
        if (s_.special && i == (&b == &student_ ? 10 : 2)) x = -2e30;
        if (!counted(i)) x = NAN;
        b.set(at(i, v), x);
        logits[i * s_.columns + v] = b.get(at(i, v));
      }
    }
    return logits;
  }

  View view(Buffer& b) const {
    View v = {};
    v.data = b.data();
    v.rows.dims = s_.rows == 1 ? 0 : 1;
    v.rows.size[0] = s_.rows;
    v.rows.stride[0] = pitch_ * size_of(b.dtype());
    if (s_.inner) {
      v.rows.dims = 2;
      v.rows.size[0] = s_.inner;
      v.rows.size[1] = (s_.rows + s_.inner - 1) / s_.inner;
      v.rows.stride[1] = (s_.inner * pitch_ + 3) * size_of(b.dtype());
    }
    v.column_stride = s_.stride;
    v.dtype = b.dtype();
    return v;
  }
  Values values(bool given, const Buffer& b, double otherwise) const {
    return {given ? b.data() : nullptr, s_.double_values, otherwise};
  }

  bool ignored(int64_t i) const { return i % 4 == 2 && i != 1; }
  bool counted(int64_t i) const {
    if (s_.row_weight && i % 5 == 3) return false;
    return s_.label_weight < 0 || s_.distill_ignored || !ignored(i);
  }

  void check_row(int64_t i) {
    const std::string text = text_of(s_) + " row " + std::to_string(i);
    const int64_t V = s_.columns;
    const double* const s = &logits_s_[i * V];
    const double* const t = &logits_t_[i * V];
    const bool labelled = s_.label_weight >= 0 && !ignored(i);
    const double T = s_.row_temperature ? temperatures_.get(i) : s_.temperature;
    const double weight = !counted(i) ? 0 : s_.row_weight ? weights_.get(i) : 1;
    const double kd_divisor = s_.divisors ? divisors_.get(0) : 4, ce_divisor = s_.divisors ? divisors_.get(1) : 5;
    const double share = s_.label_weight >= 0 ? s_.label_weight : 0;
    const double kd = weight * (1 - share) / kd_divisor * (s_.scale_by_t2 ? T * T : 1);
    const double ce = labelled ? weight * share / ce_divisor : 0;
    const int64_t label = labels_.as<int64_t>()[i];

    double loss = 0, size = 0;  // size: of what is added up
    std::vector<double> grad(V, 0), parts(V, 0);
    if (kd != 0) {
      const std::vector<double> log_p = log_softmax(s, 1 / T), log_q = log_softmax(t, 1 / T);
      double sum = 0;
      for (int64_t v = 0; v < V; ++v) {
        const double p = std::exp(log_p[v]), q = std::exp(log_q[v]);
        if (q != 0) sum += q * (log_q[v] - log_p[v]);
        grad[v] += kd / T * (p - q);
        parts[v] += std::fabs(kd) / T * (p + q);
      }
      loss += kd * sum;
      size += std::fabs(kd) * (1 + std::fabs(sum));
    }
    if (ce != 0) {
      const std::vector<double> log_p = log_softmax(s, 1);
      double sum = 0;
      for (int64_t v = 0; v < V; ++v) {
        const double target = s_.smoothing / double(V) + (v == label ? 1 - s_.smoothing : 0), p = std::exp(log_p[v]);
        if (target != 0) sum -= target * log_p[v];
        grad[v] += ce * (p - target);
        parts[v] += std::fabs(ce) * (p + target);
      }
      if (label < 0 || label >= V) sum = NAN;
      loss += ce * sum;
      size += std::fabs(ce) * (1 + std::fabs(sum));
      if (label < 0 || label >= V) std::fill(grad.begin(), grad.end(), NAN);
    }
    const double relative = !in_double() ? 4e-6 : s_.loss == 1 ? 1e-7 : 1e-12;
    const double actual = s_.loss == 0 ? losses_.get(i) : loss_.get(i);
    expect_close(actual, loss, relative * size + 1e-37, text + " loss");
    if (!s_.gradient) return;
    const double scale = call_.grad_scales ? grad_scales_.get(i) : 1;
    expect(scale > 0 && std::exp2(std::nearbyint(std::log2(scale))) == scale, text + ": the scale is a power of two");
    Buffer& g = s_.in_place ? student_ : grad_;
    const bool broken = loss != loss || std::isinf(loss);
    for (int64_t v = 0; v < V + s_.padding; ++v) {
      const double stored = g.get(at(i, v)) * scale, exact = v < V ? grad[v] : 0;
      if (broken && std::isinf(loss)) continue;  // finite, and its value is not stated
      double slack = v < V ? (in_double() ? 1e-12 : 1e-5) * parts[v] : 0;
      if (v < V && !in_double()) slack += 0x1p-126;  // exp2_fast is 0 where it is less
      const double step = std::max(roundoff(g.dtype()) * std::fabs(exact), smallest_step(g.dtype()) * scale);
      expect_close(stored, v < V && broken ? NAN : exact, slack + 1.01 * step, text, v);
    }
  }

  double top(const double* z) const {
    double m = -INFINITY;
    for (int64_t v = 0; v < s_.columns; ++v) m = z[v] != z[v] ? NAN : m != m ? m : std::max(m, z[v]);
    return m;
  }
  // From differences: logits of -2e30 have no digits for a logarithm beside them.
  std::vector<double> log_softmax(const double* z, double inv_t) const {
    const double m = top(z);
    double sum = 0;
    for (int64_t v = 0; v < s_.columns; ++v) sum += std::exp((z[v] - m) * inv_t);
    std::vector<double> log_p(s_.columns);
    for (int64_t v = 0; v < s_.columns; ++v) log_p[v] = (z[v] - m) * inv_t - std::log(sum);
    return log_p;
  }

  KdSpec s_;
  int64_t pitch_;
  Buffer student_, teacher_, grad_, losses_, loss_, grad_scales_, weights_, temperatures_, divisors_, labels_;
  std::vector<double> logits_s_, logits_t_;
  KdCall call_;
};

// Builds the problem, has its rows computed, and checks them.
template <class Fn>
void solve(const KdSpec& spec, const Fn& compute) {
  KdProblem problem(spec);
  compute(problem.call());
  problem.check();
}

}  // namespace ft::cases
