// A whole decode step of few rows as one kernel: every layer and the head, from tokens to logits or to the
// next tokens. All blocks stay on the device from the first layer to the last and hand activations to each
// other through device memory, so that the stream of weights never stops.
#pragma once

#include "cuda/types.h"

namespace fastgen {
namespace cuda {

struct SampleArgs;

constexpr int32_t kPersistentRows = 4;  // rows of a step at most
constexpr int32_t kPersistentTopK = 8;  // tokens that a step draws from, at most

// A product of a layer, [out, in] as types.h has it, rows without gaps. Where the input is normed,
// with w the norm's weight and b its bias:
//   y_n = scale * (sum_k W_nk w_k x_k - mean * sums_n) + bias_n,
// where sums_n = sum_k W_nk w_k, and bias_n has sum_k W_nk b_k in it: see FoldNorm in pack.h.
struct PersistentProduct {
  const void* weights = nullptr;
  const void* scales = nullptr;  // kInt8, kInt4: as Matrix has them, ScaleStride() (pack.h) apart
  const float* bias = nullptr;   // [out]
  const float* norm_weight = nullptr;  // [in], or null: the input is not normed
  const float* sums = nullptr;         // [out], where the input is normed
};

struct PersistentArgs {
  DType dtype = DType::kFloat16;  // of weights, not kFloat32; the cache is kBFloat16 or kFloat16
  int32_t hidden = 0, intermediate = 0, vocab = 0, layers = 0, heads = 0;
  float eps = 0.0f;
  // Of the first layer; everything of layer i is i * layer_bytes behind it.
  PersistentProduct qkv, attention_out, feed_forward_in, feed_forward_out;
  int64_t layer_bytes = 0;
  PersistentProduct head;
  Matrix embedding;                  // [vocab, hidden], of `dtype`
  const float* positions = nullptr;  // [max_positions, position_stride]
  int64_t position_stride = 0;
  CacheLayout cache;

  const Row* row_list = nullptr;  // [rows], different slots
  const Slot* slots = nullptr;
  int32_t rows = 0;
  float* logits = nullptr;  // [rows, ld]; nothing is written for a row without a token
  int64_t ld = 0;

  // Where not null, read at launch: the step ends with what Sample (kernels.h) would do to its logits, the
  // same bits (but a best logit of -0 scores 0), for rows that take the best token or draw from top_k < vocab of at most kPersistentTopK, and
  // whose logits nothing changes. row_list, slots and rows are those of the step, logits are not read.
  // Not supported for vocabularies that the blocks cannot keep, nor for 3 and 4 rows where all warps are
  // busy: there the sampling kernel is as fast.
  const SampleArgs* choice = nullptr;

  // What the blocks exchange, PersistentExchangeBytes(), zero before the first step. Every number in
  // it is marked with the epoch it belongs to, which the steps themselves count: after
  // PersistentStepsBetweenZeros() steps it has to be zeroed again.
  void* exchange = nullptr;
  // Where not null, clocks of what happens: see StampIndex. Built without FASTGEN_CUDA_STAMPS, steps that
  // ask for them are not supported.
  int64_t* stamps = nullptr;
  // As for Linear in kernels.h: the step starts to read weights before the kernel before has ended.
  bool overlap = false;
};

// Moments of a block's phase, in the order of StampIndex.
enum class Stamp : int32_t {
  kBegin,     // of the phase
  kWeights,   // the first weights (attention: keys and values) are in registers
  kInputs,    // what other blocks computed has arrived
  kProducts,  // the warp's sums (attention: results) are written
  kSums,      // those of the block are added up
  kEnd,       // the outputs are written
  kCount,
};

// Phases of a step: five per layer, QKV | attention | its output | feed-forward in | out, and the head.
inline int32_t PersistentPhases(const PersistentArgs& args) { return 5 * args.layers + 1; }

// stamps[StampIndex(...)], of [blocks][phases][Stamp::kCount], for the first warp of a block; blocks
// that have nothing to do in a phase leave theirs as they were.
inline int64_t StampIndex(const PersistentArgs& args, int32_t block, int32_t phase, Stamp stamp) {
  return (static_cast<int64_t>(block) * PersistentPhases(args) + phase) *
             static_cast<int64_t>(Stamp::kCount) +
         static_cast<int64_t>(stamp);
}

// Whether the current device, and what this library has for it, can run such steps: asks for sizes
// and types only. Blocks of a step, if so; 0 where not.
int32_t PersistentBlocks(const PersistentArgs& args);
inline bool PersistentSupported(const PersistentArgs& args) { return PersistentBlocks(args) > 0; }

size_t PersistentExchangeBytes(const PersistentArgs& args);
inline uint32_t PersistentStepsBetweenZeros(const PersistentArgs& args) {
  return 0xfffffff0u / (static_cast<uint32_t>(args.layers) + 1u) - 1u;
}

// Launches a step. A row's logits depend on the row and on the number of rows, rounded up to 1, 2 or
// 4, but not on what the other rows are.
cudaError_t PersistentStep(const PersistentArgs& args, cudaStream_t stream);

}  // namespace cuda
}  // namespace fastgen
