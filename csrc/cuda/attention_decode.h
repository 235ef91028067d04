// What the kernels of decode attention share: one query of a head against a part of its positions, in
// the registers of a warp, and how the parts of a head are put together.
//
// The pages of a row are cut into at most kDecodeParts parts of neighbouring pages, by the row's
// length alone. A warp attends over a part on its own, in order; whichever warps and blocks did the
// parts, one combine puts them together in one order. So a row's result is the same bits however the
// work is shared and whatever rows are beside it.
#pragma once

#include "cuda/attention.h"

namespace fastgen {
namespace cuda {

// ---- the plan of a step -------------------------------------------------------------------------

// A part as a warp of the streaming kernel works on it. Those of a block come in rounds, one for each
// warp; the plan holds them as [rounds][blocks][warps].
struct alignas(16) DecodeItem {
  const char* page;          // the part's first page
  const char* const* later;  // its other pages in the page table
  int32_t positions;         // 0: there is nothing for the warp in this round, nor later
  int32_t row;
  int16_t head;
  uint16_t result;  // where what becomes of the part is kept
  uint8_t part;
  uint8_t parts;  // of the head
  uint8_t count;  // of the head's parts in this block, up to this one
  uint8_t flags;
};
static_assert(sizeof(DecodeItem) == 32, "two loads");
// The last position is the row's own, which the kernel before writes.
constexpr int kItemNewest = 1;
constexpr int kItemMore = 2;    // the block has another round
constexpr int kItemEnds = 4;    // it is the last of the head's parts in this block
constexpr int kItemCut = 8;     // other blocks have parts of the head too
constexpr int kItemTurns = 16;  // the warp's next part is of another head

// Where the parts of the plan lie.
struct DecodePlan {
  DecodeItem* items;
  uint64_t* ahead;      // [blocks][warps]: see DecodePiecesAhead; of the first layer
  int32_t* empty_rows;  // their number, then they
  int32_t rounds;       // that there is room for
};

// Blocks, and warps of each, of the streaming kernel; no blocks where the device or the
// cache's shape do not allow it.
struct StreamGrid {
  int32_t blocks = 0;
  int32_t warps = 0;
  // Rounds from one barrier of a block to the next, in which a warp's parts are neighbours.
  int32_t run = 0;

  // Parts of which a block keeps what became of them: of a head those before a run of all warps, these, and
  // the next ones.
  __host__ __device__ int32_t results() const { return kDecodeParts - 1 + 2 * warps * run; }
};
cudaError_t GetStreamGrid(const CacheLayout& cache, StreamGrid* grid);

// The plan within its memory; returns the bytes.
size_t PlaceDecodePlan(const StreamGrid& grid, const CacheLayout& cache, int32_t rows, void* memory,
                       DecodePlan* plan);

// The kernel that streams pages through shared memory by bulk copies, from sm_90 on; `args.plan` is
// there.
cudaError_t DecodeAttentionStream(const DecodeAttentionArgs& args, cudaStream_t stream);

// ---- shapes -------------------------------------------------------------------------------------

// How a warp reads keys or values of a page: kLanes lanes hold a position, kChunks times 16 bytes
// each, and the warp kLoads * 32 / kLanes positions at a time.
template <typename T, int kLanes_, int kChunks_, int kLoads_>
struct DecodeShape {
  using Type = T;
  static constexpr int kLanes = kLanes_;
  static constexpr int kChunks = kChunks_;
  static constexpr int kLoads = kLoads_;
  static constexpr int kStep = 32 / kLanes;  // positions of a load
  static constexpr int kTile = kLoads * kStep;
  static constexpr int kSize = Vector<T>::kSize;
  static_assert(kPage % kTile == 0, "a tile lies within a page");
};

// ---- the parts of a row -------------------------------------------------------------------------

static_assert(kDecodeParts == 32, "the combine holds one part per lane");

struct RowParts {
  int pages;
  int pages_per_part;
  int parts;
};

__device__ inline RowParts PartsOf(int length) {
  RowParts row;
  row.pages = (length + kPage - 1) / kPage;
  row.pages_per_part = (row.pages + kDecodeParts - 1) / kDecodeParts;
  row.parts = length > 0 ? (row.pages + row.pages_per_part - 1) / row.pages_per_part : 0;
  return row;
}

// Positions that the query of a row sees, 0 where there is no token, and the pages they are in.
__device__ inline int VisibleLength(const Row& row, const Slot* slots, const char* const** pages) {
  if (row.slot < 0) return 0;
  const Slot* slot = slots + row.slot;
  *pages = const_cast<const char* const*>(slot->pages);
  const int newest = slot->finished != 0 ? 0 : slot->length;
  return row.position >= 0 ? row.position + 1 : newest;
}

// ---- within a warp ------------------------------------------------------------------------------

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float MaxOfLanes(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}

__device__ inline float SumOfLanes(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// Sums value i of kCount over the kLanes lanes of a group, leaving it in `values[0]` of those lanes
// whose number within the group is in [i, i + 1) * kLanes / kCount.
template <int kLanes, int kCount>
__device__ inline void ReduceScatter(float (&values)[kCount], int lane) {
  static_assert(kCount <= kLanes, "every value needs a lane");
  int n = kCount;
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    if (n == 1) {
      values[0] += __shfl_xor_sync(kAllLanes, values[0], offset);
      continue;
    }
    n /= 2;
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      if (i >= n) break;
      const float keep = upper ? values[i + n] : values[i];
      const float send = upper ? values[i] : values[i + n];
      values[i] = keep + __shfl_xor_sync(kAllLanes, send, offset);
    }
  }
}

// Keys or values of the positions of a tile. `head` is the first position of the page's; what is at
// or after position `end` is not read: it may hold anything. `turn_mask` is the cache's (row.h).
template <typename S, bool kShared>
__device__ inline void LoadTile(uint4 (&tile)[S::kLoads][S::kChunks], const char* head,
                                int row_bytes, int turn_mask, int position, int end, int lane) {
  const int left = end - position - lane / S::kLanes;
  const char* from = head + (position % kPage + lane / S::kLanes) * row_bytes;
#pragma unroll
  for (int i = 0; i < S::kLoads; ++i) {
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      const int piece = c * S::kLanes + lane % S::kLanes;
      const int turn = (position + i * S::kStep + lane / S::kLanes) & turn_mask;
      tile[i][c] = make_uint4(0, 0, 0, 0);
      if (i * S::kStep < left && piece * 16 < row_bytes) {
        const uint4* const at = reinterpret_cast<const uint4*>(from) + (piece ^ turn);
        tile[i][c] = kShared ? *at : __ldg(at);
      }
    }
    from += S::kStep * row_bytes;
  }
}

