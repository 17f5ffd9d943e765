// Every divergence of distill.cuh: both gradients, statistics and what surrounds it, of any types and strides,
// against double.
#include "cuda/distill.cuh"
#include "simt/cases.h"

namespace {

using namespace ft;
using namespace ft::cases;
using namespace ft::distill;

using Row = std::vector<double>;

struct Spec {
  Divergence divergence = Divergence::kForwardKL;
  DType student = DType::kFloat32, teacher = DType::kFloat32;
  int64_t rows = 3, columns = 100;
  int64_t padding = 0, gap = 0;
  int stride = 1;
  bool gradient = true, teacher_gradient = true, in_place = false, stats = false;
  double temperature = 2, label_weight = -1, smoothing = 0, cap_s = 0, cap_t = 0, scale = 3;
  bool standardize = false, row_weight = false, special = false;
  int loss = 0;  // to be summed, per row in the loss's type
};

std::string text_of(const Spec& s) {
  return std::string("distill ") + std::to_string(int(s.divergence)) + " " + name_of(s.student) + " " +
         name_of(s.teacher) + " " + std::to_string(s.rows) + "x" + std::to_string(s.columns) + "+" +
         std::to_string(s.padding) + " stride " + std::to_string(s.stride) +
         (s.standardize  ? " standardize"
          : s.cap_s != 0 ? " softcap"
                         : "") +
         (s.special ? " special" : "");
}

// ------------------------------------------------------------------------------------------- the same in double
double log_sum(const Row& x) {
  const double top = *std::max_element(x.begin(), x.end());
  if (top == -INFINITY) return top;
  double sum = 0;
  for (double v : x) sum += std::exp(v - top);
  return top + std::log(sum);
}
Row log_softmax(const Row& x) {
  const double total = log_sum(x);
  Row out(x.size(), -INFINITY);
  for (size_t v = 0; v < x.size(); ++v) {
    if (x[v] != -INFINITY) out[v] = x[v] - total;
  }
  return out;
}
double kl(const Row& y, const Row& x) {
  double sum = 0;
  for (size_t v = 0; v < y.size(); ++v) {
    if (y[v] != -INFINITY) sum += std::exp(y[v]) * (y[v] - x[v]);
  }
  return sum;
}
double entropy(const Row& x) {
  double sum = 0;
  for (double v : x) sum -= v == -INFINITY ? 0 : std::exp(v) * v;
  return sum;
}
// mass (f - sum mass f) by
Row spread(const Row& log_mass, const Row& f, double by) {
  double mean = 0;
  Row out(f.size(), 0);
  for (size_t v = 0; v < f.size(); ++v) mean += log_mass[v] == -INFINITY ? 0 : std::exp(log_mass[v]) * f[v];
  for (size_t v = 0; v < f.size(); ++v) {
    if (log_mass[v] != -INFINITY) out[v] = std::exp(log_mass[v]) * (f[v] - mean) * by;
  }
  return out;
}

struct Result {
  double value;
  Row of_s, of_t;  // for the logits at T
};

Result kl_of(const Row& y, const Row& x, double inv_t) {  // KL(y || x): of_s is x's
  Result r{kl(y, x), Row(x.size()), {}};
  Row f(x.size(), 0);
  for (size_t v = 0; v < x.size(); ++v) {
    r.of_s[v] = (std::exp(x[v]) - std::exp(y[v])) * inv_t;
    if (y[v] != -INFINITY) f[v] = y[v] - x[v];
  }
  r.of_t = std::isinf(r.value) ? Row(x.size(), 0) : spread(y, f, inv_t);
  return r;
}

Result decoupled(const Row& t, const Row& s, int64_t label, const double* weights, double inv_t) {
  const auto split = [label](const Row& z, Row& two, Row& others) {
    others = z;
    others.erase(others.begin() + label);
    two = {z[label], log_sum(others)};
  };
  Row two_s, two_t, others_s, others_t;
  split(s, two_s, others_s);
  split(t, two_t, others_t);
  const Result target = kl_of(log_softmax(two_t), log_softmax(two_s), inv_t);
  const Row p = log_softmax(others_s), q = log_softmax(others_t);
  const bool has_rest = two_t[1] != -INFINITY;
  Result r{weights[0] * target.value, Row(s.size(), 0), Row(s.size(), 0)};
  const Result rest = kl_of(q, p, inv_t);
  if (has_rest) r.value += weights[1] * rest.value;
  for (size_t v = 0, u = 0; v < s.size(); ++v) {
    if (int64_t(v) == label) {
      r.of_s[v] = weights[0] * target.of_s[0];
      r.of_t[v] = weights[0] * target.of_t[0];
      continue;
    }
    // The mass beside the label moves with the others' shares.
    r.of_s[v] = weights[0] * target.of_s[1] * std::exp(p[u]) + (has_rest ? weights[1] * rest.of_s[u] : 0);
    r.of_t[v] = weights[0] * target.of_t[1] * std::exp(q[u]) + (has_rest ? weights[1] * rest.of_t[u] : 0);
    ++u;
  }
  return r;
}

Result divergence_of(const Spec& spec, const Row& xs, const Row& xt, int64_t label, const double* args) {
  const double inv_t = 1 / spec.temperature;
  const int64_t V = spec.columns;
  Row s = xs, t = xt;
  for (int64_t v = 0; v < V; ++v) s[v] *= inv_t, t[v] *= inv_t;
  if (spec.divergence == Divergence::kDecoupled) return decoupled(t, s, label, args, inv_t);
  const Row x = log_softmax(s), y = log_softmax(t);
  if (spec.divergence == Divergence::kForwardKL) return kl_of(y, x, inv_t);
  if (spec.divergence == Divergence::kReverseKL) {
    Result r = kl_of(x, y, inv_t);
    std::swap(r.of_s, r.of_t);
    return r;
  }
  Result r{0, {}, {}};
  Row f(V, 0), h(V, 0);
  for (int64_t v = 0; v < V; ++v) {
    const double p = std::exp(x[v]), q = std::exp(y[v]);
    if (spec.divergence == Divergence::kTvd) {
      f[v] = p > q ? 0.5 : p < q ? -0.5 : 0;
      h[v] = -f[v];
      r.value += std::fabs(p - q) / 2;
      continue;
    }
    const double top = std::max(x[v], y[v]);
    if (top == -INFINITY) continue;
    const double m = top + std::log(args[0] * std::exp(y[v] - top) + (1 - args[0]) * std::exp(x[v] - top));
    if (p != 0) f[v] = (1 - args[0]) * (x[v] - m), r.value += p * f[v];
    if (q != 0) h[v] = args[0] * (y[v] - m), r.value += q * h[v];
  }
  r.of_s = spread(x, f, inv_t);
  r.of_t = spread(y, h, inv_t);
  return r;
}

// A side's logits on their way in, and a gradient's on its way out.
struct Way {
  Row z, x;
  double cap, deviation = 0, count = 0;
  bool standardize;
  Way(const Row& raw, double cap_, bool standardize_) : z(raw), cap(cap_), standardize(standardize_) {
    double mean = 0;
    for (double& v : z) {
      if (cap != 0 && v != -INFINITY) v = cap * std::tanh(v / cap);
      if (v != -INFINITY) mean += v, count += 1;
    }
    mean /= count;
    x = z;
    if (!standardize) return;
    for (double v : z) deviation += v == -INFINITY ? 0 : (v - mean) * (v - mean);
    deviation = std::sqrt(deviation / std::max(1.0, count - 1));
    for (double& v : x) v = v == -INFINITY ? v : (v - mean) / (deviation + 1e-7);
  }
  Row back_to_z(Row g) const {
    if (!standardize) return g;
    double along = 0;
    for (size_t v = 0; v < g.size(); ++v) along += x[v] == -INFINITY ? 0 : g[v] * x[v];
    const double scale = deviation + 1e-7, slope = along * scale / (deviation * std::max(1.0, count - 1));
    for (size_t v = 0; v < g.size(); ++v) g[v] = x[v] == -INFINITY ? 0 : (g[v] - x[v] * slope) / scale;
    return g;
  }
  Row back_to_raw(Row g) const {
    if (cap == 0) return g;
    for (size_t v = 0; v < g.size(); ++v) g[v] = z[v] == -INFINITY ? 0 : g[v] * (1 - z[v] / cap * (z[v] / cap));
    return g;
  }
};

bool broken(const Row& z) {
  bool any = false;
  for (double v : z) {
    if (v != v || v == INFINITY) return true;
    any = any || v != -INFINITY;
  }
  return !any;
}

// ----------------------------------------------------------------------------------------------------- one call
class Problem {
 public:
  explicit Problem(const Spec& spec)
      : s_(spec),
        pitch_((spec.columns + spec.padding - 1) * spec.stride + 1 + spec.gap),
        student_(spec.student, elements()),
        teacher_(spec.teacher, elements()),
        grad_(spec.student, elements()),
        teacher_grad_(spec.teacher, elements()),
        losses_(DType::kFloat64, spec.rows),
        loss_(in_double() ? DType::kFloat64 : DType::kFloat32, spec.rows),
        stats_(in_double() ? DType::kFloat64 : DType::kFloat32, spec.rows * kStats),
        scales_(DType::kFloat32, spec.rows),
        teacher_scales_(DType::kFloat32, spec.rows),
        weights_(DType::kFloat32, spec.rows),
        labels_(DType::kFloat64, spec.rows) {  // eight bytes each
    Random random(spec.columns * 31 + spec.rows);
    fill(student_, logits_s_, random);
    fill(teacher_, logits_t_, random);
    for (int64_t i = 0; i < spec.rows; ++i) {
      weights_.set(i, weight(i));
      labels_.as<int64_t>()[i] = label(i);
    }
    call_.kd.student = view(student_);
    call_.kd.teacher = view(teacher_);
    if (spec.gradient) call_.kd.grad = spec.in_place ? call_.kd.student : view(grad_);
    call_.kd.rows = spec.rows;
    call_.kd.columns = spec.columns;
    call_.kd.grad_columns = call_.teacher_columns = spec.columns + spec.padding;
    const bool labelled = spec.label_weight >= 0;
    if (labelled) call_.kd.labels = labels_.as<int64_t>();
    if (spec.row_weight) call_.kd.weight.data = weights_.data();
    call_.kd.weight.otherwise = 1;
    call_.kd.temperature.otherwise = spec.temperature;
    call_.kd.kd_divisor.otherwise = 4;
    call_.kd.ce_divisor.otherwise = 5;
    call_.kd.ce_part = labelled ? spec.label_weight : 0;
    call_.kd.kd_part = 1 - call_.kd.ce_part;
    call_.kd.smoothing = spec.smoothing;
    call_.kd.ignore_index = -100;
    call_.kd.scale_by_t2 = true;
    (spec.loss == 0 ? static_cast<void*&>(reinterpret_cast<void*&>(call_.kd.losses)) : call_.kd.loss) =
        spec.loss == 0 ? losses_.data() : loss_.data();
    call_.kd.loss_is_double = in_double();
    if (spec.gradient && spec.student == DType::kFloat16) call_.kd.grad_scales = scales_.as<float>();
    if (spec.teacher_gradient) {
      call_.teacher_grad = view(teacher_grad_);
      if (spec.teacher == DType::kFloat16) call_.teacher_scales = teacher_scales_.as<float>();
    }
    if (spec.stats) call_.stats = stats_.data();
    call_.cap_s = spec.cap_s;
    call_.cap_t = spec.cap_t;
    call_.standardize = spec.standardize;
    if (spec.divergence == Divergence::kJsd) call_.args[0] = 0.3;
    if (spec.divergence == Divergence::kDecoupled) call_.args[0] = 1.5, call_.args[1] = 4;
  }

