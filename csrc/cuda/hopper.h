// Instructions of sm_90 and newer as thin wrappers over PTX: copies by the bulk engine into shared
// memory that complete on a barrier there, and 16 bytes of device memory that are read and written as
// one. The persistent kernel is built of them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/arch.h"
#include "cuda/mma.h"

// Loads and stores of 128 bits that are atomic came with PTX 8.3, CUDA 12.3.
#if CUDART_VERSION >= 12030 && !defined(FASTGEN_CUDA_FLOOR)
#define FASTGEN_CUDA_HAS_PERSISTENT 1
#else
#define FASTGEN_CUDA_HAS_PERSISTENT 0
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && FASTGEN_CUDA_HAS_PERSISTENT
#define FASTGEN_ARCH_HAS_PERSISTENT 1
#else
#define FASTGEN_ARCH_HAS_PERSISTENT 0
#endif

// A kernel's parameter that is never copied to where threads could change it.
#if FASTGEN_CUDA_HAS_PERSISTENT
#define FASTGEN_GRID_CONSTANT __grid_constant__
#else
#define FASTGEN_GRID_CONSTANT
#endif

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {

// ---- barriers in shared memory (mbarrier) ---------------------------------------------------------

// A phase of the barrier ends when `count` arrivals, and the bytes announced with them, are there.
__device__ __forceinline__ void BarrierInit(uint64_t* barrier, int32_t count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(count));
}

// Makes initialised barriers known to the bulk engine; a barrier of the block has to follow.
__device__ __forceinline__ void BarrierInitDone() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void BarrierArriveExpect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(bytes)
               : "memory");
}

// Announces bytes, before the last arrival of the phase.
__device__ __forceinline__ void BarrierExpect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void BarrierArrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void BarrierArrive(uint64_t* barrier) {
  BarrierArrive(SharedAddress(barrier));
}

// The same, not before `zero`, which is none for the compiler, has been computed.
__device__ __forceinline__ void BarrierArriveAfter(uint64_t* barrier, uint32_t zero) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(SharedAddress(barrier) + zero)
               : "memory");
}

// 16 bytes of shared memory if lanes `shall` have them, else zeros. Lanes that differ take the same way.
__device__ __forceinline__ uint4 LoadSharedIf(const void* from, bool shall) {
  uint4 x = make_uint4(0, 0, 0, 0);
  asm volatile(
      "{\n"
      ".reg .pred shall;\n"
      "setp.ne.s32 shall, %5, 0;\n"
      "@shall ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
      : "r"(SharedAddress(from)), "r"(static_cast<int>(shall))
      : "memory");
  return x;
}

// Waits for the end of the phase of that parity, of the barrier at an address of shared memory.
__device__ __forceinline__ void BarrierWait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again_%=:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again_%=;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void BarrierWait(uint64_t* barrier, uint32_t parity) {
  BarrierWait(SharedAddress(barrier), parity);
}

// ---- to other blocks of the cluster ----------------------------------------------------------------

// Where what lies at an address of shared memory in this block lies in block `rank`.
__device__ __forceinline__ uint32_t AddressInBlock(uint32_t shared, int32_t rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

// Stores that complete, by their bytes, on a barrier in the same block's shared memory.
__device__ __forceinline__ void StoreAsync(uint32_t address, float2 x, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::
          "r"(address),
      "f"(x.x), "f"(x.y), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void StoreAsync(uint32_t address, float4 x, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(address),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
      : "memory");
}

// ---- the bulk engine ------------------------------------------------------------------------------

// One lane of a warp whose lanes are all here. The compiler knows it to be one: what the bulk engine is asked
// for under any other condition becomes a loop over lanes.
__device__ __forceinline__ bool ElectLane() {
  uint32_t elected = 0;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "@p mov.b32 %0, 1;\n"
      "}\n"
      : "+r"(elected));
  return elected != 0;
}

// Data that is read once and should not push other data out of the L2 cache.
__device__ __forceinline__ uint64_t ReadOncePolicy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Addresses and size are multiples of 16 bytes.
__device__ __forceinline__ void BulkCopy(void* shared, const void* global, uint32_t bytes,
                                         uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(SharedAddress(shared)),
      "l"(global), "r"(bytes), "r"(SharedAddress(barrier)), "l"(policy)
      : "memory");
}

