#include "tiny_model.h"

#include <cstring>
#include <random>
#include <stdexcept>
#include <utility>

#include "temporary.h"

namespace fastgen::tests {
namespace {

constexpr int32_t kPaddleFloat32 = 5;

class Maker {
 public:
  explicit Maker(uint64_t seed) : random_(seed) {}

  void Add(const std::string& name, std::vector<int64_t> shape, float scale, float mean = 0.0f) {
    TinyModel::Tensor tensor{name, std::move(shape), {}};
    int64_t count = 1;
    for (const int64_t size : tensor.shape) count *= size;
    for (int64_t i = 0; i < count; ++i) {
      // Not std::normal_distribution, which every standard library makes in its own way.
      const double unit = static_cast<double>(random_() >> 11) * 0x1p-53;
      tensor.values.push_back(mean + scale * static_cast<float>(2.0 * unit - 1.0));
    }
    tensors.push_back(std::move(tensor));
  }

  std::vector<TinyModel::Tensor> tensors;

 private:
  std::mt19937_64 random_;
};

template <typename Integer>
void AppendLittleEndian(Integer value, std::string* out) {
  for (size_t i = 0; i < sizeof value; ++i) {
    out->push_back(static_cast<char>(static_cast<uint64_t>(value) >> (8 * i) & 0xff));
  }
}

void AppendVarint(uint64_t value, std::string* out) {
  for (; value > 0x7f; value >>= 7) out->push_back(static_cast<char>((value & 0x7f) | 0x80));
  out->push_back(static_cast<char>(value));
}

// Values of this machine, which is little-endian as the formats are.
void AppendValues(const std::vector<float>& values, std::string* out) {
  out->append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
}

std::string ShapeOf(const TinyModel::Tensor& tensor) {
  std::string text;
  for (const int64_t size : tensor.shape) {
    text += (text.empty() ? "" : ", ") + std::to_string(size);
  }
  return "[" + text + "]";
}

std::string Number(const char* name, int64_t value) {
  return "\"" + std::string(name) + "\": " + std::to_string(value);
}

void AppendUtf8(uint32_t code, std::string* out) {
  if (code < 0x80) {
    out->push_back(static_cast<char>(code));
  } else {
    out->push_back(static_cast<char>(0xc0 | code >> 6));
    out->push_back(static_cast<char>(0x80 | (code & 0x3f)));
  }
}

}  // namespace

TinyModel MakeTinyModel(uint64_t seed, int32_t vocab_size, int32_t max_positions) {
  TinyModel model;
  fastgen_config_init(&model.config);
  model.config.vocab_size = vocab_size;
  model.config.max_positions = max_positions;
  model.config.hidden_size = 12;
  model.config.num_layers = 2;
  model.config.num_heads = 2;
  model.config.intermediate_size = 20;
  model.config.eos_token_id = 0;
  const int64_t hidden = model.config.hidden_size;
  const int64_t inner = model.config.intermediate_size;
  Maker maker(seed);
  maker.Add("wte.weight", {vocab_size, hidden}, 1.0f);
  maker.Add("wpe.weight", {model.config.max_positions, hidden}, 0.5f);
  for (int32_t i = 0; i < model.config.num_layers; ++i) {
    const std::string layer = "h." + std::to_string(i) + ".";
    maker.Add(layer + "ln_1.weight", {hidden}, 0.2f, 1.0f);
    maker.Add(layer + "ln_1.bias", {hidden}, 0.2f);
    maker.Add(layer + "attn.c_attn.weight", {hidden, 3 * hidden}, 0.5f);
    maker.Add(layer + "attn.c_attn.bias", {3 * hidden}, 0.5f);
    maker.Add(layer + "attn.c_proj.weight", {hidden, hidden}, 0.5f);
    maker.Add(layer + "attn.c_proj.bias", {hidden}, 0.5f);
    maker.Add(layer + "ln_2.weight", {hidden}, 0.2f, 1.0f);
    maker.Add(layer + "ln_2.bias", {hidden}, 0.2f);
    maker.Add(layer + "mlp.c_fc.weight", {hidden, inner}, 0.5f);
    maker.Add(layer + "mlp.c_fc.bias", {inner}, 0.5f);
    maker.Add(layer + "mlp.c_proj.weight", {inner, hidden}, 0.5f);
    maker.Add(layer + "mlp.c_proj.bias", {hidden}, 0.5f);
  }
  maker.Add("ln_f.weight", {hidden}, 0.2f, 1.0f);
  maker.Add("ln_f.bias", {hidden}, 0.2f);
  model.tensors = std::move(maker.tensors);
  return model;
}

std::vector<fastgen_tensor> TensorsOf(const TinyModel& model) {
  std::vector<fastgen_tensor> tensors;
  for (const TinyModel::Tensor& from : model.tensors) {
    fastgen_tensor to = {};
    to.name = from.name.c_str();
    to.data = from.values.data();
    to.dtype = FASTGEN_FLOAT32;
    to.num_dims = static_cast<int32_t>(from.shape.size());
    std::copy(from.shape.begin(), from.shape.end(), to.shape);
    tensors.push_back(to);
  }
  return tensors;
}

std::vector<ByteRange> WriteExport(const TinyModel& model, const std::string& directory) {
  std::string parameters;
  std::string entries;
  std::vector<ByteRange> headers;
  for (const TinyModel::Tensor& tensor : model.tensors) {
    std::string desc = "\x08";
    AppendVarint(kPaddleFloat32, &desc);
    for (const int64_t size : tensor.shape) {
      desc += "\x10";
      AppendVarint(static_cast<uint64_t>(size), &desc);
    }
    const uint64_t begin = parameters.size();
    AppendLittleEndian(uint32_t{0}, &parameters);
    AppendLittleEndian(uint64_t{0}, &parameters);
    AppendLittleEndian(uint32_t{0}, &parameters);
    AppendLittleEndian(static_cast<int32_t>(desc.size()), &parameters);
    parameters += desc;
    headers.push_back({begin, parameters.size()});
    entries += (entries.empty() ? "" : ",\n  ") + std::string("{\"name\": \"") + tensor.name +
               "\", \"dtype\": \"float32\", \"shape\": " + ShapeOf(tensor) + ", " +
               Number("offset", static_cast<int64_t>(parameters.size())) + "}";
    AppendValues(tensor.values, &parameters);
  }
  const fastgen_config& c = model.config;
  const std::string manifest =
      "{\"format\": \"fastgen-export\", \"format_version\": 1, \"program\": \"gpt.pdmodel\",\n "
      "\"config\": {" +
      Number("vocab_size", c.vocab_size) + ", " + Number("max_positions", c.max_positions) + ", " +
      Number("hidden_size", c.hidden_size) + ", " + Number("num_layers", c.num_layers) + ", " +
      Number("num_heads", c.num_heads) + ", " + Number("intermediate_size", c.intermediate_size) +
      ", " + Number("bos_token_id", c.bos_token_id) + ", " +
      Number("eos_token_id", c.eos_token_id) + ", " + Number("pad_token_id", c.pad_token_id) +
      ", \"layer_norm_eps\": 1e-05},\n \"dtype\": \"float32\", \"generation\": {\"top_k\": 4},\n "
      "\"inputs\": [{\"name\": \"input_ids\"}, {\"name\": \"seq_len\"}],\n "
      "\"tokenizer\": {\"type\": \"byte-level-bpe\", \"special_tokens\": [\"<|endoftext|>\"]},\n "
      "\"tensors\": [\n  " +
      entries + "]}\n";
  const TokenizerText tokenizer = MakeTokenizerText();
  WriteFile(directory + "/fastgen.json", manifest);
  WriteFile(directory + "/gpt.pdiparams", parameters);
  WriteFile(directory + "/vocab.txt", tokenizer.vocab);
  WriteFile(directory + "/merges.txt", tokenizer.merges);
  WriteFile(
      directory + "/special_tokens_map.json",
      "{\"bos_token\": \"<|endoftext|>\", \"eos_token\": {\"content\": \"<|endoftext|>\"}}\n");
  WriteFile(directory + "/tokenizer_config.json", "{\"unk_token\": \"<|endoftext|>\"}\n");
  return headers;
}

std::string SafetensorsFile(const std::string& header, const std::string& data) {
  std::string file;
  AppendLittleEndian(static_cast<uint64_t>(header.size()), &file);
  return file + header + data;
}

namespace {

// A safetensors file that grows.
class SafetensorsWriter {
 public:
  void Add(const std::string& name, const char* dtype, const std::string& shape, const void* bytes,
           size_t size) {
    const size_t begin = data_.size();
    data_.append(static_cast<const char*>(bytes), size);
    header_ += (header_.empty() ? "{\"" : ", \"") + name + "\": {\"dtype\": \"" + dtype +
               "\", \"shape\": " + shape + ", \"data_offsets\": [" + std::to_string(begin) + ", " +
               std::to_string(data_.size()) + "]}";
  }
  std::string File() const { return SafetensorsFile(header_ + "}", data_); }

