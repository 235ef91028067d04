// A thread of the persistent kernel: which outputs its block has, and how workers pass sums to finishers.
#pragma once

#include "cuda/persistent_exchange.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

// Numbers of the block's barriers.
enum Barrier : int32_t { kAll, kReaders, kTold, kFirstBuffer, kSecondBuffer, kChoosers };

template <typename T>
__device__ __forceinline__ const T* Behind(const T* first, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(first) + bytes);
}

// The block as the product deals its tiles, and how many it has.
__device__ __forceinline__ int RankOf(const Product& product) {
  const int rank = static_cast<int>(blockIdx.x) - product.first;
  return rank < 0 ? rank + static_cast<int>(gridDim.x) : rank;
}
__device__ __forceinline__ int TilesOf(const Product& product) {
  return product.tiles_each + (RankOf(product) < product.tiles_left ? 1 : 0);
}
// The first output of the block's tile `tile`. Tiles of a block are neighbours: a block writes whole
// lines of the exchange where it can.
__device__ __forceinline__ int OutputOf(const Product& product, int tile) {
  const int rank = RankOf(product);
  return (rank * product.tiles_each + min(rank, product.tiles_left) + tile) * kTile;
}

enum class Role : int32_t { kWorker, kFinisher, kPrefetcher };

// A worker counts from 0, and so does a finisher.
template <int kRows>
struct Thread {
  const Plan& plan;
  Shared<kRows>& shared;
  char* activations;  // of the warp
  const char* ring;
  int thread, warp, lane;
  uint32_t active;  // bit r: row r has a token
  uint32_t epoch;   // of the inputs of the first layer
  Role role;
  int buffer = 0;              // that comes next
  uint32_t buffer_parity = 0;  // of `finished`, once both have been used
  // Of the ring: the stage and the batch that come next.
  int stage = 0, batch = 0;
  uint32_t batch_parity = 0;
  uint32_t read = 0;  // something of each load of the last batch

  __device__ __forceinline__ bool Active(int row) const { return (active >> row & 1u) != 0; }

  // Once `value` is there.
  __device__ __forceinline__ void StampNow(int phase, int layer, Stamp stamp,
                                           float value = 0.0f) const {
#if FASTGEN_CUDA_STAMPS
    if (plan.stamps == nullptr || thread != 0) return;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * (5 * plan.layers + 1) +
                          (phase == kHead ? 5 * plan.layers : 5 * layer + phase);
    plan.stamps[index * static_cast<int64_t>(Stamp::kCount) + static_cast<int64_t>(stamp)] =
        ClockAfter(value);
#endif
  }

  // Hides from the compiler who the thread is, so that it does not keep what follows from it in
  // registers from one phase to the next.
  __device__ __forceinline__ void Forget() {
    asm volatile("" : "+r"(thread), "+r"(lane), "+r"(warp));
    // None is negative: dividing them by powers of two takes one instruction then, not three.
    __builtin_assume(static_cast<uint32_t>(thread) < kWorkers);
    __builtin_assume(static_cast<uint32_t>(lane) < 32u);
    __builtin_assume(static_cast<uint32_t>(warp) < kWarps);
  }

  // Workers: before they write to the buffer.
  __device__ __forceinline__ void WaitForBuffer() const {
    BarrierWait(shared.finished + buffer, buffer_parity ^ 1u);
  }
  // Workers: after that. Finishers: waits for the workers.
  __device__ __forceinline__ void PassBuffer() {
    constexpr int kAll = kWorkers + Threads<kRows>::kFinishers;
    if (role == Role::kWorker) {
      ArriveAt<kAll>(kFirstBuffer + buffer);
      NextBuffer();
    } else {
      WaitAt<kAll>(kFirstBuffer + buffer);
    }
  }
  // Finishers: after they have read all of it.
  __device__ __forceinline__ void ReturnBuffer() {
    BarrierArrive(shared.finished + buffer);
    NextBuffer();
  }

 private:
  __device__ __forceinline__ void NextBuffer() {
    buffer_parity ^= static_cast<uint32_t>(buffer);
    buffer ^= 1;
  }
};

template <int kRows>
__device__ __forceinline__ uint32_t ActiveRows(const Shared<kRows>& shared) {
  uint32_t active = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) active |= (shared.rows[r].position >= 0 ? 1u : 0u) << r;
  return active;
}

// The shared memory of a block: Shared, the activations of its warps, the ring.
extern __shared__ __align__(128) char block_memory[];

template <int kRows>
__device__ __forceinline__ Shared<kRows>& SharedOfBlock() {
  return *reinterpret_cast<Shared<kRows>*>(block_memory);
}

// The calling thread, when the step has been read.
template <int kRows>
__device__ __forceinline__ Thread<kRows> ThisThread(const Plan& plan, Role role) {
  Shared<kRows>& shared = SharedOfBlock<kRows>();
  char* const activations = block_memory + sizeof(Shared<kRows>);
  const int first = role == Role::kWorker     ? 0
                    : role == Role::kFinisher ? kWorkers
                                              : static_cast<int>(threadIdx.x) / 32 * 32;
  const int thread = static_cast<int>(threadIdx.x) - first;
  return {plan,
          shared,
          activations + thread / 32 * plan.lines * Activations<kRows>::kBytes,
          activations + plan.lines * Activations<kRows>::kWarpsBytes,
          thread,
          thread / 32,
          thread % 32,
          ActiveRows(shared),
          shared.epoch,
          role};
}

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
