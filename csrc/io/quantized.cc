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

}  // namespace fastgen::io
