// Shape of a GPT-2-family network, and where it is read from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "io/json.h"

namespace fastgen::engine {

// Which matrix turns the last hidden state into logits.
enum class Head {
  kAsStored,  // `lm_head` where there is one that differs from the word embedding
  kTied,      // the word embedding; a different `lm_head` is an error
  kSeparate,  // `lm_head`, which must be there
};

struct ModelConfig {
  int32_t vocab_size = 0;
  int32_t max_positions = 0;
  int32_t hidden_size = 0;
  int32_t num_layers = 0;
  int32_t num_heads = 0;
  int32_t intermediate_size = 0;
  float layer_norm_eps = 1e-5f;
  int32_t bos_token_id = -1;
  int32_t eos_token_id = -1;
  int32_t pad_token_id = -1;
  Head head = Head::kAsStored;
  // How matrices are stored, by what `fastgen_weights` of config.json says: "float16", "bfloat16", "int8"
  // or "int4" of docs/weights.md. Empty: as any float, and a model of them is float32 by default.
  std::string weight_dtype;

  int32_t head_size() const { return hidden_size / num_heads; }
};

// Throws Error(kInvalidArgument) naming the first member that is outside what the engine runs.
// `where` is put before the message, e.g. the file it came from.
void CheckConfig(const ModelConfig& config, const std::string& where);

// Reads `config.json` of a HuggingFace GPT-2 directory; `path` is the file. Throws
// Error(kNotFound), or Error(kBadFile) for anything that is not a GPT-2 (another model_type,
// another activation, missing or absurd sizes); what it returns passes CheckConfig().
ModelConfig ReadHuggingFaceConfig(const std::string& path);

// The same of a text, which messages call `name`.
ModelConfig ParseHuggingFaceConfig(const char* text, size_t size, const std::string& name);

// Reads the member `config` of an export's fastgen.json, whose names are those of ModelConfig;
// `path` is that file, for messages. Throws Error(kBadFile); what it returns passes CheckConfig().
ModelConfig ReadExportConfig(const io::Json& config, const std::string& path);

}  // namespace fastgen::engine