 private:
  std::string header_;
  std::string data_;
};

void AddFloats(const TinyModel::Tensor& tensor, SafetensorsWriter* file) {
  file->Add(tensor.name, "F32", ShapeOf(tensor), tensor.values.data(),
            tensor.values.size() * sizeof(float));
}

// config.json with more members, ", ..." or "".
void WriteConfig(const TinyModel& model, const std::string& more, const std::string& directory) {
  const fastgen_config& c = model.config;
  WriteFile(directory + "/config.json",
            "{\"model_type\": \"gpt2\", " + Number("vocab_size", c.vocab_size) + ", " +
                Number("n_positions", c.max_positions) + ", " + Number("n_embd", c.hidden_size) +
                ", " + Number("n_layer", c.num_layers) + ", " + Number("n_head", c.num_heads) +
                ", " + Number("n_inner", c.intermediate_size) + ", " +
                Number("eos_token_id", c.eos_token_id) + more + "}");
}

}  // namespace

void WriteHuggingFace(const TinyModel& model, const std::string& directory) {
  SafetensorsWriter file;
  for (const TinyModel::Tensor& tensor : model.tensors) AddFloats(tensor, &file);
  WriteFile(directory + "/model.safetensors", file.File());
  WriteConfig(model, "", directory);
}

void WriteRounded(const TinyModel& model, const std::string& weight_dtype,
                  const std::string& directory) {
  const bool whole = weight_dtype == "int8" || weight_dtype == "int4";
  const std::vector<fastgen_tensor> tensors = TensorsOf(model);
  SafetensorsWriter file;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TinyModel::Tensor& tensor = model.tensors[i];
    const bool table = tensor.name == "wte.weight";
    if (tensor.shape.size() != 2 || tensor.name == "wpe.weight") {
      AddFloats(tensor, &file);
      continue;
    }
    const std::string type = table && weight_dtype == "int4" ? "int8" : weight_dtype;
    const int64_t rows = tensor.shape[0], columns = tensor.shape[1];
    const int64_t groups = ((table ? columns : rows) + 31) / 32;
    std::vector<uint16_t> values(tensor.values.size()),
        scales(table ? rows * groups : groups * columns);
    if (fastgen_quantize(&tensors[i], table ? 1 : 0, type.c_str(), values.data(), scales.data()) !=
        FASTGEN_OK) {
      throw std::runtime_error(fastgen_last_error());
    }
    const auto shape = [](int64_t a, int64_t b) {
      return "[" + std::to_string(a) + ", " + std::to_string(b) + "]";
    };
    if (!whole) {
      file.Add(tensor.name, type == "float16" ? "F16" : "BF16", ShapeOf(tensor), values.data(),
               values.size() * 2);
      continue;
    }
    const int64_t packed = type == "int4" ? (rows + 1) / 2 : rows;
    file.Add(tensor.name + "." + type, type == "int4" ? "U8" : "I8", shape(packed, columns),
             values.data(), static_cast<size_t>(packed * columns));
    file.Add(tensor.name + ".scales", "F16", table ? shape(rows, groups) : shape(groups, columns),
             scales.data(), scales.size() * 2);
  }
  WriteFile(directory + "/model.safetensors", file.File());
  WriteConfig(model,
              ", \"fastgen_weights\": {" + Number("version", 1) + ", " + Number("group_size", 32) +
                  ", \"weight_dtype\": \"" + weight_dtype + "\"}",
              directory);
}

TokenizerText MakeTokenizerText() {
  TokenizerText text;
  text.vocab = "<|endoftext|>\n";
  uint32_t next = 256;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const bool visible = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad);
    AppendUtf8(visible ? byte : next++, &text.vocab);
    text.vocab += "\n";
  }
  text.merges = "#version: 0.2\n";
  const std::pair<const char*, const char*> merges[] = {
      {"r", "e"}, {"t", "u"}, {"re", "tu"}, {"r", "n"}, {"retu", "rn"}, {"\xc4\xa0", "a"}};
  for (const auto& [left, right] : merges) {
    text.vocab += std::string(left) + right + "\n";
    text.merges += std::string(left) + " " + right + "\n";
  }
  return text;
}

}  // namespace fastgen::tests
