#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined pass-through operand in its own AVX-512 header for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "cpu/vec_avx512.h"

#define FASTGEN_KERNELS_ISA avx512
#include "cpu/kernels_inl.h"
