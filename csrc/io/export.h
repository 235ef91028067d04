// An exported directory: Paddle's program and parameters, and `fastgen.json` that describes them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "io/json.h"
#include "io/pdiparams.h"
#include "io/tensor.h"

namespace fastgen::io {

constexpr const char* kManifestName = "fastgen.json";
constexpr const char* kParametersName = "gpt.pdiparams";

// `fastgen.json`, checked as far as files go. What the numbers mean is the engine's to check.
struct ExportManifest {
  std::string path;                 // of fastgen.json, for messages
  std::string program;              // file name of the program: "gpt.pdmodel" or "gpt.json"
  Json config;                      // object: sizes and special tokens
  Json generation;                  // object: the options that the export was made with
  std::vector<std::string> inputs;  // names of the program's feeds, in order
  bool has_tokenizer = false;       // vocab.txt and merges.txt belong to it
  std::vector<std::string> special_tokens;
  std::vector<StoredTensor> tensors;
};

// Reads `directory`/fastgen.json. Throws base::Error: kNotFound, or kBadFile with what is wrong.
ExportManifest ReadExportManifest(const std::string& directory);

// Maps `directory`/gpt.pdiparams, see OpenPdiparams().
std::unique_ptr<TensorSource> OpenExport(const std::string& directory,
                                         const ExportManifest& manifest);

}  // namespace fastgen::io
