// The kernel table: plain functions on raw pointers, one table per instruction set.
//
// Every kernel sums in an order that only the row's own shape fixes, so a row's result is the same
// bits alone and in any batch, with any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/cache_layout.h"
#include "cpu/panels.h"

namespace fastgen::cpu {

// Activation rows start at multiples of this many floats and are readable up to it.
constexpr int64_t kRowAlign = 16;
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

// A part of a row of activations in 8 bits, of as many as share a scale of the weights: each is about
// step * q, with one step for kRun of them. Behind a row's parts comes a float, the step of the last.
template <int64_t kRows>
struct QuantizedPart {
  int32_t offset;  // -(sum of q) * what the stored bytes of the weights are more than the weights
  float ratio;     // of the step of the run before to that of the run that begins here, else 1
  int8_t q[kRows];
};

// Rows of a sequence that attention takes at once.
constexpr int64_t kAttentionRows = 6;
// Positions that attention sums as one chain. A row's sums are one chain per span of them and then one
// over the spans, so spans can be worked on by several threads, or by one: the bits are the same.
constexpr int64_t kSpan = 256;
// A row's share of a span, its part, is its weighted values and this many floats more: its largest
// score, its sum and padding.
constexpr int64_t kPartNotes = kRowAlign;

// One head of a few query rows of a sequence, at consecutive positions, against a cache of blocks.
struct AttentionArgs {
  const float* query;  // [rows, head_size], row stride query_stride, already scaled
  int64_t query_stride;
  int64_t rows;  // 1 .. kAttentionRows
  HeadLayout head;
  const char* const* blocks;  // the head's areas, [ceil((length + rows - 1) / kBlock)]
  // Positions that the first row attends, 0 .. length - 1; each further row attends one more.
  int64_t length;
  float* scores;  // scratch, [rows, kSpan]
  float* parts;   // [ceil((length + rows - 1) / kSpan), rows, value_stride + kPartNotes]
  float* out;     // [rows, head_size], row stride out_stride
  int64_t out_stride;
};

struct Kernels {
  const char* name;
  bool (*supported)();  // processor and operating system can run this table

  // Bytes of a row of `in` activations as `matmul` takes it for weights of this type, or 0: as it is.
  int64_t (*prepared_bytes)(WeightType type, int64_t in);
  // Makes such a row: bfloat16 pairs, or for integer weights QuantizedParts and a step.
  void (*prepare)(WeightType type, const float* x, int64_t in, void* prepared);
  // Panels [begin, end) of y = epilogue(x W + b).
  void (*matmul)(const MatmulArgs& args, int64_t panel_begin, int64_t panel_end);
  // y = (x - mean) / sqrt(var + eps) * weight + bias over n elements.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                     float* y);
  // Writes positions [at, at + rows) of a block: keys and values of a head, [rows, head_size] each with that
  // row stride, to its area.
  // 16-bit types round to nearest, ties to even, and finite numbers stay finite; int8 has the scale of
  // its largest magnitude. What is not finite becomes NaN in types other than float32, with int8 all
  // of its row.
  void (*write_cache)(const HeadLayout& head, const float* keys, const float* values,
                      int64_t stride, int64_t rows, char* area, int64_t at);
  // Span `index` of the rows that reach into it: writes its parts, from its blocks only. Fetches from the
  // next span's, so their addresses must be there.
  void (*attention_span)(const AttentionArgs& args, int64_t index);
  // out, from the parts of all spans, which are used up.
  void (*attention_finish)(const AttentionArgs& args);

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
