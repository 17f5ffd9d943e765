// One SIMD level: compiled once per level with -DFT_ISA=<level> and that level's instruction set. No torch, no
// standard containers: an inline function with external linkage would be emitted as a weak symbol, of which the
// linker keeps one copy, perhaps the AVX-512 one, for every level.
#include "cpu/blend.h"
#include "cpu/distill.h"
#include "cpu/kd.h"
#include "cpu/kernels.h"
#include "cpu/l2sp.h"
#include "cpu/topk_kd.h"

#define FT_STRING_(x) #x
#define FT_STRING(x) FT_STRING_(x)

namespace ft::FT_ISA {

extern const Kernels table;
const Kernels table = {
    .level = FT_STRING(FT_ISA),
    .kd_row_float = kd_row<float, ForwardKL>,
    .kd_row_double = kd_row<double, ForwardKL>,
    .kd_scratch_bytes = kd_scratch_bytes,
    .kd_scale_row = kd_scale_row,
    .topk_row_float = topk_row<float>,
    .topk_row_double = topk_row<double>,
    .topk_scratch_bytes = topk_scratch_bytes,
    .distill_row_float = distill_row<float>,
    .distill_row_double = distill_row<double>,
    .distill_scratch_bytes = distill_scratch_bytes,
    .l2sp_run_float = l2sp_run<float>,
    .l2sp_run_double = l2sp_run<double>,
    .blend_run_float = blend_run<float>,
    .blend_run_double = blend_run<double>,
    .blend_dot_run_float = blend_dot_run<float>,
    .blend_dot_run_double = blend_dot_run<double>,
};

}  // namespace ft::FT_ISA
