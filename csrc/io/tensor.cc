#include "io/tensor.h"

#include <algorithm>
#include <cstring>

namespace fastgen::io {

namespace {

inline float BitsToFloat(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t FloatToBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// All ones where `condition` holds, else 0.
inline uint32_t Mask(bool condition) { return 0u - static_cast<uint32_t>(condition); }

// Selects with masks, so that the loop over it vectorises, and makes no float32 subnormals, so that
// it does not matter whether the thread flushes those to zero.
inline uint32_t HalfToFloatBits(uint32_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t shifted = magnitude << 13;
  // A subnormal half is its mantissa times 2^-24, a normal float32.
  const float scaled = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const uint32_t is_subnormal = Mask(magnitude < 0x0400u);
  const uint32_t is_special = Mask(magnitude >= 0x7c00u);  // infinity or NaN
  const uint32_t other = (shifted + ((127u - 15u) << 23)) | (is_special & 0x7f800000u);
  return (half & 0x8000u) << 16 | (is_subnormal & FloatToBits(scaled)) | (~is_subnormal & other);
}

}  // namespace

size_t DTypeSize(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 4;
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
    case DType::kOther: break;
  }
  return 0;
}

const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kOther: break;
  }
  return "another type";
}

int64_t TensorView::num_elements() const {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

uint64_t TensorView::num_bytes() const {
  return static_cast<uint64_t>(num_elements()) * DTypeSize(dtype);
}

std::string TensorView::ShapeText() const { return io::ShapeText(shape); }

std::string TensorView::TypeText() const {
  return dtype == DType::kOther && !stored_type.empty() ? stored_type : DTypeName(dtype);
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  constexpr size_t kMaxShown = 8;
  std::string text = "[";
  for (size_t i = 0; i < shape.size() && i < kMaxShown; ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + (shape.size() > kMaxShown ? ", ...]" : "]");
}

void ToFloat32(DType dtype, const void* source, int64_t count, float* __restrict out) {
  const char* __restrict bytes = static_cast<const char*>(source);
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(out, bytes, static_cast<size_t>(count) * sizeof(float));
      return;
    case DType::kFloat16:
      for (int64_t i = 0; i < count; ++i) {
        uint16_t half;
        std::memcpy(&half, bytes + 2 * i, sizeof(half));
        out[i] = BitsToFloat(HalfToFloatBits(half));
      }
      return;
    case DType::kBFloat16:
      for (int64_t i = 0; i < count; ++i) {
        uint16_t half;
        std::memcpy(&half, bytes + 2 * i, sizeof(half));
        out[i] = BitsToFloat(static_cast<uint32_t>(half) << 16);
      }
      return;
    case DType::kOther: return;
  }
}

void TensorSource::Release(const TensorView& tensor) {
  ReleaseBytes(tensor, 0, tensor.num_bytes());
}

bool TensorSource::Equal(const TensorView& a, const TensorView& b) {
  constexpr uint64_t kPiece = uint64_t{4} << 20;
  const uint64_t size = a.num_bytes();
  bool equal = true;
  for (uint64_t begin = 0; equal && begin < size; begin += kPiece) {
    const uint64_t end = std::min(size, begin + kPiece);
    equal = std::memcmp(static_cast<const char*>(a.data) + begin,
                        static_cast<const char*>(b.data) + begin, end - begin) == 0;
    ReleaseBytes(a, begin, end);
    ReleaseBytes(b, begin, end);
  }
  return equal;
}

}  // namespace fastgen::io
