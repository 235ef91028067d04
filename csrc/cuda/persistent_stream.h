// The warps of the persistent kernel that stream weights: into shared memory, and into the L2 cache ahead
// of that.
#pragma once

#include "cuda/persistent_thread.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

// Bytes from row to row in a stage: whole rows lie as they do in the matrix.
template <typename W>
__device__ __forceinline__ int PitchOf(const Product& product) {
  return product.chunks == 1 ? static_cast<int>(product.row_bytes) : Stage<W>::kWeightBytes;
}
template <typename W>
__device__ __forceinline__ int ScalePitchOf(const Product& product) {
  return product.chunks == 1 ? static_cast<int>(product.scale_bytes) : Stage<W>::kScaleBytes;
}

// What the first copying warp tells the prefetching one, beyond a step's layers.
enum Beyond : int { kNothing = 1, kHeadBegins = 2 };

// One of the warps that copy weights, in the order in which workers take them. All go through all
// stages; each copies its own. They fill the ring before they know whether there is anything to do.
template <typename W, int kRows>
class Streamer {
 public:
  __device__ __forceinline__ Streamer(const Plan& plan, Shared<kRows>& shared, char* ring, int warp)
      : plan_(plan),
        shared_(shared),
        ring_(ring),
        warp_(warp),
        lane_(threadIdx.x % 32),
        policy_(ReadOncePolicy()) {}

  __device__ __forceinline__ void Run() {
    int phase = kQkv, layer = 0;
#pragma unroll 1
    for (;;) {
      const bool head = phase == kHead;
      if (!Stream(plan_.products[phase], head ? 0 : layer * plan_.layer_bytes,
                  head || plan_.hurry != 0)) {
        TellPrefetcher(plan_.layers + kNothing);
        return;
      }
      if (head) break;
      if (phase == kQkv) TellPrefetcher(layer + 1);
      phase = phase == kQkv ? kOut : phase + 1;
      if (phase == kHead && ++layer < plan_.layers) phase = kQkv;
      if (phase == kHead && started_) TellPrefetcher(plan_.layers + kHeadBegins);
    }
    TellPrefetcher(plan_.layers + (started_ || Start() ? kHeadBegins : kNothing));
  }

 private:
  __device__ __forceinline__ void TellPrefetcher(int copied) {
    if (warp_ == 0 && lane_ == 0) atomicExch(&shared_.copied, copied);
  }

  // False where there is nothing to do.
  __device__ __forceinline__ bool Start() {
    started_ = true;
    WaitAt<Threads<kRows>::kCount>(kStarted);
    if (ActiveRows(shared_) != 0) return true;
    if (parity_ != 0) {  // every barrier has had a batch, and nothing of the next one was asked for
      for (int i = 0; i < kMaxStages; ++i) BarrierWait(shared_.full + i, 0);
      return false;
    }
    // The block may not end before what it has asked for is there. A batch that is not whole yet lacks
    // the arrival that ends it.
    if (left_ > 0 && lane_ == 0) BarrierArrive(shared_.full + batch_);
    for (int i = 0; i < batch_ + (left_ > 0 ? 1 : 0); ++i) BarrierWait(shared_.full + i, 0);
    return false;
  }

