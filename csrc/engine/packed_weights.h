// The one copy of a model's weights that the CPU device keeps: matrices in the panels of
// cpu/panels.h, vectors and positions in float32, everything in one mapping, in the order in which a step reads it.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/memory.h"
#include "cpu/panels.h"
#include "cpu/thread_pool.h"
#include "engine/config.h"
#include "engine/weights.h"

namespace fastgen::engine {

struct PackedMatrix {
  const char* panels = nullptr;  // num_panels() of them, see cpu/panels.h
  cpu::WeightType type = cpu::WeightType::kFloat32;
  int64_t panel_bytes = 0;
  const float* bias = nullptr;  // [panels() * cpu::kPanel], zero past `out`; null: none
  int64_t in = 0;
  int64_t out = 0;
  int64_t num_panels() const;
};

struct PackedLayer {
  const float* norm1_weight;
  const float* norm1_bias;
  PackedMatrix qkv;  // columns: queries, keys, values
  PackedMatrix attention_out;
  const float* norm2_weight;
  const float* norm2_bias;
  PackedMatrix feed_forward_in;
  PackedMatrix feed_forward_out;
};

class PackedWeights {
 public:
  // Packs and releases `source` piece by piece; `pool` packs with the threads that will read.
  PackedWeights(const ModelConfig& config, WeightSource& source, cpu::WeightType type,
                cpu::ThreadPool& pool, const Progress& progress);

  const std::vector<PackedLayer>& layers() const { return layers_; }
  const PackedMatrix& head() const { return head_; }  // [hidden, vocab], no bias
  const float* final_norm_weight() const { return final_norm_weight_; }
  const float* final_norm_bias() const { return final_norm_bias_; }

  // out[0, hidden) = embedding of `token` + embedding of `position`.
  void Embed(int32_t token, int32_t position, float* out) const;

  uint64_t bytes() const { return pages_.size(); }
  uint64_t step_bytes() const { return step_bytes_; }

 private:
  struct Carver;
  void PackRows(const PackedMatrix& matrix, WeightSource& source, cpu::ThreadPool& pool,
                bool embedding);

  const int64_t hidden_;
  cpu::Pages pages_;
  std::vector<PackedLayer> layers_;
  PackedMatrix head_;
  PackedMatrix embedding_;            // head_ itself when tied
  const float* positions_ = nullptr;  // [max_positions, hidden]
  float* final_norm_weight_ = nullptr;
  float* final_norm_bias_ = nullptr;
  uint64_t step_bytes_ = 0;
};

}  // namespace fastgen::engine
