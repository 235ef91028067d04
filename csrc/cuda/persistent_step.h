// How a step of the persistent kernel begins: which tokens it takes, and their embeddings.
#pragma once

#include "cuda/persistent_attention.h"
#include "cuda/persistent_finish.h"
#include "cuda/persistent_stream.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

// A position holds its token and all before it, so parts follow from the number of positions. Where those who read
// the attended row may put up to `joins` parts together, a part is a page or more, and a round of a block at most.
// Else a block takes up to `whole` positions in one round, which is sooner done than what has parts put together by
// one who then writes the row.
template <int kRows>
__device__ __forceinline__ void CutRow(RowState* row, int whole, int joins) {
  constexpr int kPart = 128;  // positions that are worth a block of their own
  const int positions = row->position + 1;
  const bool joined = joins > 1 && positions <= joins * whole;
  const int wanted = joined ? min(joins, (positions + kPage - 1) / kPage)
                     : positions <= whole
                         ? 1
                         : min(kMaxSplits / kRows, (positions + kPart - 1) / kPart);
  const int span = (positions + wanted - 1) / wanted;
  row->span = max(1, (span + kPage - 1) / kPage) * kPage;
  row->splits = max(1, (positions + row->span - 1) / row->span);
  row->joins = joined ? row->splits : 1;
}

// What the block has to know of the step, read by its first warps.
template <typename W, int kRows>
__device__ __forceinline__ void ReadStep(const Plan& plan, Shared<kRows>& shared) {
  const int i = threadIdx.x;
  if (i < kRows) {
    RowState row = {nullptr, -1, 0, 1, kPage, 1};
    if (i < plan.rows) {
      const Row here = plan.row_list[i];
      if (here.slot >= 0) {
        const Slot& slot = plan.slots_of_rows[here.slot];
        const int newest = slot.finished != 0 ? -1 : slot.length - 1;
        row.position = here.position >= 0 ? here.position : newest;
        row.pages = const_cast<const char* const*>(slot.pages);
        if (row.position >= 0) row.token = slot.tokens[row.position];
      }
    }
    const int joins = kRows == 1 && plan.hidden <= kChunk ? kMaxJoins : 1;
    CutRow<kRows>(&row, RoundOf(plan, kManyLoads), joins);
    shared.rows[i] = row;
  }
  if (i == 32) {
    shared.epoch = plan.state[0] + 1u;
    if (plan.chooses != 0) shared.step = *plan.choice.step;
    shared.choice.num_listed = shared.rehearsal.num_listed = 0;
  }
  if (plan.chooses != 0 && i >= 96 && i < 96 + plan.rows) {
    const int row = i - 96;
    RowChoice& choice = shared.choices[row];
    choice.slot_index = plan.row_list[row].slot;
    if (choice.slot_index >= 0) {
      const Slot& slot = plan.slots_of_rows[choice.slot_index];
      choice.slot = slot;
      choice.few = slot.sampling.sample != 0 ? slot.sampling.top_k : 0;
    }
    for (int warp = 0; warp < kMaxFinisherWarps; ++warp) {
      shared.choice.listed[warp][row] = shared.rehearsal.listed[warp][row] = 0;
    }
  }
  if (i >= 128 && i < 128 + kWarps) {
    shared.columns[i - 128] = ColumnsOfWarp(plan.hidden, i - 128);
  }
  if (i >= 64 && i < 64 + kPhases) {
    const Product& product = plan.products[i - 64];
    Work work;
    work.tiles = i - 64 == kAttention ? 0 : TilesOf(product);
    work.chunks = product.chunks;
    work.in = product.in;
    work.row_pieces =
        product.norm_weight != nullptr ? product.in / kTile * kTileStride : product.in / 4;
    work.source = plan.exchange + product.source;
    work.gamma = product.norm_weight;
    work.pitch = static_cast<int32_t>(product.row_bytes);
    work.scale_pitch = static_cast<int32_t>(product.scale_bytes);
    shared.work[i - 64] = work;
  }
}

// Element n of a token's embedding.
template <typename W>
__device__ __forceinline__ float EmbeddingAt(const Matrix& table, int token, int n) {
  const char* const row = static_cast<const char*>(table.data) + token * table.row_bytes;
  if (W::kScales == 0) {
    float pair[2];
    Vector<typename W::Element>::UnpackPair(reinterpret_cast<const uint16_t*>(row)[n], pair);
    return pair[0];
  }
  const __half* const scales = static_cast<const __half*>(table.scales);
  const float scale =
      __half2float(scales[static_cast<int64_t>(token) * table.scale_stride + n / kGroup]);
  const int q = W::kBits == 8 ? reinterpret_cast<const int8_t*>(row)[n]
                              : (row[n / 2] >> (n % 2 * 4) & 15) - 8;
  return scale * static_cast<float>(q);
}

// The first layer's input, by the finishers that keep the residual stream of those columns.
template <typename W, int kRows>
__device__ __forceinline__ void Embed(Thread<kRows>& self,
                                      float (&residual)[Threads<kRows>::kOutputs]) {
  const Plan& plan = self.plan;
  const Product& keeper = plan.products[kOut];
#pragma unroll
  for (int i = 0; i < Threads<kRows>::kOutputs; ++i) {
    const Output<kRows> output(self, keeper, 0, TilesOf(keeper), i);
    residual[i] = 0.0f;
    if (output.own) {
      const RowState& state = self.shared.rows[output.row];
      residual[i] = EmbeddingAt<W>(plan.embedding, state.token, output.n) +
                    plan.positions[state.position * plan.position_stride + output.n];
    }
    Publish(plan.exchange + plan.products[kQkv].source +
                ResidualPiece(output.row * plan.hidden + output.n),
            residual[i], self.epoch, output.own && self.lane % 4 == 0);
  }
}

// Counts the step when all blocks have read which one it is, by a thread of each.
__device__ __forceinline__ void CountStep(const Plan& plan, uint32_t epoch, int32_t step) {
  if (atomicAdd(plan.state + 1, 1u) + 1u != gridDim.x) return;
  plan.state[1] = 0;
  plan.state[0] = epoch + static_cast<uint32_t>(plan.layers);
  if (plan.chooses != 0) *plan.choice.step = step + 1;
}

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
