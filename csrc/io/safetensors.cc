#include "io/safetensors.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <map>
#include <set>

#include "base/error.h"
#include "io/json.h"
#include "io/mapped_file.h"

namespace fastgen::io {

namespace {

constexpr uint64_t kLengthBytes = 8;
// The limit of the format's own reader.
constexpr uint64_t kMaxHeaderBytes = 100000000;
constexpr uint64_t kMaxIndexBytes = 100000000;
constexpr size_t kMaxDims = 64;
constexpr size_t kMaxShardName = 255;

[[noreturn]] void Bad(const std::string& path, const std::string& what) {
  throw base::Error(FASTGEN_BAD_FILE, path + ": " + what);
}

// A type of the format: its word and the bits of an element.
struct StoredType {
  const char* name;
  uint64_t bits;
  DType dtype;
};

constexpr StoredType kStoredTypes[] = {
    {"F32", 32, DType::kFloat32},  {"F16", 16, DType::kFloat16},  {"BF16", 16, DType::kBFloat16},
    {"F64", 64, DType::kOther},    {"I64", 64, DType::kOther},    {"U64", 64, DType::kOther},
    {"C64", 64, DType::kOther},    {"I32", 32, DType::kOther},    {"U32", 32, DType::kOther},
    {"I16", 16, DType::kOther},    {"U16", 16, DType::kOther},    {"I8", 8, DType::kInt8},
    {"U8", 8, DType::kUInt8},      {"BOOL", 8, DType::kOther},    {"F8_E4M3", 8, DType::kOther},
    {"F8_E5M2", 8, DType::kOther}, {"F8_E8M0", 8, DType::kOther}, {"F6_E2M3", 6, DType::kOther},
    {"F6_E3M2", 6, DType::kOther}, {"F4", 4, DType::kOther},
};

const StoredType* FindStoredType(const std::string& name) {
  for (const StoredType& type : kStoredTypes) {
    if (name == type.name) return &type;
  }
  return nullptr;
}

// A tensor and where its bytes lie: [begin, end) of a file's data.
struct Entry {
  TensorView view;
  uint64_t begin = 0;
  uint64_t end = 0;
};

Entry ParseEntry(const std::string& path, const std::string& name, const Json& value,
                 uint64_t data_size) {
  const std::string where = "tensor " + base::Quote(name);
  if (!value.is_object()) Bad(path, where + " is not described by a JSON object");
  const Json* dtype = value.Find("dtype");
  const Json* shape = value.Find("shape");
  const Json* offsets = value.Find("data_offsets");
  if (dtype == nullptr || !dtype->is_string()) Bad(path, where + " has no text 'dtype'");
  if (shape == nullptr || !shape->is_array()) Bad(path, where + " has no list 'shape'");
  if (offsets == nullptr || !offsets->is_array() || offsets->array().size() != 2) {
    Bad(path, where + " has no pair 'data_offsets'");
  }

  Entry entry;
  entry.view.name = name;
  if (shape->array().size() > kMaxDims) {
    Bad(path, where + " has " + std::to_string(shape->array().size()) + " dimensions, at most " +
                  std::to_string(kMaxDims) + " are allowed");
  }
  uint64_t elements = 1;
  bool too_large = false;
  for (const Json& size : shape->array()) {
    if (!size.is_integer() || size.integer() < 0) {
      Bad(path, where + " has the size " + size.Describe() +
                    " in its shape, which must be an integer >= 0");
    }
    entry.view.shape.push_back(size.integer());
    too_large |= __builtin_mul_overflow(elements, static_cast<uint64_t>(size.integer()), &elements);
  }
  if (too_large || elements > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    Bad(path, where + " of shape " + entry.view.ShapeText() + " has too many elements");
  }

  for (const Json& offset : offsets->array()) {
    if (!offset.is_integer() || offset.integer() < 0) {
      Bad(path, where + " has the offset " + offset.Describe() + ", which must be an integer >= 0");
    }
  }
  entry.begin = static_cast<uint64_t>(offsets->array()[0].integer());
  entry.end = static_cast<uint64_t>(offsets->array()[1].integer());
  const std::string range =
      "[" + std::to_string(entry.begin) + ", " + std::to_string(entry.end) + ")";
  if (entry.begin > entry.end) Bad(path, where + " claims the impossible bytes " + range);
  if (entry.end > data_size) {
    Bad(path, where + " claims the bytes " + range + " where only " + std::to_string(data_size) +
                  " are; the file is truncated or damaged");
  }

  const StoredType* type = FindStoredType(dtype->string());
  entry.view.dtype = type == nullptr ? DType::kOther : type->dtype;
  if (!IsFloat(entry.view.dtype)) entry.view.stored_type = dtype->string();
  if (type != nullptr) {
    uint64_t bits = 0;
    if (__builtin_mul_overflow(elements, type->bits, &bits) || bits % 8 != 0 ||
        bits / 8 != entry.end - entry.begin) {
      Bad(path, where + " of shape " + entry.view.ShapeText() + " and type " + type->name +
                    " does not fill its bytes " + range);
    }
  }
  return entry;
}

// Reads and checks the header of a mapped file; entries come in the order of their bytes.
std::vector<Entry> ParseHeader(const MappedFile& file) {
  const std::string& path = file.path();
  if (file.size() < kLengthBytes) {
    Bad(path, "has " + std::to_string(file.size()) +
                  " bytes, too few for a safetensors file; it is truncated or something else");
  }
  uint64_t header_size = 0;
  for (uint64_t i = 0; i < kLengthBytes; ++i) {
    header_size |= static_cast<uint64_t>(static_cast<unsigned char>(file.data()[i])) << (8 * i);
  }
  const uint64_t rest = file.size() - kLengthBytes;
  if (header_size > kMaxHeaderBytes || header_size > rest) {
    Bad(path, "claims a header of " + std::to_string(header_size) + " bytes where " +
                  std::to_string(std::min(kMaxHeaderBytes, rest)) +
                  " are possible; it is truncated or no safetensors file");
  }
  const char* header = file.data() + kLengthBytes;
  const uint64_t data_size = rest - header_size;
  const Json json = ParseJson(header, static_cast<size_t>(header_size), path + ": the header");
  if (!json.is_object()) Bad(path, "the header is not a JSON object");

  std::vector<Entry> entries;
  for (const Json::Member& member : json.members()) {
    if (member.first == "__metadata__") {
      if (!member.second.is_object()) Bad(path, "'__metadata__' is not a JSON object");
      for (const Json::Member& item : member.second.members()) {
        if (!item.second.is_string()) {
          Bad(path, "'__metadata__' has the value " + item.second.Describe() + " for " +
                        base::Quote(item.first) + ", only texts are allowed");
        }
      }
      continue;
    }
    entries.push_back(ParseEntry(path, member.first, member.second, data_size));
    entries.back().view.data = header + header_size + entries.back().begin;
  }

  // The format lets tensors neither overlap nor leave a gap, so any lost or added byte shows.
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  uint64_t covered = 0;
  const Entry* previous = nullptr;
  for (const Entry& entry : entries) {
    if (entry.begin < covered) {
      Bad(path, "tensor " + base::Quote(entry.view.name) + " overlaps tensor " +
                    base::Quote(previous->view.name));
    }
    if (entry.begin > covered) {
      Bad(path, "bytes [" + std::to_string(covered) + ", " + std::to_string(entry.begin) +
                    ") before tensor " + base::Quote(entry.view.name) + " belong to no tensor");
    }
    covered = entry.end;
    previous = &entry;
  }
  if (covered != data_size) {
    Bad(path, "the last " + std::to_string(data_size - covered) + " bytes belong to no tensor");
  }
  return entries;
}

class SafetensorsSource : public TensorSource {
 public:
  // Adds the tensors of one file. `views` are final once every file is added.
  void AddFile(const std::string& path) {
    auto file = std::make_unique<MappedFile>(path);
    for (Entry& entry : ParseHeader(*file)) {
      const auto added = file_of_.emplace(entry.view.name, files_.size());
      if (!added.second) {
        Bad(path, "tensor " + base::Quote(entry.view.name) + " is also in " +
                      files_[added.first->second]->path());
      }
      tensors_.push_back(std::move(entry.view));
    }
    files_.push_back(std::move(file));
  }

