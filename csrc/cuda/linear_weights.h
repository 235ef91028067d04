// Weights of 16 bits and fewer on their way to tensor cores, for the two kernels that use them
// (linear_mma.cu, linear_cluster.cu): a lane's bytes of a step as they come from memory, and the
// fragments that they become.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/mma.h"
#include "cuda/types.h"

namespace fastgen {
namespace cuda {
namespace linear_weights {

constexpr int kStepBytes = 64;  // of an output's weights: 16 of each of 4 lanes

// Types of weights. kPieces: pieces of 8 columns in 16 bytes. kSlotBytes: of a step of 8
// outputs in a ring.
struct Half {
  using Element = __half;
  static constexpr int kPieces = 1;
  static constexpr bool kScaled = false;
  static constexpr int kSlotBytes = 512;
};
struct Brain {
  using Element = BFloat16;
  static constexpr int kPieces = 1;
  static constexpr bool kScaled = false;
  static constexpr int kSlotBytes = 512;
};
struct Int8 {
  using Element = __half;
  static constexpr int kPieces = 2;
  static constexpr bool kScaled = true;
  static constexpr int kSlotBytes = 512 + 128;  // with a word of scales per lane
};
struct Int4 {
  using Element = __half;
  static constexpr int kPieces = 4;
  static constexpr bool kScaled = true;
  static constexpr int kSlotBytes = 512 + 128;  // with a word of scales per lane
};

#ifdef __CUDACC__

// float16 has x in units that let it be as large as 2^20.
constexpr float kUnit = 16.0f;
__device__ inline float UnitOf(__half) { return kUnit; }
__device__ inline float UnitOf(BFloat16) { return 1.0f; }

__device__ inline __half2 AsHalves(uint32_t bits) { return *reinterpret_cast<__half2*>(&bits); }

// (pair - minus) * scale
__device__ inline uint32_t HalfPair(uint32_t pair, uint32_t minus, __half2 scale) {
  __half2 product = __hmul2(__hsub2(AsHalves(pair), AsHalves(minus)), scale);
  return *reinterpret_cast<uint32_t*>(&product);
}

// The fragments of piece j of a lane's 16 bytes of a step. float16 numbers are built by their bits, as
// 1024 + q.
__device__ inline uint32_t WordOf(const uint4& raw, int i) {
  return i == 0 ? raw.x : i == 1 ? raw.y : i == 2 ? raw.z : raw.w;
}
__device__ inline void Unpack(Half, const uint4& raw, int, uint32_t, uint32_t (&b)[4]) {
  b[0] = raw.x, b[1] = raw.y, b[2] = raw.z, b[3] = raw.w;
}
__device__ inline void Unpack(Brain, const uint4& raw, int, uint32_t, uint32_t (&b)[4]) {
  b[0] = raw.x, b[1] = raw.y, b[2] = raw.z, b[3] = raw.w;
}
__device__ inline void Unpack(Int8, const uint4& raw, int j, uint32_t scale, uint32_t (&b)[4]) {
  const __half2 scales = AsHalves(scale | scale << 16);
  const uint32_t low = WordOf(raw, 2 * j) ^ 0x80808080u;
  const uint32_t high = WordOf(raw, 2 * j + 1) ^ 0x80808080u;
  b[0] = HalfPair(__byte_perm(low, 0x64646464u, 0x4140), 0x64806480u, scales);
  b[1] = HalfPair(__byte_perm(low, 0x64646464u, 0x4342), 0x64806480u, scales);
  b[2] = HalfPair(__byte_perm(high, 0x64646464u, 0x4140), 0x64806480u, scales);
  b[3] = HalfPair(__byte_perm(high, 0x64646464u, 0x4342), 0x64806480u, scales);
}
// Columns come in pairs (0, 4), (1, 5), (2, 6), (3, 7).
__device__ inline void Unpack(Int4, const uint4& raw, int j, uint32_t scale, uint32_t (&b)[4]) {
  const uint32_t bits = WordOf(raw, j);
  const __half2 scales = AsHalves(scale | scale << 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    b[i] = HalfPair((bits >> (4 * i) & 0x000f000fu) | 0x64006400u, 0x64086408u, scales);
  }
}

// Group of columns of the weights that lane `member` of four has of a step.
template <typename W>
__device__ inline int32_t GroupOf(int32_t step, int32_t member) {
  return W::kPieces == 2 ? step * 2 + member / 2 : step * 4 + member;
}

// Copies the word that holds the scale of output n; the array may end in its middle.
template <typename W>
__device__ inline void CopyScale(void* slot, const Matrix& w, int32_t n, int32_t step,
                                 int32_t member, bool valid) {
  const int32_t group = GroupOf<W>(step, member);
  const int64_t index = static_cast<int64_t>(n) * w.scale_stride + group;
  const int64_t count = static_cast<int64_t>(w.out) * w.scale_stride;
  const bool have = valid && group < w.scale_stride;
  const char* data = static_cast<const char*>(w.scales);
  const int32_t bytes = !have ? 0 : (index | 1) < count ? 4 : 2;
  StreamCopy4(slot, have ? data + (index & ~int64_t{1}) * 2 : data, bytes);
}

// Which half of the word it is, by the lowest bit of its index in the whole array.
template <typename W>
__device__ inline uint32_t ScaleIn(const char* slot, const Matrix& w, uint32_t n, int32_t step,
                                   int32_t member) {
  const uint32_t index = n * w.scale_stride + GroupOf<W>(step, member);
  return reinterpret_cast<const uint16_t*>(slot)[index & 1];
}

#endif  // __CUDACC__

}  // namespace linear_weights
}  // namespace cuda
}  // namespace fastgen
