// Attention of the persistent kernel. A unit is a row, a head and a part of the row's positions, a split;
// a block takes a unit, its workers take positions, and its finishers put them together. Who has the
// first split of a row and head then puts the splits together; or the next product's workers do, each for
// itself, where there are few: that is a way from block to block less. Keys and values that are in the cache
// are on their way before the query is there; those of the newest position come from the exchange, and
// the unit that sees them writes them to the cache.
#pragma once

#include "cuda/persistent_thread.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

// Loads of keys, and of values, that a thread holds: the fewer where a round of them is all of a unit. The least only
// with one row, whose positions many blocks share.
constexpr int kLeastLoads = 2, kFewLoads = 4, kManyLoads = 8;

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

// Lanes that hold a position.
__device__ __forceinline__ int LanesOf(const Plan& plan) { return plan.head_size <= 64 ? 8 : 16; }

// Positions of a round of a block's loads.
__device__ __forceinline__ int RoundOf(const Plan& plan, int loads) {
  return kWarps * loads * 32 / LanesOf(plan);
}

template <int kRows>
__device__ __forceinline__ int LoadsOf(const Thread<kRows>& self, const Unit& unit) {
  const int positions = unit.end - unit.begin;
  if (kRows == 1 && positions <= RoundOf(self.plan, kLeastLoads)) return kLeastLoads;
  return positions <= RoundOf(self.plan, kFewLoads) ? kFewLoads : kManyLoads;
}

// A thread's key of the warp's positions from `first` on, in the first layer: `lanes` lanes hold a
// position, 8 numbers each.
template <int kRows>
__device__ __forceinline__ const char* KeyAt(const Thread<kRows>& self, const Unit& unit, int first,
                                             int lanes) {
  const CacheLayout& cache = self.plan.cache;
  const int dim = self.lane % lanes * 8, in_page = first % kPage + self.lane / lanes;
  const int64_t at = HeadOffset(cache, 0, 0, unit.head) + in_page * cache.head_stride + dim;
  return self.shared.rows[unit.row].pages[first / kPage] + TurnedIndex(cache, at, in_page) * 2;
}

// The same for the first key of a unit; null where it is not in the cache.
template <int kRows>
__device__ __forceinline__ const char* FirstKey(const Thread<kRows>& self, const Unit& unit) {
  const int lanes = LanesOf(self.plan);
  const int first = unit.begin + self.warp * (LoadsOf(self, unit) * 32 / lanes);
  const bool cached = first < unit.end - (unit.newest ? 1 : 0);
  return cached ? KeyAt(self, unit, first, lanes) : nullptr;
}

// Bytes of the cache from keys to values of a head, and from layer to layer.
__device__ __forceinline__ int64_t ToValues(const CacheLayout& cache) {
  return HeadOffset(cache, 0, 1, 0) * 2;
}
__device__ __forceinline__ int64_t ToLayer(const CacheLayout& cache, int layer) {
  return HeadOffset(cache, layer, 0, 0) * 2;
}

// Brings the keys and values of the block's units that are in the cache into the L2 cache, by a warp.
template <int kRows>
__device__ __forceinline__ void PrefetchUnits(const Thread<kRows>& self, int layer) {
  constexpr int kLine = 128;
  const CacheLayout& cache = self.plan.cache;
  const int bytes = cache.head_stride * 2;  // of a position
  Unit unit;
#pragma unroll 1
  for (int index = FirstUnit(); FindUnit(self, index, &unit);
       index += static_cast<int>(gridDim.x)) {
    const char* const* const pages = self.shared.rows[unit.row].pages;
    const int end = (unit.end - (unit.newest ? 1 : 0)) * bytes;
#pragma unroll 1
    for (int at = unit.begin * bytes + self.lane * kLine; at < end; at += 32 * kLine) {
      const int page = at / (kPage * bytes);
      const char* const key =
          pages[page] + HeadOffset(cache, layer, 0, unit.head) * 2 + at - page * (kPage * bytes);
      PrefetchToL2(key);
      PrefetchToL2(key + ToValues(cache));
    }
  }
}