  template <class A>
  void run(int threads, int64_t blocks) {
    const Grid grid{std::min(s_.rows, blocks), threads, 1, int64_t(sizeof(DistillShared<A>))};
    switch (s_.divergence) {
      case Divergence::kForwardKL:
        return launch(distill_kernel<A, Divergence::kForwardKL>, grid, {}, call_);
      case Divergence::kReverseKL:
        return launch(distill_kernel<A, Divergence::kReverseKL>, grid, {}, call_);
      case Divergence::kJsd:
        return launch(distill_kernel<A, Divergence::kJsd>, grid, {}, call_);
      case Divergence::kTvd:
        return launch(distill_kernel<A, Divergence::kTvd>, grid, {}, call_);
      case Divergence::kDecoupled:
        return launch(distill_kernel<A, Divergence::kDecoupled>, grid, {}, call_);
    }
  }
  bool in_double() const { return s_.student == DType::kFloat64 || s_.teacher == DType::kFloat64; }

  void check() {
    for (int64_t i = 0; i < s_.rows; ++i) check_row(i);
    for (const Buffer* b :
         {&student_, &teacher_, &grad_, &teacher_grad_, &losses_, &loss_, &stats_, &scales_, &teacher_scales_}) {
      expect(b->intact(), text_of(s_) + ": memory beside a buffer");
    }
  }

