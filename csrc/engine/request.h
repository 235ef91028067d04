// One request as it was asked for, and the checks that stand between it and the engine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/config.h"
#include "engine/sampling_params.h"

namespace fastgen::engine {

struct RequestOptions {
  SamplingParams sampling;  // seed and sequence: of the first returned sequence
  int32_t num_return_sequences = 1;
  bool has_seed = false;  // false: the session draws one
  bool keep_logits = false;
};

// Throws Error(kInvalidArgument) naming the first option, or the token of the prompt, that is
// outside what is allowed. `prompt` may be null when `length` is 0.
void CheckRequest(const ModelConfig& config, const int32_t* prompt, size_t length,
                  const RequestOptions& options);

// Throws Error(kInvalidArgument) naming the first token that is not in [0, vocab_size).
// `what` is what the tokens are called in the message.
void CheckTokens(const char* what, const int32_t* tokens, size_t length, int32_t vocab_size);

}  // namespace fastgen::engine
