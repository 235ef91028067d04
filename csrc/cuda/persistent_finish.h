// The finishers' side of a product: sums of the workers to outputs, and those to the exchange.
#pragma once

#include "cuda/persistent_choice.h"
#include "cuda/persistent_norm.h"
#include "cuda/persistent_thread.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

// The tanh form of GELU, as x * sigmoid(2 u).
__device__ __forceinline__ float Gelu(float x) {
  const float u = 0.7978845608028654f * fmaf(0.044715f * x, x * x, x);
  return __fdividef(x, 1.0f + Exp2(-2.0f * kLog2e * u));
}

// Output i of a thread, of a group of tiles: [tile][row][kTile].
template <int kRows>
struct Output {
  int at, row, n;
  bool own;

  __device__ __forceinline__ Output(const Thread<kRows>& self, const Product& product, int group,
                                    int tiles, int i) {
    at = self.thread + i * Threads<kRows>::kFinishers;
    const int tile = at / (kTile * kRows);
    row = at / kTile % kRows;
    n = OutputOf(product, group + tile) + at % kTile;
    own = tile < tiles && n < product.out && self.Active(row);
  }
};

// The sum of an output over the warps.
template <int kRows>
__device__ __forceinline__ float SumOfParts(const float* from) {
  constexpr int kCount = Partial<kRows>::kCount / 4;
  const float4* const parts = reinterpret_cast<const float4*>(from);
  float sums[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float4 part = parts[i];
    sums[i] = (part.x + part.y) + (part.z + part.w);
  }
  static_assert(kCount == 2 || kCount == 4, "two or four fours");
  return kCount == 2 ? sums[0] + sums[1]
                     : (sums[0] + sums[1]) + (sums[kCount - 2] + sums[kCount - 1]);
}

// What a finisher knows of an output before its sums are there, in registers: after that all others wait.
struct Finish {
  float bias, column_sum, factor;
  char* to;
  uint32_t own, shall;  // whether it is the thread's, and whether the thread writes

  __device__ __forceinline__ void Pin() {
    asm volatile("" : "+f"(factor), "+l"(to), "+r"(own), "+r"(shall));
  }
};

template <typename W, int kRows, bool kNormed>
__device__ __forceinline__ void FinishProduct(Thread<kRows>& self, int phase, int layer,
                                              float (&residual)[Threads<kRows>::kOutputs]) {
  constexpr int kOutputs = Threads<kRows>::kOutputs;
  const Plan& plan = self.plan;
  const Product& product = plan.products[phase];
  const int tiles = TilesOf(product);
  const bool head = kNormed && phase == kHead;
  const int64_t behind = head ? 0 : layer * plan.layer_bytes;
  const uint32_t epoch = self.epoch + static_cast<uint32_t>(layer) + 1u;
  NormResult norm = {0.0f, 1.0f};
  NormOfWarps norm_of_warps;
#pragma unroll 1
  for (int group = 0; group < tiles; group += kRound) {
    const int group_tiles = min(kRound, tiles - group);
    Finish finish[kOutputs];
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      const Output<kRows> output(self, product, group, group_tiles, i);
      finish[i].bias = finish[i].column_sum = 0.0f;
      if (output.own) {
        const float* const bias = product.bias;
        if (bias != nullptr) finish[i].bias = LoadNow(Behind(bias, behind) + output.n);
        if (kNormed) finish[i].column_sum = LoadNow(Behind(product.sums, behind) + output.n);
      }
      finish[i].factor = phase == kQkv && output.n < plan.hidden ? plan.query_scale : 1.0f;
      finish[i].own = output.own ? 1 : 0;
      finish[i].shall = output.own && self.lane % 4 == 0 ? 1 : 0;
      const int at = output.row * product.out + output.n;
      finish[i].to = head ? reinterpret_cast<char*>(plan.logits + output.row * plan.ld + output.n)
                          : reinterpret_cast<char*>(plan.exchange + product.target +
                                                    (kNormed ? at / 4 : ResidualPiece(at)));
    }
    if (kNormed && group == 0) norm_of_warps.Prepare(self.shared, product.in);
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) finish[i].Pin();
    self.PassBuffer();
    float sums[kOutputs];
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      const int at = self.thread + i * Threads<kRows>::kFinishers;
      sums[i] = SumOfParts<kRows>(self.shared.partial[self.buffer][at]);
    }
    if (group == 0) self.StampNow(phase, layer, Stamp::kSums, sums[0]);
    // All outputs of a thread are of one row.
    static_assert(Threads<kRows>::kFinishers % (kTile * kRows) == 0, "whole tiles");
    if (kNormed) {
      // Without a branch, so that it goes on beside the sums; later groups have no other.
      const NormResult here =
          norm_of_warps.Combine(self.shared, self.buffer, self.thread / kTile % kRows, plan.eps);
      norm.mean = group == 0 ? here.mean : norm.mean;
      norm.scale = group == 0 ? here.scale : norm.scale;
    }
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      float y = sums[i];
      if (kNormed) y = norm.scale * fmaf(-norm.mean, finish[i].column_sum, y);
      y += finish[i].bias;
      if (head) {
        if (finish[i].own != 0) *reinterpret_cast<float*>(finish[i].to) = y;
        if (plan.chooses != 0) {
          Keep(self, group / kRound * kOutputs + i, y, finish[i].own != 0);
        }
        continue;
      }
      uint4* const to = reinterpret_cast<uint4*>(finish[i].to);
      const bool shall = finish[i].shall != 0;
      if (!kNormed) {
        residual[i] += y;
        Publish(to, residual[i], epoch, shall);
      } else if (phase == kQkv) {
        Publish(to, y * finish[i].factor, epoch, shall);
      } else {
        PublishStaged<W>(to, Gelu(y), epoch, shall);
      }
    }
    self.ReturnBuffer();
  }
  if (tiles > 0) self.StampNow(phase, layer, Stamp::kEnd);
}

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
