// The kernel table: plain functions on raw pointers, one table per instruction set.
//
// Every kernel sums in an order that only the row's own shape fixes, so a row's result is the same
// bits alone and in any batch, with any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/panels.h"

namespace fastgen::cpu {

// Activation rows start at multiples of this many floats and are readable up to it.
constexpr int64_t kRowAlign = 16;
// Positions of the KV cache come in blocks of this many.
constexpr int64_t kBlock = 32;

enum class Epilogue {
  kStore,     // y = acc + bias
  kGelu,      // y = gelu_tanh(acc + bias)
  kResidual,  // y += acc + bias
};

struct MatmulArgs {
  const void* x;     // [rows], float32 [in] each, or what `prepare` made of it
  int64_t x_stride;  // bytes
  int64_t rows;
  int64_t in;
  const void* panels;   // ceil(out / kPanel) of them, one after the other: see panels.h
  int64_t panel_bytes;  // PanelBytes(type, in)
  WeightType type;      // of the weights; sums are float32
  const float* bias;    // [out], or null
  int64_t out;
  float* y;  // [rows, out], row stride ldy
  int64_t ldy;
  Epilogue epilogue;
};

// kGroup activations of a row in 8 bits: each is about scale * q.
struct QuantizedGroup {
  int32_t offset;  // -(sum of q) * what the stored bytes of the weights are more than the weights
  float scale;
  int8_t q[kGroup];
};

// One head of one query row against a cache of blocks.
//   keys   of a block: [head_size, kBlock] (transposed: a vector of positions per element)
//   values of a block: [kBlock, value_stride] rows
struct AttentionArgs {
  const float* query;  // [head_size], already scaled
  int64_t head_size;
  int64_t value_stride;            // head_size rounded up to kRowAlign
  const float* const* key_blocks;  // [ceil(length / kBlock)]
  const float* const* value_blocks;
  int64_t length;  // positions attended: 0 .. length - 1
  float* scores;   // scratch, [length rounded up to kBlock]
  float* out;      // [head_size]
};

struct Kernels {
  const char* name;
  bool (*supported)();  // processor and operating system can run this table

  // Bytes of a row of `in` activations as `matmul` takes it for weights of this type, or 0: as it is.
  int64_t (*prepared_bytes)(WeightType type, int64_t in);
  // Makes such a row: bfloat16 pairs, or for integer weights a QuantizedGroup for every kGroup.
  void (*prepare)(WeightType type, const float* x, int64_t in, void* prepared);
  // Panels [begin, end) of y = epilogue(x W + b).
  void (*matmul)(const MatmulArgs& args, int64_t panel_begin, int64_t panel_end);
  // y = (x - mean) / sqrt(var + eps) * weight + bias over n elements.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                     float* y);
  void (*attention)(const AttentionArgs& args);

  // probs[i] = exp(x[i] / temperature - max) / sum, float32 as the reference computes it.
  void (*softmax)(const float* x, int64_t n, float temperature, float* probs);
  // log(sum(exp(x[i]))).
  float (*log_sum_exp)(const float* x, int64_t n);
  // Index of the first largest element; NaN never wins.
  int64_t (*argmax)(const float* x, int64_t n);

  // Reads n floats; returns something that depends on them (for measuring bandwidth).
  float (*read_sum)(const float* x, int64_t n);
};

}  // namespace fastgen::cpu
