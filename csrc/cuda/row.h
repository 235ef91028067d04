// What kernels do with one row: numbers of another type, where a token stands, its place in the
// cache, the sums of a layer norm.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/types.h"

namespace fastgen {
namespace cuda {

// ---- numbers: finite ones saturate, NaN stays ---------------------------------------------------

__device__ inline float HalfToFloat(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

__device__ inline uint16_t FloatToHalf(float x) {
  x = x > 65504.0f ? 65504.0f : x;
  x = x < -65504.0f ? -65504.0f : x;
  return __half_as_ushort(__float2half_rn(x));
}

__device__ inline float BrainToFloat(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

__device__ inline uint16_t FloatToBrain(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);  // NaN
  // From here on, rounding would give infinity.
  if (magnitude >= 0x7f7f8000u) return static_cast<uint16_t>((bits >> 16 & 0x8000u) | 0x7f7fu);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Elements of float32, float16 and bfloat16 arrays.
__device__ inline int32_t ElementBytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

__device__ inline float LoadElement(DType dtype, const void* data, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == DType::kFloat16 ? HalfToFloat(bits) : BrainToFloat(bits);
}

__device__ inline void StoreElement(DType dtype, void* data, int64_t index, float x) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[index] = x;
  } else {
    static_cast<uint16_t*>(data)[index] =
        dtype == DType::kFloat16 ? FloatToHalf(x) : FloatToBrain(x);
  }
}

// Four neighbours, aligned to their size.
__device__ inline float4 LoadFour(DType dtype, const void* data, int64_t index) {
  if (dtype == DType::kFloat32) {
    return *reinterpret_cast<const float4*>(static_cast<const float*>(data) + index);
  }
  const uint2 raw = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(data) + index);
  const uint16_t bits[4] = {static_cast<uint16_t>(raw.x), static_cast<uint16_t>(raw.x >> 16),
                            static_cast<uint16_t>(raw.y), static_cast<uint16_t>(raw.y >> 16)};
  if (dtype == DType::kFloat16) {
    return make_float4(HalfToFloat(bits[0]), HalfToFloat(bits[1]), HalfToFloat(bits[2]),
                       HalfToFloat(bits[3]));
  }
  return make_float4(BrainToFloat(bits[0]), BrainToFloat(bits[1]), BrainToFloat(bits[2]),
                     BrainToFloat(bits[3]));
}

#if FASTGEN_ARCH_HAS_MMA_K16
// x where it is at most `most` from zero, else the end of the range; NaN stays.
__device__ inline float Clamp(float x, float most) {
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(most));
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(-most));
  return x;
}
#endif

// Two numbers as a pair of 16 bits, the first in the lower half.
__device__ inline uint32_t HalfPair(float low, float high) {
#if FASTGEN_ARCH_HAS_MMA_K16
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;"
      : "=r"(pair)
      : "f"(Clamp(high, 65504.0f)), "f"(Clamp(low, 65504.0f)));
  return pair;
#else
  return FloatToHalf(low) | static_cast<uint32_t>(FloatToHalf(high)) << 16;
#endif
}

__device__ inline uint32_t BrainPair(float low, float high) {
#if FASTGEN_ARCH_HAS_MMA_K16
  constexpr float kMost = 3.3895313892515355e38f;  // the largest bfloat16
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
      : "=r"(pair)
      : "f"(Clamp(high, kMost)), "f"(Clamp(low, kMost)));
  return pair;
#else
  return FloatToBrain(low) | static_cast<uint32_t>(FloatToBrain(high)) << 16;
#endif
}

__device__ inline void StoreFour(DType dtype, void* data, int64_t index, float4 x) {
  if (dtype == DType::kFloat32) {
    *reinterpret_cast<float4*>(static_cast<float*>(data) + index) = x;
    return;
  }
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(data) + index) =
      dtype == DType::kFloat16 ? make_uint2(HalfPair(x.x, x.y), HalfPair(x.z, x.w))
                               : make_uint2(BrainPair(x.x, x.y), BrainPair(x.z, x.w));
}

// ---- rows of a batch ----------------------------------------------------------------------------

// Position of the row's token in its slot, or -1 where there is nothing to do.
__device__ inline int32_t PositionOf(const Row& row, const Slot* slots) {
  if (row.slot < 0) return -1;
  if (row.position >= 0) return row.position;
  const Slot& slot = slots[row.slot];
  return slot.finished != 0 ? -1 : slot.length - 1;
}

// Where a row's keys and values go.
struct CachePlace {
  char* page;       // null: nowhere
  int32_t in_page;  // position within the page
};

__device__ inline RowPlace WholePlaceOf(const Row& row, const Slot* slots) {
  RowPlace place = {nullptr, nullptr, 0, 0};
  const int32_t position = PositionOf(row, slots);
  if (position < 0) return place;
  place.pages = slots[row.slot].pages;
  place.page = place.pages[position / kPage];
  place.in_page = position % kPage;
  place.length = position + 1;
  return place;
}

__device__ inline CachePlace PlaceOf(const Row& row, const Slot* slots) {
  const RowPlace place = WholePlaceOf(row, slots);
  return CachePlace{place.page, place.in_page};
}

