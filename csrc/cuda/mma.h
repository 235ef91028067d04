// Tensor core products of 16-bit types, as thin wrappers over PTX. Fragments are those of
// mma.m16n8k16; sm_75 computes the same product of float16 as two m16n8k8.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/arch.h"

namespace fastgen {
namespace cuda {

// The type bfloat16, for toolkits that have none: the upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

// Whether the architecture being compiled for has the products.
template <typename T>
struct HasMma;
template <>
struct HasMma<__half> {
  static constexpr bool value = FASTGEN_ARCH_HAS_MMA_K8 || FASTGEN_ARCH_HAS_MMA_K16;
};
template <>
struct HasMma<BFloat16> {
  static constexpr bool value = FASTGEN_ARCH_HAS_MMA_K16;
};

__device__ inline uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory, or zeros; done for all threads after WaitCopies and a barrier.
__device__ inline void Copy16(void* shared, const void* global, bool valid) {
#if FASTGEN_ARCH_HAS_CP_ASYNC
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#else
  uint4 value = make_uint4(0, 0, 0, 0);
  if (valid) value = *static_cast<const uint4*>(global);
  *static_cast<uint4*>(shared) = value;
#endif
}

__device__ inline void CommitCopies() {
#if FASTGEN_ARCH_HAS_CP_ASYNC
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until no more than kPending of this thread's groups of copies are under way.
template <int kPending>
__device__ inline void WaitCopies() {
#if FASTGEN_ARCH_HAS_CP_ASYNC
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Four 8 x 8 matrices; lane l holds the address of row l % 8 of matrix l / 8.
__device__ inline void LoadMatrices(uint32_t (&r)[4], const void* row) {
#if FASTGEN_ARCH_HAS_MMA_K8
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row)));
#endif
}

__device__ inline void LoadMatricesTransposed(uint32_t (&r)[4], const void* row) {
#if FASTGEN_ARCH_HAS_MMA_K8
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row)));
#endif
}

// c += a b, with a 16 x 16 of rows, b 16 x 8 of columns.
template <typename T>
__device__ void Mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void Mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
#if FASTGEN_ARCH_HAS_MMA_K16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif FASTGEN_ARCH_HAS_MMA_K8
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

template <>
__device__ inline void Mma<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                     uint32_t b1) {
#if FASTGEN_ARCH_HAS_MMA_K16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// c += a b of signed bytes, a 16 x 32 by rows, b 32 x 8 by columns.
__device__ inline void MmaBytes(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if FASTGEN_ARCH_HAS_MMA_K16
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Two numbers in a register, `low` in its lower half.
template <typename T>
__device__ uint32_t PackPair(float low, float high);

template <>
__device__ inline uint32_t PackPair<__half>(float low, float high) {
  return static_cast<uint32_t>(__half_as_ushort(__float2half_rn(high))) << 16 |
         __half_as_ushort(__float2half_rn(low));
}

template <>
__device__ inline uint32_t PackPair<BFloat16>(float low, float high) {
#if FASTGEN_ARCH_HAS_MMA_K16
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return 0;  // only HasMma<BFloat16> code packs
#endif
}

constexpr float kLog2e = 1.4426950408889634f;

// 2^x, without the care for denormal results that exp2f takes.
__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of normal numbers, to 2^-22 and to a unit in the last place: a power of two comes in and out without care for
// denormal ones.
__device__ inline float Log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float Reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace cuda
}  // namespace fastgen
