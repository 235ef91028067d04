// What the parts of the persistent kernel share: its plan, its shared memory, and how activations go
// from block to block.
//
// Exchange. Blocks do not wait for each other at barriers: they poll for the numbers that they need.
// Activations travel in pieces of 16 bytes, four numbers of 24 bits (16 of them significant) and the
// epoch they were computed in, and a piece is read and written as one. There is one place in device
// memory for each kind of number (the inputs of QKV, q k v, attended, ...), written once per layer.
//
// Why a piece is never overwritten before all have read it: whoever writes kind X of layer l+1 has, by
// the chain of inputs, waited for every piece of every kind between X of layer l and itself. Along that
// chain each block that reads X of layer l writes something after it has read (every product and
// every unit of attention reads all its inputs before the barrier of the block that its outputs come
// after), and the next kind's readers need all of what was written: products read whole rows, and
// the units of attention between them read all of q, k and v. So X of layer l+1 is written after all
// who read X of layer l have done so. A block without outputs in a phase reads nothing in it. Between
// steps lies the end of the kernel.
#pragma once

#include <cuda_fp16.h>

#include "cuda/attention.h"
#include "cuda/hopper.h"
#include "cuda/persistent.h"

namespace fastgen {
namespace cuda {
namespace persistent {

constexpr int kWarps = 8;  // that compute; one more feeds them weights
constexpr int kConsumers = 32 * kWarps;
constexpr int kThreads = kConsumers + 32;
constexpr int kTile = 8;       // outputs of a tile
constexpr int kUnit = 32;      // columns that a warp multiplies at a time
constexpr int kWarpUnits = 4;  // units of a warp in a block of weights
constexpr int kBlockColumns = kWarps * kWarpUnits * kUnit;  // of a block of weights at most
constexpr int kRound = 4;  // blocks of weights that a warp holds in registers
constexpr int kMaxStages = 16;
constexpr int kMaxSlots = 5;   // blocks of columns whose activations, or norm's sums, are kept
constexpr int kMaxSplits = 8;  // parts of a sequence in attention
constexpr int kMaxHeadSize = 128;

enum Phase : int32_t { kQkv, kAttention, kOut, kIn, kDown, kHead, kPhases };

// A product: its outputs are cut into tiles, tile i is block i % blocks's; its columns into `chunks` of
// `chunk_columns`, of which a warp takes `warp_units` units.
struct Product {
  const char* weights;
  const float* bias;
  const float* norm_weight;
  const float* sums;
  int32_t in, out;
  int32_t tiles, tiles_each, tiles_left;  // of all; of a block; blocks that have one more
  int32_t chunks, chunk_columns, warp_units;
  int32_t source, target;  // pieces of the exchange where input and output begin
};

struct Plan {
  Product products[kPhases];  // that of kAttention is not used
  int64_t layer_bytes;
  int32_t layers, hidden, heads, head_size, rows;
  int32_t split_stats;  // pieces where the maxima and sums of attention's splits begin
  int32_t max_splits;
  float eps;
  float query_scale;
  uint4* exchange;
  uint32_t epoch;
  int32_t stages, stage_bytes, row_stride;  // of the ring of weights
  int32_t slots;
  const void* embedding;
  const float* positions;
  int64_t position_stride;
  CacheLayout cache;
  const Row* row_list;
  const Slot* slots_of_rows;
  float* logits;
  int64_t ld;
  int64_t* stamps;
};

struct RowState {
  const char* const* pages;
  int32_t position;  // of the newest token; -1: the row has none
  int32_t token;
  int32_t splits, span;  // parts that its positions are cut into, and positions of a part
};

// Shared memory besides activations and the ring, which follow.
template <int kRows>
struct alignas(128) Shared {
  float partial[2][kRound * kRows * kTile][kWarps];  // sums of the warps
  // Of the norm: columns, mean, sum of squares.
  float4 stats[2][kMaxSlots][kRows][kWarps];
  float scales[kWarps][kMaxSlots][kRows];  // that take activations back to what they were
  float attended[2][kWarps][kMaxHeadSize];
  float attention_max[2][kWarps];
  float attention_sum[2][kWarps];
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
  RowState rows[kRows];
  Plan plan;
};

inline int32_t ActivationBytes(int32_t rows, int32_t slots) {
  return slots * 2 * rows * kWarps * kWarpUnits * kUnit * 2;
}

#if FASTGEN_ARCH_HAS_PERSISTENT

// ---- pieces of the exchange -----------------------------------------------------------------------

// To 16 significant bits, in the upper 24.
__device__ __forceinline__ uint32_t Round24(float x) {
  return x == x ? __float_as_uint(x) + 0x80u : 0x7fc00000u;
}

__device__ __forceinline__ uint4 PackPiece(float a, float b, float c, float d, uint32_t epoch) {
  const uint32_t i = Round24(a), j = Round24(b), k = Round24(c), l = Round24(d);
  return make_uint4(__byte_perm(i, j, 0x5321), __byte_perm(j, k, 0x6532), __byte_perm(k, l, 0x7653),
                    epoch);
}

__device__ __forceinline__ void UnpackPiece(const uint4& piece, float* x) {
  x[0] = __uint_as_float(piece.x << 8);
  x[1] = __uint_as_float(__byte_perm(piece.x, piece.y, 0x5430) & 0xffffff00u);
  x[2] = __uint_as_float(__byte_perm(piece.y, piece.z, 0x4320) & 0xffffff00u);
  x[3] = __uint_as_float(piece.z & 0xffffff00u);
}

// Four neighbouring lanes hold four numbers; the one that shall, the first of them, writes.
__device__ __forceinline__ void PublishLanes(uint4* to, float x, uint32_t epoch, bool shall) {
  const float b = __shfl_down_sync(0xffffffffu, x, 1);
  const float c = __shfl_down_sync(0xffffffffu, x, 2);
  const float d = __shfl_down_sync(0xffffffffu, x, 3);
  if (shall) StoreWhole(to, PackPiece(x, b, c, d, epoch));
}

// Pieces that a thread wants, all on their way at once: bit i of `wanted` for piece i, which is at(i).
template <int kCount, typename At>
__device__ __forceinline__ void AskForPieces(uint4 (&pieces)[kCount], uint32_t wanted,
                                             const At& at) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    pieces[i] = make_uint4(0, 0, 0, 0);
    if ((wanted >> i & 1u) != 0) pieces[i] = LoadWhole(at(i));
  }
}

// Asks again until all are of the epoch.
template <int kCount, typename At>
__device__ __forceinline__ void WaitForPieces(uint4 (&pieces)[kCount], uint32_t wanted,
                                              const At& at, uint32_t epoch) {
  for (;;) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (pieces[i].w == epoch) wanted &= ~(1u << i);
    }
    if (wanted == 0) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if ((wanted >> i & 1u) != 0) pieces[i] = LoadWhole(at(i));
    }
  }
}