// How a warp reads keys and values: kLanes lanes hold a position, and all of a unit is one round (kOnce) or more.
template <int kLanes_, int kLoads_, bool kOnce_>
struct Reading {
  static constexpr int kLanes = kLanes_, kLoads = kLoads_;
  static constexpr bool kOnce = kOnce_;
  static constexpr int kStep = 32 / kLanes;          // positions of a load
  static constexpr int kSpan = kLoads * kStep;       // of a warp
  static constexpr int kRoundSpan = kWarps * kSpan;  // of a block
  static_assert(kPage % kSpan == 0, "a warp's positions lie in a page");
};

// The warp's part of a round's keys or values, which begin at `at` (not read where null), as far as
// they are in the cache.
template <typename R, int kRows>
__device__ __forceinline__ void LoadRound(const Thread<kRows>& self, const Unit& unit, int first,
                                          const char* at, uint4 (&to)[R::kLoads]) {
  const int cached = unit.end - (unit.newest ? 1 : 0);
  const bool own = at != nullptr && self.lane % R::kLanes * 8 < self.plan.head_size;
  const int left = own ? cached - first - self.lane / R::kLanes : 0;
  const int stride = R::kStep * self.plan.cache.head_stride * 2;
  // Four positions further the piece lies in the other half of a turned position, which begins at 128 bytes.
  static_assert(R::kLanes != 8 || R::kSpan % 8 == 0, "a warp's positions begin with a turn");
  const int half = R::kLanes == 8 && IsTurned(self.plan.cache) ? 64 : 0;
  const char* const other = reinterpret_cast<const char*>(reinterpret_cast<uint64_t>(at) ^ half);
#pragma unroll
  for (int i = 0; i < R::kLoads; ++i) {
    to[i] = make_uint4(0, 0, 0, 0);
    const char* const from = (i % 2 == 0 ? at : other) + i * stride;
    if (i * R::kStep < left) to[i] = *reinterpret_cast<const uint4*>(from);
  }
}

// Eight numbers as the cache holds them: finite ones stay finite.
template <typename T>
__device__ __forceinline__ uint4 CacheEight(const uint4& first, const uint4& second) {
  float x[8];
  UnpackPiece(first, x);
  UnpackPiece(second, x + 4);
  return make_uint4(RoundPairFinite<T>(x[0], x[1]), RoundPairFinite<T>(x[2], x[3]),
                    RoundPairFinite<T>(x[4], x[5]), RoundPairFinite<T>(x[6], x[7]));
}

// Writes 8 numbers of the newest position's keys and values to the cache.
template <int kRows>
__device__ __forceinline__ void StoreNewest(const Thread<kRows>& self, const Unit& unit, int layer,
                                            int dim, const uint4& k, const uint4& v) {
  const CacheLayout& cache = self.plan.cache;
  const RowState& row = self.shared.rows[unit.row];
  char* const page = const_cast<char*>(row.pages[row.position / kPage]);
  const int in_page = row.position % kPage;
  const int64_t at = TurnedIndex(cache, in_page * cache.head_stride + dim, in_page);
  *reinterpret_cast<uint4*>(page + (HeadOffset(cache, layer, 0, unit.head) + at) * 2) = k;
  *reinterpret_cast<uint4*>(page + (HeadOffset(cache, layer, 1, unit.head) + at) * 2) = v;
}

