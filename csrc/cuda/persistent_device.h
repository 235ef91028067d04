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
//
// What costs time is the way from inputs to outputs, so a block has three kinds of warps. Some stream
// weights. The workers take them into registers, wait for inputs, multiply, and go on to the next
// phase at once. The finishers add up what the workers have, finish the outputs and publish them while
// the workers prepare for the next inputs.
//
// Weights are copied into the ring as its stages become free, which is in bursts, and what waits in the
// queues of memory behind such a burst holds up the exchange. So another warp brings them into the L2
// cache before, evenly, and copies keep a pace, where the ring holds a layer.
#pragma once

#include <cuda_fp16.h>

#include "cuda/attention.h"
#include "cuda/hopper.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/persistent.h"
#include "cuda/sample_group.h"

namespace fastgen {
namespace cuda {
namespace persistent {

#ifndef FASTGEN_CUDA_STAMPS
#define FASTGEN_CUDA_STAMPS 0
#endif

constexpr int kWarps = 8;  // workers
constexpr int kWorkers = 32 * kWarps;
constexpr int kTile = 8;                // outputs of a tile
constexpr int kSpan = 128;              // columns of a warp in a chunk
constexpr int kChunk = kWarps * kSpan;  // columns of a chunk
constexpr int kRound = 4;               // tiles of a group, at most
constexpr int kMaxChunks = 32;          // a lane each
constexpr int kMaxStages = 40;
constexpr int kMaxSplits = 8;  // parts of the sequences of a step in attention, over all rows
constexpr int kMaxJoins = 4;   // parts of a step's only row that who reads it puts together
constexpr int kMaxHeadSize = 128;
constexpr int kMaxBlocks = 256;
// Pieces from a tile's two to the next tile's in the places of the residual stream. A block has one tile
// there most of the time, and what several write to a line and all read meanwhile is slow.
constexpr int kTileStride = 4;

// Threads by rows of a step. Three warps to a quarter of the multiprocessor, at most: registers. So there
// are two that stream beside the finishers of several rows, three beside those of one.
template <int kRows>
struct Threads {
  static constexpr int kFinishers = kRows == 1 ? 32 : 64;
  static constexpr int kOutputs = kTile * kRound * kRows / kFinishers;  // of a group, by finisher
  static constexpr int kStreamers = kRows == 1 ? 96 : 64;
  static constexpr int kCount = kWorkers + kFinishers + kStreamers;
  static constexpr int kReaders = kWorkers + kFinishers;  // of what a step is about
  static constexpr int kTold = kReaders + 32;             // these and the prefetching warp
};

constexpr int kMaxFinisherWarps = 2;
// Where the step chooses tokens: outputs of the head that a block keeps, and tokens of a row that a warp
// lists.
constexpr int kMostKept = 2 * kWarps * kMaxHeadSize;
constexpr uint32_t kListedOfWarp = 8;

enum Phase : int32_t { kQkv, kAttention, kOut, kIn, kDown, kHead, kPhases };

// Types of weights in the ring. kLoads: 16 bytes of an output that a lane reads of a stage; kScales:
// scales that go with them. Scales follow the weights of an output in a stage.
struct Half {
  using Element = __half;
  static constexpr int kBits = 16, kLoads = 4, kScales = 0;
  static constexpr float kUnit = 16.0f;
};
struct Brain {
  using Element = BFloat16;
  static constexpr int kBits = 16, kLoads = 4, kScales = 0;
  static constexpr float kUnit = 1.0f;
};
struct Int8 {
  using Element = __half;
  static constexpr int kBits = 8, kLoads = 2, kScales = 2;
  static constexpr float kUnit = 16.0f;
};
struct Int4 {
  using Element = __half;
  static constexpr int kBits = 4, kLoads = 1, kScales = 1;
  static constexpr float kUnit = 16.0f;
};

// A stage: kTile rows of weights, and their scales, without gaps where rows are whole, so that one copy takes all
// of it; the bulk engine takes about 50 cycles for a copy, however short, and longer where it does not begin at
// a multiple of 128 bytes. Lanes that read at once have 64 bytes of a row of even number and 64 of one of odd; for
// these not to meet in the banks, those of odd rows read them the other way round, second before first, where they
// have two.
template <typename W>
struct Stage {
  static constexpr bool kSwaps = W::kLoads % 2 == 0;
  static constexpr int kWeightBytes = kChunk * W::kBits / 8;  // of a row, at most
  static constexpr int kScaleBytes = W::kScales > 0 ? kChunk / kGroup * 2 : 0;
  static constexpr int kScalesAt = kTile * kWeightBytes;
  static constexpr int kBytes = kScalesAt + kTile * kScaleBytes;
  static_assert(kBytes % 128 == 0, "stages begin at multiples of 128 bytes");
};

// What a lane reads of a stage.
template <typename W>
struct Raw {
  uint4 weights[W::kLoads];
  uint32_t scales[W::kScales > 0 ? W::kScales : 1];
};

// And holds of it: eight numbers of 16 bits of each of a warp's four fragments of columns.
struct Held {
  uint4 fragments[4];
};
// Or, where bytes are multiplied: two operands, and the scale of one of a row's groups of columns.
struct HeldBytes {
  uint4 operands[2];
  float scale;
};

// Stages that a worker holds in registers. Attention's output has a stage or two in a block where its
// inputs are one chunk: code for more would be slower, and take more of the instruction cache.
__host__ __device__ constexpr int StagesAtOnce(int rows, bool normed, bool one_chunk) {
  return !normed && one_chunk ? 1 : rows == 4 ? 2 : 4;
}

// A product: its outputs are cut into tiles, which the blocks share from block `first` on; its columns
// into chunks. A tile's part of a chunk is a stage of the ring of weights.
struct Product {
  const char* weights;
  const char* scales;
  const float* bias;
  const float* norm_weight;
  const float* sums;
  int64_t row_bytes, scale_bytes;  // of an output
  int32_t in, out;
  int32_t tiles_each, tiles_left;  // of a block; blocks that have one more
  int32_t first;
  int32_t chunks;
  int32_t whole;           // rows lie in a stage as they do in the matrix
  int32_t round;           // stages that workers take at once
  int32_t source, target;  // pieces of the exchange where input and output begin
};

struct Plan {
  Product products[kPhases];  // that of kAttention is not used
  int64_t layer_bytes;
  int32_t layers, hidden, heads, head_size, rows;
  // Pieces where attention's splits begin, and their maxima and sums.
  int32_t split_values, split_stats;
  float eps;
  float query_scale;
  uint4* exchange;
  uint32_t* state;  // epochs so far; blocks that are done
  int32_t stages;   // of the ring of weights
  int32_t copiers;  // warps that copy, batches in turns
  // Whether weights are copied as fast as they can be: the ring holds less than a layer, or copies are short. Else
  // they are prefetched too, if there is a warp for it, and a layer's copies keep a pace.
  int32_t hurry;
  uint32_t pace;  // cycles from stage to stage, at least
  int32_t lines;  // of activations, that a warp has for each row
  int32_t clear;  // bytes of the ring to be zeroed first: columns behind a row's end count as zero
  Matrix embedding;
  const float* positions;
  int64_t position_stride;
  CacheLayout cache;
  const Row* row_list;
  const Slot* slots_of_rows;
  float* logits;
  int64_t ld;
  // Whether the step ends with the tokens, by `choice`; and pieces where begin the best of rows and blocks,
  // and sums of exponentials and listed tokens of rows, blocks and warps.
  int32_t chooses, bests, sums, listed;
  MassScale scale;
  SampleArgs choice;
  int64_t* stamps;
  uint32_t zero;  // that the compiler does not know: ReleaseWeights()
};

struct RowState {
  const char* const* pages;
  int32_t position;  // of the newest token; -1: the row has none
  int32_t token;
  int32_t splits, span;  // parts that its positions are cut into, and positions of a part
  int32_t joins;         // parts that those who read the attended row put together, all or one
};

// Partial sums of an output: with up to two rows a warp has two, of half of its columns each.
template <int kRows>
struct Partial {
  static constexpr int kCount = kRows <= 2 ? 2 * kWarps : kWarps;
  static constexpr int kStride = kCount + 4;  // floats; neighbours start in different banks
};

// What workers have to know of a product.
struct alignas(16) Work {
  int32_t tiles, chunks, in;
  int32_t row_pieces;  // from row to row of the input
  const uint4* source;
  const float* gamma;          // of the first layer
  int32_t pitch, scale_pitch;  // bytes from row to row in a stage, where rows are whole
};

// The largest output of a row, and of equal ones the first: as numbers that a maximum orders so.
struct BestOutput {
  uint32_t order;  // 0: none but NaN, which is token 0
  uint32_t first;  // ~token
  uint32_t any_nan;

#if FASTGEN_ARCH_HAS_PERSISTENT
  // Outputs come in ascending `token`.
  __device__ __forceinline__ void See(float logit, int token) {
    if (logit != logit) {
      any_nan = 1;
    } else if (OrderOf(logit) > order) {
      order = OrderOf(logit);
      first = ~static_cast<uint32_t>(token);
    }
  }
  __device__ __forceinline__ void Merge(const BestOutput& other) {
    any_nan |= other.any_nan;
    if (other.order < order || (other.order == order && other.first <= first)) return;
    order = other.order;
    first = other.first;
  }
  __device__ __forceinline__ int32_t Token() const {
    return order == 0 ? 0 : static_cast<int32_t>(~first);
  }
  __device__ __forceinline__ float Logit() const {
    return order == 0 ? __int_as_float(0x7fc00000) : LogitOf(order);
  }
  __device__ __forceinline__ float Largest() const {
    return order == 0 ? __int_as_float(static_cast<int>(0xff800000u)) : LogitOf(order);
  }
  // Whether exponentials make a distribution.
  __device__ __forceinline__ bool IsDistribution(float temperature) const {
    const float largest = Largest();
    const float scaled = temperature == 1.0f ? largest : largest / temperature;
    return any_nan == 0 && fabsf(largest) <= FLT_MAX && fabsf(scaled) <= FLT_MAX;
  }
#endif
};

// What a row's token is chosen by.
struct RowChoice {
  int32_t few;  // top-k of a draw; 0: the best is taken
  int32_t slot_index;
  Slot slot;  // before the step
};

// Tokens that may be drawn.
constexpr uint32_t kMostListed = 64;
struct DrawSpace {
  Candidate few[kMostListed];
  uint64_t kept[kMostListed];
  float logits[kMostListed];
  uint32_t probs[kMostListed];  // bits
};

// What the choice finds out on the way.
template <int kRows>
struct ChoiceSpace {
  BestOutput bests[kMaxFinisherWarps][kRows];  // of a warp
  BestOutput best[kRows];                      // over all blocks
  float listed_from[kRows];                    // logits that are listed, NaN: none
  uint32_t listed[kMaxFinisherWarps][kRows];   // tokens of a warp
  uint32_t num_listed;                         // of all warps, in the block that draws
  DrawSpace draw;
};

// Shared memory besides activations and the ring, which follow. There are two buffers of what workers
// leave for finishers.
template <int kRows>
struct alignas(128) Shared {
  float partial[2][kRound * kRows * kTile][Partial<kRows>::kStride];
  float4 norm[2][kRows][kWarps / 2];  // of two warps: StoreNorm's sum and squared distances
  float2 columns[kWarps];             // of normed rows, that a warp sees: ColumnsOfWarp
  float attended[2][kWarps][kMaxHeadSize];
  alignas(16) float2 attention_stats[2][kWarps];  // maximum and sum
  Work work[kPhases];
  // Batches of stages: how many workers take at once.
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
  uint64_t finished[2];              // the buffer may be written again
  uint64_t started;                  // the step has been read
  uint8_t stages_of[2][kMaxStages];  // of a batch; what each copying lane knows
  int copied;  // layers whose first weights have been copied; one more when the head begins
  RowState rows[kRows];
  RowChoice choices[kRows];
  ChoiceSpace<kRows> choice, rehearsal;
  int32_t step;  // as the choice counts them
  uint32_t epoch;
};

// Activations of a warp: lines of kSpan numbers of 16 bits. Of a chunk: a line for each row, or two,
// where numbers are the sum of two, as normed ones are.
constexpr int kLine = kSpan * 2;  // bytes
template <int kRows>
struct Activations {
  static constexpr int kBytes = kRows * kLine;         // a line for each row
  static constexpr int kWarpsBytes = kWarps * kBytes;  // of all warps
};

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen
