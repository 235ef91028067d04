// How a matrix of weights lies in memory: panels of kPanel output columns that a kernel reads in
// sequence, of one of several types.
//
// A panel of `in` rows holds, by type,
//   float32             [in, kPanel]
//   bfloat16, float16   [in, kPanel]
//   int8    groups of kGroup rows: float16 scales [kPanel], then int8 [kGroup, kPanel]
//   int4    groups of kGroup rows: float16 scales [kPanel], then bytes [kGroup / 2, kPanel] with row 2 i
//           in the low and row 2 i + 1 in the high half, each as q + 8
// and an integer's weight is scale * q. Columns past the end of the matrix, and rows of a group past
// it, are zero.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastgen::cpu {

enum class WeightType { kFloat32, kBFloat16, kFloat16, kInt8, kInt4 };

constexpr int64_t kPanel = 32;
constexpr int64_t kGroup = 32;  // rows that share a scale

// The type of that name, "float32", "bfloat16", ...; false for another.
bool ParseWeightType(const char* name, WeightType* type);
const char* WeightTypeName(WeightType type);

// Bytes of a panel, a multiple of 64.
int64_t PanelBytes(WeightType type, int64_t in);

// Writes a panel of float32 weights [in, kPanel]. 16-bit types round to nearest, ties to even, and
// saturate; integers get the scale that leaves the least error of a few.
void PackPanel(WeightType type, const float* weights, int64_t in, void* panel);

// The weight of row k and column c of a panel.
float WeightAt(WeightType type, const void* panel, int64_t k, int64_t c);

}  // namespace fastgen::cpu
