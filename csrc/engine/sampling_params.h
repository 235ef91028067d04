// Checked options of one sequence: what logits processing and the sampler need.
#pragma once

#include <cstdint>

namespace fastgen::engine {

struct SamplingParams {
  bool sample = false;  // false: greedy search
  int32_t max_length = 20;
  int32_t min_length = 0;
  int32_t top_k = 0;   // 0 or >= vocab: off
  float top_p = 1.0f;  // 0 or 1: off
  float temperature = 1.0f;
  float repetition_penalty = 1.0f;   // 1: off
  int32_t no_repeat_ngram_size = 0;  // 0: off
  int32_t eos_token_id = -1;
  int32_t forced_bos_token_id = -1;
  int32_t forced_eos_token_id = -1;
  uint64_t seed = 0;
  uint32_t sequence = 0;  // high part of the Philox counter
};

}  // namespace fastgen::engine
