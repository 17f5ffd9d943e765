// Two sweeps (kd_sweep.cuh) over logits of any types and strides, one at a time: student and teacher of different
// types, and float64, which is computed in double throughout.
#pragma once

#include "cuda/kd_sweep.cuh"

namespace ft::distill {

// To nearest odd: what is rounded again, to 16 bits, is then as if it had been rounded once.
FT_DEVICE float to_odd(double x) {
  const float f = float(x);
  uint32_t bits = __builtin_bit_cast(uint32_t, f);
  if (double(f) == x || x != x || (bits & 0x7f800000u) == 0x7f800000u) return f;
  if (fabs(double(f)) > fabs(x)) --bits;
  return __builtin_bit_cast(float, bits | 1u);
}
FT_DEVICE float to_odd(float x) { return x; }

template <class A>
FT_DEVICE A element(DType dtype, const void* row, int64_t index) {
  switch (dtype) {
    case DType::kFloat64:
      return A(load(static_cast<const double*>(row) + index));
    case DType::kBFloat16:
      return A(widen(load(static_cast<const BFloat16*>(row) + index)));
    case DType::kFloat16:
      return A(widen(load(static_cast<const Half*>(row) + index)));
    case DType::kFloat32:
      break;
  }
  return A(load(static_cast<const float*>(row) + index));
}

template <class S, class F>
FT_DEVICE void store_as(void* row, int64_t index, F value) {
  S rounded;
  narrow(value, rounded);
  store(static_cast<S*>(row) + index, rounded);
}

template <class A>
FT_DEVICE void put_element(DType dtype, void* row, int64_t index, A value) {
  switch (dtype) {
    case DType::kFloat64:
      return store_as<double>(row, index, value);
    case DType::kBFloat16:
      return store_as<BFloat16>(row, index, to_odd(value));
    case DType::kFloat16:
      return store_as<Half>(row, index, to_odd(value));
    case DType::kFloat32:
      break;
  }
  store_as<float>(row, index, value);
}

// The logits of kAnyAtOnce columns from `first` on, a block's width apart.
template <class A>
struct AnyColumns {
  int64_t first, columns;
  FT_DEVICE int64_t at(int k) const { return first + int64_t(k) * threads(); }
  FT_DEVICE bool has(int k) const { return at(k) < columns; }
  FT_DEVICE void fetch(const View& view, const void* row, A (&x)[kAnyAtOnce]) const {
#pragma unroll
    for (int k = 0; k < kAnyAtOnce; ++k) {
      x[k] = has(k) ? element<A>(view.dtype, row, at(k) * view.column_stride) : neg_inf<A>();
    }
  }
};

template <class A>
FT_DEVICE A highest_of(const A (&x)[kAnyAtOnce]) {
  A top = x[0];
#pragma unroll
  for (int k = 1; k < kAnyAtOnce; ++k) top = higher(top, x[k]);
  return top;
}

template <class A>
FT_DEVICE Online<A> sweep_any(const KdCall& call, const void* s, const void* t, const RowMath<A>& m) {
  Online<A> online;
  for (int64_t first = thread(); first < call.columns; first += kAnyAtOnce * threads()) {
    const AnyColumns<A> columns = {first, call.columns};
    A a[kAnyAtOnce], b[kAnyAtOnce], es[kAnyAtOnce], et[kAnyAtOnce];
    columns.fetch(call.student, s, a);
    if (t) columns.fetch(call.teacher, t, b);
    online.raise(m, highest_of(a), t ? highest_of(b) : neg_inf<A>());
    online.sum.add(sum_carefully(m, online.ref(), a, b, [&](int k) { return columns.has(k); }, es, et));
#pragma unroll
    for (int k = 0; k < kAnyAtOnce; ++k) online.count += columns.has(k);
  }
  return online;
}

// Backwards, as in kd_sweep.cuh; every column by the thread that it had in the first sweep.
template <class A>
FT_DEVICE void write_any(const KdCall& call, const void* s, const void* t, void* grad, const RowMath<A>& m,
                         const Refs<A>& ref, const Factors& factors, int64_t label) {
  const GradFactors<A> f(factors);
  const int64_t steps = (call.columns + threads() - 1) / threads();
  for (int64_t step = steps - 1; step >= 0; --step) {
    const int64_t v = step * threads() + thread();
    if (v >= call.columns) continue;
    const A ds = element<A>(call.student.dtype, s, v * call.student.column_stride) - ref.s;
    const A es[1] = {exp_of(ds, m.c)}, e1[1] = {m.hot ? exp_1_of(m, ds, es[0]) : A(0)};
    A et[1] = {0}, g[1];
    if (t) et[0] = exp_of(element<A>(call.teacher.dtype, t, v * call.teacher.column_stride) - ref.t, m.c);
    gradient(m, f, factors, hit_of(label, v, 1), es, et, e1, g);
    put_element(call.grad.dtype, grad, v * call.grad.column_stride, g[0]);
  }
}

template <class A>
FT_DEVICE void fill_any(const KdCall& call, void* grad, int64_t begin, int64_t end, A value) {
  for (int64_t v = begin + thread(); v < end; v += threads()) {
    put_element(call.grad.dtype, grad, v * call.grad.column_stride, value);
  }
}

template <class A>
FT_KERNEL void FT_BOUNDS(kAnyThreads, 1) kd_any_kernel(FT_PARAMS(KdCall) call) {
  BlockShared<A>& block = block_shared<A>();
  for (int64_t i = device::block(); i < call.rows; i += blocks()) {
    const void* const s = call.student.row<char>(i);
    void* const grad = call.grad.data ? call.grad.row<char>(i) : nullptr;
    if (thread() == 0) {
      block.row = read_row(call, i);
      block.label_logit = label_logit(call, block.row, [&](int64_t v) {
        return element<double>(call.student.dtype, s, v * call.student.column_stride);
      });
    }
    barrier();
    if (block.row.counted()) {
      const RowMath<A> m = row_math<A>(call, block.row);
      const void* const t = m.teacher ? call.teacher.row<char>(i) : nullptr;
      const Online<A> online = sweep_any(call, s, t, m);
      const Refs<A> top = row_tops(block, online.top, 0, 1);
      finish_row(call, i, block, online.totals(m, top, inv_t_of(block.row)), m, top, 0, 1);
      if (grad) {
        if (block.factors.valid) {
          const Refs<A> ref = {reference(top.s), reference(top.t)};
          write_any(call, s, t, grad, m, ref, block.factors, label_column(block.row));
        } else {
          fill_any(call, grad, 0, call.columns, A(__builtin_nan("")));
        }
        fill_any(call, grad, call.columns, call.grad_columns, A(0));
      }
    } else {
      if (thread() == 0) store_nothing(call, i);
      if (grad) fill_any(call, grad, 0, call.grad_columns, A(0));
    }
    barrier();
  }
}

}  // namespace ft::distill