// Hides from the compiler what a number is, so that it does not keep what follows from it in registers
// from one phase to the next.
__device__ __forceinline__ int Opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Tiles of this block.
__device__ __forceinline__ int TilesOf(const Product& product) {
  return product.tiles_each + (static_cast<int>(blockIdx.x) < product.tiles_left ? 1 : 0);
}

// ---- a consumer's thread --------------------------------------------------------------------------

template <int kRows>
struct Thread {
  const Plan& plan;
  Shared<kRows>& shared;
  char* activations;  // of the warp
  const char* ring;
  int thread, warp, lane;
  uint32_t active;  // bit r: row r has a token
  int stage = 0;    // of the ring, that comes next
  uint32_t parity = 0;
  int buffer = 0;  // of the two of what a barrier separates
  float residual = 0.0f;

  __device__ __forceinline__ bool Active(int row) const { return (active >> row & 1u) != 0; }

  __device__ __forceinline__ void StampNow(int phase, int layer, Stamp stamp) const {
    if (plan.stamps == nullptr || thread != 0) return;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * (5 * plan.layers + 1) +
                          (phase == kHead ? 5 * plan.layers : 5 * layer + phase);
    plan.stamps[index * static_cast<int64_t>(Stamp::kCount) + static_cast<int64_t>(stamp)] =
        Clock();
  }

  // Forgets what follows from who the thread is.
  __device__ __forceinline__ void Forget() {
    thread = Opaque(thread);
    __builtin_assume(thread >= 0 && thread < kConsumers);
    lane = thread % 32;
    warp = __shfl_sync(0xffffffffu, thread / 32, 0);
    __builtin_assume(warp >= 0 && warp < kWarps);
  }

  // A barrier of all that compute; what is written in `buffer` before it may be read after it.
  __device__ __forceinline__ void Sync() { SyncFirst<kConsumers>(); }
};

#endif  // FASTGEN_ARCH_HAS_PERSISTENT

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen
