#include "io/export.h"

#include <utility>

#include "base/error.h"
#include "io/mapped_file.h"

namespace fastgen::io {

namespace {

constexpr const char* kFormat = "fastgen-export";
constexpr int64_t kFormatVersion = 1;
// A thousand layers take about three.
constexpr uint64_t kMaxManifestBytes = uint64_t{16} << 20;
constexpr size_t kMaxDims = 4;
constexpr int64_t kMaxOffset = int64_t{1} << 60;

class ManifestReader {
 public:
  ManifestReader(const Json& json, const std::string& path) : json_(json), path_(path) {}

  ExportManifest Read() const {
    if (!json_.is_object()) Bad("is not a JSON object");
    const Json* format = json_.Find("format");
    if (format == nullptr || !format->is_string() || format->string() != kFormat) {
      Bad(std::string("is no description of an export: format is ") +
          (format == nullptr ? "missing" : format->Describe()) + ", it must be '" + kFormat + "'");
    }
    const Json& version = Member("format_version");
    if (!version.is_integer() || version.integer() != kFormatVersion) {
      Bad("format_version is " + version.Describe() + ", this library reads version " +
          std::to_string(kFormatVersion));
    }
    ExportManifest manifest;
    manifest.path = path_;
    manifest.program = Text(Member("program"), "program");
    // Beside this file, under one of the names that the format has.
    if (manifest.program != "gpt.pdmodel" && manifest.program != "gpt.json") {
      Bad("program is " + base::Quote(manifest.program) +
          ", it must be 'gpt.pdmodel' or 'gpt.json'");
    }
    manifest.config = Object("config");
    manifest.generation = Object("generation");
    for (const Json& input : List("inputs")) {
      const Json* name = input.Find("name");
      if (name == nullptr) Bad("an entry of inputs has no name");
      manifest.inputs.push_back(Text(*name, "the name of an input"));
    }
    ReadTokenizer(&manifest);
    for (const Json& tensor : List("tensors")) manifest.tensors.push_back(ReadTensor(tensor));
    return manifest;
  }

 private:
  [[noreturn]] void Bad(const std::string& what) const {
    throw base::Error(FASTGEN_BAD_FILE, path_ + ": " + what);
  }

  const Json& Member(const char* key) const {
    const Json* value = json_.Find(key);
    if (value == nullptr) Bad(std::string(key) + " is missing");
    return *value;
  }

  const Json& Object(const char* key) const {
    const Json& value = Member(key);
    if (!value.is_object()) {
      Bad(std::string(key) + " is " + value.Describe() + ", it must be a JSON object");
    }
    return value;
  }

  const std::vector<Json>& List(const char* key) const {
    const Json& value = Member(key);
    if (!value.is_array()) {
      Bad(std::string(key) + " is " + value.Describe() + ", it must be a list");
    }
    return value.array();
  }

  const std::string& Text(const Json& value, const std::string& what) const {
    if (!value.is_string()) Bad(what + " is " + value.Describe() + ", it must be a text");
    return value.string();
  }

  void ReadTokenizer(ExportManifest* manifest) const {
    const Json* tokenizer = json_.Find("tokenizer");
    if (tokenizer == nullptr || tokenizer->is_null()) return;
    const Json* tokens = tokenizer->Find("special_tokens");
    if (tokens == nullptr || !tokens->is_array()) Bad("tokenizer has no list of special_tokens");
    for (const Json& token : tokens->array()) {
      manifest->special_tokens.push_back(Text(token, "a special token"));
    }
    manifest->has_tokenizer = true;
  }

  StoredTensor ReadTensor(const Json& json) const {
    StoredTensor tensor;
    const Json* name = json.Find("name");
    if (name == nullptr) Bad("an entry of tensors has no name");
    tensor.view.name = Text(*name, "the name of a tensor");
    const std::string where = "tensor " + base::Quote(tensor.view.name);
    tensor.view.dtype = ReadType(json.Find("dtype"), where);
    const Json* shape = json.Find("shape");
    if (shape == nullptr || !shape->is_array() || shape->array().size() > kMaxDims) {
      Bad(where + " has no list 'shape' of at most " + std::to_string(kMaxDims) + " sizes");
    }
    for (const Json& size : shape->array()) {
      if (!size.is_integer() || size.integer() < 1) {
        Bad(where + " has the size " + size.Describe() +
            " in its shape, which must be an integer >= 1");
      }
      tensor.view.shape.push_back(size.integer());
    }
    const Json* offset = json.Find("offset");
    if (offset == nullptr || !offset->is_integer() || offset->integer() < 0 ||
        offset->integer() > kMaxOffset) {
      Bad(where + " has no integer 'offset' >= 0");
    }
    tensor.offset = static_cast<uint64_t>(offset->integer());
    return tensor;
  }

  DType ReadType(const Json* json, const std::string& where) const {
    if (json != nullptr && json->is_string()) {
      for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
        if (json->string() == DTypeName(dtype)) return dtype;
      }
    }
    Bad(where + " has the dtype " + (json == nullptr ? "null" : json->Describe()) +
        ", it must be 'float32', 'float16' or 'bfloat16'");
  }

  const Json& json_;
  const std::string& path_;
};

}  // namespace

ExportManifest ReadExportManifest(const std::string& directory) {
  const std::string path = directory + "/" + kManifestName;
  const std::string text = ReadTextFile(path, kMaxManifestBytes);
  const Json json = ParseJson(text.data(), text.size(), path);
  return ManifestReader(json, path).Read();
}

std::unique_ptr<TensorSource> OpenExport(const std::string& directory,
                                         const ExportManifest& manifest) {
  return OpenPdiparams(directory + "/" + kParametersName, manifest.tensors);
}

}  // namespace fastgen::io