template <typename T, typename R, int kRows>
__device__ __forceinline__ void RunUnit(Thread<kRows>& self, const Unit& unit,
                                        const char* first_key, int layer) {
  constexpr int kLanes = R::kLanes;
  const Plan& plan = self.plan;
  const uint32_t epoch = self.epoch + static_cast<uint32_t>(layer) + 1u;
  const int dim = self.lane % kLanes * 8;
  const int sub = self.lane / kLanes;
  const bool own = dim < plan.head_size;

  // The lanes that hold the newest position take its keys and values along with the query.
  const int newest = unit.end - 1 - sub - unit.begin;  // from the lane's first position
  const bool holds = own && unit.newest && newest >= 0 && newest % R::kStep == 0 &&
                     newest % R::kRoundSpan / R::kSpan == self.warp;
  uint4 pieces[6];
  const uint4* const query = plan.exchange + plan.products[kQkv].target +
                             (unit.row * 3 * plan.hidden + unit.head * plan.head_size + dim) / 4;
  const auto at = [&](int i) { return query + i / 2 * (plan.hidden / 4) + i % 2; };
#pragma unroll
  for (int i = 0; i < 6; ++i) pieces[i] = AskForPiece(at(i), epoch, own && (i < 2 || holds));

  int first = unit.begin + self.warp * R::kSpan;
  const int64_t in_page = ToLayer(plan.cache, layer);
  const char* const keys = first_key == nullptr ? nullptr : first_key + in_page;
  uint4 k[R::kLoads], v[R::kLoads];
  LoadRound<R>(self, unit, first, keys, k);
  LoadRound<R>(self, unit, first, keys == nullptr ? nullptr : keys + ToValues(plan.cache), v);
  self.StampNow(kAttention, layer, Stamp::kWeights, __uint_as_float(k[0].x));

  WaitForPieces(pieces, at, epoch);
  self.StampNow(kAttention, layer, Stamp::kInputs, __uint_as_float(pieces[0].x));
  float q[8];
  UnpackPiece(pieces[0], q);
  UnpackPiece(pieces[1], q + 4);
  uint4 new_k = make_uint4(0, 0, 0, 0), new_v = new_k;
  if (holds) {
    new_k = CacheEight<T>(pieces[2], pieces[3]);
    new_v = CacheEight<T>(pieces[4], pieces[5]);
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
    const bool more = !R::kOnce && next < unit.end;
    const char* next_keys = nullptr;
    if (more && next < unit.end - (unit.newest ? 1 : 0)) {
      next_keys = KeyAt(self, unit, next, kLanes) + in_page;
    }
    if (more) LoadRound<R>(self, unit, next, next_keys, k);
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
    if (!R::kOnce) {
      const float keep = Exp2(max - base);
      sum *= keep;
#pragma unroll
      for (int e = 0; e < 8; ++e) result[e] *= keep;
    }
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
    if (!more) break;
    first = next;
    LoadRound<R>(self, unit, first,
                 next_keys == nullptr ? nullptr : next_keys + ToValues(plan.cache), v);
  }
#pragma unroll
  for (int offset = 16; offset >= kLanes; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
#pragma unroll
    for (int e = 0; e < 8; ++e) result[e] += __shfl_xor_sync(0xffffffffu, result[e], offset);
  }
  self.WaitForBuffer();
  if (sub == 0) {
    float4* const to =
        reinterpret_cast<float4*>(self.shared.attended[self.buffer][self.warp] + dim);
    to[0] = make_float4(result[0], result[1], result[2], result[3]);
    to[1] = make_float4(result[4], result[5], result[6], result[7]);
  }
  if (self.lane == 0) {
    self.shared.attention_stats[self.buffer][self.warp] = make_float2(max, sum);
  }
  self.StampNow(kAttention, layer, Stamp::kProducts, sum);
  self.PassBuffer();
  // Nobody reads them before the next step.
  if (holds) StoreNewest(self, unit, layer, dim, new_k, new_v);
}

// By code for as many positions as there are: what it does not have it does not jump over, and one row's step
// waits for it.
template <typename T, int kLanes, int kRows>
__device__ __forceinline__ void RunUnitOf(Thread<kRows>& self, const Unit& unit,
                                          const char* first_key, int layer) {
  const int loads = LoadsOf(self, unit);
  if (kRows == 1 && loads == kLeastLoads) {
    RunUnit<T, Reading<kLanes, kLeastLoads, true>>(self, unit, first_key, layer);
  } else if (loads == kFewLoads) {
    RunUnit<T, Reading<kLanes, kFewLoads, true>>(self, unit, first_key, layer);
  } else if (kRows == 1 && unit.end - unit.begin <= RoundOf(self.plan, kManyLoads)) {
    RunUnit<T, Reading<kLanes, kManyLoads, true>>(self, unit, first_key, layer);
  } else {
    RunUnit<T, Reading<kLanes, kManyLoads, false>>(self, unit, first_key, layer);
  }
}

