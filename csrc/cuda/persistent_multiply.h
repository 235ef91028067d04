// The multiplication of the persistent kernel: activations staged as numbers of 16 bits, weights of the
// ring, and what mma.m16n8k16 makes of them.
//
// Weights are the left operand: its 16 rows are two tiles of outputs; its 8 columns are the
// activations of up to 4 rows, each as the sum of two numbers of 16 bits. A lane reads 16 bytes, 8
// columns of one output, which are two operands of an order of columns that the activations have too.
// Where a block has one tile only, the lower 8 rows take the tile's next columns instead (and the
// upper 4 activation columns belong to them), unless more than two rows need all columns.
#pragma once

#include "cuda/persistent_device.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

// Whether activations are scaled before they become numbers of the type.
template <typename T>
struct HasScale {
  static constexpr bool value = false;
};
template <>
struct HasScale<__half> {
  static constexpr bool value = true;
};

// Activations as they are staged for a warp: [slot][row, high and low][unit][8 bytes of 4 columns],
// units of odd lines swapped in pairs, so that a quarter of a warp reads from all banks.
template <typename T, int kRows>
struct Staged {
  static constexpr int kLine = kWarpUnits * kUnit * 2;  // bytes
  static constexpr int kSlot = 2 * kRows * kLine;
};

// Splits four numbers into two of 16 bits each and stages them. Float16 is scaled, row by row and
// warp by warp, by the power of two that brings the largest number near the end of its range.
template <typename T, int kRows>
__device__ __forceinline__ void StageFour(Thread<kRows>& self, int slot, int row, float (&x)[4]) {
  if (HasScale<T>::value) {
    const float largest = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
    const uint32_t exponent = max(WarpMaxBits(__float_as_uint(largest)) >> 23, 15u);
    const float scale = __uint_as_float((268u - exponent) << 23);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] *= scale;
    if (self.lane == 0) {
      self.shared.scales[self.warp][slot][row] = __uint_as_float((exponent - 14u) << 23);
    }
  }
  uint32_t high[2], low[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float back[2];
    high[i] = RoundPair<T>(x[2 * i], x[2 * i + 1]);
    Vector<T>::UnpackPair(high[i], back);
    low[i] = RoundPair<T>(x[2 * i] - back[0], x[2 * i + 1] - back[1]);
  }
  char* const line =
      self.activations + slot * Staged<T, kRows>::kSlot + 2 * row * Staged<T, kRows>::kLine;
  *reinterpret_cast<uint2*>(line + self.lane * 8) = make_uint2(high[0], high[1]);
  *reinterpret_cast<uint2*>(line + Staged<T, kRows>::kLine + (self.lane ^ 8) * 8) =
      make_uint2(low[0], low[1]);
}

// The 8 columns of `unit` that this lane multiplies, of line `line`.
template <typename T, int kRows>
__device__ __forceinline__ uint4 StagedEight(const Thread<kRows>& self, int slot, int line,
                                             int unit) {
  const char* const at = self.activations + slot * Staged<T, kRows>::kSlot +
                         line * Staged<T, kRows>::kLine + (unit ^ (line & 1)) * (kUnit * 2) +
                         self.lane % 4 * 16;
  return line < 2 * kRows ? *reinterpret_cast<const uint4*>(at) : make_uint4(0, 0, 0, 0);
}

template <typename T>
__device__ __forceinline__ void MultiplyEight(float (&sums)[4], const uint4& upper,
                                              const uint4& lower, const uint4& x) {
  const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
  const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
  Mma<T>(sums, first, x.x, x.y);
  Mma<T>(sums, second, x.z, x.w);
}

// What takes a slot's sums back to the activations' scale, for this lane's row.
template <typename T, int kRows>
__device__ __forceinline__ float ScaleBack(const Thread<kRows>& self, int slot) {
  return HasScale<T>::value ? self.shared.scales[self.warp][slot][self.lane % 4 % kRows] : 1.0f;
}

// Adds the products of two tiles of a block of columns, row `lane % 4` of the step, output lane / 4.
template <typename T, int kRows>
__device__ __forceinline__ void MultiplyPair(float scale, const uint4 (&x)[kWarpUnits],
                                             const uint4 (&upper)[kWarpUnits],
                                             const uint4 (&lower)[kWarpUnits], float& first,
                                             float& second) {
  float sums[2][4] = {};
#pragma unroll
  for (int u = 0; u < kWarpUnits; ++u) MultiplyEight<T>(sums[u % 2], upper[u], lower[u], x[u]);
  first = fmaf((sums[0][0] + sums[0][1]) + (sums[1][0] + sums[1][1]), scale, first);
  second = fmaf((sums[0][2] + sums[0][3]) + (sums[1][2] + sums[1][3]), scale, second);
}

// The same for one tile and several blocks of columns, slots 0 to kBlocks - 1, of which the first
// `blocks` count. With one or two rows of the step lanes hold row lane % 2, and the sum over half the
// columns: FinishSingle adds the other half.
template <typename T, int kRows, int kBlocks>
__device__ __forceinline__ void MultiplySingle(const Thread<kRows>& self, int blocks,
                                               const uint4 (&w)[kRound][kWarpUnits], float& total) {
  const int g = self.lane / 4;
  float sums[kBlocks][4] = {};
  if (kRows <= 2) {
#pragma unroll
    for (int u = 0; u < kWarpUnits / 2; ++u) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        const uint4 x = StagedEight<T>(self, j, g % 4, u + g / 4 * 2);
        MultiplyEight<T>(sums[j], w[j][u], w[j][u + 2], x);
      }
    }
  } else {
#pragma unroll
    for (int u = 0; u < kWarpUnits; ++u) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        const uint4 x = StagedEight<T>(self, j, g, u);
        MultiplyEight<T>(sums[j], w[j][u], make_uint4(0, 0, 0, 0), x);
      }
    }
  }
  const bool upper = kRows > 2 || self.lane % 4 < 2;
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    const float sum = upper ? sums[j][0] + sums[j][1] : sums[j][2] + sums[j][3];
    const float more = fmaf(sum, ScaleBack<T>(self, j), total);
    if (j < blocks) total = more;
  }
}

template <int kRows>
__device__ __forceinline__ float FinishSingle(float total) {
  return kRows <= 2 ? total + __shfl_xor_sync(0xffffffffu, total, 2) : total;
}

// The warp's part of the next block of weights of the ring: zeros behind `units`.
template <int kRows>
__device__ __forceinline__ void TakeWeights(Thread<kRows>& self, int warp_units, int units,
                                            uint4 (&w)[kWarpUnits]) {
  BarrierWait(self.shared.full + self.stage, self.parity);
  const char* const at = self.ring + self.stage * self.plan.stage_bytes +
                         self.lane / 4 * self.plan.row_stride +
                         self.warp * warp_units * (kUnit * 2) + self.lane % 4 * 16;
#pragma unroll
  for (int u = 0; u < kWarpUnits; ++u) {
    w[u] = make_uint4(0, 0, 0, 0);
    if (u < units) w[u] = *reinterpret_cast<const uint4*>(at + u * (kUnit * 2));
  }
  __syncwarp();
  if (self.lane == 0) BarrierArrive(self.shared.empty + self.stage);
  if (++self.stage == self.plan.stages) {
    self.stage = 0;
    self.parity ^= 1u;
  }
}

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
