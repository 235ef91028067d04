// The network's weights in device memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/check.h"
#include "cuda/types.h"
#include "engine/device_plugin.h"

namespace fastgen::cuda {

// What lets a product take its input before the norm.
struct FoldedNorm {
  const float* sums = nullptr;
  const float* bias = nullptr;
};

struct LayerWeights {
  Norm norm1, norm2;
  Matrix qkv, attention_out, feed_forward_in, feed_forward_out;
  // The biases of what prefill writes as `activation_dtype`; null where that is float32.
  const void* qkv_bias16 = nullptr;
  const void* feed_forward_in_bias16 = nullptr;
  // See FoldNorm; null where the weights are float32.
  FoldedNorm folded1, folded2;
};

class Weights {
 public:
  // Reads, converts on the device, releases the source layer by layer. Throws base::Error.
  Weights(const engine::PluginConfig& config, const engine::PluginOptions& options, DType dtype,
          DType activation_dtype, const engine::PluginWeights& source, cudaStream_t stream);

  const std::vector<LayerWeights>& layers() const { return layers_; }
  const Matrix& head() const { return head_; }
  const Matrix& embedding() const { return embedding_; }
  const Norm& final_norm() const { return final_norm_; }
  const FoldedNorm& folded_final() const { return folded_final_; }
  // Bytes from a layer's weights to those of the next, the same for all of them.
  int64_t layer_bytes() const { return layer_bytes_; }
  const float* positions() const { return positions_; }  // [max_positions, hidden]
  // What no magnitude of a layer's queries, keys, values or of its inner activations exceeds; 0 where the
  // weights are float32. Not a number if some weight is not.
  float most_normed() const { return most_normed_; }
  uint64_t bytes() const { return memory_.size(); }
  uint64_t step_bytes() const { return step_bytes_; }

 private:
  DeviceMemory memory_;
  std::vector<LayerWeights> layers_;
  Matrix head_, embedding_;
  Norm final_norm_;
  FoldedNorm folded_final_;
  int64_t layer_bytes_ = 0;
  const float* positions_ = nullptr;
  uint64_t step_bytes_ = 0;
  float most_normed_ = 0.0f;
};

// "float32", "float16", ...; throws base::Error for another name.
DType ParseWeightType(const std::string& name);
const char* TypeName(DType dtype);

}  // namespace fastgen::cuda
