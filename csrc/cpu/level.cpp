// One SIMD level: compiled once per level with -DFT_ISA=<level> and that level's instruction set. No torch, no
// standard containers: an inline function with external linkage would be emitted as a weak symbol, of which the
// linker keeps one copy, perhaps the AVX-512 one, for every level.
#include "cpu/kd.h"
#include "cpu/kernels.h"

#define FT_STRING_(x) #x
#define FT_STRING(x) FT_STRING_(x)

namespace ft::FT_ISA {

extern const Kernels table;
const Kernels table = {
    FT_STRING(FT_ISA), kd_row<float, ForwardKL>, kd_row<double, ForwardKL>, kd_scratch_bytes, kd_scale_row,
};

}  // namespace ft::FT_ISA
