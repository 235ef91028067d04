// What the attention kernels share: where a page holds a head, and numbers of the cache as float32.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/kernels.h"
#include "cuda/mma.h"
#include "cuda/row.h"

namespace fastgen {
namespace cuda {

__device__ inline float Infinity() { return __int_as_float(0x7f800000); }

// Elements from the start of a page to its keys (kv = 0) or values (kv = 1) of a head.
__host__ __device__ inline int64_t HeadOffset(const CacheLayout& cache, int layer, int kv,
                                              int head) {
  return ((static_cast<int64_t>(layer) * 2 + kv) * cache.num_heads + head) * kPage *
         cache.head_stride;
}

// 16 bytes of a type, as float32.
template <typename T>
struct Vector;

template <>
struct Vector<float> {
  static constexpr int kSize = 4;
  __device__ static void Unpack(const uint4& v, float* f) {
    f[0] = __uint_as_float(v.x);
    f[1] = __uint_as_float(v.y);
    f[2] = __uint_as_float(v.z);
    f[3] = __uint_as_float(v.w);
  }
};

template <>
struct Vector<__half> {
  static constexpr int kSize = 8;
  __device__ static void UnpackPair(uint32_t pair, float* f) {
    __half2 h;
    *reinterpret_cast<uint32_t*>(&h) = pair;
    const float2 both = __half22float2(h);
    f[0] = both.x;
    f[1] = both.y;
  }
  __device__ static void Unpack(const uint4& v, float* f) {
    UnpackPair(v.x, f);
    UnpackPair(v.y, f + 2);
    UnpackPair(v.z, f + 4);
    UnpackPair(v.w, f + 6);
  }
};

template <>
struct Vector<BFloat16> {
  static constexpr int kSize = 8;
  __device__ static void UnpackPair(uint32_t pair, float* f) {
    f[0] = __uint_as_float(pair << 16);
    f[1] = __uint_as_float(pair & 0xffff0000u);
  }
  __device__ static void Unpack(const uint4& v, float* f) {
    UnpackPair(v.x, f);
    UnpackPair(v.y, f + 2);
    UnpackPair(v.z, f + 4);
    UnpackPair(v.w, f + 6);
  }
};

// float16 of x; what is finite stays finite.
__device__ inline float SaturateHalf(float x) {
  return x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
}

// bfloat16 of x, to nearest even, saturating.
__device__ inline uint16_t ToBFloat16(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);  // NaN
  if (magnitude > 0x7f7f0000u && magnitude < 0x7f800000u) {
    return static_cast<uint16_t>((bits & 0x80000000u) >> 16 | 0x7f7fu);
  }
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// The prefill kernel of float32 arithmetic: any types, any architecture.
cudaError_t PrefillAttentionFma(const PrefillAttentionArgs& args, cudaStream_t stream);

}  // namespace cuda
}  // namespace fastgen