// A query and what it has gathered of the positions so far. A lane has the numbers
// (c * kLanes + lane % kLanes) * kSize + e of the head.
template <typename S>
struct Gathered {
  float q[S::kChunks][S::kSize];
  float acc[S::kChunks][S::kSize];
  float max, sum;

  __device__ void Query(const float* query, int head_size, int lane) {
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
#pragma unroll
      for (int e = 0; e < S::kSize; ++e) {
        const int d = (c * S::kLanes + lane % S::kLanes) * S::kSize + e;
        q[c][e] = d < head_size ? __fmul_rn(query[d], kLog2e) : 0.0f;
      }
    }
  }

  __device__ void Clear() {
    max = -Infinity();
    sum = 0.0f;
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
#pragma unroll
      for (int e = 0; e < S::kSize; ++e) acc[c][e] = 0.0f;
    }
  }

  // The lane's share of the scores of a tile.
  __device__ void Multiply(const uint4 (&k)[S::kLoads][S::kChunks],
                           float (&scores)[S::kLoads]) const {
#pragma unroll
    for (int i = 0; i < S::kLoads; ++i) {
      scores[i] = 0.0f;
#pragma unroll
      for (int c = 0; c < S::kChunks; ++c) {
        float f[S::kSize];
        Vector<typename S::Type>::Unpack(k[i][c], f);
#pragma unroll
        for (int e = 0; e < S::kSize; ++e) scores[i] = __fmaf_rn(q[c][e], f[e], scores[i]);
      }
    }
  }

  // Takes the tile at `position` in: its scores become weights, one of which each lane returns.
  __device__ float Weigh(float (&scores)[S::kLoads], int position, int end, int lane) {
    ReduceScatter<S::kLanes, S::kLoads>(scores, lane);
    const int mine = lane % S::kLanes * S::kLoads / S::kLanes * S::kStep + lane / S::kLanes;
    const float score = position + mine < end ? scores[0] : -Infinity();
    const float new_max = fmaxf(max, MaxOfLanes(score));
    const float shrink = exp2f(max - new_max);
    const float weight = exp2f(score - new_max);
    max = new_max;
    sum = __fmaf_rn(sum, shrink, weight);
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
#pragma unroll
      for (int e = 0; e < S::kSize; ++e) acc[c][e] = __fmul_rn(acc[c][e], shrink);
    }
    return weight;
  }

  __device__ void Add(const uint4 (&v)[S::kLoads][S::kChunks], float weight, int lane) {
#pragma unroll
    for (int i = 0; i < S::kLoads; ++i) {
      const int owner = lane / S::kLanes * S::kLanes + i * (S::kLanes / S::kLoads);
      const float w = __shfl_sync(kAllLanes, weight, owner);
#pragma unroll
      for (int c = 0; c < S::kChunks; ++c) {
        float f[S::kSize];
        Vector<typename S::Type>::Unpack(v[i][c], f);
#pragma unroll
        for (int e = 0; e < S::kSize; ++e) acc[c][e] = __fmaf_rn(w, f[e], acc[c][e]);
      }
    }
  }

  // Writes the part's sums [head_size], greatest score and sum of weights.
  __device__ void Store(float* sums, float* stats, int head_size, int lane) {
    // Lanes of a group each held one weight of the tile kLanes / kLoads times.
#pragma unroll
    for (int offset = 16; offset >= S::kLanes / S::kLoads; offset /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
#pragma unroll
      for (int e = 0; e < S::kSize; ++e) {
#pragma unroll
        for (int offset = 16; offset >= S::kLanes; offset /= 2) {
          acc[c][e] += __shfl_xor_sync(kAllLanes, acc[c][e], offset);
        }
        const int d = (c * S::kLanes + lane % S::kLanes) * S::kSize + e;
        if (e % S::kStep == lane / S::kLanes && d < head_size) sums[d] = acc[c][e];
      }
    }
    if (lane == 0) {
      stats[0] = max;
      stats[1] = sum;
    }
  }
};

