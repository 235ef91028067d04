// One row of logits over the threads of a group of blocks (cluster.h): how the row is divided, what
// lies in shared memory, and the filters, which are selections by histogram.
#pragma once

#include "cuda/cluster.h"
#include "cuda/sample_logits.h"

namespace fastgen {
namespace cuda {

// A histogram has so many buckets; the first tells five bits of the fraction of probabilities above
// about 2^-32, what is below shares a bucket.
constexpr int32_t kBuckets = 1024;
constexpr int kFirstShift = 18;
constexpr int32_t kFirstBase = (0x3F800000 >> kFirstShift) - (kBuckets - 1);
// So many elements are on their way through a thread together.
constexpr int kBatch = 4;
// So few tokens in the last bucket are ranked one against the other.
constexpr int32_t kFew = 128;

// A sum that is no number, in the place of one; sums are below.
constexpr uint64_t kNoSum = uint64_t{1} << 63;

// Where the filters cut: kept are higher probabilities, and equal ones up to an id.
struct Cut {
  uint32_t bits;
  int32_t token;

  __device__ bool Keeps(float prob, int32_t id) const {
    const uint32_t prob_bits = __float_as_uint(prob);
    return prob_bits > bits || (prob_bits == bits && id <= token);
  }
};
constexpr int32_t kAllTokens = 0x7FFFFFFF;

struct Candidate {
  uint32_t bits;
  int32_t token;
  uint64_t mass;
};

// What comes before something in descending order of probability.
struct Before {
  uint32_t count;
  uint64_t mass;
};

template <int kParts, int kThreads>
struct SharedState {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kEntries = kParts * kWarps;  // one for each warp of the group
  static constexpr int32_t kShare = kBuckets / kParts;

  Slot slot;
  int32_t slot_index;
  int32_t step;
  uint32_t draw;

  // Written by every warp of the group into every block.
  uint64_t best[kEntries];
  uint64_t sums[kEntries];
  uint64_t plain_sums[kEntries];
  uint64_t masses[kEntries];
  uint64_t ties[kEntries];
  int32_t tie_token;

  uint32_t histogram[3][kBuckets];  // counts, low and high halves of masses
  union {
    uint32_t shares[kParts][3][kShare];
    uint2 few[kParts][kFew];
  } received;
  uint32_t few_counts[kParts];
  uint32_t few_here;
  Candidate candidates[kFew];
  unsigned long long cut;

  uint32_t warp_counts[kWarps];
  uint64_t warp_masses[kWarps];
  int32_t crossing;
  Before crossing_before;
  uint32_t crossing_count;
};

template <int kParts, int kThreads>
class Group {
 public:
  using Shared = SharedState<kParts, kThreads>;
  static constexpr int kWarps = Shared::kWarps;
  static constexpr int kEntries = Shared::kEntries;
  static constexpr int kPerLane = kEntries / 32;
  static_assert(kEntries % 32 == 0, "lanes share the entries of the group's warps evenly");
  static_assert(kBuckets % kThreads == 0 && kFew <= kThreads, "threads share the buckets evenly");

  // `count` ids from `begin` on are this block's; each warp has a stretch of them.
  __device__ Group(Shared& shared, int32_t begin, int32_t count)
      : s(shared),
        part(static_cast<int>(blockIdx.x) % kParts),
        thread(static_cast<int>(threadIdx.x)),
        warp(thread / 32),
        lane(thread % 32),
        id_begin(begin),
        stretch((count + kThreads - 1) / kThreads * 32),
        warp_begin(min(warp * stretch, count)),
        warp_end(min(warp_begin + stretch, count)) {}

  // Gives a warp's value, the same in all lanes, to all blocks; to be read after a barrier.
  __device__ void Spread(uint64_t* entries, uint64_t value) const {
    if (lane < kParts) *OfPart<kParts>(entries + part * kWarps + warp, lane) = value;
  }

  __device__ uint64_t MaxOf(const uint64_t* entries) const {
    uint64_t value = 0;
    for (int i = 0; i < kPerLane; ++i) {
      const uint64_t entry = entries[i * 32 + lane];
      value = entry > value ? entry : value;
    }
    return MaxOverWarp(value);
  }

