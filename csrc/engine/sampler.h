// From logits to a token on the host, in the reference's order: logits processing (min_length,
// repetition_penalty, no_repeat_ngram, forced bos, forced eos), then greedy choice or
// temperature, softmax, top-k, top-p and one draw.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "engine/sampling_params.h"

namespace fastgen::engine {

// Tokens of a sequence so far, prompt first. All are in [0, vocab).
struct TokenHistory {
  const int32_t* tokens = nullptr;
  int32_t prompt_length = 0;
  int32_t length = 0;  // prompt and generated
};

// Applies the logits processors in place; logits [vocab]. Allocates nothing.
void ProcessLogits(const SamplingParams& params, const TokenHistory& history, float* logits,
                   int32_t vocab);

struct Choice {
  int32_t token = -1;
  float score = 0.0f;  // log-probability before temperature and filters, or the processed logit
};

// Chooses tokens; holds scratch only, so one per thread serves every sequence.
class Sampler {
 public:
  explicit Sampler(const cpu::Kernels& kernels) : kernels_(kernels) {}

  // `logits` [vocab] are processed; `step` counts this sequence's new tokens from 0.
  //
  // Greedy search takes the largest logit, the smallest id among equals. Sampling takes the first
  // kept token, in ascending id, whose running sum of probabilities (in double) exceeds u * m, with
  // u the step's draw and m the mass of what is kept. Where the softmax is not a distribution
  // (a logit is NaN or +inf, or logits / temperature overflows) it takes the greedy choice; NaN
  // logits never win, and token 0 stands for nothing but NaN.
  Choice Choose(const SamplingParams& params, uint32_t step, const float* logits, int32_t vocab);

  // The filters alone: `probs` [vocab] in [0, 1], what is not kept becomes 0, nothing is
  // renormalised. top-k keeps every probability >= the k-th largest. top-p walks what top-k left in
  // descending probability, ascending id among equals, and keeps a token iff the mass before it
  // (in double) is <= top_p.
  void Filter(const SamplingParams& params, float* probs, int32_t vocab);

 private:
  struct Candidate {
    float prob;
    int32_t token;
  };
  // The last token that a walk in descending order keeps.
  struct Cut {
    float prob;
    int32_t token;
  };

  // Walks `probs` in descending order, ascending id among equals, adding up weight(prob), and
  // returns the last token before which the sum is <= limit. Tokens below `floor` may be passed
  // over: the caller knows that the walk ends before them.
  template <typename Weight>
  Cut FindCut(const float* probs, int32_t vocab, double limit, float floor, const Weight& weight);
  // The k-th largest of `probs`, counting equals.
  float KthLargest(const float* probs, int32_t vocab, int32_t k);
  void KeepTopP(float top_p, float* probs, int32_t vocab);
  // Returns -1 when `probs` has no positive finite mass.
  int32_t Draw(double uniform, const float* probs, int32_t vocab);

  const cpu::Kernels& kernels_;
  std::vector<float> probs_;
  std::vector<float> largest_;
  std::vector<Candidate> candidates_;
  std::vector<double> block_sums_;
};

}  // namespace fastgen::engine
