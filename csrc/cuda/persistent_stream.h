// The warps of the persistent kernel that stream weights: one or two into shared memory, one into the L2 cache
// ahead of that.
#pragma once

#include "cuda/persistent_attention.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

// What the first copying warp tells the prefetching one, beyond a step's layers.
constexpr int kHeadBegins = 1;

// A lane that copies weights into the ring, in the order in which workers take them. Where there are two they take
// turns, and each keeps count of all batches. They fill the ring before they know whether there is anything to do.
template <typename W, int kRows>
class Streamer {
 public:
  __device__ __forceinline__ Streamer(const Plan& plan, Shared<kRows>& shared, char* ring,
                                      int copier)
      : plan_(plan),
        shared_(shared),
        ring_(ring),
        copier_(copier),
        policy_(ReadOncePolicy()),
        free_(plan.stages) {}

  __device__ __forceinline__ void Run() {
    int phase = kQkv, layer = 0;
#pragma unroll 1
    for (;;) {
      const bool head = phase == kHead;
      if (!Stream(plan_.products[phase], head ? 0 : layer * plan_.layer_bytes,
                  head ? 0u : plan_.pace)) {
        return;
      }
      if (head) break;
      if (phase == kQkv) TellPrefetcher(layer + 1);
      phase = phase == kQkv ? kOut : phase + 1;
      if (phase == kHead && ++layer < plan_.layers) phase = kQkv;
      if (phase == kHead && started_) TellPrefetcher(plan_.layers + kHeadBegins);
    }
    if (started_ || Start()) TellPrefetcher(plan_.layers + kHeadBegins);
  }

 private:
  __device__ __forceinline__ void TellPrefetcher(int copied) {
    if (copier_ == 0) atomicExch(&shared_.copied, copied);
  }

  // False where there is nothing to do.
  __device__ __forceinline__ bool Start() {
    started_ = true;
    BarrierWait(&shared_.started, 0);
    if (ActiveRows(shared_) != 0) return true;
    // The block may not end before what it has asked for is there.
    const int batches = wrapped_ ? kMaxStages : batch_;
#pragma unroll 1
    for (int i = 0; i < batches; ++i) BarrierWait(shared_.full + i, 0);
    return false;
  }

  // Stages for the next batch; false where there is nothing to do.
  __device__ __forceinline__ bool Take(int count) {
#pragma unroll 1
    while (free_ < count) {
      if (!started_ && !Start()) return false;
      BarrierWait(shared_.empty + oldest_, oldest_parity_);
      free_ += shared_.stages_of[copier_][oldest_];
      if (++oldest_ == kMaxStages) {
        oldest_ = 0;
        oldest_parity_ ^= 1u;
      }
    }
    free_ -= count;
    shared_.stages_of[copier_][batch_] = static_cast<uint8_t>(count);
    return true;
  }

  __device__ __forceinline__ bool Stream(const Product& product, int64_t behind, uint32_t pace) {
    const int tiles = TilesOf(product), chunks = product.chunks, round = product.round;
    const int first = OutputOf(product, 0);
    const char* from = product.weights + behind + first * product.row_bytes;
    const char* scales = product.scales + behind + first * product.scale_bytes;
    int outputs_left = product.out - first;
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile += kRound) {
      int chunk = 0;
      // Batches do not go beyond the end of a group of tiles.
#pragma unroll 1
      for (int left = min(kRound, tiles - tile) * chunks; left > 0; left -= round) {
        const int count = min(round, left);
        if (!Take(count)) return false;
        uint64_t* const full = shared_.full + batch_;
        const bool own = turn_ == copier_;
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          if (own) {
            if (started_) Wait(pace);
            Copy(product, from, scales, min(kTile, outputs_left), chunk, full);
          }
          if (++stage_ == plan_.stages) stage_ = 0;
          if (++chunk == chunks) {
            chunk = 0;
            from += kTile * product.row_bytes;
            scales += kTile * product.scale_bytes;
            outputs_left -= kTile;
          }
        }
        if (own) BarrierArrive(full);
        if (++turn_ == plan_.copiers) turn_ = 0;
        if (++batch_ == kMaxStages) {
          batch_ = 0;
          wrapped_ = true;
        }
      }
    }
    return true;
  }

  // Rows that are whole are copied at once, others one by one; scales alike.
  __device__ __forceinline__ void Copy(const Product& product, const char* from, const char* scales,
                                       uint32_t outputs, int chunk, uint64_t* full) {
    char* const to = ring_ + stage_ * Stage<W>::kBytes;
    char* const scales_to = to + Stage<W>::kScalesAt;
    if (product.whole != 0) {
      const uint32_t bytes = outputs * static_cast<uint32_t>(product.row_bytes);
      const uint32_t scale_bytes =
          W::kScales == 0 ? 0u : outputs * static_cast<uint32_t>(product.scale_bytes);
      BarrierExpect(full, bytes + scale_bytes);
      BulkCopy(to, from, bytes, full, policy_);
      if (W::kScales > 0) BulkCopy(scales_to, scales, scale_bytes, full, policy_);
      return;
    }
    const int columns = min(kChunk, product.in - chunk * kChunk);
    const uint32_t bytes = columns * W::kBits / 8u;
    // Up to a multiple of 16: rows of scales are that long.
    const uint32_t scale_bytes = W::kScales == 0 ? 0u : (columns / kGroup * 2u + 15u) / 16u * 16u;
    from += chunk * Stage<W>::kWeightBytes;
    scales += chunk * Stage<W>::kScaleBytes;
    BarrierExpect(full, outputs * (bytes + scale_bytes));
#pragma unroll
    for (int row = 0; row < kTile; ++row) {
      if (row >= outputs) break;
      BulkCopy(to + row * Stage<W>::kWeightBytes, from, bytes, full, policy_);
      from += product.row_bytes;
      if (W::kScales == 0) continue;
      BulkCopy(scales_to + row * Stage<W>::kScaleBytes, scales, scale_bytes, full, policy_);
      scales += product.scale_bytes;
    }
  }

  // Until so many cycles after the last time.
  __device__ __forceinline__ void Wait(uint32_t cycles) {
    while (static_cast<uint32_t>(clock()) - last_ < cycles) __nanosleep(20);
    last_ = static_cast<uint32_t>(clock());
  }

  const Plan& plan_;
  Shared<kRows>& shared_;
  char* const ring_;
  const int copier_;
  const uint64_t policy_;
  bool started_ = false;
  bool wrapped_ = false;       // all barriers have had a batch
  int free_;                   // stages
  int stage_ = 0, batch_ = 0;  // that come next
  int turn_ = 0;               // whose batch that is
  int oldest_ = 0;             // batch that has not been seen to be free
  uint32_t oldest_parity_ = 0;
  uint32_t last_ = 0;
};

