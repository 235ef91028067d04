// Attention of the persistent kernel. A unit is a row, a head and a part of the row's positions; a
// block takes a unit, its warps take positions, and one barrier puts the warps together. Keys and values
// that are in the cache are on their way before the query is there; those of the newest position come
// from the exchange, and the unit that sees them writes them to the cache.
#pragma once

#include "cuda/persistent_device.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

// Units of attention, counted from the last block down: the first have the most outputs to compute.
struct Unit {
  int row, head, split;
  int begin, end;  // positions
  bool newest;     // end - 1 is the row's newest
};

// False where there are fewer units.
template <int kRows>
__device__ __forceinline__ bool FindUnit(const Thread<kRows>& self, int index, Unit* unit) {
  const int heads = self.plan.heads;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const RowState& row = self.shared.rows[r];
    const int units = self.Active(r) ? row.splits * heads : 0;
    if (index < units) {
      unit->row = r;
      unit->split = index / heads;
      unit->head = index - unit->split * heads;
      unit->begin = unit->split * row.span;
      unit->end = min(row.position + 1, unit->begin + row.span);
      unit->newest = unit->end == row.position + 1;
      return true;
    }
    index -= units;
  }
  return false;
}

__device__ __forceinline__ int FirstUnit() {
  return static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x);
}

// How a warp reads keys and values: kLanes lanes hold a position, 8 numbers each.
template <typename T, int kLanes_>
struct Reading {
  static constexpr int kLanes = kLanes_;
  static constexpr int kLoads = 4;
  static constexpr int kStep = 32 / kLanes;          // positions of a load
  static constexpr int kSpan = kLoads * kStep;       // of a warp
  static constexpr int kRoundSpan = kWarps * kSpan;  // of a block
  static_assert(kPage % kSpan == 0, "a warp's positions lie in a page");
};

// Tells the L2 cache which keys and values the block will read in this layer.
template <int kRows>
__device__ __forceinline__ void PrefetchUnit(const Thread<kRows>& self, int layer) {
  Unit unit;
  if (!FindUnit(self, FirstUnit(), &unit)) return;
  const CacheLayout& cache = self.plan.cache;
  const int kind = self.thread & 1;
  const int position = unit.begin + self.thread / 2;
  if (position >= unit.end - (unit.newest ? 1 : 0)) return;
  const char* const page = self.shared.rows[unit.row].pages[position / kPage];
  const char* const at =
      page + (HeadOffset(cache, layer, kind, unit.head) + position % kPage * cache.head_stride) * 2;
  for (int byte = 0; byte < cache.head_stride * 2; byte += 128) PrefetchToL2(at + byte);
}

// The warp's part of a round's keys (kind 0) or values (kind 1), as far as they are in the cache.
template <typename R, int kRows>
__device__ __forceinline__ void LoadRound(const Thread<kRows>& self, const Unit& unit, int layer,
                                          int kind, int first, uint4 (&to)[R::kLoads]) {
  const CacheLayout& cache = self.plan.cache;
  const int cached = unit.end - (unit.newest ? 1 : 0);
  const int dim = self.lane % R::kLanes * 8;
  const int sub = self.lane / R::kLanes;
  const char* at = nullptr;
  if (first < cached) {
    at = self.shared.rows[unit.row].pages[first / kPage] +
         (HeadOffset(cache, layer, kind, unit.head) + (first % kPage + sub) * cache.head_stride +
          dim) *
             2;
  }
  const int left = dim < self.plan.head_size ? cached - first - sub : 0;
#pragma unroll
  for (int i = 0; i < R::kLoads; ++i) {
    to[i] = make_uint4(0, 0, 0, 0);
    if (i * R::kStep < left) {
      to[i] = *reinterpret_cast<const uint4*>(at + i * R::kStep * cache.head_stride * 2);
    }
  }
}

// Eight numbers as the cache holds them: finite ones stay finite.
template <typename T>
__device__ __forceinline__ uint32_t CachePair(float low, float high);

template <>
__device__ __forceinline__ uint32_t CachePair<__half>(float low, float high) {
  return RoundPair<__half>(SaturateHalf(low), SaturateHalf(high));
}

