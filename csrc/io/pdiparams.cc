#include "io/pdiparams.h"

#include <algorithm>
#include <map>
#include <utility>

#include "base/error.h"
#include "io/mapped_file.h"

namespace fastgen::io {

namespace {

// uint32 version, uint64 levels of detail, uint32 version, int32 size of the TensorDesc.
constexpr uint64_t kFixedBytes = 20;
// Of the two or three dimensions that a weight has; each takes at most 11 bytes.
constexpr uint64_t kMaxDescBytes = 256;

// Members of the message TensorDesc: (field number << 3) | wire type.
constexpr uint64_t kDataTypeKey = 1 << 3 | 0;
constexpr uint64_t kDimsKey = 2 << 3 | 0;
constexpr uint64_t kPackedDimsKey = 2 << 3 | 2;

[[noreturn]] void Bad(const std::string& path, const std::string& what) {
  throw base::Error(FASTGEN_BAD_FILE, path + ": " + what);
}

// Paddle's VarType.Type of a type that can be read.
struct StoredType {
  uint64_t number;
  DType dtype;
};
constexpr StoredType kStoredTypes[] = {
    {5, DType::kFloat32}, {4, DType::kFloat16}, {22, DType::kBFloat16}};

std::string StoredTypeName(uint64_t number) {
  for (const StoredType& type : kStoredTypes) {
    if (type.number == number) return DTypeName(type.dtype);
  }
  return "Paddle's type number " + std::to_string(number);
}

// Bytes [at, end) of the file, little-endian.
class Cursor {
 public:
  Cursor(const char* data, uint64_t at, uint64_t end) : data_(data), at_(at), end_(end) {}

  uint64_t at() const { return at_; }
  bool done() const { return at_ == end_; }

  bool ReadFixed(int bytes, uint64_t* value) {
    if (end_ - at_ < static_cast<uint64_t>(bytes)) return false;
    *value = 0;
    for (int i = 0; i < bytes; ++i) *value |= Byte() << (8 * i);
    return true;
  }

  bool ReadVarint(uint64_t* value) {
    *value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (done()) return false;
      const uint64_t byte = Byte();
      *value |= (byte & 0x7f) << shift;
      if ((byte & 0x80) == 0) return shift < 63 || byte <= 1;
    }
    return false;
  }

 private:
  uint64_t Byte() { return static_cast<unsigned char>(data_[at_++]); }

  const char* data_;
  uint64_t at_;
  uint64_t end_;
};

struct Desc {
  bool has_type = false;
  uint64_t type = 0;
  std::vector<int64_t> dims;
};

// False for anything but a TensorDesc.
bool ParseDesc(Cursor cursor, Desc* desc) {
  uint64_t key = 0;
  uint64_t value = 0;
  while (!cursor.done()) {
    if (!cursor.ReadVarint(&key)) return false;
    if (key == kDataTypeKey) {
      if (desc->has_type || !cursor.ReadVarint(&desc->type)) return false;
      desc->has_type = true;
    } else if (key == kDimsKey) {
      if (!cursor.ReadVarint(&value)) return false;
      desc->dims.push_back(static_cast<int64_t>(value));
    } else if (key == kPackedDimsKey) {
      if (!cursor.ReadVarint(&value)) return false;
      const uint64_t begin = cursor.at();
      while (cursor.at() - begin < value) {
        uint64_t size = 0;
        if (!cursor.ReadVarint(&size)) return false;
        desc->dims.push_back(static_cast<int64_t>(size));
      }
      if (cursor.at() - begin != value) return false;
    } else {
      return false;
    }
  }
  return desc->has_type;
}

// Walks the records in step with the tensors that `fastgen.json` lists.
class Walker {
 public:
  explicit Walker(const MappedFile& file) : file_(file) {}

