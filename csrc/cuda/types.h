// What the kernels of csrc/cuda are called with: plain structures of device pointers and sizes.
// They know no model, no file, no framework. C++14: this is read by nvcc of CUDA 10.2 too.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace fastgen {
namespace cuda {

// Type of weights and of the KV cache. Everything between products is float32 in decode steps.
enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3, kInt4 = 4 };
// Bytes of a number of the cache or of activations. Host code.
inline size_t SizeOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Columns of a group that share a scale, in int4 and int8 weights.
constexpr int32_t kGroup = 32;
// Positions of a page of the KV cache.
constexpr int32_t kPage = 32;
// Numbers of a head, at most.
constexpr int32_t kMostHeadSize = 256;
// Rows of weights and of activations start at multiples of this many bytes and are zero up to it.
constexpr int32_t kAlign = 16;

// A stored matrix W of y = W x + b: row n holds the weights of output n, so that a dot product reads
// memory in sequence; also what cuBLASLt calls a transposed operand.
struct Matrix {
  const void* data = nullptr;  // [out] rows, row_bytes apart, zero from `in` to the row's end
  int64_t row_bytes = 0;       // a multiple of kAlign
  DType dtype = DType::kFloat32;
  int32_t in = 0;
  int32_t out = 0;
  // kInt8, kInt4: float16 scales [out, scale_stride], one per kGroup columns; weight = scale * q.
  // kInt4 holds q + 8, two to a byte, the even column in the low half.
  const void* scales = nullptr;
  int32_t scale_stride = 0;
  const float* bias = nullptr;  // [out], or null
};

// A layer norm over `size` columns.
struct Norm {
  const float* weight = nullptr;
  const float* bias = nullptr;
  float eps = 0.0f;
};

// Options of one sequence, as engine/sampling_params.h explains them.
struct SamplingParams {
  int32_t sample;
  int32_t max_length;
  int32_t min_length;
  int32_t top_k;
  float top_p;
  float temperature;
  float repetition_penalty;
  int32_t no_repeat_ngram_size;
  int32_t eos_token_id;
  int32_t forced_bos_token_id;
  int32_t forced_eos_token_id;
  uint32_t sequence;
  uint64_t seed;
};

// State of one sequence, in device memory. Written by the host when the slot is opened and by whoever
// chooses tokens, the sampling kernel or the persistent step, afterwards.
struct Slot {
  int32_t length;  // tokens in `tokens`: prompt and what was sampled
  int32_t prompt_length;
  int32_t finished;
  int32_t reserved;
  int32_t* tokens;     // [prompt_length + max_length]
  char* const* pages;  // pages of the KV cache, kPage positions each, in order
  SamplingParams sampling;
};

// One token on its way through the network.
struct Row {
  int32_t slot;  // -1: padding, nothing is read or written for it
  int32_t
      position;  // of the token in Slot::tokens; -1: the newest one, unless the slot has finished
};

// Where a row's token stands: what Row, Slot and the table of pages say, in one read.
struct RowPlace {
  char* const* pages;  // of the slot
  char* page;          // of the row's own position; null where there is no token
  int32_t in_page;     // its position there
  int32_t length;      // positions up to its own; 0 where there is no token
};

// A page of the KV cache: [layers][keys, values][heads][kPage][head_stride] elements of `dtype`. Where a position
// of a head has 64 elements of 16 bits, they are turned: see TurnOf.
struct CacheLayout {
  DType dtype = DType::kFloat16;  // kFloat32, kFloat16 or kBFloat16
  int32_t num_layers = 0;
  int32_t num_heads = 0;
  int32_t head_size = 0;
  int32_t head_stride = 0;  // head_size rounded up to kAlign bytes; the rest is zero
};

// What a decode step says of one row; written to memory that the host reads, by one store where the
// device can.
struct alignas(16) StepResult {
  int32_t token;  // -1: the sequence had ended before
  float score;
  int32_t finished;
  int32_t ready;  // written last, with the number of the step plus 1
};

}  // namespace cuda
}  // namespace fastgen
