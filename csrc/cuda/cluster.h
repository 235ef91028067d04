// A group of kParts blocks that work on one thing: a cluster, or a single block where kParts is 1.
// Data goes from block to block by stores into the other's shared memory, then a barrier.
#pragma once

#include "cuda/arch.h"

namespace fastgen {
namespace cuda {

// The variable of block `part` that lies where `variable` lies in this block's shared memory.
template <int kParts, typename T>
__device__ __forceinline__ T* OfPart(T* variable, int part) {
#if FASTGEN_ARCH_HAS_CLUSTERS
  if (kParts > 1) {
    T* remote;
    asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(variable), "r"(part));
    return remote;
  }
#endif
  (void)part;
  return variable;
}

// The halves of a barrier of all threads of the group; what was stored before the first half is
// seen after the second.
template <int kParts>
__device__ __forceinline__ void ArriveAtGroup() {
#if FASTGEN_ARCH_HAS_CLUSTERS
  if (kParts > 1) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

template <int kParts>
__device__ __forceinline__ void WaitForGroup() {
#if FASTGEN_ARCH_HAS_CLUSTERS
  if (kParts > 1) {
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

template <int kParts>
__device__ __forceinline__ void SyncGroup() {
  ArriveAtGroup<kParts>();
  WaitForGroup<kParts>();
}

}  // namespace cuda
}  // namespace fastgen