 private:
  int64_t elements() const { return (s_.rows - 1) * pitch_ + (s_.columns + s_.padding - 1) * s_.stride + 1; }
  int64_t at(int64_t i, int64_t v) const { return i * pitch_ + v * s_.stride; }
  double weight(int64_t i) const { return !s_.row_weight ? 1 : i % 5 == 3 ? 0 : 0.5 + double(i % 3); }
  int64_t label(int64_t i) const {
    return i % 4 == 2 ? -100 : s_.special && i == 4 ? s_.columns : i == 1 ? s_.columns - 1 : i * 7 % s_.columns;
  }
  bool labelled(int64_t i) const { return s_.label_weight >= 0 && i % 4 != 2; }
  bool counted(int64_t i) const { return weight(i) != 0 && (s_.label_weight < 0 || labelled(i)); }

  void fill(Buffer& b, std::vector<Row>& logits, Random& random) {
    const bool of_teacher = &b == &teacher_;
    for (int64_t i = 0; i < s_.rows; ++i) {
      Row& row = logits.emplace_back(s_.columns);
      for (int64_t v = 0; v < s_.columns; ++v) {
        double x = s_.scale * random.normal();
        if (s_.special && i == 0 && v % 4 == 1) x = -INFINITY;                 // on both sides
        if (s_.special && i == 1 && of_teacher && v % 3 == 0) x = -INFINITY;   // the teacher's
        if (s_.special && i == 3 && !of_teacher && v % 3 == 2) x = -INFINITY;  // the student's
        if (s_.special && i == 5 && v == s_.columns / 2) x = of_teacher ? NAN : x;
        if (s_.special && i == 7 && v == s_.columns / 2) x = of_teacher ? x : INFINITY;
        if (s_.special && i == 8 && !of_teacher) x = -INFINITY;
        if (s_.special && i == 9) x = v == 1 ? 300 : x;                       // saturated
        if (s_.special && i == 11 && of_teacher) x = v == 3 ? 1 : -INFINITY;  // one logit
        if (!counted(i)) x = NAN;
        b.set(at(i, v), x);
        row[v] = b.get(at(i, v));
      }
    }
  }

