// A product of the persistent kernel: weights from the ring, inputs from the exchange, outputs back.
#pragma once

#include "cuda/persistent_device.h"
#include "cuda/persistent_multiply.h"
#include "cuda/persistent_norm.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

// The tanh form of GELU, as x * sigmoid(2 u).
__device__ __forceinline__ float Gelu(float x) {
  const float u = 0.7978845608028654f * fmaf(0.044715f * x, x * x, x);
  return __fdividef(x, 1.0f + Exp2(-2.0f * kLog2e * u));
}

// Units of the warp in a chunk.
__device__ __forceinline__ int UnitsOf(const Product& product, int warp, int chunk) {
  const int columns = min(product.chunk_columns, product.in - chunk * product.chunk_columns);
  const int left = columns / kUnit - warp * product.warp_units;
  return max(0, min(left, product.warp_units));
}

// Four columns of kGroup attended rows from `row` on, where some row has splits: puts together what
// they gave, in their order. Several pieces are on their way at once.
template <int kGroup, int kRows>
__device__ __forceinline__ void GatherSplits(const Thread<kRows>& self, int row, int column,
                                             bool own, uint32_t epoch, float (&x)[kGroup][4]) {
  constexpr int kBatch = 4 / kGroup;
  const Plan& plan = self.plan;
  const uint4* values = plan.exchange + plan.products[kOut].source + column / 4;
  const uint4* stats = plan.exchange + plan.split_stats + column / plan.head_size;
  float max[kGroup], sum[kGroup];
#pragma unroll
  for (int r = 0; r < kGroup; ++r) {
    max[r] = -Infinity();
    sum[r] = 0.0f;
#pragma unroll
    for (int e = 0; e < 4; ++e) x[r][e] = 0.0f;
  }
#pragma unroll 1
  for (int first = 0; first < plan.max_splits; first += kBatch) {
    uint4 pieces[2 * kBatch * kGroup];
    const auto at = [&](int i) {
      const int r = i / 2 / kBatch, split = first + i / 2 % kBatch;
      return i % 2 == 0 ? values + (split * kPersistentRows + row + r) * (plan.hidden / 4)
                        : stats + (split * kPersistentRows + row + r) * plan.heads;
    };
    uint32_t wanted = 0;
#pragma unroll
    for (int i = 0; i < 2 * kBatch * kGroup; ++i) {
      const int r = i / 2 / kBatch, split = first + i / 2 % kBatch;
      const int splits = own && self.Active(row + r) ? self.shared.rows[row + r].splits : 0;
      // A sequence that is not split has no stats.
      if (split < splits && (i % 2 == 0 || splits > 1)) wanted |= 1u << i;
    }
    AskForPieces(pieces, wanted, at);
    WaitForPieces(pieces, wanted, at, epoch);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kBatch * kGroup; ++i) {
      if ((wanted >> 2 * i & 1u) == 0) continue;
      const int r = i / kBatch;
      float more[4];
      UnpackPiece(pieces[2 * i], more);
      const bool alone = (wanted >> (2 * i + 1) & 1u) == 0;
      const float its_max = alone ? 0.0f : __uint_as_float(pieces[2 * i + 1].x);
      const float its_sum = alone ? 1.0f : __uint_as_float(pieces[2 * i + 1].y);
      const float greater = fmaxf(max[r], its_max);
      const float keep = Exp2(max[r] - greater), add = Exp2(its_max - greater);
#pragma unroll
      for (int e = 0; e < 4; ++e) x[r][e] = fmaf(more[e], add, x[r][e] * keep);
      sum[r] = fmaf(its_sum, add, sum[r] * keep);
      max[r] = greater;
    }
  }
#pragma unroll
  for (int r = 0; r < kGroup; ++r) {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[r][e] = sum[r] == 0.0f ? 0.0f : __fdiv_rn(x[r][e], sum[r]);
  }
}

__device__ __forceinline__ float ReadBehind(const float* first, int64_t bytes, int n) {
  if (first == nullptr) return 0.0f;
  return __ldg(reinterpret_cast<const float*>(reinterpret_cast<const char*>(first) + bytes) + n);
}

// The output that a thread finishes of a group of tiles.
struct Output {
  int row, n;
  bool own;
};

template <int kRows>
__device__ __forceinline__ Output OutputOf(const Thread<kRows>& self, const Product& product,
                                           int group, int slots) {
  Output output;
  output.row = self.thread / kTile % kRows;
  const int tile = group * kRound + self.thread / (kTile * kRows);
  output.n = (tile * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)) * kTile +
             self.thread % kTile;
  output.own =
      self.thread < slots * kRows * kTile && output.n < product.out && self.Active(output.row);
  return output;
}

