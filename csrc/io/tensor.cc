#include "io/tensor.h"

#include <algorithm>
#include <cstring>

#include "base/half.h"

namespace fastgen::io {

bool IsFloat(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

size_t DTypeSize(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 4;
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
    case DType::kInt8:
    case DType::kUInt8: return 1;
    case DType::kOther: break;
  }
  return 0;
}

const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kInt8: return "int8";
    case DType::kUInt8: return "uint8";
    case DType::kOther: break;
  }
  return "another type";
}

int64_t TensorView::num_elements() const {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

const char* TensorView::At(int64_t row, int64_t column) const {
  const auto element = static_cast<int64_t>(DTypeSize(dtype));
  return static_cast<const char*>(data) + (row * shape[1] + column) * element;
}

uint64_t TensorView::num_bytes() const {
  return static_cast<uint64_t>(num_elements()) * DTypeSize(dtype);
}

std::string TensorView::ShapeText() const { return io::ShapeText(shape); }

std::string TensorView::TypeText() const {
  return !IsFloat(dtype) && !stored_type.empty() ? stored_type : DTypeName(dtype);
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
        out[i] = base::HalfToFloat(half);
      }
      return;
    case DType::kBFloat16:
      for (int64_t i = 0; i < count; ++i) {
        uint16_t half;
        std::memcpy(&half, bytes + 2 * i, sizeof(half));
        out[i] = base::BrainToFloat(half);
      }
      return;
    case DType::kInt8:
    case DType::kUInt8:
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
