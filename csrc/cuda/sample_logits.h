// Pieces of the sampling kernel that know no blocks' division of work: the logits processors, the
// draw, float arithmetic that gives what the host's gives, masses as integers.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "cuda/arch.h"
#include "cuda/types.h"

namespace fastgen {
namespace cuda {

// As in engine/logits_processing.cc: the lowest finite number, not -inf.
constexpr float kMasked = -FLT_MAX;

// Applies the logits processors to logits[0, count) of the ids from `begin` on. To be called by all
// threads of a block that has seen the logits written; ends with all of them seeing the result.
// `seen` is shared memory of `words` words.
// Out of line: most steps have none to apply, and their instructions are not to be fetched.
static __device__ __noinline__ void ProcessLogits(const Slot& slot, float* logits, int32_t begin,
                                                  int32_t count, uint32_t* seen, int32_t words) {
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

// Whether there is anything to apply.
__device__ __forceinline__ bool HasProcessors(const Slot& slot) {
  const SamplingParams& params = slot.sampling;
  const int32_t new_tokens = slot.length - slot.prompt_length;
  return new_tokens < params.min_length || params.repetition_penalty != 1.0f ||
         params.no_repeat_ngram_size > 0 || (params.forced_bos_token_id >= 0 && slot.length == 1) ||
         (params.forced_eos_token_id >= 0 && new_tokens == params.max_length - 1);
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

// The exponential of x <= 0: 0 where the host's is 0, NaN for NaN. The choice is a selection and no
// branch, so that several are under way at once.
__device__ __forceinline__ float ExpOf(float x) {
  float result;
  asm("{\n"
      ".reg .pred below;\n"
      "setp.lt.f32 below, %1, %2;\n"
      "selp.f32 %0, 0f00000000, %3, below;\n"
      "}\n"
      : "=f"(result)
      : "f"(x), "f"(-87.33f), "f"(expf(x)));
  return result;
}

// Exponentials, in [0, 1], and sums of them as whole numbers of 2^-bits, so that sums are exact in
// any order and any division of work. They are rounded up: what is possible stays so.
struct MassScale {
  float factor;  // 2^bits
  int32_t bits;
};

// A sum of `vocab` masses stays below 2^63.
inline MassScale MassScaleOf(int32_t vocab) {
  MassScale scale = {0.0f, 62};
  for (int64_t largest = 1; largest < vocab; largest *= 2) --scale.bits;
  if (scale.bits > 46) scale.bits = 46;
  scale.factor = std::ldexp(1.0f, scale.bits);
  return scale;
}

// A mass in two parts, high * 2^-23 + low * 2^-bits: sums of some need no 64 bits.
struct MassParts {
  uint32_t high, low;

  __device__ void Add(const MassParts& other) {
    high += other.high;
    low += other.low;
  }
  __device__ uint64_t Whole(MassScale scale) const {
    return (static_cast<uint64_t>(high) << (scale.bits - 23)) + low;
  }
};

// By additions that leave the whole number in the fraction.
__device__ __forceinline__ MassParts MassPartsOf(float exp, MassScale scale) {
  const float high = __fadd_rd(exp, 1.0f);
  const float rest = __fsub_rn(exp, __fsub_rn(high, 1.0f));  // exact, below 2^-23
  const float low = __fmaf_ru(rest, scale.factor, 8388608.0f);
  return {__float_as_uint(high) - 0x3F800000u, __float_as_uint(low) - 0x4B000000u};
}

__device__ __forceinline__ uint64_t MassOf(float exp, MassScale scale) {
  return MassPartsOf(exp, scale).Whole(scale);
}

// As a number; the scale is a power of 2.
__device__ __forceinline__ double SumOfMass(uint64_t mass, MassScale scale) {
  const float inverse = __uint_as_float(0x7F000000u - __float_as_uint(scale.factor));
  return static_cast<double>(mass) * static_cast<double>(inverse);
}

// The whole part of mass * draw / 2^32: a running sum is above the product when it is above this.
__device__ __forceinline__ uint64_t TargetOf(uint64_t mass, uint32_t draw) {
  return __umul64hi(mass, draw) << 32 | mass * draw >> 32;
}

// The whole part of mass * part, for masses below 2^63 and 0 < part < 1. What of `part` lies below
// 2^-62 is left out.
__device__ __forceinline__ uint64_t PartOf(uint64_t mass, float part) {
  const auto factor = static_cast<uint64_t>(__float2ull_rd(part * 4611686018427387904.0f));
  return __umul64hi(mass, factor) << 2 | mass * factor >> 62;
}

// largest + log(sum), for sums of 1 and more.
__device__ inline float LogOfSum(float largest, uint64_t mass, MassScale scale) {
  const double sum = SumOfMass(mass, scale);
  int exponent = (__double2hiint(sum) >> 20) - 1023;
  const int high = (__double2hiint(sum) & 0xFFFFF) | 0x3FF00000;
  auto fraction = static_cast<float>(__hiloint2double(high, __double2loint(sum)));  // [1, 2]
  if (fraction > 1.5f) {
    fraction *= 0.5f;
    ++exponent;
  }
  constexpr double kLog2 = 0.69314718055994531;
  return static_cast<float>(static_cast<double>(largest) +
                            (exponent * kLog2 + static_cast<double>(logf(fraction))));
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

__device__ __forceinline__ uint32_t SumOverWarp(uint32_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && FASTGEN_CUDA_HAS_11
  return __reduce_add_sync(kAllLanes, value);
#else
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
  return value;
#endif
}

// Of numbers whose sum is below 2^64, piece by piece.
__device__ __forceinline__ uint64_t SumOverWarp(uint64_t value) {
  constexpr int kPiece = 22;
  constexpr uint32_t kMask = (1u << kPiece) - 1;
  const uint32_t low = SumOverWarp(static_cast<uint32_t>(value) & kMask);
  const uint32_t middle = SumOverWarp(static_cast<uint32_t>(value >> kPiece) & kMask);
  const uint32_t high = SumOverWarp(static_cast<uint32_t>(value >> 2 * kPiece));
  return (static_cast<uint64_t>(high) << 2 * kPiece) + (static_cast<uint64_t>(middle) << kPiece) +
         low;
}

__device__ __forceinline__ uint32_t MaxOverWarp(uint32_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && FASTGEN_CUDA_HAS_11
  return __reduce_max_sync(kAllLanes, value);
#else
  for (int mask = 16; mask > 0; mask /= 2) {
    value = max(value, __shfl_xor_sync(kAllLanes, value, mask));
  }
  return value;
#endif
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