template <>
__device__ __forceinline__ uint32_t CachePair<BFloat16>(float low, float high) {
  constexpr float kMost = 3.3895313892515355e38f;
  low = low > kMost ? kMost : low < -kMost ? -kMost : low;
  high = high > kMost ? kMost : high < -kMost ? -kMost : high;
  return RoundPair<BFloat16>(low, high);
}

template <typename T>
__device__ __forceinline__ uint4 CacheEight(const uint4& first, const uint4& second) {
  float x[8];
  UnpackPiece(first, x);
  UnpackPiece(second, x + 4);
  return make_uint4(CachePair<T>(x[0], x[1]), CachePair<T>(x[2], x[3]), CachePair<T>(x[4], x[5]),
                    CachePair<T>(x[6], x[7]));
}

// Writes 8 numbers of the newest position's keys and values to the cache.
template <int kRows>
__device__ __forceinline__ void StoreNewest(const Thread<kRows>& self, const Unit& unit, int layer,
                                            int dim, const uint4& k, const uint4& v) {
  const CacheLayout& cache = self.plan.cache;
  const RowState& row = self.shared.rows[unit.row];
  char* const page = const_cast<char*>(row.pages[row.position / kPage]);
  const int64_t at = row.position % kPage * cache.head_stride + dim;
  *reinterpret_cast<uint4*>(page + (HeadOffset(cache, layer, 0, unit.head) + at) * 2) = k;
  *reinterpret_cast<uint4*>(page + (HeadOffset(cache, layer, 1, unit.head) + at) * 2) = v;
}

template <typename T, int kLanes, int kRows>
__device__ __forceinline__ void RunUnit(Thread<kRows>& self, const Unit& unit, int layer) {
  using R = Reading<T, kLanes>;
  const Plan& plan = self.plan;
  const uint32_t epoch = plan.epoch + static_cast<uint32_t>(layer) + 1u;
  const int dim = self.lane % kLanes * 8;
  const int sub = self.lane / kLanes;
  const bool own = dim < plan.head_size;

  int first = unit.begin + self.warp * R::kSpan;
  uint4 k[R::kLoads], v[R::kLoads];
  LoadRound<R>(self, unit, layer, 0, first, k);
  LoadRound<R>(self, unit, layer, 1, first, v);
  self.StampNow(kAttention, layer, Stamp::kWeights);

  // The lanes that hold the newest position take its keys and values along with the query.
  const int newest = unit.end - 1 - sub - unit.begin;  // from the lane's first position
  const bool holds = own && unit.newest && newest >= 0 && newest % R::kStep == 0 &&
                     newest % R::kRoundSpan / R::kSpan == self.warp;
  uint4 pieces[6];
  const uint4* const query = plan.exchange + plan.products[kQkv].target +
                             (unit.row * 3 * plan.hidden + unit.head * plan.head_size + dim) / 4;
  const auto at = [&](int i) { return query + i / 2 * (plan.hidden / 4) + i % 2; };
  const uint32_t wanted = holds ? 63u : own ? 3u : 0u;
  AskForPieces(pieces, wanted, at);
  WaitForPieces(pieces, wanted, at, epoch);
  __syncwarp();
  self.StampNow(kAttention, layer, Stamp::kInputs);
  float q[8];
  UnpackPiece(pieces[0], q);
  UnpackPiece(pieces[1], q + 4);
  uint4 new_k = make_uint4(0, 0, 0, 0), new_v = new_k;
  if (holds) {
    new_k = CacheEight<T>(pieces[2], pieces[3]);
    new_v = CacheEight<T>(pieces[4], pieces[5]);
    StoreNewest(self, unit, layer, dim, new_k, new_v);
  }

  float max = -Infinity(), sum = 0.0f;
  float result[8] = {};
#pragma unroll 1
  for (;;) {
    const int next = first + R::kRoundSpan;
    float scores[R::kLoads];
    float greatest = max;
#pragma unroll
    for (int i = 0; i < R::kLoads; ++i) {
      if (holds && first + sub + i * R::kStep == unit.end - 1) {
        k[i] = new_k;
        v[i] = new_v;
      }
    }
#pragma unroll
    for (int i = 0; i < R::kLoads; ++i) {
      float key[8];
      Vector<T>::Unpack(k[i], key);
      float a = 0.0f, b = 0.0f;
#pragma unroll
      for (int e = 0; e < 8; e += 2) {
        a = fmaf(q[e], key[e], a);
        b = fmaf(q[e + 1], key[e + 1], b);
      }
      scores[i] = a + b;
    }
    if (next < unit.end) LoadRound<R>(self, unit, layer, 0, next, k);
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < R::kLoads; ++i) {
        scores[i] += __shfl_xor_sync(0xffffffffu, scores[i], offset);
      }
    }
