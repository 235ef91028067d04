#include "io/quantized.h"

#include <algorithm>
#include <cstring>

#include "base/half.h"

namespace fastgen::io {
namespace {

// -128 is no number of the format: its meaning must not depend on who reads it.
float Whole(signed char byte) { return static_cast<float>(std::max<int>(byte, -127)); }

}  // namespace

void DequantizeInput(const TensorView& values, const TensorView& scales, int64_t row,
                     int64_t column, int64_t count, float* __restrict out) {
  ToFloat32(DType::kFloat16, scales.At(row / kScaleGroup, column), count, out);
  if (values.dtype == DType::kInt8) {
    const auto* q = reinterpret_cast<const signed char*>(values.At(row, column));
    for (int64_t i = 0; i < count; ++i) out[i] *= Whole(q[i]);
    return;
  }
  const auto* pairs = reinterpret_cast<const unsigned char*>(values.At(row / 2, column));
  const int shift = row % 2 * 4;
  for (int64_t i = 0; i < count; ++i) out[i] *= static_cast<float>((pairs[i] >> shift & 15) - 8);
}

void DequantizeOutput(const TensorView& values, const TensorView& scales, int64_t row,
                      float* __restrict out) {
  const int64_t in = values.shape[1];
  const auto* q = reinterpret_cast<const signed char*>(values.At(row, 0));
  for (int64_t begin = 0; begin < in; begin += kScaleGroup) {
    uint16_t half;
    CopyScales(scales, row, begin / kScaleGroup, 1, &half);
    const float scale = base::HalfToFloat(half);
    const int64_t end = std::min(begin + kScaleGroup, in);
    for (int64_t i = begin; i < end; ++i) out[i] = scale * Whole(q[i]);
  }
}

void CopyScales(const TensorView& scales, int64_t row, int64_t column, int64_t count,
                uint16_t* out) {
  std::memcpy(out, scales.At(row, column), static_cast<size_t>(count) * sizeof(uint16_t));
}

bool ScalesInRuns(const TensorView& scales, bool of_table) {
  constexpr int64_t kGroups = kScaleRun / kScaleGroup;
  const int64_t rows = scales.shape[0], columns = scales.shape[1];
  const auto bytes = static_cast<size_t>(columns) * sizeof(uint16_t);
  std::vector<uint16_t> row(static_cast<size_t>(columns));
  for (int64_t r = 0; r < rows; ++r) {
    if (!of_table) {
      if (std::memcmp(scales.At(r, 0), scales.At(r / kGroups * kGroups, 0), bytes) != 0)
        return false;
      continue;
    }
    CopyScales(scales, r, 0, columns, row.data());
    for (int64_t group = 0; group < columns; ++group) {
      if (row[group] != row[group / kGroups * kGroups]) return false;
    }
  }
  return true;
}

}  // namespace fastgen::io