  // With `split` the warps take turns, else the first one does it alone.
  __device__ __forceinline__ bool Stream(const Product& product, int64_t behind, bool split) {
    const int tiles = TilesOf(product);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int first = OutputOf(product, tile);
      const int outputs = min(kTile, product.out - first);
      const char* const weights = product.weights + behind + first * product.row_bytes;
      const char* const scales = product.scales + behind + first * product.scale_bytes;
      // Batches do not go beyond the end of a group of tiles.
      const int group_left = (min(kRound, tiles - tile / kRound * kRound) - tile % kRound);
#pragma unroll 1
      for (int chunk = 0; chunk < product.chunks; ++chunk) {
        if (left_ == 0) left_ = min(product.round, group_left * product.chunks - chunk);
        if (taken_ == plan_.stages && !started_ && !Start()) return false;
        uint64_t* const full = shared_.full + batch_;
        if (taken_ == plan_.stages) {
          // The batch that had the stage before.
          const int before = shared_.batch_of[warp_][stage_];
          BarrierWait(shared_.empty + before, before < batch_ ? parity_ : parity_ ^ 1u);
          __syncwarp();  // all lanes have read it
        }
        if (lane_ == 0) shared_.batch_of[warp_][stage_] = static_cast<uint8_t>(batch_);
        __syncwarp();
        if ((split && plan_.copiers == 2 ? stage_ % 2 : 0) == warp_) {
          Copy(product, outputs, chunk, weights, scales, full);
        }
        __syncwarp();  // what the barrier is to expect comes before the last arrival
        taken_ = min(taken_ + 1, plan_.stages);
        if (--left_ == 0 && lane_ == 0) BarrierArrive(full);
        if (++stage_ == plan_.stages) stage_ = 0;
        if (left_ == 0 && ++batch_ == kMaxStages) {
          batch_ = 0;
          parity_ ^= 1u;
        }
      }
    }
    return true;
  }

  // Rows that are whole are copied in two halves, others one by one; scales alike.
  __device__ __forceinline__ void Copy(const Product& product, int outputs, int chunk,
                                       const char* weights, const char* scales, uint64_t* full) {
    char* const stage = ring_ + stage_ * Stage<W>::kBytes;
    if (product.chunks == 1) {
      const auto row_bytes = static_cast<uint32_t>(product.row_bytes);
      const auto scale_bytes = static_cast<uint32_t>(product.scale_bytes);
      const uint32_t first = min(outputs, kTile / 2), second = outputs - first;
      if (!ElectLane()) return;
      BarrierExpect(full, outputs * (row_bytes + (W::kScales > 0 ? scale_bytes : 0u)));
      BulkCopy(stage, weights, first * row_bytes, full, policy_);
      if (W::kScales > 0) {
        BulkCopy(stage + Stage<W>::kScalesAt, scales, outputs * scale_bytes, full, policy_);
      }
      if (second > 0) {
        BulkCopy(stage + RowAt(kTile / 2, product.row_bytes), weights + first * row_bytes,
                 second * row_bytes, full, policy_);
      }
      return;
    }
    const int columns = min(kChunk, product.in - chunk * kChunk);
    const uint32_t row_bytes = columns * W::kBits / 8u;
    // Up to a multiple of 16: rows of scales are that long.
    const uint32_t scale_bytes = W::kScales == 0 ? 0u : (columns / kGroup * 2u + 15u) / 16u * 16u;
    const char* from = weights + chunk * Stage<W>::kWeightBytes;
    const char* scales_from = scales + chunk * Stage<W>::kScaleBytes;
    if (!ElectLane()) return;
    BarrierExpect(full, outputs * (row_bytes + scale_bytes));
#pragma unroll
    for (int row = 0; row < kTile; ++row) {
      if (row >= outputs) break;
      BulkCopy(stage + RowAt(row, Stage<W>::kWeightBytes), from, row_bytes, full, policy_);
      from += product.row_bytes;
      if (W::kScales == 0) continue;
      BulkCopy(stage + Stage<W>::kScalesAt + row * Stage<W>::kScaleBytes, scales_from, scale_bytes,
               full, policy_);
      scales_from += product.scale_bytes;
    }
  }

  const Plan& plan_;
  Shared<kRows>& shared_;
  char* const ring_;
  const int warp_, lane_;
  const uint64_t policy_;
  bool started_ = false;
  int taken_ = 0;  // stages that have been used, up to all of them
  int stage_ = 0, batch_ = 0, left_ = 0;
  uint32_t parity_ = 0;  // of the batch
};

// The warp that brings what a layer reads into the L2 cache while the layer before is worked on: biases and
// the like, and weights without scales, of which the ring holds a layer.
template <int kRows>
class Prefetcher {
 public:
  __device__ __forceinline__ Prefetcher(const Plan& plan, Shared<kRows>& shared)
      : plan_(plan), shared_(shared), lane_(threadIdx.x % 32) {}

  // Until the head begins, and what has been read of the step is there; false where there is nothing to do.
  __device__ __forceinline__ bool Run() {
    const bool begins = RunLayers();
    WaitAt<Threads<kRows>::kTold>(kTold);
    return begins;
  }

 private:
  __device__ __forceinline__ bool RunLayers() {
#pragma unroll 1
    for (int layer = 0; layer < plan_.layers; ++layer) {
      if (layer > 0 && WaitFor(layer) == plan_.layers + kNothing) return false;
      const int64_t behind = layer * plan_.layer_bytes;
#pragma unroll 1
      for (int phase = kQkv; phase < kHead; ++phase) {
        if (phase != kAttention) PrefetchVectors(plan_.products[phase], behind);
      }
      // The first layer's go to the ring at once.
#pragma unroll 1
      for (int phase = kQkv; phase < kHead && layer > 0 && plan_.hurry == 0; ++phase) {
        const Product& product = plan_.products[phase];
        if (phase != kAttention) Prefetch(product, TilesOf(product), behind);
      }
    }
    if (WaitFor(plan_.layers) == plan_.layers + kNothing) return false;
    const Product& head = plan_.products[kHead];
    PrefetchVectors(head, 0);
    // Of the head, what the ring takes during the last layer, and what the cache holds beside that.
    if (plan_.hurry == 0) Prefetch(head, min(TilesOf(head), 2 * plan_.stages), 0);
    return WaitFor(plan_.layers + kNothing) >= plan_.layers + kHeadBegins;
  }

  // Until so many have been copied; what has been told then.
  __device__ __forceinline__ int WaitFor(int copied) const {
    int told = 0;
    for (;;) {
      if (lane_ == 0) told = atomicOr(&shared_.copied, 0);
      told = __shfl_sync(0xffffffffu, told, 0);
      if (told >= copied) return told;
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
    constexpr uint32_t kCycles = 400;  // at least from one to the next: the pace of memory, no more
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
