// Named tensors in memory, mapped from a file or owned by a caller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace fastgen::io {

// kInt8, kUInt8: whole numbers, which mean weights with the scales of another tensor only, see
// io/quantized.h. kOther: a type that the engine does not compute with, e.g. the boolean mask that old
// checkpoints carry. Such a tensor keeps its place in the list, so that leaving it out is a decision.
enum class DType { kFloat32, kFloat16, kBFloat16, kInt8, kUInt8, kOther };

// Weights by themselves: float32, float16 or bfloat16.
bool IsFloat(DType dtype);

// Bytes of one element; 0 for kOther.
size_t DTypeSize(DType dtype);
const char* DTypeName(DType dtype);

struct TensorView {
  std::string name;
  const void* data = nullptr;  // at any address: read with memcpy or ToFloat32()
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;
  std::string stored_type;  // the file's own word for the type, when it is no float

  int64_t num_elements() const;
  // Where an element of a tensor of two dimensions lies.
  const char* At(int64_t row, int64_t column) const;
  uint64_t num_bytes() const;
  // "[768, 2304]", for messages.
  std::string ShapeText() const;
  // "float32", or the file's own word.
  std::string TypeText() const;
};

std::string ShapeText(const std::vector<int64_t>& shape);

// `count` elements of type `dtype` (a float) from any address as float32. Exact, subnormals,
// infinities and NaN payloads included.
void ToFloat32(DType dtype, const void* source, int64_t count, float* out);

// A set of tensors. Views stay valid until the end of the source.
class TensorSource {
 public:
  virtual ~TensorSource() = default;
  virtual const std::vector<TensorView>& tensors() const = 0;
  // The caller is done with bytes [begin, end) of this tensor, one of tensors(): a mapped file
  // drops their pages. They may be read again, at the price of reading the file again. Safe from
  // several threads.
  virtual void ReleaseBytes(const TensorView& tensor, uint64_t begin, uint64_t end) = 0;
  // The same for the whole tensor.
  void Release(const TensorView& tensor);
  // Whether two tensors of the same shape and type have the same bytes. Does not bring more than a
  // piece of them into memory at a time.
  virtual bool Equal(const TensorView& a, const TensorView& b);
};

// Tensors that the caller owns and keeps.
class MemoryTensorSource : public TensorSource {
 public:
  explicit MemoryTensorSource(std::vector<TensorView> tensors) : tensors_(std::move(tensors)) {}
  const std::vector<TensorView>& tensors() const override { return tensors_; }
  void ReleaseBytes(const TensorView&, uint64_t, uint64_t) override {}

 private:
  std::vector<TensorView> tensors_;
};

}  // namespace fastgen::io