  // The record that must be `tensor`'s; sets view.data.
  void Next(StoredTensor* tensor) {
    TensorView& view = tensor->view;
    where_ = "the record of tensor " + base::Quote(view.name);
    if (at_ == file_.size()) {
      Bad(file_.path(), where_ + " is missing: the file ends before it");
    }
    const uint64_t data = ReadHeader(view);
    if (data != tensor->offset) {
      Bad(file_.path(), where_ + " has its data at byte " + std::to_string(data) +
                            ", fastgen.json says " + std::to_string(tensor->offset));
    }
    uint64_t bytes = DTypeSize(view.dtype);
    for (const int64_t size : view.shape) {
      if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(size), &bytes)) {
        Bad(file_.path(), where_ + " of shape " + view.ShapeText() + " has too many elements");
      }
    }
    if (bytes > file_.size() - data) {
      Bad(file_.path(), where_ + " has " + std::to_string(bytes) + " bytes of data where only " +
                            std::to_string(file_.size() - data) +
                            " are left; the file is truncated or damaged");
    }
    view.data = file_.data() + data;
    at_ = data + bytes;
  }

  void Finish() const {
    if (at_ != file_.size()) {
      Bad(file_.path(), "the last " + std::to_string(file_.size() - at_) +
                            " bytes belong to no tensor of fastgen.json");
    }
  }

 private:
  // Checks the header at at_ and returns where its data begins.
  uint64_t ReadHeader(const TensorView& view) const {
    Cursor cursor(file_.data(), at_, file_.size());
    uint64_t version = 0;
    uint64_t levels = 0;
    uint64_t tensor_version = 0;
    uint64_t desc_bytes = 0;
    if (!cursor.ReadFixed(4, &version) || !cursor.ReadFixed(8, &levels) ||
        !cursor.ReadFixed(4, &tensor_version) || !cursor.ReadFixed(4, &desc_bytes)) {
      Bad(file_.path(), where_ + " is cut off: " + std::to_string(file_.size() - at_) +
                            " bytes are left for a header of at least " +
                            std::to_string(kFixedBytes));
    }
    if (version != 0 || tensor_version != 0) {
      Bad(file_.path(), where_ + " has the version " + std::to_string(version | tensor_version) +
                            ", only 0 is known");
    }
    if (levels != 0) {
      Bad(file_.path(),
          where_ + " has " + std::to_string(levels) + " levels of detail, a weight has none");
    }
    const uint64_t left = file_.size() - cursor.at();
    if (desc_bytes > std::min(left, kMaxDescBytes)) {
      Bad(file_.path(), where_ + " claims a description of " + std::to_string(desc_bytes) +
                            " bytes where at most " +
                            std::to_string(std::min(left, kMaxDescBytes)) + " are possible");
    }
    const uint64_t data = cursor.at() + desc_bytes;
    Desc desc;
    if (!ParseDesc(Cursor(file_.data(), cursor.at(), data), &desc)) {
      Bad(file_.path(), where_ + " has a description that is no TensorDesc message");
    }
    const std::string type = StoredTypeName(desc.type);
    if (type != DTypeName(view.dtype)) {
      Bad(file_.path(),
          where_ + " has the type " + type + ", fastgen.json says " + DTypeName(view.dtype));
    }
    if (desc.dims != view.shape) {
      Bad(file_.path(), where_ + " has the shape " + ShapeText(desc.dims) + ", fastgen.json says " +
                            view.ShapeText());
    }
    return data;
  }

  const MappedFile& file_;
  uint64_t at_ = 0;
  std::string where_;
};

class PdiparamsSource : public TensorSource {
 public:
  PdiparamsSource(const std::string& path, std::vector<StoredTensor> tensors) : file_(path) {
    std::sort(tensors.begin(), tensors.end(),
              [](const StoredTensor& a, const StoredTensor& b) { return a.offset < b.offset; });
    Walker walker(file_);
    for (StoredTensor& tensor : tensors) {
      walker.Next(&tensor);
      tensors_.push_back(std::move(tensor.view));
    }
    walker.Finish();
  }

  const std::vector<TensorView>& tensors() const override { return tensors_; }

  void ReleaseBytes(const TensorView& tensor, uint64_t begin, uint64_t end) override {
    const uint64_t offset =
        static_cast<uint64_t>(static_cast<const char*>(tensor.data) - file_.data());
    file_.DropPages(offset + begin, offset + end);
  }

 private:
  MappedFile file_;
  std::vector<TensorView> tensors_;
};

}  // namespace

std::unique_ptr<TensorSource> OpenPdiparams(const std::string& path,
                                            std::vector<StoredTensor> tensors) {
  return std::make_unique<PdiparamsSource>(path, std::move(tensors));
}

}  // namespace fastgen::io