// The warp that brings what a layer reads into the L2 cache while the layer before is worked on: biases and
// the like, keys and values, and weights without scales, of which the ring holds a layer.
template <int kRows>
class Prefetcher {
 public:
  __device__ __forceinline__ Prefetcher(const Plan& plan, Shared<kRows>& shared)
      : plan_(plan), shared_(shared), lane_(threadIdx.x % 32) {}

  // Until the head begins; false where there is nothing to do.
  __device__ __forceinline__ bool Run() {
#pragma unroll 1
    for (int layer = 0; layer < plan_.layers; ++layer) {
      const int64_t behind = layer * plan_.layer_bytes;
      if (layer > 0) WaitFor(layer);
#pragma unroll 1
      for (int phase = kQkv; phase < kHead; ++phase) {
        if (phase != kAttention) PrefetchVectors(plan_.products[phase], behind);
      }
      // What has been read of the step.
      if (layer == 0) WaitAt<Threads<kRows>::kTold>(kTold);
      if (ActiveRows(shared_) == 0) return false;
      PrefetchUnits(ThisThread<kRows>(plan_, Role::kPrefetcher), layer);
      // The first layer's go to the ring at once.
#pragma unroll 1
      for (int phase = kQkv; phase < kHead && layer > 0 && plan_.hurry == 0; ++phase) {
        const Product& product = plan_.products[phase];
        if (phase != kAttention) Prefetch(product, TilesOf(product), behind);
      }
    }
    WaitFor(plan_.layers);
    const Product& head = plan_.products[kHead];
    PrefetchVectors(head, 0);
    // Of the head, what the ring takes during the last layer, and what the cache holds beside that.
    if (plan_.hurry == 0) Prefetch(head, min(TilesOf(head), 2 * plan_.stages), 0);
    WaitFor(plan_.layers + kHeadBegins);
    return true;
  }

 private:
  // Until so many have been copied.
  __device__ __forceinline__ void WaitFor(int copied) const {
    for (;;) {
      int told = 0;
      if (lane_ == 0) told = atomicOr(&shared_.copied, 0);
      if (__shfl_sync(0xffffffffu, told, 0) >= copied) return;
      __nanosleep(100);
    }
  }

  // What goes with the block's outputs, and the block's share of what goes with inputs.
  __device__ __forceinline__ void PrefetchVectors(const Product& product, int64_t behind) {
    const int first = OutputOf(product, 0);
    const int outputs = min(TilesOf(product) * kTile, product.out - first);
    PrefetchFloats(product.bias, behind, first, outputs);
    if (product.norm_weight == nullptr) return;
    PrefetchFloats(product.sums, behind, first, outputs);
    const Product& inputs =
        plan_.products[kOut];  // of which there are as many as this one's outputs
    const int input = OutputOf(inputs, 0);
    PrefetchFloats(product.norm_weight, behind, input,
                   min(TilesOf(inputs) * kTile, inputs.out - input));
  }

  __device__ __forceinline__ void PrefetchFloats(const float* first, int64_t behind, int begin,
                                                 int count) {
    constexpr int kLine = 32;  // floats
    if (first == nullptr || count <= 0) return;
    const float* const from = Behind(first, behind) + begin;
#pragma unroll 1
    for (int i = lane_ * kLine; i < count + kLine - 1; i += 32 * kLine) {
      PrefetchToL2(from + min(i, count - 1));
    }
  }

  __device__ __forceinline__ void Prefetch(const Product& product, int tiles, int64_t behind) {
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int first = OutputOf(product, tile);
      const int outputs = min(kTile, product.out - first);
      Prefetch(product.weights + behind + first * product.row_bytes, outputs * product.row_bytes);
    }
  }

  __device__ __forceinline__ void Prefetch(const char* from, int64_t bytes) {
    constexpr int kBytes = 8192;       // at once
    constexpr uint32_t kCycles = 250;  // at least from one to the next: the pace of memory, no more
#pragma unroll 1
    for (int64_t at = 0; at < bytes; at += kBytes) {
      while (static_cast<uint32_t>(clock()) - last_ < kCycles) __nanosleep(20);
      last_ = static_cast<uint32_t>(clock());
      if (lane_ == 0) {
        BulkPrefetch(from + at, static_cast<uint32_t>(bytes - at < kBytes ? bytes - at : kBytes));
      }
      __syncwarp();
    }
  }

  const Plan& plan_;
  Shared<kRows>& shared_;
  const int lane_;
  uint32_t last_ = 0;
};

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
