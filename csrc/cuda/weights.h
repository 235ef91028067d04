// The network's weights in device memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/check.h"
#include "cuda/types.h"
#include "engine/device_plugin.h"

namespace fastgen::cuda {

struct LayerWeights {
  Norm norm1, norm2;
  Matrix qkv, attention_out, feed_forward_in, feed_forward_out;
  // The biases of what prefill writes as `activation_dtype`; null where that is float32.
  const void* qkv_bias16 = nullptr;
  const void* feed_forward_in_bias16 = nullptr;
};

class Weights {
 public:
  // Reads, converts on the device, releases the source layer by layer. Throws base::Error.
  Weights(const engine::PluginConfig& config, DType dtype, DType activation_dtype,
          const engine::PluginWeights& source, cudaStream_t stream);

  const std::vector<LayerWeights>& layers() const { return layers_; }
  const Matrix& head() const { return head_; }
  const Matrix& embedding() const { return embedding_; }
  const Norm& final_norm() const { return final_norm_; }
  const float* positions() const { return positions_; }  // [max_positions, hidden]
  uint64_t bytes() const { return memory_.size(); }
  uint64_t step_bytes() const { return step_bytes_; }

 private:
  class Loader;

  DeviceMemory memory_;
  std::vector<LayerWeights> layers_;
  Matrix head_, embedding_;
  Norm final_norm_;
  const float* positions_ = nullptr;
  uint64_t step_bytes_ = 0;
};

// "float32", "float16", ...; throws base::Error for another name.
DType ParseWeightType(const std::string& name);
const char* TypeName(DType dtype);

}  // namespace fastgen::cuda
