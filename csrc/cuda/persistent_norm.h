// The layer norm of the persistent kernel: products take their input before it, so its mean and scale
// are needed at the end only, and travel with the sums of the warps.
#pragma once

#include "cuda/persistent_device.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

// Sums of a norm over the columns that a lane has seen, of each row: of the distances from the mean of
// the row's first four numbers and of their squares. The variance is at least (that mean's distance
// from the row's)^2 * 4 / columns, so little is lost to cancellation.
template <int kRows>
struct NormSums {
  float shift[kRows];
  float sums[2 * kRows];  // sums, then sums of squares

  // Lane r has the shift of row r.
  __device__ __forceinline__ void Begin(float its_shift) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      shift[r] = __shfl_sync(0xffffffffu, its_shift, r);
      sums[r] = sums[kRows + r] = 0.0f;
    }
  }

  __device__ __forceinline__ void Add(int row, const float (&x)[4], bool own) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float d = own ? x[i] - shift[row] : 0.0f;
      sums[row] += d;
      sums[kRows + row] = fmaf(d, d, sums[kRows + row]);
    }
  }
};

// Adds up the lanes and writes what the warp has seen. Each exchange halves the numbers that a lane
// holds, until it has one.
template <int kRows>
__device__ __forceinline__ void StoreNorm(Thread<kRows>& self, NormSums<kRows>& norm) {
  constexpr int kCount = 2 * kRows;
  int left = kCount;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    if (left == 1) {
      norm.sums[0] += __shfl_xor_sync(0xffffffffu, norm.sums[0], offset);
      continue;
    }
    left /= 2;
    const bool upper = (self.lane & offset) != 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      if (i >= left) break;
      const float keep = upper ? norm.sums[i + left] : norm.sums[i];
      const float send = upper ? norm.sums[i] : norm.sums[i + left];
      norm.sums[i] = keep + __shfl_xor_sync(0xffffffffu, send, offset);
    }
  }
  constexpr int kLanes = 32 / kCount;  // that hold the same number
  if (self.lane % kLanes == 0) {
    const int i = self.lane / kLanes;
    float* const to = reinterpret_cast<float*>(self.shared.norm[self.buffer][i % kRows]);
    to[self.warp * 2 + i / kRows] = norm.sums[0];
  }
  if (self.thread < kRows) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r == self.thread) self.shared.shift[self.buffer][r] = norm.shift[r];
    }
  }
}

struct NormResult {
  float mean, scale;
};

// What all warps saw of a row, put together.
template <int kRows>
__device__ __forceinline__ NormResult CombineNorm(const Shared<kRows>& shared, int buffer, int row,
                                                  int columns, float eps) {
  const float each = __fdividef(1.0f, static_cast<float>(columns));
  float sum[2], squares[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 a = shared.norm[buffer][row][half * 2];
    const float4 b = shared.norm[buffer][row][half * 2 + 1];
    sum[half] = (a.x + a.z) + (b.x + b.z);
    squares[half] = (a.y + a.w) + (b.y + b.w);
  }
  static_assert(kWarps == 8, "four pairs of warps");
  const float away = (sum[0] + sum[1]) * each;
  const float variance = fmaxf(fmaf(-away, away, (squares[0] + squares[1]) * each), 0.0f);
  return NormResult{shared.shift[buffer][row] + away, rsqrtf(variance + eps)};
}

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
