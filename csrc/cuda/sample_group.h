// One row of logits over the threads of a group of blocks (cluster.h): how the row is divided, what
// lies in shared memory, and how the blocks tell each other of it.
#pragma once

#include "cuda/cluster.h"
#include "cuda/sample_logits.h"

namespace fastgen {
namespace cuda {

// A histogram has so many buckets; the first tells four bits of the fraction of exponentials above
// about 2^-32, what is below shares a bucket.
constexpr int32_t kBuckets = 512;
constexpr int kFirstShift = 19;
constexpr int32_t kFirstBase = (0x3F800000 >> kFirstShift) - (kBuckets - 1);
// So many elements are on their way through a thread together: neighbours, 16 bytes.
constexpr int kBatch = 4;
constexpr int32_t kTile = 32 * kBatch;
// So few candidates are ranked one against the other.
constexpr int32_t kFew = 256;
// So many candidates of a block are handed to the other blocks.
constexpr int32_t kSegment = 256;

// Where the filters cut: kept are larger exponentials, and equal ones up to an id.
struct Cut {
  uint32_t bits;
  int32_t token;

  __device__ bool Keeps(uint32_t exp_bits, int32_t id) const {
    return exp_bits > bits || (exp_bits == bits && id <= token);
  }
};
constexpr int32_t kAllTokens = 0x7FFFFFFF;

// A token as blocks hand it on.
struct __align__(8) Listed {
  float logit;
  int32_t token;
};

struct __align__(16) Candidate {
  uint32_t bits;  // of the exponential
  int32_t token;
  uint64_t mass;
};

// What is known of a row's logits before anything is drawn.
struct Best {
  uint32_t order;  // of the largest, 0 if all is NaN
  int32_t token;   // the first of the largest, 0 if all is NaN
  bool any_nan;
};

// What comes before something in descending order of probability.
struct Before {
  uint32_t count;
  uint64_t mass;
};

// The bucket of a histogram in which a walk ends.
struct Crossing {
  int32_t bucket;  // -1: none
  uint32_t count;  // in the bucket
  Before before;
};

template <int kParts, int kThreads>
struct SharedState {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kEntries = kParts * kWarps;  // one for each warp of the group
  static constexpr int32_t kShare = kBuckets / kParts;

  // Written by every warp of the group into every block.
  __align__(16) uint32_t bounds[kEntries];
  uint64_t best[kEntries];
  uint64_t sums[kEntries];
  uint64_t plain_sums[kEntries];
  uint64_t masses[kEntries];
  uint64_t ties[kEntries];
  // Written by every block of the group into every block. No two of these share memory: what a
  // block is late to get of one must not come down on the other.
  __align__(16) uint32_t shares[kParts][3][kShare];
  Listed listed[kParts][kSegment];
  uint32_t listed_counts[kParts];
  int32_t tie_token;
  ExchangeBarriers barriers;

  Slot slot;
  int32_t slot_index;
  int32_t step;
  uint32_t draw;
  uint32_t bound;  // order from which on a logit may be among the first k
  float log_sum;

  // Counts, and what lies below the digits, low and high parts of it.
  __align__(16) uint32_t histogram[3 * kBuckets];
  Listed own[kSegment];
  uint32_t own_count;
  Candidate few[kFew];
  float few_logits[kFew];
  uint32_t few_probs[kFew];  // bits
  uint64_t few_kept[kFew];
  uint32_t few_count;
  unsigned long long cut;

  uint32_t warp_counts[kWarps];
  uint64_t warp_masses[kWarps];
  Crossing crossings[2];  // of top-k, of top-p
};

template <int kParts, int kThreads>
class Group {
 public:
  using Shared = SharedState<kParts, kThreads>;
  static constexpr int kWarps = Shared::kWarps;
  static constexpr int kEntries = Shared::kEntries;
  static constexpr int kPerLane = kEntries / 32;
  static constexpr uint32_t kOrderOfBound = ~static_cast<uint32_t>(kEntries - 1);
  static_assert(kEntries % 32 == 0, "lanes share the entries of the group's warps evenly");

  // `count` ids from `begin` on are this block's; each warp has some tiles of them in a row.
  __device__ Group(Shared& shared, int32_t begin, int32_t count)
      : s(shared),
        exchange(&shared.barriers),
        part(static_cast<int>(blockIdx.x) % kParts),
        thread(static_cast<int>(threadIdx.x)),
        warp(thread / 32),
        lane(thread % 32),
        id_begin(begin),
        tiles((count + kTile - 1) / kTile),
        warp_begin(tiles * warp / kWarps * kTile),
        warp_end(min(tiles * (warp + 1) / kWarps * kTile, max(count, warp_begin))) {}

  // visit(i): the kBatch elements from i on are the lane's, but for those from warp_end on.
  template <typename Visit>
  __device__ void ForEachOwn(const Visit& visit) const {
#pragma unroll 1
    for (int32_t i = warp_begin + lane * kBatch; i < warp_end; i += kTile) visit(i);
  }

  // Places on the block's own list for `hits` tokens of each lane: the lane's first. By whole
  // warps.
  __device__ uint32_t Reserve(uint32_t hits) const {
    if (!__any_sync(kAllLanes, hits > 0)) return 0;
    const uint32_t scan = ScanOverWarp(hits, lane);
    uint32_t place = 0;
    if (lane == 31) place = atomicAdd(&s.own_count, scan);
    return __shfl_sync(kAllLanes, place, 31) + scan - hits;
  }

  __device__ void Keep(uint32_t place, int32_t i, float logit) const {
    if (place < kSegment) s.own[place] = {logit, id_begin + i};
  }

