// What becomes of a chosen token: it is appended to its sequence, and the host is told.
#pragma once

#include "cuda/arch.h"
#include "cuda/kernels.h"

namespace fastgen {
namespace cuda {

// In one thread of a row; the token is -1 where there is none.
struct Chosen {
  int32_t token;
  float score;
};

// Says what a row came to, by one thread.
static __device__ __forceinline__ void Report(const SampleArgs& args, int32_t row, int32_t step,
                                              const Chosen& chosen, int32_t finished) {
  const auto place = static_cast<int64_t>(step % args.result_steps) * args.result_rows + row;
  StepResult* const result = args.results + place;
#if FASTGEN_ARCH_HAS_EXCHANGE && CUDART_VERSION >= 12030
  // All of it in one store, so that `ready` is not there without the rest.
  asm volatile(
      "{\n"
      ".reg .b64 low, high;\n"
      ".reg .b128 whole;\n"
      "mov.b64 low, {%1, %2};\n"
      "mov.b64 high, {%3, %4};\n"
      "mov.b128 whole, {low, high};\n"
      "st.relaxed.sys.global.b128 [%0], whole;\n"
      "}\n" ::"l"(result),
      "r"(chosen.token), "f"(chosen.score), "r"(finished), "r"(step + 1)
      : "memory");
#else
  volatile StepResult* const fields = result;
  fields->token = chosen.token;
  fields->score = chosen.score;
  fields->finished = finished;
  __threadfence_system();
  fields->ready = step + 1;
#endif
}

// Whether a sequence ends with its next token.
static __device__ __forceinline__ bool Ends(const Slot& before, int32_t token) {
  const int32_t new_tokens = before.length - before.prompt_length;
  return token == before.sampling.eos_token_id || new_tokens + 1 >= before.sampling.max_length;
}

// Appends it, by one thread.
static __device__ __forceinline__ void Append(const SampleArgs& args, const Slot& before,
                                              int32_t slot_index, int32_t token, int32_t finished) {
  Slot* const slot = args.slots + slot_index;
  before.tokens[before.length] = token;
  slot->length = before.length + 1;
  slot->finished = finished;
}

}  // namespace cuda
}  // namespace fastgen
