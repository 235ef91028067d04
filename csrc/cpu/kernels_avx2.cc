#include "cpu/vec_avx2.h"

#define FASTGEN_KERNELS_ISA avx2
#include "cpu/kernels_inl.h"