// Four numbers of an attended row, as the next product takes them: `x` over `sum`. The third number of the piece is
// `mass`, the logarithm of the sum of exponentials of scores where the row's parts are put together by who reads them.
template <typename W>
__device__ __forceinline__ uint4 AttendedPiece(const float (&x)[4], float sum, float mass,
                                               uint32_t epoch) {
  using T = typename W::Element;
  const float each = Reciprocal(sum) * (1.0f / W::kUnit);
  return make_uint4(RoundPairFinite<T>(x[0] * each, x[1] * each),
                    RoundPairFinite<T>(x[2] * each, x[3] * each), __float_as_uint(mass), epoch);
}

// Its place; that of part i is where row i would have it.
template <int kRows>
__device__ __forceinline__ uint4* AttendedAt(const Thread<kRows>& self, const Unit& unit,
                                             int part) {
  const Plan& plan = self.plan;
  const int row = unit.row + part;
  return plan.exchange + plan.products[kOut].source +
         (row * plan.hidden + unit.head * plan.head_size) / 4 + self.thread;
}

// The places of a split's four numbers, and of its maximum and sum.
template <int kRows>
__device__ __forceinline__ uint4* SplitValues(const Thread<kRows>& self, const Unit& unit,
                                              int split) {
  const Plan& plan = self.plan;
  const int row = split * kPersistentRows + unit.row;
  return plan.exchange + plan.split_values + (row * plan.hidden + unit.head * plan.head_size) / 4 +
         self.thread;
}
template <int kRows>
__device__ __forceinline__ uint4* SplitStats(const Thread<kRows>& self, const Unit& unit,
                                             int split) {
  const Plan& plan = self.plan;
  const int row = split * kPersistentRows + unit.row;
  return plan.exchange + plan.split_stats + row * plan.heads + unit.head;
}

// Puts together what the warps have of a unit.
template <typename W, int kRows>
__device__ __forceinline__ void FinishUnit(Thread<kRows>& self, const Unit& unit, int layer) {
  const Plan& plan = self.plan;
  const RowState& row = self.shared.rows[unit.row];
  const uint32_t epoch = self.epoch + static_cast<uint32_t>(layer) + 1u;
  // A lane has four numbers of the result; there are at most 128.
  const int d = self.thread * 4;
  uint32_t own = d < plan.head_size ? 1 : 0;
  // All that can be known before sums are there. After that all others wait, for code without jumps, too: what comes
  // next is fetched ahead.
  uint32_t direct = row.splits == row.joins ? 1 : 0;
  uint32_t joined = row.joins > 1 ? 1 : 0;
  uint4* to =
      direct != 0 ? AttendedAt(self, unit, unit.split) : SplitValues(self, unit, unit.split);
  asm volatile("" : "+l"(to), "+r"(own), "+r"(direct), "+r"(joined));
  self.PassBuffer();
  float maxima[kWarps], sums[kWarps];
  const float4* const stats =
      reinterpret_cast<const float4*>(self.shared.attention_stats[self.buffer]);
#pragma unroll
  for (int pair = 0; pair < kWarps / 2; ++pair) {
    const float4 both = stats[pair];
    maxima[2 * pair] = both.x, sums[2 * pair] = both.y;
    maxima[2 * pair + 1] = both.z, sums[2 * pair + 1] = both.w;
  }
  static_assert(kWarps == 8, "four pairs of warps");
  const float max = fmaxf(fmaxf(fmaxf(maxima[0], maxima[1]), fmaxf(maxima[2], maxima[3])),
                          fmaxf(fmaxf(maxima[4], maxima[5]), fmaxf(maxima[6], maxima[7])));
  float sum = 0.0f;
  float x[4] = {};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const float weight = Exp2(maxima[w] - max);
    sum = fmaf(weight, sums[w], sum);
    if (own == 0) continue;
    const float4 part = *reinterpret_cast<const float4*>(self.shared.attended[self.buffer][w] + d);
    x[0] = fmaf(weight, part.x, x[0]);
    x[1] = fmaf(weight, part.y, x[1]);
    x[2] = fmaf(weight, part.z, x[2]);
    x[3] = fmaf(weight, part.w, x[3]);
  }
  self.StampNow(kAttention, layer, Stamp::kSums, x[0]);
  const float mass = kRows == 1 && joined != 0 ? max + Log2(sum) : 0.0f;
  const uint4 piece = AttendedPiece<W>(x, sum, mass, epoch);
  if (own & direct) StoreWhole(to, piece);
  self.ReturnBuffer();
  if (direct == 0) {
    if (own != 0) StoreWhole(to, PackPiece(x[0], x[1], x[2], x[3], epoch));
    if (self.thread == 0) {
      StoreWhole(SplitStats(self, unit, unit.split),
                 make_uint4(__float_as_uint(max), __float_as_uint(sum), 0, epoch));
    }
  }
  self.StampNow(kAttention, layer, Stamp::kEnd);
}

