#define FASTGEN_KERNELS_ISA avx2
#include "cpu/vec_avx2.h"

#include "cpu/kernels_inl.h"
