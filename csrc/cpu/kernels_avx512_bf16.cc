#define FASTGEN_KERNELS_ISA avx512_bf16
#include "cpu/vec_avx512.h"

#include "cpu/kernels_inl.h"