// Whether a block with that unit puts the row's and head's splits together.
template <int kRows>
__device__ __forceinline__ bool Merges(const Thread<kRows>& self, const Unit& unit) {
  const RowState& row = self.shared.rows[unit.row];
  return unit.split == 0 && row.splits > row.joins;
}

// Puts together the splits of a row and head, in their order.
template <typename W, int kRows>
__device__ __forceinline__ void MergeSplits(const Thread<kRows>& self, const Unit& unit,
                                            int layer) {
  constexpr int kSplits = kMaxSplits / kRows;
  const uint32_t epoch = self.epoch + static_cast<uint32_t>(layer) + 1u;
  const int splits = self.shared.rows[unit.row].splits;
  const bool own = self.thread * 4 < self.plan.head_size;
  uint4 pieces[2 * kSplits];
  const auto at = [&](int i) -> const uint4* {
    return i % 2 == 0 ? SplitValues(self, unit, i / 2) : SplitStats(self, unit, i / 2);
  };
#pragma unroll
  for (int i = 0; i < 2 * kSplits; ++i) {
    pieces[i] = AskForPiece(at(i), epoch, own && i / 2 < splits);
  }
  WaitForPieces(pieces, at, epoch);
  float max = -Infinity(), sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kSplits; ++i) {
    if (i < splits) max = fmaxf(max, __uint_as_float(pieces[2 * i + 1].x));
  }
  float x[4] = {};
#pragma unroll
  for (int i = 0; i < kSplits; ++i) {
    const uint4& stat = pieces[2 * i + 1];
    const float weight = i < splits ? Exp2(__uint_as_float(stat.x) - max) : 0.0f;
    // The third number is zero: it is read because the 16 bytes have to be read as one.
    sum = fmaf(__uint_as_float(stat.y), weight, sum) + __uint_as_float(stat.z);
    float more[4];
    UnpackPiece(pieces[2 * i], more);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = fmaf(more[e], weight, x[e]);
  }
  if (own) StoreWhole(AttendedAt(self, unit, 0), AttendedPiece<W>(x, sum, 0.0f, epoch));
}

// The block's first unit, if it is `there`, and the thread's first key of it.
template <typename W, int kRows>
__device__ __forceinline__ void WorkOnAttention(Thread<kRows>& self, bool there, Unit unit,
                                                const char* first_key, int layer) {
  using T = typename W::Element;
  self.Forget();
  int index = FirstUnit();
#pragma unroll 1
  while (there) {
    self.StampNow(kAttention, layer, Stamp::kBegin);
    if (LanesOf(self.plan) == 8) {
      RunUnitOf<T, 8>(self, unit, first_key, layer);
    } else {
      RunUnitOf<T, 16>(self, unit, first_key, layer);
    }
    index += static_cast<int>(gridDim.x);
    there = FindUnit(self, index, &unit);
    if (there) first_key = FirstKey(self, unit);
  }
}

template <typename W, int kRows>
__device__ __forceinline__ void FinishAttention(Thread<kRows>& self, int layer) {
  Unit unit;
  bool merges = false;
#pragma unroll 1
  for (int index = FirstUnit(); FindUnit(self, index, &unit);
       index += static_cast<int>(gridDim.x)) {
    FinishUnit<W>(self, unit, layer);
    merges = merges || Merges(self, unit);
  }
  // Not before all units of the block are there for those who wait for them.
  if (!merges) return;
#pragma unroll 1
  for (int index = FirstUnit(); FindUnit(self, index, &unit);
       index += static_cast<int>(gridDim.x)) {
    if (Merges(self, unit)) MergeSplits<W>(self, unit, layer);
  }
}

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
