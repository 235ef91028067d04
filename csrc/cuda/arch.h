// What the toolkit and the architecture being compiled for have beyond the floor, CUDA 10.2 on
// sm_70. FASTGEN_CUDA_FLOOR switches off what CUDA 10.2 lacks, to test the code it would compile.
#pragma once

#include <cuda_runtime_api.h>

#if CUDART_VERSION >= 11000 && !defined(FASTGEN_CUDA_FLOOR)
#define FASTGEN_CUDA_HAS_11 1
#else
#define FASTGEN_CUDA_HAS_11 0
#endif

// cuda_bf16.h and its conversions.
#define FASTGEN_CUDA_HAS_BF16_TYPE FASTGEN_CUDA_HAS_11

// Device code only: __CUDA_ARCH__ is not defined on the host.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && FASTGEN_CUDA_HAS_11
#define FASTGEN_ARCH_HAS_CP_ASYNC 1
#define FASTGEN_ARCH_HAS_MMA_K16 1  // m16n8k16 of float16 and of bfloat16
#else
#define FASTGEN_ARCH_HAS_CP_ASYNC 0
#define FASTGEN_ARCH_HAS_MMA_K16 0
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
#define FASTGEN_ARCH_HAS_MMA_K8 1  // m16n8k8 of float16, ldmatrix
#else
#define FASTGEN_ARCH_HAS_MMA_K8 0
#endif

// Graphs whose kernels may start before the one before has ended.
#if CUDART_VERSION >= 12030 && !defined(FASTGEN_CUDA_FLOOR)
#define FASTGEN_CUDA_HAS_GRAPH_EDGES 1
#else
#define FASTGEN_CUDA_HAS_GRAPH_EDGES 0
#endif

// Clusters of blocks and programmatic dependent launch: the launch attributes, and the instructions.
#if CUDART_VERSION >= 11080 && !defined(FASTGEN_CUDA_FLOOR)
#define FASTGEN_CUDA_HAS_CLUSTERS 1
#else
#define FASTGEN_CUDA_HAS_CLUSTERS 0
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && FASTGEN_CUDA_HAS_CLUSTERS
#define FASTGEN_ARCH_HAS_CLUSTERS 1
#else
#define FASTGEN_ARCH_HAS_CLUSTERS 0
#endif
