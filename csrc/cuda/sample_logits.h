// Pieces of the sampling kernel that know no blocks' division of work: the logits processors, the
// draw, float arithmetic that gives what the host's gives, masses as integers.
#pragma once

#include <cfloat>
#include <cstdint>

#include "cuda/types.h"

namespace fastgen {
namespace cuda {

// As in engine/logits_processing.cc: the lowest finite number, not -inf.
constexpr float kMasked = -FLT_MAX;

// Applies the logits processors to logits[0, count) of the ids from `begin` on. To be called by all
// threads of a block that has seen the logits written; ends with all of them seeing the result.
// `seen` is shared memory of `words` words.
__device__ inline void ProcessLogits(const Slot& slot, float* logits, int32_t begin, int32_t count,
                                     uint32_t* seen, int32_t words) {
  const SamplingParams& params = slot.sampling;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const auto threads = static_cast<int32_t>(blockDim.x);
  const auto owns = [begin, count](int32_t token) {
    return static_cast<uint32_t>(token - begin) < static_cast<uint32_t>(count);
  };
  const int32_t length = slot.length;
  const int64_t min_total = static_cast<int64_t>(slot.prompt_length) + params.min_length;
  const int64_t max_total = static_cast<int64_t>(slot.prompt_length) + params.max_length;

  if (params.min_length > 0 && owns(params.eos_token_id) && length < min_total) {
    if (thread == 0) logits[params.eos_token_id - begin] = kMasked;
    __syncthreads();
  }
  if (params.repetition_penalty != 1.0f) {
    // Every distinct token once: whoever sets its bit in a window of ids.
    const int32_t window = words * 32;
    for (int64_t first = begin; first < static_cast<int64_t>(begin) + count; first += window) {
      for (int32_t i = thread; i < words; i += threads) seen[i] = 0;
      __syncthreads();
      for (int32_t i = thread; i < length; i += threads) {
        const int32_t token = slot.tokens[i];
        if (!owns(token) || token < first || token - first >= window) continue;
        const auto bit = static_cast<int32_t>(token - first);
        if (atomicOr(&seen[bit / 32], 1u << bit % 32) >> bit % 32 & 1u) continue;
        const float logit = logits[token - begin];
        logits[token - begin] = logit < 0.0f ? __fmul_rn(logit, params.repetition_penalty)
                                             : __fdiv_rn(logit, params.repetition_penalty);
      }
      __syncthreads();
    }
  }
  if (params.no_repeat_ngram_size > 0 && length >= params.no_repeat_ngram_size) {
    const int32_t prefix = params.no_repeat_ngram_size - 1;
    const int32_t* const tail = slot.tokens + length - prefix;
    for (int32_t i = thread; i < length - prefix; i += threads) {
      const int32_t* const candidate = slot.tokens + i;
      int32_t equal = 0;
      while (equal < prefix && candidate[equal] == tail[equal]) ++equal;
      if (equal == prefix && owns(candidate[prefix])) logits[candidate[prefix] - begin] = kMasked;
    }
    __syncthreads();
  }
  const bool force_bos = params.forced_bos_token_id >= 0 && length == 1;
  const bool force_eos = params.forced_eos_token_id >= 0 && length == max_total - 1;
  if (force_bos || force_eos) {
    const int32_t forced = force_eos ? params.forced_eos_token_id : params.forced_bos_token_id;
    for (int32_t i = thread; i < count; i += threads) {
      logits[i] = i + begin == forced ? 0.0f : kMasked;
    }
    __syncthreads();
  }
}

// Word 0 of Philox-4x32-10 as engine/rng.h counts: u * 2^32 of the step's draw u.
__device__ inline uint32_t Draw(uint64_t seed, uint32_t sequence, uint32_t step) {
  uint32_t c0 = step, c1 = 0, c2 = sequence, c3 = 0;
  auto k0 = static_cast<uint32_t>(seed);
  auto k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// Division by one number, rounded as a division is: the steps that a division ends with, for what
// lies far from overflow and underflow.
class Divider {
 public:
  __device__ explicit Divider(float divisor)
      : divisor_(divisor),
        reciprocal_(1.0f / divisor),
        limit_(divisor > 1e-6f && divisor < 4e9f ? 1e30f : 0.0f) {}

  __device__ float operator()(float x) const {
    return IsInside(x) ? Inside(x) : __fdiv_rn(x, divisor_);
  }
  __device__ bool IsInside(float x) const { return fabsf(x) < limit_; }
  // For |x| < 1e30 and divisors from 1e-6 to 4e9.
  __device__ float Inside(float x) const {
    float quotient = __fmul_rn(x, reciprocal_);
    quotient = __fmaf_rn(__fmaf_rn(-quotient, divisor_, x), reciprocal_, quotient);
    return __fmaf_rn(__fmaf_rn(-quotient, divisor_, x), reciprocal_, quotient);
  }

 private:
  float divisor_, reciprocal_, limit_;
};

// 0 where the host's exponential is 0; NaN for NaN.
__device__ __forceinline__ float ExpOf(float x) { return x < -87.33f ? 0.0f : expf(x); }

// Probabilities as whole numbers of 2^-62, so that sums are exact in any order and any division of
// work: an error of less than 2^-62 each, and what is possible stays so.
constexpr float kMassScale = 4611686018427387904.0f;

__device__ __forceinline__ uint64_t MassOf(float prob) {
  const auto mass = static_cast<uint64_t>(__float2ull_rn(prob * kMassScale));
  return mass == 0 && prob > 0.0f ? 1 : mass;
}

// Orders like the logit; -0 equals 0. Above 0 for all but NaN.
__device__ __forceinline__ uint32_t OrderOf(float logit) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

__device__ __forceinline__ float LogitOf(uint32_t order) {
  return __uint_as_float(order ^ (order >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

template <typename T>
__device__ __forceinline__ T SumOverWarp(T value) {
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
  return value;
}

__device__ __forceinline__ uint64_t MaxOverWarp(uint64_t value) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// Sum of the values of this lane and those before it.
template <typename T>
__device__ __forceinline__ T ScanOverWarp(T value, int lane) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

}  // namespace cuda
}  // namespace fastgen