  // Gives a warp's value, the same in all lanes, to all blocks, in this round of the exchange.
  template <typename T>
  __device__ void Spread(T* entries, T value) const {
    if (lane < kParts) exchange.Send(entries + part * kWarps + warp, lane, value);
  }
  static constexpr uint32_t kSpreadBytes = kWarps * sizeof(uint64_t);  // of a block's 64 bits

  // The best of a warp, of those that its lanes have found, as it is spread. `token` is -1 in lanes
  // that have none.
  __device__ uint64_t BestOfWarp(uint32_t order, int32_t token, bool any_nan) const {
    const uint32_t best = MaxOverWarp(token >= 0 ? order : 0);
    const uint32_t first = MaxOverWarp(token >= 0 && order == best ? ~NumberOf(token) : 0);
    const bool nan = __any_sync(kAllLanes, any_nan) != 0;
    return static_cast<uint64_t>(best) << 32 | (best == 0 ? 0 : first & ~1u) | (nan ? 1 : 0);
  }

  __device__ Best BestOf(const uint64_t* entries) const {
    uint64_t own = 0;
    bool any_nan = false;
    for (int i = 0; i < kPerLane; ++i) {
      const uint64_t entry = entries[i * 32 + lane];
      any_nan = any_nan || (entry & 1) != 0;
      own = (entry | 1) > own ? entry | 1 : own;
    }
    Best best;
    best.order = MaxOverWarp(static_cast<uint32_t>(own >> 32));
    const bool has = static_cast<uint32_t>(own >> 32) == best.order;
    const uint32_t first = MaxOverWarp(has ? static_cast<uint32_t>(own) : 0);
    best.token = best.order == 0 ? 0 : static_cast<int32_t>(~first >> 1);
    best.any_nan = __any_sync(kAllLanes, any_nan) != 0;
    return best;
  }

  __device__ uint64_t SumOf(const uint64_t* entries) const {
    uint64_t value = 0;
    for (int i = 0; i < kPerLane; ++i) value += entries[i * 32 + lane];
    return SumOverWarp(value);
  }

  // Of entries in ascending id: the one that `before + entry` exceeds `target` with first, and the
  // sum before it.
  struct Place {
    int entry;  // -1: none
    uint64_t before;
  };
  __device__ Place FindPlace(const uint64_t* entries, uint64_t target) const {
    uint64_t own = 0;
    for (int i = 0; i < kPerLane; ++i) own += entries[lane * kPerLane + i];
    uint64_t before = ScanOverWarp(own, lane) - own;
    Place place = {-1, 0};
    for (int i = 0; i < kPerLane; ++i) {
      const int entry = lane * kPerLane + i;
      if (before <= target && before + entries[entry] > target) place = {entry, before};
      before += entries[entry];
    }
    const uint32_t found = __ballot_sync(kAllLanes, place.entry >= 0);
    if (found == 0) return {-1, 0};
    const int source = __ffs(static_cast<int>(found)) - 1;
    place.entry = __shfl_sync(kAllLanes, place.entry, source);
    place.before = __shfl_sync(kAllLanes, place.before, source);
    return place;
  }
  __device__ bool IsMine(int entry) const { return entry == part * kWarps + warp; }

  // An order in the place of a warp's best: no two warps have the same, so that one of them is the
  // k-th.
  __device__ static uint32_t BoundOf(uint64_t best_of_warp, int entry) {
    static_assert((kEntries & (kEntries - 1)) == 0, "an entry's number fits below the order");
    return (static_cast<uint32_t>(best_of_warp >> 32) & kOrderOfBound) |
           static_cast<uint32_t>(entry);
  }

  // An order that k tokens, and in most cases not many more, have or exceed, by a few of the warps'
  // best; for k up to kFewest.
  __device__ uint32_t FindBoundOfFewest(const uint64_t* entries, uint32_t k) const {
    uint32_t own = 0;
    for (int i = 0; i < kPerLane; ++i) {
      own = max(own, BoundOf(entries[i * 32 + lane], i * 32 + lane));
    }
    uint32_t kth = 0;
    for (uint32_t i = 0; i < k; ++i) {
      kth = MaxOverWarp(own);
      if (own == kth) own = 0;
    }
    return kth & kOrderOfBound;
  }
  static constexpr uint32_t kFewest = 8;
  // Up to this k about 130 tokens have the order or exceed it, if they are spread evenly.
  static constexpr uint32_t kMostBounded = kEntries * 7 / 8 < 64 ? kEntries * 7 / 8 : 64;

  // The same by all of the warps' bounds, that have been spread; in s.bound, which was 0. To be
  // followed by a barrier.
  __device__ void FindBound(uint32_t k) const {
    constexpr int kLanes = kThreads / kEntries;  // that look from one of them at all
    static_assert(kLanes >= 1 && kLanes <= 32, "threads share the entries evenly");
    const uint32_t mine = s.bounds[thread / kLanes];
    uint32_t higher = 0;
    for (int i = thread % kLanes * 4; i < kEntries; i += kLanes * 4) {
      const uint4 others = *reinterpret_cast<const uint4*>(s.bounds + i);
      higher += others.x > mine ? 1 : 0;
      higher += others.y > mine ? 1 : 0;
      higher += others.z > mine ? 1 : 0;
      higher += others.w > mine ? 1 : 0;
    }
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      higher += __shfl_xor_sync(kAllLanes, higher, mask);
    }
    if (higher + 1 == k) s.bound = mine & kOrderOfBound;
  }

  Shared& s;
  Exchange<kParts> exchange;
  const int part, thread, warp, lane;
  const int32_t id_begin, tiles, warp_begin, warp_end;

 private:
  // Twice the token, so that there is a bit left.
  __device__ static uint32_t NumberOf(int32_t token) { return static_cast<uint32_t>(token) << 1; }
};

}  // namespace cuda
}  // namespace fastgen