template <typename T, int kRows>
__device__ __forceinline__ void RunProduct(Thread<kRows>& self, int phase, int layer) {
  constexpr int kBatch = kRound / kRows;  // blocks of columns that are asked for at once
  const Plan& plan = self.plan;
  const Product& product = plan.products[phase];
  const int tiles = TilesOf(product);
  if (tiles == 0) return;
  self.StampNow(phase, layer, Stamp::kBegin);
  const bool normed = phase == kQkv || phase == kIn || phase == kHead;
  // One tile: its columns fill the registers, rather than one block of columns of several tiles.
  const int whether_deep = tiles == 1 && !normed ? 1 : 0;
  const int64_t behind = (phase == kHead ? 0 : layer) * plan.layer_bytes;
  const uint32_t epoch =
      plan.epoch + static_cast<uint32_t>(layer) + (phase == kQkv || phase == kHead ? 0u : 1u);
  const uint4* const source = plan.exchange + product.source;
  NormResult result = {0.0f, 1.0f};
  // Whether the inputs are yet to be put together.
  bool split = false;
  if (phase == kOut) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) split = split || self.shared.rows[r].splits > 1;
  }

#pragma unroll 1
  for (int group = 0; group * kRound < tiles; ++group) {
    const int slots = min(kRound, tiles - group * kRound);
    // What the threads that finish an output each will need.
    Output output = OutputOf(self, product, group, slots);
    float bias = 0.0f, column_sum = 0.0f;
    if (output.own) {
      bias = ReadBehind(product.bias, behind, output.n);
      if (normed) column_sum = ReadBehind(product.sums, behind, output.n);
    }

    float total[kRound] = {};
    int step = 1;
#pragma unroll 1
    for (int chunk = 0; chunk < product.chunks; chunk += step) {
      const bool deep = Opaque(whether_deep) != 0;
      step = deep ? kRound : 1;
      const int inputs = deep ? min(kRound, product.chunks - chunk) : 1;
      const int blocks = deep ? inputs : slots;
      const int first_slot = deep ? 0 : chunk % plan.slots;
      const int units = UnitsOf(product, self.warp, chunk);
      const int last_units = UnitsOf(product, self.warp, chunk + inputs - 1);

      // Inputs are asked for before weights are waited for, whichever comes first.
      const int column =
          chunk * product.chunk_columns + self.warp * product.warp_units * kUnit + self.lane * 4;
      uint4 pieces[kBatch * kRows];
      int batch = 0;  // the first of the blocks of columns that are asked for
      const auto at = [&](int i) {
        return source +
               (i % kRows * product.in + column + (batch + i / kRows) * product.chunk_columns) / 4;
      };
      const auto wanted = [&]() {
        uint32_t mask = 0;
#pragma unroll
        for (int i = 0; i < kBatch * kRows; ++i) {
          const int j = batch + i / kRows;
          const int its_units = j >= inputs ? 0 : j == inputs - 1 ? last_units : units;
          if (self.Active(i % kRows) && self.lane < its_units * 8) mask |= 1u << i;
        }
        return mask;
      };
      float4 gamma = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
      if (split) {
        constexpr int kGroup = kRows == 4 ? 2 : 1;
        __syncwarp();  // what is staged has been read by all lanes
#pragma unroll 1
        for (int i = 0; i < inputs * (kRows / kGroup); ++i) {
          const int j = i / (kRows / kGroup), row = i % (kRows / kGroup) * kGroup;
          const int its_units = j == inputs - 1 ? last_units : units;
          float x[kGroup][4];
          GatherSplits<kGroup>(self, row, column + j * product.chunk_columns,
                               self.lane < its_units * 8, epoch, x);
#pragma unroll
          for (int r = 0; r < kGroup; ++r) StageFour<T>(self, first_slot + j, row + r, x[r]);
        }
        __syncwarp();
      } else if (group == 0) {
        AskForPieces(pieces, wanted(), at);
        if (normed && self.lane < units * 8) {
          gamma = __ldg(reinterpret_cast<const float4*>(
              reinterpret_cast<const char*>(product.norm_weight) + behind + column * 4));
        }
      }

      uint4 w[kRound][kWarpUnits];
#pragma unroll
      for (int j = 0; j < kRound; ++j) {
        if (j < blocks) {
          const int its_units = deep && j == inputs - 1 ? last_units : units;
          TakeWeights(self, product.warp_units, its_units, w[j]);
        }
      }
      if (group == 0 && chunk == 0) self.StampNow(phase, layer, Stamp::kWeights);

      // From here to the barrier of the block is what all others wait for.
      NormSums norm[kRows];
      if (group == 0 && !split) {
        __syncwarp();  // what is staged has been read by all lanes
        if (inputs == 1) {
          WaitForPieces(pieces, wanted(), at, epoch);
          __syncwarp();
          float x[kRows][4];
#pragma unroll
          for (int r = 0; r < kRows; ++r) UnpackPiece(pieces[r], x[r]);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (normed) norm[r] = SumsOfFour(x[r], self.lane < units * 8);
            x[r][0] *= gamma.x;
            x[r][1] *= gamma.y;
            x[r][2] *= gamma.z;
            x[r][3] *= gamma.w;
            StageFour<T>(self, first_slot, r, x[r]);
          }
        } else {
#pragma unroll 1
          for (;;) {
            WaitForPieces(pieces, wanted(), at, epoch);
            __syncwarp();
#pragma unroll
            for (int j = 0; j < kBatch; ++j) {
              float x[kRows][4];
#pragma unroll
              for (int r = 0; r < kRows; ++r) UnpackPiece(pieces[j * kRows + r], x[r]);
#pragma unroll
              for (int r = 0; r < kRows; ++r) StageFour<T>(self, batch + j, r, x[r]);
            }
            batch += kBatch;
            if (batch >= inputs) break;
            AskForPieces(pieces, wanted(), at);
          }
        }
        __syncwarp();
      }
      if (group == 0 && chunk == 0) self.StampNow(phase, layer, Stamp::kInputs);

      if (deep) {
        if (inputs == 1) {
          MultiplySingle<T, kRows, 1>(self, 1, w, total[0]);
        } else {
          MultiplySingle<T, kRows, kRound>(self, inputs, w, total[0]);
        }
      } else {
        uint4 x[kWarpUnits];
#pragma unroll
        for (int u = 0; u < kWarpUnits; ++u) {
          x[u] = StagedEight<T>(self, first_slot, self.lane / 4, u);
        }
        // A tile that is not there takes part with what is in the registers; its sums are not used.
        const float scale = ScaleBack<T>(self, first_slot);
        MultiplyPair<T, kRows>(scale, x, w[0], w[1], total[0], total[1]);
        StoreNorm(self, chunk, units * kUnit, norm, normed && group == 0);
        if (blocks > 2) MultiplyPair<T, kRows>(scale, x, w[2], w[3], total[2], total[3]);
      }
    }

    if (whether_deep != 0) total[0] = FinishSingle<kRows>(total[0]);