  bool Has(const std::string& name) const { return file_of_.count(name) != 0; }

  const std::vector<TensorView>& tensors() const override { return tensors_; }

  void ReleaseBytes(const TensorView& tensor, uint64_t begin, uint64_t end) override {
    const auto found = file_of_.find(tensor.name);
    if (found == file_of_.end()) return;
    const MappedFile& file = *files_[found->second];
    const uint64_t offset =
        static_cast<uint64_t>(static_cast<const char*>(tensor.data) - file.data());
    file.DropPages(offset + begin, offset + end);
  }

 private:
  std::vector<std::unique_ptr<MappedFile>> files_;
  std::map<std::string, size_t> file_of_;  // a tree: hostile names cannot make it slow
  std::vector<TensorView> tensors_;
};

bool Exists(const std::string& path) {
  struct stat status;
  // Anything but "there is no such file" (a symlink loop, no permission) is for the opening to say.
  return stat(path.c_str(), &status) == 0 || errno != ENOENT;
}

// A plain name in the index's directory: an index must not make the engine read anything else. And one
// that is fit for a message, because the system's errors name the file.
bool IsShardName(const std::string& name) {
  if (name.empty() || name.size() > kMaxShardName || name == "." || name == "..") return false;
  return std::all_of(name.begin(), name.end(),
                     [](char c) { return c >= 0x20 && c < 0x7f && c != '/' && c != '\\'; });
}

std::unique_ptr<TensorSource> OpenShards(const std::string& directory,
                                         const std::string& index_path) {
  const std::string text = ReadTextFile(index_path, kMaxIndexBytes);
  const Json json = ParseJson(text.data(), text.size(), index_path);
  const Json* map = json.Find("weight_map");
  if (map == nullptr || !map->is_object()) Bad(index_path, "has no object 'weight_map'");
  std::set<std::string> shards;
  for (const Json::Member& member : map->members()) {
    if (!member.second.is_string()) {
      Bad(index_path, "tensor " + base::Quote(member.first) + " has the shard " +
                          member.second.Describe() + ", which must be a file name");
    }
    const std::string& shard = member.second.string();
    if (!IsShardName(shard)) {
      Bad(index_path, "the shard " + base::Quote(shard) + " of tensor " +
                          base::Quote(member.first) +
                          " is not a plain file name of printable ASCII characters");
    }
    shards.insert(shard);
  }
  auto source = std::make_unique<SafetensorsSource>();
  for (const std::string& shard : shards) source->AddFile(directory + "/" + shard);
  for (const Json::Member& member : map->members()) {
    if (!source->Has(member.first)) {
      Bad(index_path, "tensor " + base::Quote(member.first) + " is not in its shard " +
                          base::Quote(member.second.string()));
    }
  }
  return source;
}

}  // namespace

std::unique_ptr<TensorSource> OpenSafetensors(const std::string& path) {
  auto source = std::make_unique<SafetensorsSource>();
  source->AddFile(path);
  return source;
}

std::unique_ptr<TensorSource> OpenCheckpoint(const std::string& directory) {
  struct stat status;
  if (stat(directory.c_str(), &status) != 0) {
    const int error = errno;
    throw base::Error(FASTGEN_NOT_FOUND, directory + ": the model directory cannot be opened: " +
                                             base::ErrnoText(error));
  }
  if (!S_ISDIR(status.st_mode)) {
    throw base::Error(FASTGEN_NOT_FOUND, directory + ": is not a directory");
  }
  const std::string single = directory + "/model.safetensors";
  if (Exists(single)) return OpenSafetensors(single);
  const std::string index = single + ".index.json";
  if (Exists(index)) return OpenShards(directory, index);
  std::string hint;
  for (const char* other : {"model_state.pdparams", "pytorch_model.bin"}) {
    if (hint.empty() && Exists(directory + "/" + other)) {
      hint = std::string("; it has ") + other + ", which must be converted first";
    }
  }
  throw base::Error(
      FASTGEN_NOT_FOUND,
      directory + ": has neither model.safetensors nor model.safetensors.index.json" + hint);
}

}  // namespace fastgen::io
