// Products of integer weights with one row of the persistent kernel, on the matrix units for bytes: weights
// as they are, and activations as sums of two signed bytes.
//
// The columns of a row that a warp stages at once share a power of two by which they become integers of 15 bits;
// an integer is its upper byte, rounded, times 256 and its lower byte. So products and sums over a group of 32
// columns are exact, and a group's scale comes after them: weights need no conversion, where numbers of 16 bits
// took some 14 instructions for 8 of them.
//
// Of mma.m16n8k32 the left operand's upper 8 rows are a tile's outputs, and the lower 8 the same with int8,
// whose second 16 bytes of a lane go there. The right operand's columns are pairs of bytes of a group of
// columns each, and zero in the lanes that have weights of other groups.
#pragma once

#include "cuda/persistent_thread.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

template <typename W, int kRows>
__host__ __device__ constexpr bool TakesBytes() {
  return W::kBits <= 8 && kRows == 1;
}

constexpr int kByteLine = kSpan;  // bytes from upper to lower ones

// The greatest magnitude of four numbers, as bits, of which those of NaN are the largest.
__device__ __forceinline__ uint32_t LargestBits(const float (&x)[4]) {
  const auto magnitude = [&](int i) { return __float_as_uint(x[i]) & 0x7fffffffu; };
  return max(max(magnitude(0), magnitude(1)), max(magnitude(2), magnitude(3)));
}

// How numbers of a warp become integers below 2^14, and what those are to be multiplied by: NaN where a number is not
// finite.
struct ByteScale {
  float up, down;

  // Of the lane's largest number; the whole warp takes part.
  __device__ __forceinline__ explicit ByteScale(uint32_t largest) {
    const uint32_t exponent = max(__reduce_max_sync(0xffffffffu, largest) >> 23, 14u);
    up = __uint_as_float((267u - exponent) << 23);
    down =
        exponent == 255u ? __uint_as_float(0x7fc00000u) : __uint_as_float((exponent - 13u) << 23);
  }
};

// Stages four numbers of a chunk's columns, if there are any.
template <typename W, int kRows>
__device__ __forceinline__ void StageBytes(Thread<kRows>& self, int line, const float (&x)[4],
                                           const ByteScale& scale, bool there) {
  uint32_t q[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) q[i] = __float_as_uint(fmaf(x[i], scale.up, 12582912.0f));
  const uint32_t lower =
      __byte_perm(__byte_perm(q[0], q[1], 0x0040), __byte_perm(q[2], q[3], 0x0040), 0x5410);
#pragma unroll
  for (int i = 0; i < 4; ++i) q[i] += 0x80u;
  const uint32_t upper =
      __byte_perm(__byte_perm(q[0], q[1], 0x0051), __byte_perm(q[2], q[3], 0x0051), 0x5410);
  char* const to = self.activations + line * kLine;
  if (!there) return;
  if (W::kBits == 8) {
    *reinterpret_cast<uint32_t*>(to + self.lane * 4) = upper;
    *reinterpret_cast<uint32_t*>(to + kByteLine + self.lane * 4) = lower;
  } else {
    // Of eight columns, those of even number first.
    char* const place = to + self.lane / 2 * 8 + self.lane % 2 * 2;
    const auto store = [&](char* at, uint32_t four) {
      *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(__byte_perm(four, 0, 0x4420));
      *reinterpret_cast<uint16_t*>(at + 4) = static_cast<uint16_t>(__byte_perm(four, 0, 0x4431));
    };
    store(place, upper);
    store(place + kByteLine, lower);
  }
}

// The activations that this lane multiplies, of a line.
template <typename W>
__device__ __forceinline__ void ReadBytes(const Thread<1>& self, int line, uint4 (&x)[2]) {
  const int column = self.lane / 4, member = self.lane % 4;
  const char* const from = self.activations + line * kLine + column % 2 * kByteLine;
  if (W::kBits == 8) {
    x[0] = LoadSharedIf(from + column / 4 * 64 + member * 16, column / 2 % 2 == member / 2);
    x[1] = make_uint4(0, 0, 0, 0);
  } else {
    x[0] = LoadSharedIf(from + member * 32, column / 2 == member);
    x[1] = LoadSharedIf(from + member * 32 + 16, column / 2 == member);
  }
}

__device__ __forceinline__ void ToBytes(const Raw<Int8>& raw, HeldBytes& held) {
  const uint4 &a = raw.weights[0], &b = raw.weights[1];
  held.operands[0] = make_uint4(a.x, b.x, a.y, b.y);
  held.operands[1] = make_uint4(a.z, b.z, a.w, b.w);
  held.scale = __half2float(__ushort_as_half(static_cast<uint16_t>(raw.scales[0])));
}

// A nibble q + 8 becomes 16 q.
__device__ __forceinline__ void ToBytes(const Raw<Int4>& raw, HeldBytes& held) {
  const uint4& w = raw.weights[0];
  const auto even = [](uint32_t bits) { return bits << 4 & 0xf0f0f0f0u ^ 0x80808080u; };
  const auto odd = [](uint32_t bits) { return bits & 0xf0f0f0f0u ^ 0x80808080u; };
  held.operands[0] = make_uint4(even(w.x), odd(w.x), even(w.y), odd(w.y));
  held.operands[1] = make_uint4(even(w.z), odd(w.z), even(w.w), odd(w.w));
  held.scale = 0.0625f * __half2float(__ushort_as_half(static_cast<uint16_t>(raw.scales[0])));
}

// Of one stage: lanes of even number have sums of half of the columns of output lane / 4.
template <typename W>
__device__ __forceinline__ float MultiplyBytes(const HeldBytes& held, const uint4 (&x)[2],
                                               int lane) {
  int32_t sums[4] = {};
  bool upper = true;
  if (W::kBits == 8) {
    const uint4 &a = held.operands[0], &b = held.operands[1];
    const uint32_t first[4] = {a.x, a.y, a.z, a.w}, second[4] = {b.x, b.y, b.z, b.w};
    MmaBytes(sums, first, x[0].x, x[0].y);
    MmaBytes(sums, second, x[0].z, x[0].w);
    const bool swapped = lane / 4 % 2 != 0;
    upper = (lane % 4 < 2) != swapped;
  } else {
    int32_t others[4] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4& w = held.operands[i];
      // Nobody reads the sums of the lower rows.
      const uint32_t first[4] = {w.x, w.x, w.y, w.y}, second[4] = {w.z, w.z, w.w, w.w};
      MmaBytes(sums, first, x[i].x, x[i].y);
      MmaBytes(others, second, x[i].z, x[i].w);
    }
    sums[0] += others[0];
    sums[1] += others[1];
  }
  const int32_t high = upper ? sums[0] : sums[2], low = upper ? sums[1] : sums[3];
  const float sum = static_cast<float>(high * 256 + low) * held.scale;
  return sum + __shfl_xor_sync(0xffffffffu, sum, 1);
}

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
