// The layer norm of the persistent kernel: products take their input before it, so its mean and scale
// are needed at the end only, and travel with the sums of the warps.
#pragma once

#include "cuda/persistent_device.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

// The sums of a norm over columns that a lane, then a warp has seen, shifted by one of them: the
// variance is at least (the shift's distance from the mean)^2 / columns, so little is lost to
// cancellation.
struct NormSums {
  float shift = 0.0f, sum = 0.0f, squares = 0.0f;
};

struct NormResult {
  float mean, scale;
};

// What all warps saw, put together (Chan et al.).
template <int kRows>
__device__ __forceinline__ NormResult CombineNorm(const Shared<kRows>& shared, int buffer, int row,
                                                  int chunks, int columns, float eps) {
  const float count = __frcp_rn(static_cast<float>(columns));
  float sum = 0.0f, squares = 0.0f;
#pragma unroll 1
  for (int c = 0; c < chunks; ++c) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 part = shared.stats[buffer][c][row][w];
      sum = fmaf(part.x, part.y, sum);
    }
  }
  const float mean = sum * count;
#pragma unroll 1
  for (int c = 0; c < chunks; ++c) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 part = shared.stats[buffer][c][row][w];
      const float away = part.y - mean;
      squares += fmaf(part.x * away, away, part.z);
    }
  }
  return NormResult{mean, rsqrtf(fmaf(squares, count, eps))};
}

// The sums of four columns of a row. `own` is false for lanes that have none.
__device__ __forceinline__ NormSums SumsOfFour(const float (&x)[4], bool own) {
  NormSums norm;
  norm.shift = __shfl_sync(0xffffffffu, x[0], 0);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float d = own ? x[i] - norm.shift : 0.0f;
    norm.sum += d;
    norm.squares = fmaf(d, d, norm.squares);
  }
  return norm;
}

// Adds up the lanes and, if it shall, writes what the warp knows of a block of columns, of which it has
// `columns`: without a branch, so that it fills the gaps between products.
template <int kRows>
__device__ __forceinline__ void StoreNorm(Thread<kRows>& self, int chunk, int columns,
                                          NormSums (&norm)[kRows], bool shall) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      norm[r].sum += __shfl_xor_sync(0xffffffffu, norm[r].sum, offset);
      norm[r].squares += __shfl_xor_sync(0xffffffffu, norm[r].squares, offset);
    }
  }
  const float count = static_cast<float>(columns);
  const float each = columns > 0 ? __frcp_rn(count) : 0.0f;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float away = norm[r].sum * each;
    const float4 part = make_float4(count, norm[r].shift + away,
                                    fmaxf(fmaf(-away, norm[r].sum, norm[r].squares), 0.0f), 0.0f);
    if (shall && self.lane == r) self.shared.stats[self.buffer][chunk][r][self.warp] = part;
  }
}

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
