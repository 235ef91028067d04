// A network on a device: what sessions share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "engine/config.h"
#include "engine/device.h"
#include "io/tensor.h"

namespace fastgen::engine {

// Thread-safe: the configuration is constant and the device takes one call at a time.
class Model {
 public:
  Model(const ModelConfig& config, std::unique_ptr<Device> device)
      : config_(config), device_(std::move(device)) {}

  // Reads an exported directory (one with a fastgen.json) or a HuggingFace GPT-2 directory. Throws
  // base::Error: kNotFound, kBadFile, kUnsupported, kOutOfMemory.
  static std::shared_ptr<Model> Load(const std::string& directory, const DeviceOptions& options);

  // Packs tensors in memory, which are not needed afterwards.
  static std::shared_ptr<Model> Create(const ModelConfig& config, io::TensorSource& tensors,
                                       const DeviceOptions& options);

  const ModelConfig& config() const { return config_; }
  Device& device() const { return *device_; }

  // Logits after every token of a sequence; logits [length, vocab]. Throws Error(kInvalidArgument)
  // unless 1 <= length <= max_positions and every token is in the vocabulary.
  void Logits(const int32_t* tokens, size_t length, float* logits) const;

 private:
  const ModelConfig config_;
  const std::unique_ptr<Device> device_;
};

}  // namespace fastgen::engine
