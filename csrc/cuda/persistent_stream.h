// The warp of the persistent kernel that streams weights into shared memory.
#pragma once

#include "cuda/persistent_device.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

template <int kRows>
__device__ __forceinline__ uint32_t ActiveRows(const Shared<kRows>& shared) {
  uint32_t active = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) active |= (shared.rows[r].position >= 0 ? 1u : 0u) << r;
  return active;
}

// The warp that streams weights, in the order in which workers take them, an output of a stage by a
// lane. It fills the ring before it knows whether there is anything to do.
template <typename W, int kRows>
class Streamer {
 public:
  __device__ __forceinline__ Streamer(const Plan& plan, Shared<kRows>& shared, char* ring)
      : plan_(plan),
        shared_(shared),
        ring_(ring),
        lane_(threadIdx.x % 32),
        output_(lane_ % kTile),
        scales_(lane_ >= kTile),
        policy_(ReadOncePolicy()) {}

  __device__ __forceinline__ void Run() {
    int phase = kQkv, layer = 0;
#pragma unroll 1
    for (;;) {
      if (!Stream(plan_.products[phase], phase == kHead ? 0 : layer * plan_.layer_bytes)) return;
      if (phase == kHead) break;
      phase = phase == kQkv ? kOut : phase + 1;
      if (phase == kHead && ++layer < plan_.layers) phase = kQkv;
    }
    if (!started_) Start();
  }

 private:
  // False where there is nothing to do.
  __device__ __forceinline__ bool Start() {
    started_ = true;
    WaitAt<Threads<kRows>::kCount>(kStarted);
    if (ActiveRows(shared_) != 0) return true;
    // The block may not end before what it has asked for is there. A batch that is not whole yet lacks
    // the announcement that ends it.
    if (left_ > 0 && lane_ == 0) BarrierArrive(shared_.full + batch_);
    for (int i = 0; i < batch_ + (left_ > 0 ? 1 : 0); ++i) BarrierWait(shared_.full + i, 0);
    return false;
  }

  __device__ __forceinline__ bool Stream(const Product& product, int64_t behind) {
    const int tiles = TilesOf(product);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int first = OutputOf(product, tile);
      const int outputs = min(kTile, product.out - first);
      const char* from = scales_ ? product.scales + behind + (first + output_) * product.scale_bytes
                                 : product.weights + behind + (first + output_) * product.row_bytes;
      // Batches do not go beyond the end of a group of tiles.
      const int group_left = (min(kRound, tiles - tile / kRound * kRound) - tile % kRound);
#pragma unroll 1
      for (int chunk = 0; chunk < product.chunks; ++chunk) {
        if (left_ == 0) left_ = min(product.round, group_left * product.chunks - chunk);
        if (taken_ == plan_.stages && !started_ && !Start()) return false;
        if (taken_ < plan_.stages) {
          ++taken_;
        } else {
          // The batch that had the stage before.
          const int before = shared_.batch_of[stage_];
          BarrierWait(shared_.empty + before, before < batch_ ? parity_ : parity_ ^ 1u);
        }
        const int columns = min(kChunk, product.in - chunk * kChunk);
        const uint32_t weight_bytes = static_cast<uint32_t>(columns) * W::kBits / 8;
        // Up to a multiple of 16: rows of scales are that long.
        const uint32_t scale_bytes =
            W::kScales > 0 ? (static_cast<uint32_t>(columns) / kGroup * 2 + 15) / 16 * 16 : 0;
        uint64_t* const full = shared_.full + batch_;
        --left_;
        if (lane_ == 0) {
          shared_.batch_of[stage_] = static_cast<uint8_t>(batch_);
          const uint32_t bytes = static_cast<uint32_t>(outputs) * (weight_bytes + scale_bytes);
          if (left_ > 0) {
            BarrierExpect(full, bytes);
          } else {
            BarrierArriveExpect(full, bytes);
          }
        }
        __syncwarp();
        char* const to = ring_ + stage_ * Stage<W>::kBytes + output_ * Stage<W>::kRowBytes;
        if (output_ < outputs && lane_ < kTile) BulkCopy(to, from, weight_bytes, full, policy_);
        if (W::kScales > 0 && output_ < outputs && lane_ >= kTile && lane_ < 2 * kTile) {
          BulkCopy(to + Stage<W>::kWeightBytes, from, scale_bytes, full, policy_);
        }
        from += scales_ ? kChunk / kGroup * 2 : kChunk * W::kBits / 8;
        if (++stage_ == plan_.stages) stage_ = 0;
        if (left_ == 0 && ++batch_ == kMaxStages) {
          batch_ = 0;
          parity_ ^= 1u;
        }
      }
    }
    return true;
  }

  const Plan& plan_;
  Shared<kRows>& shared_;
  char* const ring_;
  const int lane_, output_;
  const bool scales_;  // lanes of the second eight copy them, where there are any
  const uint64_t policy_;
  bool started_ = false;
  int taken_ = 0;  // stages that have been used, up to all of them
  int stage_ = 0, batch_ = 0, left_ = 0;
  uint32_t parity_ = 0;  // of the batch
};

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