// Brings a stretch of device memory into the L2 cache.
__device__ __forceinline__ void BulkPrefetch(const void* global, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

// Orders what the thread has read from shared memory, or written there, before what the bulk engine then
// writes. Without it a barrier is not enough: reads that the barrier's arrival follows need not have been
// served when others see it.
__device__ __forceinline__ void FenceForBulkEngine() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- 16 bytes that are one ------------------------------------------------------------------------

__device__ __forceinline__ uint4 LoadWhole(const uint4* from) {
  uint64_t low, high;
  asm volatile(
      "{\n"
      ".reg .b128 whole;\n"
      "ld.relaxed.gpu.global.b128 whole, [%2];\n"
      "mov.b128 {%0, %1}, whole;\n"
      "}\n"
      : "=l"(low), "=l"(high)
      : "l"(from)
      : "memory");
  return make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
                    static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32));
}

__device__ __forceinline__ void StoreWhole(uint4* to, uint4 v) {
  const uint64_t low = static_cast<uint64_t>(v.y) << 32 | v.x;
  const uint64_t high = static_cast<uint64_t>(v.w) << 32 | v.z;
  asm volatile(
      "{\n"
      ".reg .b128 whole;\n"
      "mov.b128 whole, {%1, %2};\n"
      "st.relaxed.gpu.global.b128 [%0], whole;\n"
      "}\n" ::"l"(to),
      "l"(low), "l"(high)
      : "memory");
}

// ---- what has to be read here and now -----------------------------------------------------------

// The compiler moves ordinary reads of constant data behind barriers, and then all wait for them.
__device__ __forceinline__ float LoadNow(const float* from) {
  float value;
  asm volatile("ld.volatile.global.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ float4 LoadNow(const float4* from) {
  float4 v;
  asm volatile("ld.volatile.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

// What is computed before a barrier the compiler computes again behind it, if it can, to have the registers: addresses,
// and who the thread is. It cannot what lanes have told each other. By whole warps.
__device__ __forceinline__ uint32_t Kept(uint32_t x) {
  return __shfl_sync(0xffffffffu, x, threadIdx.x % 32);
}
__device__ __forceinline__ int32_t Kept(int32_t x) {
  return static_cast<int32_t>(Kept(static_cast<uint32_t>(x)));
}
template <typename T>
__device__ __forceinline__ T* Kept(T* x) {
  const uint64_t bits = reinterpret_cast<uint64_t>(x);
  return reinterpret_cast<T*>(__shfl_sync(0xffffffffu, bits, threadIdx.x % 32));
}

// 16 and 8 bytes at an address of shared memory, read where the code says so.
__device__ __forceinline__ float4 LoadShared4(uint32_t from) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(from)
               : "memory");
  return x;
}
// Undefined in lanes that shall not have it, which take the same way.
__device__ __forceinline__ float4 LoadShared4If(uint32_t from, bool shall) {
  float4 x;
  asm volatile(
      "{\n"
      ".reg .pred shall;\n"
      "setp.ne.s32 shall, %5, 0;\n"
      "@shall ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "r"(from), "r"(static_cast<int>(shall))
      : "memory");
  return x;
}
__device__ __forceinline__ float2 LoadShared2(uint32_t from) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from) : "memory");
  return x;
}

__device__ __forceinline__ void StoreShared4(uint32_t to, float4 x) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w)
               : "memory");
}

// ---- the rest -------------------------------------------------------------------------------------

// Barriers of kThreads threads of the block, by number; 0 is __syncthreads'. Those that arrive do not
// wait for the others.
template <int kThreads>
__device__ __forceinline__ void ArriveAt(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}
template <int kThreads>
__device__ __forceinline__ void WaitAt(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

__device__ __forceinline__ void PrefetchToL2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// The clock once `value` is there: barriers do not hold up an instruction that needs nothing of them.
__device__ __forceinline__ int64_t ClockAfter(float value) {
  int64_t now;
  asm volatile(
      "{\n"
      ".reg .pred there;\n"
      "setp.ne.b32 there, %1, 0x7fc12345;\n"
      "mov.u64 %0, 0;\n"
      "@there mov.u64 %0, %clock64;\n"
      "}\n"
      : "=l"(now)
      : "r"(__float_as_uint(value))
      : "memory");
  return now;
}

// Two numbers in a register, `low` in its lower half; float16 as well as bfloat16.
template <typename T>
__device__ __forceinline__ uint32_t RoundPair(float low, float high);

template <>
__device__ __forceinline__ uint32_t RoundPair<__half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
__device__ __forceinline__ uint32_t RoundPair<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The same, but what is too large becomes the largest number.
template <typename T>
__device__ __forceinline__ uint32_t RoundPairFinite(float low, float high);

template <>
__device__ __forceinline__ uint32_t RoundPairFinite<__half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
__device__ __forceinline__ uint32_t RoundPairFinite<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.satfinite.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