  // kNoSum if any entry is.
  __device__ uint64_t SumOf(const uint64_t* entries) const {
    uint64_t value = 0;
    bool no_sum = false;
    for (int i = 0; i < kPerLane; ++i) {
      no_sum |= entries[i * 32 + lane] == kNoSum;
      value += entries[i * 32 + lane];
    }
    return __any_sync(kAllLanes, no_sum) ? kNoSum : SumOverWarp(value);
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

  // Where the walk of top-k (the k-th largest) or of top-p (what exceeds the limit), whichever ends
  // first, ends. prob_of(i) is the probability of the block's i-th id; no walk ends below `floor`.
  // Masses are needed for top-p alone.
  template <typename ProbOf>
  __device__ Cut FindCut(const ProbOf& prob_of, uint32_t k, uint64_t limit, bool use_mass,
                         float floor) {
    Range range;
    range.lowest = max(__float_as_uint(floor), 1u);
    range.size = 0x3F800001u - range.lowest;
    range.offset = 0;
    range.base = kFirstBase;
    range.shift = kFirstShift;
    Before before = {0, 0};
    for (;;) {
      BuildHistogram(prob_of, range, use_mass);
      if (!FindCrossing(k, limit, before, use_mass)) return {0, kAllTokens};
      range.Narrow(s.crossing);
      before = s.crossing_before;
      const uint32_t count = s.crossing_count;
      if (count <= kFew) return RankFew(prob_of, range, count, before, k, limit);
      if (range.size == 1) return CutTies(prob_of, range.lowest, count, before, limit);
    }
  }

  Shared& s;
  const int part, thread, warp, lane;
  const int32_t id_begin, stretch, warp_begin, warp_end;

 private:
  // Bits of probabilities that may be the last one, and how they are put into buckets.
  struct Range {
    uint32_t lowest, size;
    uint32_t offset;
    int32_t base;
    int shift;

    __device__ bool Has(uint32_t bits) const { return bits - lowest < size; }
    __device__ int32_t BucketOf(uint32_t bits) const {
      return max(static_cast<int32_t>((bits - offset) >> shift) - base, 0);
    }
    __device__ void Narrow(int32_t bucket) {
      const auto digit = static_cast<uint32_t>(bucket + base);
      const uint32_t end = min(lowest + size, offset + ((digit + 1) << shift));
      if (bucket > 0) lowest = max(lowest, offset + (digit << shift));
      size = end - lowest;
      offset = lowest;
      base = 0;
      constexpr int kBucketBits = 10;
      static_assert(1 << kBucketBits == kBuckets, "digits are buckets");
      shift = max(32 - __clz(static_cast<int>(size - 1)) - kBucketBits, 0);
    }
  };

  // Of the whole group, in every block.
  template <typename ProbOf>
  __device__ void BuildHistogram(const ProbOf& prob_of, const Range& range, bool use_mass) {
    const int fields = use_mass ? 3 : 1;
    uint32_t* const counts = s.histogram[0];
    uint32_t* const lows = s.histogram[1];
    uint32_t* const highs = s.histogram[2];
    for (int i = thread; i < fields * kBuckets; i += kThreads) counts[i] = 0;
    __syncthreads();
    for (int32_t first = warp_begin + lane; first < warp_end; first += 32 * kBatch) {
      float probs[kBatch];
      for (int j = 0; j < kBatch; ++j) {
        const int32_t i = first + 32 * j;
        probs[j] = i < warp_end ? prob_of(i) : 0.0f;  // 0 is in no range
      }
      uint32_t highs_to_add[kBatch];
      for (int j = 0; j < kBatch; ++j) {
        const uint32_t bits = __float_as_uint(probs[j]);
        if (!range.Has(bits)) continue;
        const int32_t bucket = range.BucketOf(bits);
        atomicAdd(counts + bucket, 1u);
        if (!use_mass) continue;
        // A 64-bit sum by halves: whoever makes the low one overflow carries.
        const uint64_t mass = MassOf(probs[j]);
        const auto low = static_cast<uint32_t>(mass);
        const uint32_t before = atomicAdd(lows + bucket, low);
        highs_to_add[j] = static_cast<uint32_t>(mass >> 32) + (before > ~low ? 1 : 0);
      }
      if (!use_mass) continue;
      for (int j = 0; j < kBatch; ++j) {
        const uint32_t bits = __float_as_uint(probs[j]);
        if (range.Has(bits)) atomicAdd(highs + range.BucketOf(bits), highs_to_add[j]);
      }
    }
    __syncthreads();
    if (kParts > 1) MergeHistograms(fields);
  }

  // Each block adds up a share of the buckets of all blocks and gives the sums to all.
  __device__ void MergeHistograms(int fields) {
    const bool use_mass = fields > 1;
    uint32_t* const counts = s.histogram[0];
    uint32_t* const lows = s.histogram[1];
    uint32_t* const highs = s.histogram[2];
    for (int i = thread; i < fields * kBuckets; i += kThreads) {
      const int bucket = i % kBuckets;
      *OfPart<kParts>(&s.received.shares[part][i / kBuckets][bucket % Shared::kShare],
                      bucket / Shared::kShare) = counts[i];
    }
    SyncGroup<kParts>();
    for (int i = thread; i < Shared::kShare; i += kThreads) {
      uint32_t count = 0;
      uint64_t mass = 0;
#pragma unroll 4
      for (int source = 0; source < kParts; ++source) {
        const auto& share = s.received.shares[source];
        count += share[0][i];
        if (use_mass) mass += static_cast<uint64_t>(share[2][i]) << 32 | share[1][i];
      }
      const int bucket = part * Shared::kShare + i;
      for (int target = 0; target < kParts; ++target) {
        *OfPart<kParts>(counts + bucket, target) = count;
        if (!use_mass) continue;
        *OfPart<kParts>(lows + bucket, target) = static_cast<uint32_t>(mass);
        *OfPart<kParts>(highs + bucket, target) = static_cast<uint32_t>(mass >> 32);
      }
    }
    SyncGroup<kParts>();
  }

  // Walks the histogram from the highest bucket to the first in which a walk ends; false if none
  // does. The bucket and what comes before it are in s.crossing*.
  __device__ bool FindCrossing(uint32_t k, uint64_t limit, const Before& start, bool use_mass) {
    constexpr int kEach = kBuckets / kThreads;
    const int highest = kBuckets - 1 - thread * kEach;
    uint32_t counts[kEach];
    uint64_t masses[kEach];
    Before own = {0, 0};
    for (int i = 0; i < kEach; ++i) {
      counts[i] = s.histogram[0][highest - i];
      masses[i] = use_mass ? static_cast<uint64_t>(s.histogram[2][highest - i]) << 32 |
                                 s.histogram[1][highest - i]
                           : 0;
      own.count += counts[i];
      own.mass += masses[i];
    }
    const uint32_t count_scan = ScanOverWarp(own.count, lane);
    const uint64_t mass_scan = use_mass ? ScanOverWarp(own.mass, lane) : 0;
    if (lane == 31) {
      s.warp_counts[warp] = count_scan;
      s.warp_masses[warp] = mass_scan;
    }
    if (thread == 0) {
      s.crossing = -1;
      s.few_here = 0;
      s.cut = 0;
    }
    __syncthreads();
    Before before = {start.count + SumOverWarp(lane < warp ? s.warp_counts[lane] : 0), start.mass};
    before.count += count_scan - own.count;
    if (use_mass) {
      before.mass += SumOverWarp(lane < warp ? s.warp_masses[lane] : 0) + mass_scan - own.mass;
    }
    int32_t bucket = -1;
    Before before_bucket = {0, 0};
    uint32_t count = 0;
    for (int i = 0; i < kEach; ++i) {
      const bool kth = before.count < k && k - before.count <= counts[i];
      const bool crosses = before.mass <= limit && masses[i] > limit - before.mass;
      if (bucket < 0 && (kth || crosses)) {
        bucket = highest - i;
        before_bucket = before;
        count = counts[i];
      }
      before.count += counts[i];
      before.mass += masses[i];
    }
    if (bucket >= 0) atomicMax(&s.crossing, bucket);
    __syncthreads();
    if (bucket >= 0 && bucket == s.crossing) {
      s.crossing_before = before_bucket;
      s.crossing_count = count;
    }
    __syncthreads();
    return s.crossing >= 0;
  }

  // A cut as a number: the larger one keeps less.
  __device__ static unsigned long long NumberOf(uint32_t bits, int32_t token) {
    return static_cast<unsigned long long>(bits) << 32 | static_cast<uint32_t>(kAllTokens - token);
  }

  // The cut among few tokens: each finds its place in the order by looking at all.
  template <typename ProbOf>
  __device__ Cut RankFew(const ProbOf& prob_of, const Range& range, uint32_t count, Before before,
                         uint32_t k, uint64_t limit) {
    for (int32_t i = warp_begin + lane; i < warp_end; i += 32) {
      const uint32_t bits = __float_as_uint(prob_of(i));
      if (!range.Has(bits)) continue;
      const uint32_t at = atomicAdd(&s.few_here, 1u);
      for (int target = 0; target < kParts; ++target) {
        *OfPart<kParts>(&s.received.few[part][at], target) =
            make_uint2(bits, static_cast<uint32_t>(id_begin + i));
      }
    }
    __syncthreads();
    if (thread < kParts) *OfPart<kParts>(&s.few_counts[part], thread) = s.few_here;
    SyncGroup<kParts>();
    Candidate mine = {0, 0, 0};
    if (static_cast<uint32_t>(thread) < count) {
      auto at = static_cast<uint32_t>(thread);
      int source = 0;
      while (at >= s.few_counts[source]) at -= s.few_counts[source++];
      const uint2 few = s.received.few[source][at];
      mine = {few.x, static_cast<int32_t>(few.y), MassOf(__uint_as_float(few.x))};
      s.candidates[thread] = mine;
    }
    __syncthreads();
    if (static_cast<uint32_t>(thread) < count) {
      for (uint32_t i = 0; i < count; ++i) {
        const Candidate other = s.candidates[i];
        const bool first =
            other.bits > mine.bits || (other.bits == mine.bits && other.token < mine.token);
        before.count += first ? 1 : 0;
        before.mass += first ? other.mass : 0;
      }
      if (before.count + 1 == k) atomicMax(&s.cut, NumberOf(mine.bits, kAllTokens));
      if (before.mass <= limit && mine.mass > limit - before.mass) {
        atomicMax(&s.cut, NumberOf(mine.bits, mine.token));
      }
    }
    __syncthreads();
    return {static_cast<uint32_t>(s.cut >> 32),
            kAllTokens - static_cast<int32_t>(static_cast<uint32_t>(s.cut))};
  }

  // The cut among equals: top-k keeps all of them, top-p those of smallest id.
  template <typename ProbOf>
  __device__ Cut CutTies(const ProbOf& prob_of, uint32_t bits, uint32_t count, const Before& before,
                         uint64_t limit) {
    if (before.mass > limit) return {bits, kAllTokens};
    const uint64_t keep = (limit - before.mass) / MassOf(__uint_as_float(bits)) + 1;
    if (keep >= count) return {bits, kAllTokens};
    // Rounds of whole warps, for the votes.
    const auto ties_at = [&](int32_t begin) {
      const int32_t i = begin + lane;
      return __ballot_sync(kAllLanes, i < warp_end && __float_as_uint(prob_of(i)) == bits);
    };
    uint64_t ties = 0;
    for (int32_t i = warp_begin; i < warp_end; i += 32) ties += __popc(ties_at(i));
    Spread(s.ties, ties);
    SyncGroup<kParts>();
    const Place place = FindPlace(s.ties, keep - 1);
    if (IsMine(place.entry)) {
      uint64_t before_round = place.before;
      for (int32_t i = warp_begin; i < warp_end; i += 32) {
        const uint32_t mask = ties_at(i);
        const auto rank = static_cast<uint32_t>(__popc(mask & ((1u << lane) - 1)));
        if ((mask >> lane & 1) != 0 && before_round + rank == keep - 1) {
          for (int target = 0; target < kParts; ++target) {
            *OfPart<kParts>(&s.tie_token, target) = id_begin + i + lane;
          }
        }
        before_round += __popc(mask);
      }
    }
    SyncGroup<kParts>();
    return {bits, s.tie_token};
  }
};

}  // namespace cuda
}  // namespace fastgen
