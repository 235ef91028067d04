#define FASTGEN_KERNELS_ISA generic
#include "cpu/vec_generic.h"

#include "cpu/kernels_inl.h"
