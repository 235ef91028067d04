// The layer norm of the persistent kernel: products take their input before it, so its mean and scale
// are needed at the end only, and travel with the sums of the warps.
#pragma once

#include "cuda/persistent_thread.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

// Columns of a normed row that a warp sees, and 1 over them, or zeros.
__device__ __forceinline__ float2 ColumnsOfWarp(int in, int warp) {
  const int whole = in / kChunk;
  const int rest = in - whole * kChunk - warp * kSpan;
  const auto columns = static_cast<float>(whole * kSpan + max(0, min(rest, kSpan)));
  return make_float2(columns, columns > 0.0f ? __fdividef(1.0f, columns) : 0.0f);
}

// Sums of a norm over the columns that a lane has seen, of each row: of the distances from a number
// near them, the mean of the warp's first four, and of their squares.
template <int kRows>
struct NormSums {
  float shift[kRows];
  float sums[2 * kRows];  // sums, then sums of squares
  float2 columns;         // ColumnsOfWarp

  // Before inputs are waited for.
  __device__ __forceinline__ void Prepare(const Shared<kRows>& shared, int warp) {
    columns = shared.columns[warp];
    asm volatile("" : "+f"(columns.x), "+f"(columns.y));
  }

  // `four` are lane 0's of the row.
  __device__ __forceinline__ void Begin(int row, const float (&four)[4]) {
    const float mean = 0.25f * ((four[0] + four[1]) + (four[2] + four[3]));
    shift[row] = __shfl_sync(0xffffffffu, mean, 0);
    sums[row] = sums[kRows + row] = 0.0f;
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

// Adds up the lanes and writes, of the columns that the warp has seen, their sum and the sum of their
// squared distances from their mean. Each exchange halves the numbers that a lane holds, until it has
// one.
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
  const bool squares = self.lane >= 16;
  const int row = self.lane % 16 / kLanes;
  const float sum = __shfl_xor_sync(0xffffffffu, norm.sums[0], 16);  // where this is of squares
  float shift = norm.shift[0];
#pragma unroll
  for (int r = 1; r < kRows; ++r) shift = row == r ? norm.shift[r] : shift;
  const float result = squares ? fmaxf(fmaf(-sum * norm.columns.y, sum, norm.sums[0]), 0.0f)
                               : fmaf(norm.columns.x, shift, norm.sums[0]);
  if (self.lane % kLanes == 0) {
    float* const to = reinterpret_cast<float*>(self.shared.norm[self.buffer][row]);
    to[self.warp * 2 + (squares ? 1 : 0)] = result;
  }
}

struct NormResult {
  float mean, scale;
};

// Puts together what all warps saw of rows of `columns`.
class NormOfWarps {
 public:
  template <int kRows>
  __device__ __forceinline__ void Prepare(const Shared<kRows>& shared, int columns) {
    each_ = __fdividef(1.0f, static_cast<float>(columns));
#pragma unroll
    for (int pair = 0; pair < kWarps / 2; ++pair) {
      columns_[pair] = reinterpret_cast<const float4*>(shared.columns)[pair];
    }
  }

  template <int kRows>
  __device__ __forceinline__ NormResult Combine(const Shared<kRows>& shared, int buffer, int row,
                                                float eps) const {
    static_assert(kWarps == 8, "four pairs of warps");
    float sums[kWarps], squares[kWarps];
#pragma unroll
    for (int pair = 0; pair < kWarps / 2; ++pair) {
      const float4 both = shared.norm[buffer][row][pair];
      sums[2 * pair] = both.x, squares[2 * pair] = both.y;
      sums[2 * pair + 1] = both.z, squares[2 * pair + 1] = both.w;
    }
    const float mean = (((sums[0] + sums[1]) + (sums[2] + sums[3])) +
                        ((sums[4] + sums[5]) + (sums[6] + sums[7]))) *
                       each_;
#pragma unroll
    for (int pair = 0; pair < kWarps / 2; ++pair) {
      const float4& both = columns_[pair];
      squares[2 * pair] = AboutMean(squares[2 * pair], sums[2 * pair], mean, both.x, both.y);
      squares[2 * pair + 1] =
          AboutMean(squares[2 * pair + 1], sums[2 * pair + 1], mean, both.z, both.w);
    }
    const float variance = (((squares[0] + squares[1]) + (squares[2] + squares[3])) +
                            ((squares[4] + squares[5]) + (squares[6] + squares[7]))) *
                           each_;
    return NormResult{mean, rsqrtf(variance + eps)};
  }

 private:
  // Squared distances from `mean`, of those from the mean of the warp's own columns.
  static __device__ __forceinline__ float AboutMean(float squares, float sum, float mean,
                                                    float columns, float inverse) {
    const float away = fmaf(-columns, mean, sum);
    return fmaf(away * inverse, away, squares);
  }

  float each_ = 0.0f;
  float4 columns_[kWarps / 2] = {};  // ColumnsOfWarp of two warps each
};

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
