// Rows of float32 on their way to 16 bits (PackedRows), for all kernels that write them: the same
// numbers give the same bits everywhere.
#pragma once

#include "cuda/hopper.h"
#include "cuda/kernels.h"
#include "cuda/linear_weights.h"
#include "cuda/mma.h"
#include "cuda/row.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {

// Lanes that share a part of a row, and the columns that each of them has.
constexpr int kPartLanes = 16;
constexpr int kLaneColumns = 4;
static_assert(kPartLanes * kLaneColumns == kPartColumns, "a half of a warp has a part");

// Two neighbouring columns times a number each, which is 1 where there is no norm.
template <typename Element>
__device__ __forceinline__ uint32_t PackTwo(float first, float second, float first_weight,
                                            float second_weight) {
  const float inverse = 1.0f / linear_weights::UnitOf(Element());
  return RoundPairFinite<Element>(__fmul_rn(first, __fmul_rn(first_weight, inverse)),
                                  __fmul_rn(second, __fmul_rn(second_weight, inverse)));
}

// A part, of sums of `count` numbers' differences to one of them and of the squares of these.
__device__ __forceinline__ float2 JoinedPart(float pivot, float sum, float squares, int32_t count) {
  const float off = __fdividef(sum, static_cast<float>(count));
  return make_float2(pivot + off, fmaxf(fmaf(-sum, off, squares), 0.0f));
}

// What a norm needs of a part of a row, of which the first `count` columns are there. Differences to
// the first column are summed: they are no larger than what the part's own spread makes of them.
__device__ __forceinline__ float2 PartOf(const float (&x)[kLaneColumns], int32_t count,
                                         int32_t lane) {
  const float pivot = __shfl_sync(0xffffffffu, x[0], lane & ~(kPartLanes - 1));
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const float d = lane % kPartLanes * kLaneColumns + i < count ? x[i] - pivot : 0.0f;
    sum += d;
    squares = fmaf(d, d, squares);
  }
#pragma unroll
  for (int offset = kPartLanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  }
  return JoinedPart(pivot, sum, squares, count);
}

// Sums of several parts: about the first one's mean, which none of them is far from.
struct PartSums {
  float pivot = 0.0f, sum = 0.0f, squares = 0.0f;

  __device__ __forceinline__ void Add(float2 part, float count) {
    const float distance = part.x - pivot;
    const float weighted = __fmul_rn(count, distance);
    sum += weighted;
    squares += fmaf(weighted, distance, part.y);
  }
  __device__ __forceinline__ NormSums Norm(float inverse_size, float eps) const {
    const float off = __fmul_rn(sum, inverse_size);
    const float variance = fmaxf(__fmul_rn(fmaf(-sum, off, squares), inverse_size), 0.0f);
    return NormSums{pivot + off, rsqrtf(variance + eps)};
  }
};

// Packs parts `part` and `part` + 1 of a row of 64 columns each, as far as it has them; by a warp.
template <typename Element>
__device__ __forceinline__ void PackParts(const float* x, int32_t size, const float* weight,
                                          int32_t part, const PackedRows& out, int32_t row,
                                          int32_t lane) {
  part += lane / kPartLanes;
  const int32_t n = part * kPartColumns + lane % kPartLanes * kLaneColumns;
  float value[kLaneColumns], factor[kLaneColumns];
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    value[i] = n + i < size ? x[n + i] : 0.0f;
    factor[i] = n + i < size && weight != nullptr ? __ldg(weight + n + i) : 1.0f;
  }
  if (n < size) {
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(out.data) + row * out.stride + n) =
        make_uint2(PackTwo<Element>(value[0], value[1], factor[0], factor[1]),
                   PackTwo<Element>(value[2], value[3], factor[2], factor[3]));
  }
  if (out.parts == nullptr) return;
  const int32_t count = max(1, min(size - part * kPartColumns, kPartColumns));
  const float2 sums = PartOf(value, count, lane);
  if (n < size && lane % kPartLanes == 0) out.parts[row * out.part_stride + part] = sums;
}

}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
