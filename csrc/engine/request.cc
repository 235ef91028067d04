#include "engine/request.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>

#include "base/error.h"

namespace fastgen::engine {
namespace {

// More sequences of one prompt than this are a mistake in units, not a request.
constexpr int32_t kMaxReturnSequences = 65536;

[[noreturn]] void Fail(const std::string& message) {
  throw base::Error(FASTGEN_INVALID_ARGUMENT, message);
}

// The shortest text that reads back as the same float: 0.1, not 0.100000001.
std::string Text(float value) {
  char buffer[32];
  for (int digits = 6; digits <= 9; ++digits) {
    std::snprintf(buffer, sizeof buffer, "%.*g", digits, static_cast<double>(value));
    if (std::strtof(buffer, nullptr) == value) break;
  }
  return buffer;
}

void CheckAtLeast(const char* name, int32_t value, int32_t least, const char* note) {
  if (value < least) {
    Fail(std::string(name) + " is " + std::to_string(value) + ", it must be at least " +
         std::to_string(least) + note);
  }
}

void CheckPositive(const char* name, float value) {
  // Written so that NaN fails.
  if (!(value > 0.0f && std::isfinite(value))) {
    Fail(std::string(name) + " is " + Text(value) + ", it must be a finite number above 0");
  }
}

void CheckTokenOption(const char* name, int32_t token, int32_t vocab_size) {
  if (token < -1 || token >= vocab_size) {
    Fail(std::string(name) + " is " + std::to_string(token) + ", it must be from 0 to " +
         std::to_string(vocab_size - 1) + " (vocab_size - 1), or -1 for none");
  }
}

void CheckLength(const ModelConfig& config, size_t length, int32_t max_length) {
  if (length == 0) Fail("the prompt is empty, it must have at least one token");
  const auto positions = static_cast<uint64_t>(config.max_positions);
  // Not their sum, which may be more than a number holds.
  if (length < positions && static_cast<uint64_t>(max_length) <= positions - length) return;
  const std::string start = "the prompt has " + std::to_string(length) +
                            " tokens and max_length is " + std::to_string(max_length) +
                            ", which is more than the model's " + std::to_string(positions) +
                            " positions; ";
  if (length >= positions) {
    Fail(start + "the prompt may have at most " + std::to_string(positions - 1) + " tokens");
  }
  Fail(start + "the largest max_length for this prompt is " + std::to_string(positions - length));
}

}  // namespace

void CheckTokens(const char* what, const int32_t* tokens, size_t length, int32_t vocab_size) {
  for (size_t i = 0; i < length; ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocab_size) {
      Fail(std::string(what) + "[" + std::to_string(i) + "] is " + std::to_string(tokens[i]) +
           ", token ids must be from 0 to " + std::to_string(vocab_size - 1) + " (vocab_size - 1)");
    }
  }
}

void CheckRequest(const ModelConfig& config, const int32_t* prompt, size_t length,
                  const RequestOptions& options) {
  const SamplingParams& sampling = options.sampling;
  CheckAtLeast("max_length", sampling.max_length, 1, "");
  CheckAtLeast("min_length", sampling.min_length, 0, "");
  CheckAtLeast("top_k", sampling.top_k, 0, " (0 switches it off)");
  if (!(sampling.top_p >= 0.0f && sampling.top_p <= 1.0f)) {
    Fail("top_p is " + Text(sampling.top_p) + ", it must be from 0 to 1 (both switch it off)");
  }
  CheckPositive("temperature", sampling.temperature);
  CheckPositive("repetition_penalty", sampling.repetition_penalty);
  CheckAtLeast("no_repeat_ngram_size", sampling.no_repeat_ngram_size, 0, " (0 switches it off)");
  CheckAtLeast("num_return_sequences", options.num_return_sequences, 1, "");
  if (options.num_return_sequences > kMaxReturnSequences) {
    Fail("num_return_sequences is " + std::to_string(options.num_return_sequences) +
         ", it must be at most " + std::to_string(kMaxReturnSequences));
  }
  if (!sampling.sample && options.num_return_sequences > 1) {
    Fail("num_return_sequences is " + std::to_string(options.num_return_sequences) +
         ", it must be 1 for greedy search, which has one result");
  }
  const auto more = static_cast<uint32_t>(options.num_return_sequences - 1);
  if (sampling.sequence > std::numeric_limits<uint32_t>::max() - more) {
    Fail("first_sequence is " + std::to_string(sampling.sequence) + ", with " +
         std::to_string(options.num_return_sequences) + " sequences it must be at most " +
         std::to_string(std::numeric_limits<uint32_t>::max() - more));
  }
  CheckTokenOption("eos_token_id", sampling.eos_token_id, config.vocab_size);
  CheckTokenOption("forced_bos_token_id", sampling.forced_bos_token_id, config.vocab_size);
  CheckTokenOption("forced_eos_token_id", sampling.forced_eos_token_id, config.vocab_size);
  CheckLength(config, length, sampling.max_length);
  CheckTokens("prompt", prompt, length, config.vocab_size);
}

}  // namespace fastgen::engine
