#include "engine/config.h"

#include <initializer_list>
#include <limits>

#include "base/error.h"
#include "cpu/cache_layout.h"
#include "io/json.h"
#include "io/mapped_file.h"
#include "io/quantized.h"

namespace fastgen::engine {

namespace {

using io::Json;

constexpr int64_t kMaxVocabSize = int64_t{1} << 24;
constexpr int64_t kMaxPositions = int64_t{1} << 20;
constexpr int64_t kMaxHiddenSize = 65536;
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxHeadSize = cpu::kMostHeadSize;
constexpr int64_t kMaxIntermediateSize = int64_t{1} << 20;

// Of `fastgen_weights`; docs/weights.md.
constexpr int64_t kWeightsVersion = 1;

constexpr uint64_t kMaxConfigBytes = uint64_t{16} << 20;

// bos_token_id and eos_token_id of transformers.GPT2Config when nobody sets them.
constexpr int64_t kDefaultSpecialToken = 50256;

// Where the limits are checked, and how the members are called there.
struct Checker {
  const std::string& where;
  fastgen_status status;

  [[noreturn]] void Fail(const std::string& what) const {
    throw base::Error(status, where + ": " + what);
  }

  void Size(const char* name, int64_t value, int64_t max) const {
    if (value < 1 || value > max) {
      Fail(std::string(name) + " is " + std::to_string(value) + ", it must be from 1 to " +
           std::to_string(max));
    }
  }

  void Token(const char* name, int64_t value, int64_t vocab_size) const {
    if (value < -1 || value >= vocab_size) {
      Fail(std::string(name) + " is " + std::to_string(value) + ", it must be from 0 to " +
           std::to_string(vocab_size - 1) + " (vocab_size - 1), or -1 for none");
    }
  }

  void HeadSize(int64_t hidden_size, int64_t num_heads, const char* hidden_name,
                const char* heads_name) const {
    if (hidden_size % num_heads != 0) {
      Fail(std::string(hidden_name) + " is " + std::to_string(hidden_size) +
           ", it must be a multiple of " + heads_name + ", which is " + std::to_string(num_heads));
    }
    if (hidden_size / num_heads > kMaxHeadSize) {
      Fail(std::string(hidden_name) + " / " + heads_name + " is " +
           std::to_string(hidden_size / num_heads) + ", it must be at most " +
           std::to_string(kMaxHeadSize));
    }
  }

  void Epsilon(const char* name, double value) const {
    // Written so that NaN fails, and tested as float32 too, because that is what the engine gets.
    if (!(value > 0.0 && value < 1.0) || static_cast<float>(value) == 0.0f) {
      Fail(std::string(name) + " is " + Json(value).Describe() + ", it must be between 0 and 1");
    }
  }
};

// The members of a HuggingFace configuration, with checks that name the file.
class HuggingFaceReader {
 public:
  HuggingFaceReader(const Json& json, const std::string& path)
      : json_(json), check_{path, FASTGEN_BAD_FILE} {}

  ModelConfig Read() const {
    if (!json_.is_object()) check_.Fail("is not a JSON object");
    CheckModelType();
    CheckVariants();

    ModelConfig config;
    config.vocab_size = Size("vocab_size", kMaxVocabSize);
    config.max_positions =
        Size(Given("n_positions") || !Given("n_ctx") ? "n_positions" : "n_ctx", kMaxPositions);
    config.hidden_size = Size("n_embd", kMaxHiddenSize);
    config.num_layers = Size("n_layer", kMaxLayers);
    config.num_heads = Size("n_head", kMaxHiddenSize);
    check_.HeadSize(config.hidden_size, config.num_heads, "n_embd", "n_head");
    config.intermediate_size =
        Given("n_inner") ? Size("n_inner", kMaxIntermediateSize) : 4 * config.hidden_size;
    if (const Json* eps = json_.Find("layer_norm_epsilon")) {
      if (!eps->is_number()) Wrong("layer_norm_epsilon", *eps, "a number");
      check_.Epsilon("layer_norm_epsilon", eps->number());
      config.layer_norm_eps = static_cast<float>(eps->number());
    }
    config.bos_token_id = Token("bos_token_id", config.vocab_size);
    config.eos_token_id = Token("eos_token_id", config.vocab_size);
    config.pad_token_id = Token("pad_token_id", config.vocab_size);
    if (Given("tie_word_embeddings")) {
      config.head = Flag("tie_word_embeddings", true) ? Head::kTied : Head::kSeparate;
    }
    if (Given("fastgen_weights")) config.weight_dtype = WeightType();
    return config;
  }