// out = the parts' sums, weighted by how far each part's maximum lies under the greatest. `stats(part)` reads a
// part's maximum and sum of weights, `sums(part, d)` its sum of number d of the head, `store(d, x)` writes that
// number.

// Up to kFewParts are weighed by each lane, and lanes wait for nothing of each other. Both functions are asked for
// kFewParts parts, whatever is there behind the last one, which goes into nothing. Of no parts comes no number.
constexpr int kFewParts = 8;

struct FewWeights {
  float of[kFewParts];
  float each;  // what the weighted sum is multiplied by
};

template <typename Stats>
__device__ __forceinline__ FewWeights WeighFewParts(const Stats& stats, int parts) {
  float2 read[kFewParts];
#pragma unroll
  for (int i = 0; i < kFewParts; ++i) read[i] = stats(i);
  float max = read[0].x;
#pragma unroll
  for (int i = 1; i < kFewParts; ++i) max = i < parts ? fmaxf(max, read[i].x) : max;
  FewWeights weights;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kFewParts; ++i) {
    weights.of[i] = Exp2(read[i].x - max);
    total = i < parts ? __fmaf_rn(weights.of[i], read[i].y, total) : total;
  }
  weights.each = __fdividef(1.0f, total);
  return weights;
}

template <typename Sums>
__device__ __forceinline__ float SumFewParts(const FewWeights& weights, const Sums& sums, int parts,
                                             int d) {
  float values[kFewParts], result = 0.0f;
#pragma unroll
  for (int i = 0; i < kFewParts; ++i) values[i] = sums(i, d);
#pragma unroll
  for (int i = 0; i < kFewParts; ++i) {
    result = i < parts ? __fmaf_rn(weights.of[i], values[i], result) : result;
  }
  return __fmul_rn(result, weights.each);
}

// Any number of parts, kBatch of which are read at a time, for the numbers first + lane,
// first + stride + lane, ... of a head. There is a part.
template <int kBatch, typename Stats, typename Sums, typename Store>
__device__ inline void CombineManyParts(const Stats& stats, const Sums& sums, int parts,
                                        int head_size, int first, int stride, int lane,
                                        const Store& store) {
  float2 mine = make_float2(-Infinity(), 0.0f);
  if (lane < parts) mine = stats(lane);
  const float weight = Exp2(mine.x - MaxOfLanes(mine.x));
  const float each = __fdividef(1.0f, SumOfLanes(__fmul_rn(weight, mine.y)));
  for (int begin = first; begin < head_size; begin += stride) {
    const int d = min(begin + lane, head_size - 1);
    float result = 0.0f;
    for (int part = 0; part < parts; part += kBatch) {
      float values[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) values[i] = sums(min(part + i, parts - 1), d);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float w = __shfl_sync(kAllLanes, weight, part + i);
        if (part + i < parts) result = __fmaf_rn(w, values[i], result);
      }
    }
    if (begin + lane < head_size) store(d, __fmul_rn(result, each));
  }
}

// The same by the shorter way where there is one.
template <int kBatch, typename Stats, typename Sums, typename Store>
__device__ inline void CombineParts(const Stats& stats, const Sums& sums, int parts, int head_size,
                                    int first, int stride, int lane, const Store& store) {
  if (parts <= kFewParts) {
    const FewWeights weights = WeighFewParts(stats, parts);
    for (int d = first + lane; d < head_size; d += stride) {
      store(d, SumFewParts(weights, sums, parts, d));
    }
    return;
  }
  CombineManyParts<kBatch>(stats, sums, parts, head_size, first, stride, lane, store);
}

}  // namespace cuda
}  // namespace fastgen