#pragma unroll
    for (int i = 0; i < R::kLoads; ++i) {
      if (first + i * R::kStep + sub >= unit.end) scores[i] = -Infinity();
      greatest = fmaxf(greatest, scores[i]);
    }
#pragma unroll
    for (int offset = 16; offset >= kLanes; offset /= 2) {
      greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffffu, greatest, offset));
    }
    // Nothing yet: all weights are exp2(-inf), which must not meet another -inf.
    const float base = greatest == -Infinity() ? 0.0f : greatest;
    const float keep = Exp2(max - base);
    sum *= keep;
#pragma unroll
    for (int e = 0; e < 8; ++e) result[e] *= keep;
#pragma unroll
    for (int i = 0; i < R::kLoads; ++i) {
      const float p = Exp2(scores[i] - base);
      sum += p;
      float value[8];
      Vector<T>::Unpack(v[i], value);
#pragma unroll
      for (int e = 0; e < 8; ++e) result[e] = fmaf(p, value[e], result[e]);
    }
    max = greatest;
    if (next >= unit.end) break;
    first = next;
    LoadRound<R>(self, unit, layer, 1, first, v);
  }
#pragma unroll
  for (int offset = 16; offset >= kLanes; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
#pragma unroll
    for (int e = 0; e < 8; ++e) result[e] += __shfl_xor_sync(0xffffffffu, result[e], offset);
  }
  const int buffer = self.buffer;
  if (sub == 0) {
    float4* const to = reinterpret_cast<float4*>(self.shared.attended[buffer][self.warp] + dim);
    to[0] = make_float4(result[0], result[1], result[2], result[3]);
    to[1] = make_float4(result[4], result[5], result[6], result[7]);
  }
  if (self.lane == 0) {
    self.shared.attention_max[buffer][self.warp] = max;
    self.shared.attention_sum[buffer][self.warp] = sum;
  }
  self.Sync();
  self.StampNow(kAttention, layer, Stamp::kSums);
  self.buffer ^= 1;
  if (self.warp * 32 >= plan.head_size) return;

  // Thread d puts number d of the head together.
  const int d = self.thread;
  float all_max = -Infinity(), all_sum = 0.0f, x = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    all_max = fmaxf(all_max, self.shared.attention_max[buffer][w]);
  }
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const float weight = Exp2(self.shared.attention_max[buffer][w] - all_max);
    all_sum = fmaf(weight, self.shared.attention_sum[buffer][w], all_sum);
    x = fmaf(weight, self.shared.attended[buffer][w][min(d, kMaxHeadSize - 1)], x);
  }
  const bool alone = self.shared.rows[unit.row].splits == 1;
  if (alone) x = __fdiv_rn(x, all_sum);
  const int split = unit.split * kPersistentRows;
  PublishLanes(plan.exchange + plan.products[kOut].source +
                   ((split + unit.row) * plan.hidden + unit.head * plan.head_size + d) / 4,
               x, epoch, d < plan.head_size && d % 4 == 0);
  if (!alone && d == 0) {
    StoreWhole(plan.exchange + plan.split_stats + (split + unit.row) * plan.heads + unit.head,
               make_uint4(__float_as_uint(all_max), __float_as_uint(all_sum), 0, epoch));
  }
}

template <typename T, int kRows>
__device__ __forceinline__ void RunAttention(Thread<kRows>& self, int layer) {
  Unit unit;
#pragma unroll 1
  for (int index = FirstUnit(); FindUnit(self, index, &unit); index += gridDim.x) {
    self.StampNow(kAttention, layer, Stamp::kBegin);
    if (self.plan.head_size <= 64) {
      RunUnit<T, 8>(self, unit, layer);
    } else {
      RunUnit<T, 16>(self, unit, layer);
    }
    self.StampNow(kAttention, layer, Stamp::kEnd);
  }
}

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