  View view(Buffer& b) const {
    View v = {};
    v.data = b.data();
    v.rows.dims = 1;
    v.rows.size[0] = s_.rows;
    v.rows.stride[0] = pitch_ * size_of(b.dtype());
    v.column_stride = s_.stride;
    v.dtype = b.dtype();
    return v;
  }

  void check_gradient(int64_t i, Buffer& b, const Row& exact, double size, const float* scales,
                      const std::string& what) {
    const double scale = scales ? scales[i] : 1;
    expect(scale > 0 && std::exp2(std::nearbyint(std::log2(scale))) == scale, what + ": a power of two");
    for (int64_t v = 0; v < s_.columns + s_.padding; ++v) {
      const double wanted = v < s_.columns ? exact[v] : 0;
      const double step = std::max(roundoff(b.dtype()) * std::fabs(wanted), smallest_step(b.dtype()) * scale);
      const double slack = v < s_.columns ? (in_double() ? 1e-11 : 1e-5) * size : 0;
      expect_close(b.get(at(i, v)) * scale, wanted, slack + 1.01 * step, what, v);
    }
  }

  void check_row(int64_t i) {
    const std::string text = text_of(s_) + " row " + std::to_string(i);
    const int64_t V = s_.columns;
    const Row zero(V, 0), nan(V, NAN);
    double loss = 0, size = 1e-30;
    Row grad_s = zero, grad_t = zero, stats(kStats, 0);
    double mass = 0;  // of what gradients are made of
    if (counted(i)) {
      const double share = s_.label_weight >= 0 ? s_.label_weight : 0, T = s_.temperature;
      const double kd = weight(i) * (1 - share) / 4 * T * T, ce = labelled(i) ? weight(i) * share / 5 : 0;
      const bool reads_teacher = kd != 0 || s_.stats;
      const int64_t y = label(i);
      if (broken(logits_s_[i]) || (reads_teacher && broken(logits_t_[i])) || (labelled(i) && (y < 0 || y >= V))) {
        loss = NAN;
        grad_s = grad_t = nan;
        stats.assign(kStats, NAN);
      } else {
        const Way s(logits_s_[i], s_.cap_s, s_.standardize);
        Row of_s = zero;
        if (reads_teacher) {
          const Way t(logits_t_[i], s_.cap_t, s_.standardize);
          const Result d = divergence_of(s_, s.x, t.x, labelled(i) ? y : 0, call_.args);
          if (kd != 0) loss += kd * d.value;
          size += std::fabs(kd) * (1 + std::fabs(d.value));
          const double at_most = s_.divergence == Divergence::kDecoupled ? 5.5 : 1;
          const auto thinnest = s_.standardize ? std::min(s.deviation, t.deviation) : 1;
          mass += std::fabs(kd) / T * at_most * std::max(1.0, s_.scale) * (thinnest > 0 ? 1 / thinnest : 1);
          of_s = s.back_to_z(d.of_s);
          for (double& g : of_s) g *= kd;
          grad_t = t.back_to_raw(t.back_to_z(d.of_t));
          for (double& g : grad_t) g *= kd;
          Row x = s.x, q = t.x;
          for (int64_t v = 0; v < V; ++v) x[v] /= T, q[v] /= T;
          x = log_softmax(x), q = log_softmax(q);
          const auto first = [](const Row& z) { return std::max_element(z.begin(), z.end()) - z.begin(); };
          stats = {kl(q, x), 0, entropy(x), entropy(q), double(first(s.z) == first(t.z))};
        }
        if (labelled(i)) {
          const Row p = log_softmax(s.z);
          stats[1] = -p[y];
          double term = 0;
          for (int64_t v = 0; v < V; ++v) {
            const double target = s_.smoothing / double(V) + (v == y ? 1 - s_.smoothing : 0);
            if (target != 0) term -= target * p[v];
            of_s[v] += ce * (std::exp(p[v]) - target);
          }
          if (ce != 0) loss += ce * term, size += ce * (1 + std::fabs(term)), mass += ce;
        }
        grad_s = s.back_to_raw(of_s);
      }
    }
    const double relative = in_double() ? 1e-11 : 4e-6;
    expect_close(s_.loss == 0 ? losses_.get(i) : loss_.get(i), loss, relative * size, text + " loss");
    if (s_.stats) {
      for (int k = 0; k < kStats; ++k) {
        const double allowed = relative * (1 + std::fabs(stats[k]));
        expect_close(stats_.get(i * kStats + k), stats[k], allowed, text + " statistic " + std::to_string(k));
      }
    }
    if (s_.gradient) {
      check_gradient(i, s_.in_place ? student_ : grad_, grad_s, mass, call_.kd.grad_scales, text + " student");
    }
    if (s_.teacher_gradient) check_gradient(i, teacher_grad_, grad_t, mass, call_.teacher_scales, text + " teacher");
  }

