// How a function of csrc/core is declared: always inlined, and callable from a CUDA kernel when nvcc compiles it.
// Always inlined matters twice: the SIMD level files must not emit a weak symbol (the linker could keep the
// AVX-512 copy for everybody), and ThreadSanitizer does not follow a struct passed by value to a real call.
#pragma once

#if defined(__CUDACC__)
#define FT_HD __host__ __device__ __forceinline__
#else
#define FT_HD inline __attribute__((always_inline))
#endif