#pragma unroll
    for (int j = 0; j < kRound; ++j) {
      const int r = self.lane % 4;
      if (j < slots && r < kRows) {
        self.shared.partial[self.buffer][(j * kRows + r) * kTile + self.lane / 4][self.warp] =
            total[j];
      }
    }
    self.Sync();
    if (group == 0) self.StampNow(phase, layer, Stamp::kSums);
    const int buffer = self.buffer;
    self.buffer ^= 1;
    if (self.warp * 32 >= slots * kRows * kTile) continue;

    self.Forget();
    output = OutputOf(self, product, group, slots);
    const float4* const parts = reinterpret_cast<const float4*>(
        self.shared.partial[buffer][min(self.thread, kRound * kRows * kTile - 1)]);
    const float4 a = parts[0], b = parts[1];
    float y = ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
    if (normed) {
      if (group == 0)
        result = CombineNorm(self.shared, buffer, output.row, product.chunks, product.in, plan.eps);
      y = result.scale * fmaf(-result.mean, column_sum, y);
    }
    y += bias;
    if (phase == kHead) {
      if (output.own) plan.logits[output.row * plan.ld + output.n] = y;
      continue;
    }
    if (phase == kQkv) {
      y *= output.n < plan.hidden ? plan.query_scale : 1.0f;
    } else if (phase == kIn) {
      y = Gelu(y);
    } else {
      self.residual += y;
      y = self.residual;
    }
    PublishLanes(plan.exchange + product.target + (output.row * product.out + output.n) / 4, y,
                 plan.epoch + static_cast<uint32_t>(layer) + 1u, output.own && self.lane % 4 == 0);
  }
  self.StampNow(phase, layer, Stamp::kEnd);
}

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