  Spec s_;
  int64_t pitch_;
  Buffer student_, teacher_, grad_, teacher_grad_, losses_, loss_, stats_, scales_, teacher_scales_, weights_,
      labels_;
  std::vector<Row> logits_s_, logits_t_;
  DistillCall call_ = {};
};

void solve(const Spec& spec, int threads, int64_t blocks) {
  Problem problem(spec);
  problem.in_double() ? problem.run<double>(threads, blocks) : problem.run<float>(threads, blocks);
  problem.check();
}

std::vector<Spec> variants(Divergence divergence, DType student, DType teacher, int64_t columns) {
  Spec plain;
  plain.divergence = divergence;
  plain.student = student;
  plain.teacher = teacher;
  plain.columns = columns;
  if (divergence == Divergence::kDecoupled) plain.label_weight = 0;
  std::vector<Spec> list(8, plain);
  list[1].label_weight = 0.4;
  list[1].smoothing = 0.1;
  list[1].rows = 5;
  list[1].gap = 2;
  list[1].stats = true;
  list[2].standardize = true;
  list[2].stride = 2;
  list[2].label_weight = 0.3;
  list[3].cap_s = 4;
  list[3].cap_t = 6;
  list[3].padding = 3;
  list[3].in_place = true;
  list[4].special = true;
  list[4].rows = 12;
  list[4].label_weight = 0.5;
  list[4].stats = true;
  list[4].loss = 1;
  list[5].gradient = false;
  list[5].row_weight = true;
  list[5].rows = 5;
  list[5].temperature = 1;
  list[6].gradient = list[6].teacher_gradient = false;
  list[6].standardize = true;
  list[6].cap_t = 5;
  list[6].stats = true;
  list[7].label_weight = 1;  // the teacher is not read
  list[7].standardize = true;
  list[7].teacher_gradient = divergence != Divergence::kTvd;
  return list;
}

void all(const char*) {
  constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  for (int d = 0; d < 5; ++d) {
    const auto divergence = Divergence(d);
    for (int64_t columns : {5, 130, 600}) {
      for (const Spec& spec : variants(divergence, DType::kFloat32, DType::kFloat32, columns)) {
        solve(spec, columns < 100 ? 32 : 96, columns == 130 ? 2 : spec.rows);
      }
    }
    for (DType student : kTypes) {
      for (DType teacher : kTypes) {
        if (student == DType::kFloat32 && student == teacher) continue;
        for (const Spec& spec : variants(divergence, student, teacher, 70)) solve(spec, 64, 2);
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) { return main_of(count, arguments, {"sm_80"}, all); }
