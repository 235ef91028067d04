#include "cpu/vec_generic.h"

#define FASTGEN_KERNELS_ISA generic
#include "cpu/kernels_inl.h"
