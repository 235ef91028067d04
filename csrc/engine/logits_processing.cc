// What the reference does to logits before it chooses, in its order and in float32.
#include <algorithm>
#include <cfloat>
#include <cstddef>

#include "engine/sampler.h"

namespace fastgen::engine {
namespace {

// The reference masks with the lowest finite number, not with -inf; a repetition penalty above 1
// or a temperature below 1 may still push it there.
constexpr float kMasked = -FLT_MAX;

// Every distinct token of the history, once. Tokens already seen are marked in a bitmap on the
// stack that covers a window of ids, so nothing is allocated; usual vocabularies are one window.
template <typename Visit>
void ForEachDistinctToken(const TokenHistory& history, int32_t vocab, const Visit& visit) {
  constexpr int32_t kWindow = 1 << 16;
  constexpr int32_t kWordBits = 64;
  uint64_t seen[kWindow / kWordBits];
  for (int32_t first = 0; first < vocab; first += kWindow) {
    const int32_t size = std::min(kWindow, vocab - first);
    std::fill_n(seen, (size + kWordBits - 1) / kWordBits, uint64_t{0});
    for (int32_t i = 0; i < history.length; ++i) {
      const int32_t token = history.tokens[i];
      if (token < first || token - first >= size) continue;
      const uint64_t bit = uint64_t{1} << (token - first) % kWordBits;
      uint64_t& word = seen[(token - first) / kWordBits];
      if (word & bit) continue;
      word |= bit;
      visit(token);
    }
    if (vocab - first <= kWindow) break;  // also keeps first + kWindow from overflowing
  }
}

void PenalizeRepetition(const TokenHistory& history, float penalty, float* logits, int32_t vocab) {
  ForEachDistinctToken(history, vocab, [&](int32_t token) {
    const float logit = logits[token];
    logits[token] = logit < 0.0f ? logit * penalty : logit / penalty;
  });
}

// Masks every token that would complete an n-gram that the history already has.
void BanRepeatedNgrams(const TokenHistory& history, int32_t ngram, float* logits) {
  const int32_t prefix = ngram - 1;
  if (history.length < ngram) return;
  const int32_t* tail = history.tokens + history.length - prefix;
  for (int32_t i = 0; i + prefix < history.length; ++i) {
    const int32_t* candidate = history.tokens + i;
    if (std::equal(tail, tail + prefix, candidate)) logits[candidate[prefix]] = kMasked;
  }
}

void ForceToken(int32_t token, float* logits, int32_t vocab) {
  std::fill_n(logits, vocab, kMasked);
  logits[token] = 0.0f;
}

}  // namespace

void ProcessLogits(const SamplingParams& params, const TokenHistory& history, float* logits,
                   int32_t vocab) {
  // 64-bit: limits are any int32 here, the position table is checked elsewhere.
  const int64_t min_total = static_cast<int64_t>(history.prompt_length) + params.min_length;
  const int64_t max_total = static_cast<int64_t>(history.prompt_length) + params.max_length;
  if (params.min_length > 0 && params.eos_token_id >= 0 && history.length < min_total) {
    logits[params.eos_token_id] = kMasked;
  }
  if (params.repetition_penalty != 1.0f) {
    PenalizeRepetition(history, params.repetition_penalty, logits, vocab);
  }
  if (params.no_repeat_ngram_size > 0) {
    BanRepeatedNgrams(history, params.no_repeat_ngram_size, logits);
  }
  if (params.forced_bos_token_id >= 0 && history.length == 1) {
    ForceToken(params.forced_bos_token_id, logits, vocab);
  }
  if (params.forced_eos_token_id >= 0 && history.length == max_total - 1) {
    ForceToken(params.forced_eos_token_id, logits, vocab);
  }
}

}  // namespace fastgen::engine
