// How a matrix of weights lies in memory: panels of kPanel output columns that a kernel reads in
// sequence, of one of several types.
//
// A panel of `in` rows holds, by type,
//   float32   [in, kPanel]
//   float16   [in, kPanel]
//   bfloat16  [in / 2, kPanel, 2], pairs of rows
//   int8      runs of kRun rows, of which the last has as many whole groups of kGroup as it needs: float16
//             scales [kPanel], then bytes [rows / 4, kPanel, 4], each q + 128
//   int4      groups of kGroup rows: float16 scales [kPanel], then bytes [kGroup / 8, kPanel, 4], of
//             which byte i has row 8 k + i in its low and row 8 k + 4 + i in its high half, each as q + 8
//   kInt8Groups, for files whose groups of a run have different scales: as int8, of groups
// and an integer's weight is scale * q. Columns past the end of the matrix, and rows of a pair or a
// group past it, are zero. The orders within a line are those of instructions that multiply pairs of
// bfloat16 and quadruples of bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastgen::cpu {

enum class WeightType { kFloat32, kBFloat16, kFloat16, kInt8, kInt4, kInt8Groups };

constexpr int64_t kPanel = 32;
constexpr int64_t kGroup = 32;
constexpr int64_t kRun = 4 * kGroup;

// Rows that share a scale of an integer type.
constexpr int64_t ScaleRows(WeightType type) { return type == WeightType::kInt8 ? kRun : kGroup; }

// The type of that name, "float32", "bfloat16", ...; false for another. kInt8Groups is one for files only.
bool ParseWeightType(const char* name, WeightType* type);
const char* WeightTypeName(WeightType type);

// Bytes of a panel, a multiple of 64.
int64_t PanelBytes(WeightType type, int64_t in);

// Writes a panel of float32 weights [in, kPanel]. 16-bit types round to nearest, ties to even, and
// saturate; integers get the scale that leaves the least error of a few, or the one that `scales`
// [(in + kGroup - 1) / kGroup, kPanel] has, the same for every group of a run: weights that are a scale times
// a whole number become that number again.
void PackPanel(WeightType type, const float* weights, int64_t in, void* panel,
               const uint16_t* scales = nullptr);

// The two halves of what PackPanel does with up to ScaleRows(type) rows [count, kPanel] of an integer type: the
// float16 scale of each column, and the whole numbers [count, kPanel] of given scales, -127 to 127 or -8
// to 7.
void FindScales(WeightType type, const float* rows, int64_t count, uint16_t* scales);
void Quantize(WeightType type, const float* rows, int64_t count, const uint16_t* scales,
              int8_t* values);

// out[0, in) = column c of a panel [in, kPanel] as float32.
void ReadColumn(WeightType type, const void* panel, int64_t in, int64_t c, float* out);

}  // namespace fastgen::cpu
