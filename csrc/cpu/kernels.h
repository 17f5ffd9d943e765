// What crosses between the torch-facing files (kd.cpp, l2sp.cpp, blend.cpp) and the SIMD levels (level.cpp): plain
// structs of pointers and sizes, and one table of functions per level.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace ft {

// ------------------------------------------------------------------------------------------------ kd
// What is the same for all rows of a call.
struct KdCall {
  DType student, teacher, grad;
  int64_t columns;                                      // the vocabulary that counts, V
  int64_t grad_columns;                                 // the gradient's width: columns past V are zero
  int64_t student_stride, teacher_stride, grad_stride;  // elements between columns
  double label_smoothing;
  bool stream;  // the gradient does not fit the cache: store around it
};

struct KdRow {
  const void* student;  // [grad_columns]
  const void* teacher;  // [columns or more]; null where the distillation term has no weight
  void* grad;           // [grad_columns]; null for the loss alone
  double inv_t;         // 1 / temperature
  double kd_weight;     // d loss / d divergence: row weight, T^2 and divisor
  double label_weight;  // d loss / d cross entropy; 0 for a row without a label term
  int64_t label;
};

struct KdRowLoss {
  double kd, ce;      // unweighted; 0 where the weight is 0
  double grad_scale;  // the stored gradient times this is the gradient: a power of two for fp16, else 1
};

// out = in * factor for one row of a saved gradient, in place where in == out.
struct KdScale {
  DType dtype;
  int64_t columns, in_stride, out_stride;
};

// ------------------------------------------------------------------------------------------- topk_kd
enum class TopkTail : int { kRenormalize, kZero, kBucket };

struct TopkCall {
  DType student, values, grad;
  bool wide_indices;  // int64, else int32
  TopkTail tail;
  int64_t entries;                // of the teacher per row, k
  int64_t columns, grad_columns;  // as in KdCall
  int64_t student_stride, grad_stride, value_stride, index_stride;
  double label_smoothing;
  bool stream;
};

struct TopkRow {
  const void* student;  // [grad_columns]
  const void* values;   // [entries]; null where the distillation term has no weight
  const void* indices;  // [entries]
  void* grad;           // the rest is as in KdRow
  double inv_t, kd_weight, label_weight;
  int64_t label;
};

// ------------------------------------------------------------------------------------------- distill
enum class Divergence : int { kForwardKL, kReverseKL, kJsd, kTvd, kDecoupled };

struct DistillSide {
  DType dtype;  // of the logits and of their gradient
  int64_t stride, grad_stride, grad_columns;
  double softcap;  // 0: none
  bool stream;     // as in KdCall, of this side's gradient
};

struct DistillCall {
  DistillSide side[2];  // student, teacher
  Divergence divergence;
  double args[2];  // jsd: beta; decoupled: the weights of the target and the non-target part
  bool standardize, want_stats;
  int64_t columns;
  double label_smoothing;
};

struct DistillRow {
  const void* logits[2];  // the teacher's null where nothing is wanted of it
  void* grad[2];          // null where not wanted
  double inv_t, kd_weight, label_weight;
  bool labelled;  // has a label, whatever its weight
  int64_t label;
};

struct DistillResult {
  double loss;           // weighted
  double grad_scale[2];  // as in KdRowLoss
  double stats[5];       // KL(q || p), CE, the entropies of p and q, whether the first maxima are the same
};

// ---------------------------------------------------------------------------------------------- l2sp
// A run of one parameter: n elements that lie one after the other in every operand.
struct L2spRun {
  const void* param;
  const void* start;       // null: 0
  const void* importance;  // null: 1
  void* grad;              // null: the value alone
  DType param_dtype, start_dtype, importance_dtype, grad_dtype;
  double factor;    // d grad / d (p - p0)
  bool accumulate;  // add to grad, or write it
  int64_t n;
};

// --------------------------------------------------------------------------------------------- blend
struct BlendTerm {
  const void* data;
  DType dtype;
  double coef;
};

struct BlendSum {
  const BlendTerm* terms;  // the first is the base; zeros are left out
  int count;               // at least 1
  bool around;             // the base: the coefficients sum to 1 (run), to 0 (dot)
  int64_t begin, n;        // elements [begin, begin + n) of every term, and of what the sum meets
};

struct BlendRun : BlendSum {
  void* out;
  DType out_dtype;
};

// The dot product of the sum with a run of numbers.
struct BlendDotRun : BlendSum {
  const void* with;
  DType with_dtype;
};

struct Kernels {
  const char* level;
  KdRowLoss (*kd_row_float)(const KdCall&, const KdRow&, void* scratch);
  KdRowLoss (*kd_row_double)(const KdCall&, const KdRow&, void* scratch);
  int64_t (*kd_scratch_bytes)(int64_t columns, bool is_double);  // for one thread
  void (*kd_scale_row)(const KdScale&, const void* in, void* out, double factor);
  KdRowLoss (*topk_row_float)(const TopkCall&, const TopkRow&, void* scratch);
  KdRowLoss (*topk_row_double)(const TopkCall&, const TopkRow&, void* scratch);
  int64_t (*topk_scratch_bytes)(int64_t columns, int64_t entries, bool is_double);  // for one thread
  DistillResult (*distill_row_float)(const DistillCall&, const DistillRow&, void* scratch);
  DistillResult (*distill_row_double)(const DistillCall&, const DistillRow&, void* scratch);
  int64_t (*distill_scratch_bytes)(int64_t columns, bool is_double);  // for one thread
  double (*l2sp_run_float)(const L2spRun&);
  double (*l2sp_run_double)(const L2spRun&);
  void (*blend_run_float)(const BlendRun&);
  void (*blend_run_double)(const BlendRun&);
  double (*blend_dot_run_float)(const BlendDotRun&);
  double (*blend_dot_run_double)(const BlendDotRun&);
};

// The table of the level in force: the best that this CPU runs, FASTTRANSFER_SIMD, or what set_level() chose.
const Kernels& kernels();

}  // namespace ft