 private:
  [[noreturn]] void Wrong(const char* key, const Json& value, const std::string& wanted) const {
    check_.Fail(std::string(key) + " is " + value.Describe() + ", it must be " + wanted);
  }

  // In these files null means the same as not being there.
  bool Given(const char* key) const {
    const Json* value = json_.Find(key);
    return value != nullptr && !value->is_null();
  }

  bool Flag(const char* key, bool absent) const {
    if (!Given(key)) return absent;
    const Json* value = json_.Find(key);
    if (!value->is_bool()) Wrong(key, *value, "true or false");
    return value->boolean();
  }

  int32_t Size(const char* key, int64_t max) const {
    const Json* value = json_.Find(key);
    if (value == nullptr) {
      check_.Fail(std::string(key) + " is missing; a HuggingFace GPT-2 configuration has it");
    }
    if (!value->is_integer()) Wrong(key, *value, "an integer from 1 to " + std::to_string(max));
    check_.Size(key, value->integer(), max);
    return static_cast<int32_t>(value->integer());
  }

  int32_t Token(const char* key, int64_t vocab_size) const {
    if (!Given(key)) return -1;
    const Json* value = json_.Find(key);
    if (value->is_array()) {
      if (value->array().size() != 1) Wrong(key, *value, "one token id, not several");
      value = &value->array()[0];
    }
    if (!value->is_integer()) Wrong(key, *value, "an integer, a token id");
    const int64_t id = value->integer();
    // transformers writes its default even when the vocabulary is too small to have that token:
    // there it means that nobody chose one.
    if (id == kDefaultSpecialToken && id >= vocab_size) return -1;
    check_.Token(key, id, vocab_size);
    return static_cast<int32_t>(id);
  }

  void CheckModelType() const {
    if (Given("model_type")) {
      const Json* type = json_.Find("model_type");
      if (!type->is_string() || type->string() != "gpt2") {
        Wrong("model_type", *type, "'gpt2', the only model type that is supported");
      }
      return;
    }
    const Json* names = json_.Find("architectures");
    if (names != nullptr && names->is_array()) {
      for (const Json& name : names->array()) {
        if (name.is_string() && name.string().compare(0, 4, "GPT2") == 0) return;
      }
    }
    check_.Fail("model_type is missing and architectures names no GPT2 model; it must be 'gpt2'");
  }

  // What `fastgen convert --weight_dtype` says of the tensors.
  std::string WeightType() const {
    const Json& scheme = *json_.Find("fastgen_weights");
    if (!scheme.is_object()) Wrong("fastgen_weights", scheme, "an object");
    const auto member = [&](const char* key) {
      const Json* value = scheme.Find(key);
      if (value == nullptr) check_.Fail(std::string("fastgen_weights has no ") + key);
      return value;
    };
    const Json& version = *member("version");
    if (!version.is_integer() || version.integer() != kWeightsVersion) {
      Wrong("version of fastgen_weights", version,
            std::to_string(kWeightsVersion) + ", the one that this library reads");
    }
    const Json& type = *member("weight_dtype");
    for (const char* known : {"float16", "bfloat16", "int8", "int4"}) {
      if (!type.is_string() || type.string() != known) continue;
      const bool whole = std::string(known).compare(0, 3, "int") == 0;
      const Json* group = whole ? member("group_size") : nullptr;
      if (whole && (!group->is_integer() || group->integer() != io::kScaleGroup)) {
        Wrong("group_size of fastgen_weights", *group, std::to_string(io::kScaleGroup));
      }
      return known;
    }
    Wrong("weight_dtype of fastgen_weights", type, "'float16', 'bfloat16', 'int8' or 'int4'");
  }

