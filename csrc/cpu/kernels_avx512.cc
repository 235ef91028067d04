#define FASTGEN_KERNELS_ISA avx512
#include "cpu/vec_avx512.h"

#include "cpu/kernels_inl.h"