// A position of 64 numbers of 16 bits has 128 bytes, one pass over the banks of shared memory, so that equal
// pieces of neighbouring positions would be in the same banks. So its 16-byte piece i lies in place
// i ^ TurnOf(position).
__device__ inline bool IsTurned(const CacheLayout& cache) {
  return cache.head_size == 64 && cache.dtype != DType::kFloat32;
}
// What is left of a position as its turn.
__device__ inline int32_t TurnMask(const CacheLayout& cache) { return IsTurned(cache) ? 7 : 0; }
__device__ inline int32_t TurnOf(const CacheLayout& cache, int32_t position) {
  return IsTurned(cache) ? position % 8 : 0;
}
// The index of an element of a position, which would be `index` were it not turned. Where it is, it begins at a
// multiple of 64 elements, and pieces are bits 3 to 5.
__device__ inline int64_t TurnedIndex(const CacheLayout& cache, int64_t index, int32_t position) {
  return index ^ TurnOf(cache, position) * 8;
}

// Index in its page of the first element of a head's key (kind 0) or value (kind 1).
__device__ inline int64_t PageIndex(const CacheLayout& cache, int32_t layer, int32_t kind,
                                    int32_t head, int32_t in_page) {
  const int64_t plane = (static_cast<int64_t>(layer) * 2 + kind) * cache.num_heads + head;
  return (plane * kPage + in_page) * cache.head_stride;
}

// ---- layer norm ---------------------------------------------------------------------------------

struct NormSums {
  float mean;
  float scale;  // 1 / sqrt(variance + eps)
};

__device__ inline float WarpSum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Columns k to k + 3 of a row, zero from `size` on. kFours: `size` is a multiple of 4.
template <bool kFours = false>
__device__ inline float4 NormFour(const float* x, int32_t k, int32_t size) {
  float4 four = make_float4(0, 0, 0, 0);
  if (k < size) four = *reinterpret_cast<const float4*>(x + k);
  if (kFours) return four;
  if (k + 1 >= size) four.y = 0;
  if (k + 2 >= size) four.z = 0;
  if (k + 3 >= size) four.w = 0;
  return four;
}

constexpr int kNormLoads = 8;  // under way at once, of a lane

template <bool kFours = false>
__device__ inline void ReadNormPart(const float* x, int32_t first, int32_t size,
                                    float4 (&part)[kNormLoads]) {
#pragma unroll
  for (int i = 0; i < kNormLoads; ++i) part[i] = NormFour<kFours>(x, first + i * 128, size);
}

__device__ inline float NormSum(const float4 (&part)[kNormLoads], float sum) {
#pragma unroll
  for (int i = 0; i < kNormLoads; ++i) {
    sum += (part[i].x + part[i].y) + (part[i].z + part[i].w);
  }
  return sum;
}

template <bool kFours = false>
__device__ inline float NormSquares(const float4 (&part)[kNormLoads], float mean, int32_t first,
                                    int32_t size, float sum) {
#pragma unroll
  for (int i = 0; i < kNormLoads; ++i) {
    const int32_t k = first + i * 128;
    const float a = k < size ? part[i].x - mean : 0.0f;
    const float b = (kFours ? k : k + 1) < size ? part[i].y - mean : 0.0f;
    const float c = (kFours ? k : k + 2) < size ? part[i].z - mean : 0.0f;
    const float d = (kFours ? k : k + 3) < size ? part[i].w - mean : 0.0f;
    sum += fmaf(a, a, __fmul_rn(b, b)) + fmaf(c, c, __fmul_rn(d, d));
  }
  return sum;
}

// By one warp, all lanes of which get the result. Sums in an order that depends on `size` alone;
// products are joined with sums by hand, so that every kernel does it alike. Reads float4s up to
// `size` rounded up to 4, and leaves in `part` what ReadNormPart gives from the lane's first column.
template <bool kFours = false, bool kOnePart = false>
__device__ inline NormSums SumsOf(const float* x, int32_t size, float eps, int32_t lane,
                                  float4 (&part)[kNormLoads]) {
  constexpr int32_t kStride = kNormLoads * 128;
  const float count = static_cast<float>(size);
  float4 other[kNormLoads];
  float sum = 0.0f;
  for (int32_t first = kStride; !kOnePart && first < size; first += kStride) {
    ReadNormPart<kFours>(x, first + lane * 4, size, other);
    sum = NormSum(other, sum);
  }
  ReadNormPart<kFours>(x, lane * 4, size, part);
  const float mean = WarpSum(NormSum(part, sum)) / count;
  float squares = NormSquares<kFours>(part, mean, lane * 4, size, 0.0f);
  for (int32_t first = kStride; !kOnePart && first < size; first += kStride) {
    ReadNormPart<kFours>(x, first + lane * 4, size, other);
    squares = NormSquares<kFours>(other, mean, first + lane * 4, size, squares);
  }
  return NormSums{mean, 1.0f / sqrtf(WarpSum(squares) / count + eps)};
}

__device__ inline NormSums SumsOf(const float* x, int32_t size, float eps, int32_t lane) {
  float4 part[kNormLoads];
  return SumsOf(x, size, eps, lane, part);
}

// A column of a row, normed; `weight` and `bias` are the norm's, of that column.
__device__ inline float Normed(float x, NormSums sums, float weight, float bias) {
  return fmaf(__fmul_rn(x - sums.mean, sums.scale), weight, bias);
}

}  // namespace cuda
}  // namespace fastgen
