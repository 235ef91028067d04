// Tiny random GPT-2s: as tensors in memory, as an export and as a HuggingFace directory, written byte
// by byte from the formats' descriptions, so that the readers are not tested with their own words.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fastgen/fastgen.h"

namespace fastgen::tests {

struct TinyModel {
  struct Tensor {
    std::string name;  // HuggingFace's
    std::vector<int64_t> shape;
    std::vector<float> values;
  };

  fastgen_config config;
  std::vector<Tensor> tensors;
};

TinyModel MakeTinyModel(uint64_t seed, int32_t vocab_size = 23, int32_t max_positions = 40);

// To be given to fastgen_model_create(); points into `model`.
std::vector<fastgen_tensor> TensorsOf(const TinyModel& model);

// Where the headers of gpt.pdiparams lie.
struct ByteRange {
  uint64_t begin;
  uint64_t end;
};

// Writes fastgen.json, gpt.pdiparams and a tokenizer as `fastgen export` does: vocab.txt, merges.txt,
// special_tokens_map.json, tokenizer_config.json. Returns the record headers.
std::vector<ByteRange> WriteExport(const TinyModel& model, const std::string& directory);

// config.json and model.safetensors.
void WriteHuggingFace(const TinyModel& model, const std::string& directory);

// The same, rounded to a type as `fastgen convert --weight_dtype` does.
void WriteRounded(const TinyModel& model, const std::string& weight_dtype,
                  const std::string& directory);

// The file format alone: an 8-byte length, the header, the data.
std::string SafetensorsFile(const std::string& header, const std::string& data);

// vocab.txt of all single bytes and of what `merges` make; merges.txt.
struct TokenizerText {
  std::string vocab;
  std::string merges;
};
TokenizerText MakeTokenizerText();

}  // namespace fastgen::tests
