// Matrices of whole numbers as files hold them: weight = scale * q, with a float16 scale for every
// kScaleGroup inputs of an output. docs/weights.md has the format.
//
// The matrix `name` is two tensors, whole numbers and `name`.scales. Linear matrices lie [in, out], tables
// (embedding, head) lie [out, in]:
//   `name`.int8    [in, out] or [out, in], each q from -127 to 127 (-128 counts as -127)
//   `name`.int4    [(in + 1) / 2, out]: input 2 k in the low and 2 k + 1 in the high half of a byte, each
//                  as q + 8; past the last input anything
//   `name`.scales  [groups, out] or [out, groups]
// int8 that fastgen makes has one scale for every kScaleRun inputs, which stands there for each of their groups.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "io/tensor.h"

namespace fastgen::io {

constexpr int64_t kScaleGroup = 32;
constexpr int64_t kScaleRun = 128;
constexpr char kInt8Suffix[] = ".int8";
constexpr char kInt4Suffix[] = ".int4";
constexpr char kScalesSuffix[] = ".scales";

inline int64_t ScaleGroups(int64_t in) { return (in + kScaleGroup - 1) / kScaleGroup; }

// A linear matrix: `count` weights of input `row` from output `column` on. `values` are kInt8 or, packed
// two and two, kUInt8.
void DequantizeInput(const TensorView& values, const TensorView& scales, int64_t row,
                     int64_t column, int64_t count, float* out);

// A table: all weights of output `row`.
void DequantizeOutput(const TensorView& values, const TensorView& scales, int64_t row, float* out);

// `count` elements of row `row` of a tensor of scales from `column` on.
void CopyScales(const TensorView& scales, int64_t row, int64_t column, int64_t count,
                uint16_t* out);

// Whether all groups of every run have the same scale, bit for bit; `of_table`: [out, groups].
bool ScalesInRuns(const TensorView& scales, bool of_table);

}  // namespace fastgen::io