  // Members that change what the network computes, and the values that the engine implements.
  void CheckVariants() const {
    if (Given("activation_function")) {
      const Json* name = json_.Find("activation_function");
      bool known = false;
      for (const char* tanh_gelu : {"gelu_new", "gelu_pytorch_tanh", "gelu_fast"}) {
        known |= name->is_string() && name->string() == tanh_gelu;
      }
      if (!known) {
        Wrong("activation_function", *name,
              "'gelu_new', 'gelu_pytorch_tanh' or 'gelu_fast' (GELU with tanh)");
      }
    }
    if (!Flag("scale_attn_weights", true)) {
      check_.Fail("scale_attn_weights is false, it must be true");
    }
    for (const char* key :
         {"scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"}) {
      if (Flag(key, false)) check_.Fail(std::string(key) + " is true, it must be false");
    }
  }

  const Json& json_;
  Checker check_;
};

// What the engine can run, whoever describes it.
void CheckMembers(const ModelConfig& config, const Checker& check) {
  check.Size("vocab_size", config.vocab_size, kMaxVocabSize);
  check.Size("max_positions", config.max_positions, kMaxPositions);
  check.Size("hidden_size", config.hidden_size, kMaxHiddenSize);
  check.Size("num_layers", config.num_layers, kMaxLayers);
  check.Size("num_heads", config.num_heads, kMaxHiddenSize);
  check.HeadSize(config.hidden_size, config.num_heads, "hidden_size", "num_heads");
  check.Size("intermediate_size", config.intermediate_size, kMaxIntermediateSize);
  check.Epsilon("layer_norm_eps", static_cast<double>(config.layer_norm_eps));
  check.Token("bos_token_id", config.bos_token_id, config.vocab_size);
  check.Token("eos_token_id", config.eos_token_id, config.vocab_size);
  check.Token("pad_token_id", config.pad_token_id, config.vocab_size);
}

}  // namespace

void CheckConfig(const ModelConfig& config, const std::string& where) {
  CheckMembers(config, Checker{where, FASTGEN_INVALID_ARGUMENT});
}

ModelConfig ReadHuggingFaceConfig(const std::string& path) {
  const std::string text = io::ReadTextFile(path, kMaxConfigBytes);
  return ParseHuggingFaceConfig(text.data(), text.size(), path);
}

ModelConfig ParseHuggingFaceConfig(const char* text, size_t size, const std::string& name) {
  const Json json = io::ParseJson(text, size, name);
  return HuggingFaceReader(json, name).Read();
}

ModelConfig ReadExportConfig(const Json& json, const std::string& path) {
  const Checker check{path, FASTGEN_BAD_FILE};
  const auto integer = [&](const char* key) {
    const Json* value = json.Find(key);
    if (value == nullptr || !value->is_integer() ||
        value->integer() > std::numeric_limits<int32_t>::max() ||
        value->integer() < std::numeric_limits<int32_t>::min()) {
      check.Fail(std::string(key) + " of config is " +
                 (value == nullptr ? "missing" : value->Describe()) +
                 ", it must be an integer of 32 bits");
    }
    return static_cast<int32_t>(value->integer());
  };
  ModelConfig config;
  config.vocab_size = integer("vocab_size");
  config.max_positions = integer("max_positions");
  config.hidden_size = integer("hidden_size");
  config.num_layers = integer("num_layers");
  config.num_heads = integer("num_heads");
  config.intermediate_size = integer("intermediate_size");
  config.bos_token_id = integer("bos_token_id");
  config.eos_token_id = integer("eos_token_id");
  config.pad_token_id = integer("pad_token_id");
  const Json* eps = json.Find("layer_norm_eps");
  if (eps == nullptr || !eps->is_number()) {
    check.Fail(std::string("layer_norm_eps of config is ") +
               (eps == nullptr ? "missing" : eps->Describe()) + ", it must be a number");
  }
  check.Epsilon("layer_norm_eps", eps->number());
  config.layer_norm_eps = static_cast<float>(eps->number());
  CheckMembers(config, check);
  return config;
}

}  // namespace fastgen::engine
