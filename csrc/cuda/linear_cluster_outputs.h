// How the outputs of linear_cluster.cu are finished, one by one: where their sums are and where they go.
#pragma once

#include "cuda/linear_cluster.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace linear_cluster {

// An output that a thread finishes.
struct Target {
  bool there;
  int32_t column;  // of the tile
  int32_t row;     // of the block
  uint32_t sums;   // its first share, in a buffer
  float bias, norm_sum;
  float* y;     // null where it goes to the cache
  char* cache;  // null: nowhere
  bool last;    // of its head
};

// Output `index` of those of the block's units, 16 outputs by 8 rows each.
template <int kRowTiles>
__device__ __forceinline__ Target TargetOf(const ClusterPlan& plan, const Place& at, int32_t tile,
                                           int32_t index, int32_t count) {
  Target target = {};
  const uint32_t local = static_cast<uint32_t>(index) / (kTileOutputs * 8);
  const uint32_t column = static_cast<uint32_t>(index) % kTileOutputs;
  const uint32_t row = static_cast<uint32_t>(index) / kTileOutputs % 8;
  const uint32_t unit = local << plan.cluster_bits | at.rank;
  target.row = unit % kRowTiles * 8 + row;
  target.column = unit / kRowTiles * kTileOutputs + column;
  target.sums = (local << at.share_bits) * kUnitBytes +
                ((column % 8 * 4 + row / 2) * 4 + column / 8 * 2 + row % 2) * 4;
  target.there = index < count && target.row < at.rows &&
                 tile * at.tile_outputs + target.column < plan.task.args.w.out;
  return target;
}

// Of output n: its bias, and its sum of the norm.
__device__ __forceinline__ float2 ReadColumn(const LinearTask& task, int32_t n) {
  float2 column = make_float2(0.0f, 0.0f);
  const float* bias = task.normed ? task.args.norm_bias : task.args.w.bias;
  if (bias != nullptr) column.x = ReadEarly(bias + n);
  if (task.normed) column.y = ReadEarly(task.args.norm_sums + n);
  return column;
}

// Where the target goes.
__device__ __forceinline__ void FindPlace(const LinearTask& task, const Place& at, int32_t tile,
                                          const CachePlace* places, Target* target) {
  if (!target->there) return;
  const int32_t n = tile * at.tile_outputs + target->column;
  const CacheColumn cache = CacheColumnOf(task, n);
  if (cache.index < 0) {
    target->y = task.args.y + (at.first_row + target->row) * task.args.ldy + n;
    return;
  }
  const CachePlace& place = places[target->row];
  if (place.page == nullptr) return;
  const CacheLayout& layout = task.args.cache;
  const int64_t element =
      TurnedIndex(layout, cache.index + place.in_page * layout.head_stride, place.in_page);
  target->cache = place.page + element * ElementBytes(layout.dtype);
  target->last = cache.last;
}

// Adds an output's shares, in order.
__device__ __forceinline__ float SumOfShares(uint32_t from, int32_t shares) {
  float total = 0.0f;
#pragma unroll 1
  for (int32_t first = 0; first < shares; first += kSharesAtOnce) {
    float part[kSharesAtOnce];
#pragma unroll
    for (int s = 0; s < kSharesAtOnce; ++s) {
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(part[s]) : "r"(from + s * kUnitBytes));
    }
#pragma unroll
    for (int s = 0; s < kSharesAtOnce; ++s) total += part[s];
    from += kSharesAtOnce * kUnitBytes;
  }
  return total;
}

// Writes a target, whose shares amount to `sum`.
__device__ __forceinline__ void WriteTarget(const LinearTask& task, const Target& target, float sum,
                                            float residual) {
  const float value = sum + target.bias;
  switch (task.args.epilogue) {
    case Epilogue::kStore: *target.y = value; return;
    case Epilogue::kGelu: *target.y = Gelu(value); return;
    case Epilogue::kResidual: *target.y = residual + value; return;
    case Epilogue::kQkv: break;
  }
  if (target.y != nullptr) {
    *target.y = value / task.query_divisor;
    return;
  }
  if (target.cache == nullptr) return;
  const CacheLayout& cache = task.args.cache;
  StoreElement(cache.dtype, target.cache, 0, value);
  if (!target.last) return;
  for (int32_t pad = 1; pad <= cache.head_stride - cache.head_size; ++pad) {
    StoreElement(cache.dtype, target.cache, pad, 0.0f);
  }
}

}  // namespace linear_cluster
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
