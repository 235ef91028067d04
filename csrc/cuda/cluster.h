// A group of kParts blocks that work on one thing: a cluster, or a single block where kParts is 1.
// Data goes from block to block by stores into the other's shared memory, which count themselves at
// a barrier there (mbarrier): nobody waits for more than what is sent to it, and no fence is
// needed.
#pragma once

#include <cstdint>

#include "cuda/arch.h"
#include "cuda/mma.h"

// Stores that complete at a barrier came with PTX 8.1, CUDA 12.1.
#if CUDART_VERSION >= 12010 && FASTGEN_CUDA_HAS_CLUSTERS
#define FASTGEN_CUDA_HAS_EXCHANGE 1
#else
#define FASTGEN_CUDA_HAS_EXCHANGE 0
#endif
#if FASTGEN_ARCH_HAS_CLUSTERS && FASTGEN_CUDA_HAS_EXCHANGE
#define FASTGEN_ARCH_HAS_EXCHANGE 1
#else
#define FASTGEN_ARCH_HAS_EXCHANGE 0
#endif

namespace fastgen {
namespace cuda {

// Lies at the same place in the shared memory of every block of the group.
struct ExchangeBarriers {
  uint64_t of[2];
};

// Rounds of all-to-all messages. In a round every block sends what it likes to each block, says how
// much, and waits for what all have sent to it. A block may be one round ahead of another, not two:
// rounds take turns with two barriers, and memory that is sent to in one round must have been read
// before the block sends in the next but one. Every thread of the group goes through all rounds.
template <int kParts>
class Exchange {
 public:
  __device__ explicit Exchange(ExchangeBarriers* barriers) : barriers_(barriers), round_(0) {}

  // By all threads of the block; to be followed by WaitForStart before anything is sent.
  __device__ void Start() const {
#if FASTGEN_ARCH_HAS_EXCHANGE
    if (kParts == 1) return;
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(SharedAddress(&barriers_->of[i])),
                     "r"(kParts)
                     : "memory");
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
  }

  __device__ void WaitForStart() const {
#if FASTGEN_ARCH_HAS_EXCHANGE
    if (kParts > 1) asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
  }

  // Stores to the variable of block `part` that lies where `variable` lies in this block. T has 4,
  // 8 or 16 bytes.
  template <typename T>
  __device__ void Send(T* variable, int part, const T& value) const {
#if FASTGEN_ARCH_HAS_EXCHANGE
    if (kParts > 1) {
      const uint32_t to = AddressIn(variable, part);
      const uint32_t barrier = AddressIn(Barrier(), part);
      const uint32_t* const words = reinterpret_cast<const uint32_t*>(&value);
      static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one store");
      if (sizeof(T) == 4) {
        asm volatile(
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                to),
            "r"(words[0]), "r"(barrier)
            : "memory");
      } else if (sizeof(T) == 8) {
        asm volatile(
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, "
            "[%3];" ::"r"(to),
            "r"(words[0]), "r"(words[1 % (sizeof(T) / 4)]), "r"(barrier)
            : "memory");
      } else {
        asm volatile(
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, "
            "%4}, [%5];" ::"r"(to),
            "r"(words[0]), "r"(words[1 % (sizeof(T) / 4)]), "r"(words[2 % (sizeof(T) / 4)]),
            "r"(words[3 % (sizeof(T) / 4)]), "r"(barrier)
            : "memory");
      }
      return;
    }
#endif
    (void)part;
    *variable = value;
  }

  // Says that this block sends so many bytes to each block in this round; by all threads.
  __device__ void Announce(uint32_t bytes) const {
#if FASTGEN_ARCH_HAS_EXCHANGE
    if (kParts > 1 && threadIdx.x < kParts) {
      asm volatile(
          "mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(
              AddressIn(Barrier(), static_cast<int>(threadIdx.x))),
          "r"(bytes)
          : "memory");
    }
#endif
    (void)bytes;
  }

  // Waits for all that was sent to this block in this round. It is no barrier of the block's
  // threads where kParts is above 1.
  __device__ void Wait() {
#if FASTGEN_ARCH_HAS_EXCHANGE
    if (kParts > 1) {
      asm volatile(
          "{\n"
          ".reg .pred done;\n"
          "again_%=:\n"
          "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
          "@!done bra again_%=;\n"
          "}\n" ::"r"(SharedAddress(Barrier())),
          "r"(round_ / 2 % 2)
          : "memory");
      ++round_;
      return;
    }
#endif
    __syncthreads();
  }

 private:
#if FASTGEN_ARCH_HAS_EXCHANGE
  __device__ uint64_t* Barrier() const { return &barriers_->of[round_ % 2]; }

  template <typename T>
  __device__ static uint32_t AddressIn(T* variable, int part) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"(SharedAddress(variable)), "r"(part));
    return address;
  }
#endif

  ExchangeBarriers* const barriers_;
  uint32_t round_;
};

}  // namespace cuda
}  // namespace fastgen
