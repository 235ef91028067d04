// The filters of one row over a group of blocks: selections by histogram, down to few candidates
// that are ranked one against the other. All is decided on the exponentials of the softmax, which
// order as the probabilities do, so that nothing waits for their sum.
#pragma once

#include "cuda/sample_group.h"

namespace fastgen {
namespace cuda {

constexpr uint32_t kBitsOfOne = 0x3F800000;

// Bits of exponentials in which a walk may end, and how they are put into buckets: by their leading
// digits, so that those of a bucket have one exponent.
struct Range {
  uint32_t lowest, size;
  int32_t base;  // digit of the first bucket
  int shift;
  bool open;  // the first bucket takes all that is below the second

  __device__ bool Has(uint32_t bits) const { return bits - lowest < size; }
  __device__ int32_t BucketOf(uint32_t bits) const {
    return max(static_cast<int32_t>(bits >> shift) - base, 0);
  }
  __device__ void Narrow(int32_t bucket) {
    const uint32_t digit = static_cast<uint32_t>(bucket + base);
    const uint32_t end = min(lowest + size, (digit + 1) << shift);
    if (bucket > 0 || !open) lowest = max(lowest, digit << shift);
    size = end - lowest;
    open = false;
    constexpr int kBucketBits = 9;
    static_assert(1 << kBucketBits == kBuckets, "digits are buckets");
    shift = max(32 - __clz(static_cast<int>(size - 1)) - kBucketBits, 0);
    if (((end - 1) >> shift) - (lowest >> shift) >= kBuckets) ++shift;
    base = static_cast<int32_t>(lowest >> shift);
  }
  // Of a bucket with so many, the sum of whose bits below the digit is `rest`; never too small.
  __device__ uint64_t MassOf(int32_t bucket, uint32_t count, uint64_t rest, MassScale scale) const {
    if (count == 0) return 0;
    const bool below = open && bucket == 0;
    const uint32_t bits = static_cast<uint32_t>(bucket + base + (below ? 1 : 0)) << shift;
    const uint64_t fractions =
        count * static_cast<uint64_t>((bits & 0x7FFFFFu) | 0x800000u) + (below ? 0 : rest);
    const int left = static_cast<int>(bits >> 23) - 150 + scale.bits;
    if (left >= 0) return fractions << left;
    return left <= -64 ? 1 : ((fractions - 1) >> -left) + 1;
  }
};

// `Source` has Exp(i) and Logit(i) of the block's i-th id, Exps(i, end, exps) of kBatch neighbours,
// 0 from `end` on, which is in no range, ExpOfLogit(logit) that gives the same as Exp, the scale of
// masses, and once the sum is known ProbOf(exp) and LowestEqual(bits): the smallest exponential
// whose probability is that of `bits`.
template <int kParts, int kThreads, typename Source>
class Filter {
 public:
  using RowGroup = Group<kParts, kThreads>;
  using Shared = typename RowGroup::Shared;
  static constexpr int kWarps = RowGroup::kWarps;
  static_assert(kBuckets <= kThreads && kFew <= kThreads, "a thread has a bucket, and a candidate");

  // Exponentials that the cut may be, `size` of them by their bits: there are `count` in the row,
  // and so much comes before.
  struct Candidates {
    uint32_t lowest, size, count;
    Before before;
  };

  __device__ Filter(RowGroup& row_group, Source& exponentials, int32_t chunk)
      : group(row_group), s(row_group.s), source(exponentials), chunk_size(chunk) {}

  // Hands every block the tokens that the blocks have in s.own. The sum of the counts is `count`;
  // false if a block has too many to hand on. The caller sends `bytes` more in the same round.
  __device__ bool HandOut(uint32_t* count, uint32_t bytes) const {
    __syncthreads();
    const uint32_t own_count = s.own_count;
    const uint32_t sent = min(own_count, static_cast<uint32_t>(kSegment));
    group.exchange.Announce(bytes + static_cast<uint32_t>(sizeof(uint32_t)) +
                            sent * static_cast<uint32_t>(sizeof(Listed)));
    if (group.thread < kParts) {
      group.exchange.Send(&s.listed_counts[group.part], group.thread, own_count);
    }
    for (uint32_t i = group.thread; i < sent * kParts; i += kThreads) {
      group.exchange.Send(&s.listed[group.part][i / kParts], static_cast<int>(i % kParts),
                          s.own[i / kParts]);
    }
    group.exchange.Wait();
    *count = 0;
    bool complete = true;
    for (int from = 0; from < kParts; ++from) {
      *count += s.listed_counts[from];
      complete = complete && s.listed_counts[from] <= kSegment;
    }
    return complete;
  }

  // The same with the exponentials of the range.
  __device__ bool Gather(const Range& range) const {
    if (group.thread == 0) s.own_count = 0;
    __syncthreads();
    uint32_t hits = 0;
    group.ForEachOwn([&](int32_t i) {
      float exps[kBatch];
      source.Exps(i, group.warp_end, exps);
      for (int j = 0; j < kBatch; ++j) hits += range.Has(__float_as_uint(exps[j])) ? 1 : 0;
    });
    uint32_t place = group.Reserve(hits);
    if (hits > 0) {
      group.ForEachOwn([&](int32_t i) {
        float exps[kBatch];
        source.Exps(i, group.warp_end, exps);
        for (int j = 0; j < kBatch; ++j) {
          if (range.Has(__float_as_uint(exps[j]))) group.Keep(place++, i + j, source.Logit(i + j));
        }
      });
    }
    uint32_t count = 0;
    return HandOut(&count, 0);
  }

  // Where the walk of top-k (the k-th largest) or of top-p (what exceeds it), whichever ends first,
  // ends; no walk ends below `floor`. Masses are needed for top-p alone; its limit is that of the
  // sums that come with the first round, for which the caller sends `bytes`. Either the cut is
  // found, or the few candidates for it are among those listed.
  template <typename LimitOf>
  __device__ Candidates FindCut(float floor, uint32_t k, const LimitOf& limit_of, bool use_mass,
                                uint32_t bytes, Cut* cut) const {
    Range range;
    range.lowest = max(__float_as_uint(floor), 1u);
    range.size = kBitsOfOne + 1 - range.lowest;
    range.base = kFirstBase;
    range.shift = kFirstShift;
    range.open = true;
    Candidates candidates = {0, 0, 0, {0, 0}};
    uint64_t limit = 0;
    bool listed = false;  // every block knows all that is in the range, and all do the same
    for (bool first = true;; first = false) {
      // Sums of 32 bits hold what lies below the digits, or have to be of two parts of it.
      const int fields = !use_mass ? 1 : chunk_size <= (INT64_C(1) << 32 >> range.shift) ? 2 : 3;
      for (int i = group.thread; i < 3 * kBuckets; i += kThreads) s.histogram[i] = 0;
      __syncthreads();
      if (listed) {
        ForEachListed([&](uint32_t, const Listed& token) {
          AddToHistogram(range, __float_as_uint(source.ExpOfLogit(token.logit)), fields);
        });
      } else {
        group.ForEachOwn([&](int32_t i) {
          float exps[kBatch];
          source.Exps(i, group.warp_end, exps);
          for (int j = 0; j < kBatch; ++j) {
            AddToHistogram(range, __float_as_uint(exps[j]), fields);
          }
        });
      }
      __syncthreads();
      if (kParts > 1 && !listed) {
        MergeHistograms(fields, first ? bytes : 0);
      }
      if (first) limit = limit_of();
      const Crossing crossing = FindCrossing(range, k, limit, candidates.before, use_mass);
      if (crossing.bucket < 0) break;
      range.Narrow(crossing.bucket);
      candidates.before = crossing.before;
      if (range.size == 1) {
        *cut = CutTies(range.lowest, crossing.count, candidates.before, limit);
        break;
      }
      if (!listed && crossing.count <= kParts * kSegment) {
        listed = Gather(range);
      }
      if (listed && crossing.count <= kFew) {
        candidates.lowest = range.lowest;
        candidates.size = range.size;
        candidates.count = crossing.count;
        break;
      }
    }
    return candidates;
  }

  // The candidates, of those listed, in s.few; there are no more than kFew. To be followed by a
  // barrier.
  __device__ void TakeFew(const Candidates& candidates) const {
    if (group.thread == 0) {
      s.few_count = 0;
      s.cut = 0;
    }
    __syncthreads();
    ForEachListed([&](uint32_t, const Listed& listed) {
      const float exp = source.ExpOfLogit(listed.logit);
      if (__float_as_uint(exp) - candidates.lowest >= candidates.size) return;
      s.few[atomicAdd(&s.few_count, 1u)] = {__float_as_uint(exp), listed.token,
                                            MassOf(exp, source.scale)};
    });
  }

  // The cut among few tokens: each finds its place in the order by looking at all.
  __device__ Cut RankFew(const Candidates& candidates, uint32_t k, uint64_t limit) const {
    const uint32_t count = candidates.count;
    const Share share(group.thread, count);
    const Candidate mine = s.few[min(share.candidate, count - 1)];
    Before before = {0, 0};
    for (uint32_t i = share.first; i < count; i += share.lanes) {
      const Candidate other = s.few[i];
      const bool first = IsFirst(other, mine);
      before.count += first ? 1 : 0;
      before.mass += first ? other.mass : 0;
    }
    before.count = share.Sum(before.count) + candidates.before.count;
    before.mass = share.Sum(before.mass) + candidates.before.mass;
    if (share.candidate < count && share.first == 0) {
      if (before.count + 1 == k) {
        atomicMax(&s.cut, NumberOf(source.LowestEqual(mine.bits), kAllTokens));
      }
      if (before.mass <= limit && mine.mass > limit - before.mass) {
        atomicMax(&s.cut, NumberOf(mine.bits, mine.token));
      }
    }
    __syncthreads();
    return {static_cast<uint32_t>(s.cut >> 32),
            kAllTokens - static_cast<int32_t>(static_cast<uint32_t>(s.cut))};
  }

  // What a draw falls on where all that is kept is among those listed, `count` of them and no more
  // than kFew: in one thread of the block, in the others the token is -1. `meanwhile` is called by
  // all threads before the last barrier; those of the last warps have the least to do.
  template <typename Meanwhile>
  __device__ Listed DrawFromListed(uint32_t count, uint32_t k, uint64_t limit, uint32_t draw,
                                   const Meanwhile& meanwhile) const {
    ForEachListed([&](uint32_t at, const Listed& listed) {
      const float exp = source.ExpOfLogit(listed.logit);
      s.few[at] = {__float_as_uint(exp), listed.token, MassOf(exp, source.scale)};
      s.few_probs[at] = __float_as_uint(source.ProbOf(exp));
      s.few_logits[at] = listed.logit;
    });
    meanwhile();
    __syncthreads();
    const Share share(group.thread, count);
    const uint32_t candidate = min(share.candidate, count - 1);
    const Candidate mine = s.few[candidate];
    const uint32_t prob = s.few_probs[candidate];
    uint32_t likelier = 0;
    uint64_t before = 0;
    for (uint32_t i = share.first; i < count; i += share.lanes) {
      likelier += s.few_probs[i] > prob ? 1 : 0;
      const Candidate other = s.few[i];
      before += IsFirst(other, mine) ? other.mass : 0;
    }
    likelier = share.Sum(likelier);
    before = share.Sum(before);
    const uint64_t kept_mass = likelier < k && before <= limit ? mine.mass : 0;
    if (share.candidate < count && share.first == 0) s.few_kept[candidate] = kept_mass;
    __syncthreads();
    uint64_t kept = 0, running = 0;
    for (uint32_t i = share.first; i < count; i += share.lanes) {
      const uint64_t mass = s.few_kept[i];
      kept += mass;
      running += s.few[i].token < mine.token ? mass : 0;
    }
    kept = share.Sum(kept);
    running = share.Sum(running);
    const uint64_t target = TargetOf(kept, draw);
    if (share.candidate < count && share.first == 0 && running <= target &&
        running + kept_mass > target) {
      return {s.few_logits[candidate], mine.token};
    }
    return {0.0f, -1};
  }

  static constexpr uint32_t kOfOneWarp = 32;
  // The same by one warp, where there are no more than kOfOneWarp: in one of its lanes. As in the step that is
  // one kernel (persistent_draw.h), whose tokens have to be these.
  __device__ Listed DrawFromFewest(uint32_t count, uint32_t k, uint64_t limit,
                                   uint32_t draw) const {
    const auto lane = static_cast<uint32_t>(group.lane);
    Listed listed = {0.0f, kAllTokens};
    Candidate mine = {0, kAllTokens, 0};
    float prob = 0.0f;
    if (lane < count) {
      listed = ListedAt(EndsOfListed(), lane);
      const float exp = source.ExpOfLogit(listed.logit);
      mine = {__float_as_uint(exp), listed.token, MassOf(exp, source.scale)};
      prob = source.ProbOf(exp);
    }
    uint32_t likelier = 0;
    uint64_t before = 0;
    for (uint32_t i = 0; i < count; ++i) {
      const Candidate other = {__shfl_sync(kAllLanes, mine.bits, i),
                               __shfl_sync(kAllLanes, mine.token, i),
                               __shfl_sync(kAllLanes, mine.mass, i)};
      likelier += __shfl_sync(kAllLanes, prob, i) > prob ? 1 : 0;
      before += IsFirst(other, mine) ? other.mass : 0;
    }
    const uint64_t kept = lane < count && likelier < k && before <= limit ? mine.mass : 0;
    uint64_t running = 0;
    for (uint32_t i = 0; i < count; ++i) {
      const int32_t token = __shfl_sync(kAllLanes, mine.token, i);
      const uint64_t mass = __shfl_sync(kAllLanes, kept, i);
      running += token < mine.token ? mass : 0;
    }
    const uint64_t target = TargetOf(SumOverWarp(kept), draw);
    if (running <= target && running + kept > target) return listed;
    return {0.0f, -1};
  }

 private:
  // How threads share the looking from each of few candidates at all: neighbouring lanes look from
  // one of them.
  struct Share {
    uint32_t lanes, candidate, first;

    __device__ Share(int thread, uint32_t count) : lanes(32) {
      while (lanes > 1 && count > kThreads / lanes) lanes /= 2;
      candidate = static_cast<uint32_t>(thread) / lanes;
      first = static_cast<uint32_t>(thread) % lanes;
    }

    template <typename T>
    __device__ T Sum(T value) const {
      for (uint32_t mask = lanes / 2; mask > 0; mask /= 2) {
        value += __shfl_xor_sync(kAllLanes, value, static_cast<int>(mask));
      }
      return value;
    }
  };

  // Whether a is before b in descending order.
  __device__ static bool IsFirst(const Candidate& a, const Candidate& b) {
    return a.bits > b.bits || (a.bits == b.bits && a.token < b.token);
  }

  __device__ void AddToHistogram(const Range& range, uint32_t bits, int fields) const {
    if (!range.Has(bits)) return;
    uint32_t* const bucket = s.histogram + range.BucketOf(bits);
    atomicAdd(bucket, 1u);
    if (fields == 1) return;
    const uint32_t rest = bits & ((1u << range.shift) - 1);
    if (fields == 2) {
      atomicAdd(bucket + kBuckets, rest);
    } else {
      atomicAdd(bucket + kBuckets, rest % kRestPart);
      atomicAdd(bucket + 2 * kBuckets, rest / kRestPart);
    }
  }

  // Each block adds up a share of the buckets of all blocks and gives the sums to all; four
  // neighbouring buckets at a time.
  __device__ void MergeHistograms(int fields, uint32_t bytes) const {
    constexpr int kFours = Shared::kShare / 4;  // of a share
    static_assert(kFours * 4 * kParts == kBuckets, "shares are whole fours");
    constexpr uint32_t kShareBytes = Shared::kShare * sizeof(uint32_t);
    group.exchange.Announce(bytes + static_cast<uint32_t>(fields) * kShareBytes);
    for (int i = group.thread; i < fields * kBuckets / 4; i += kThreads) {
      const int field = i / (kBuckets / 4), four = i % (kBuckets / 4);
      group.exchange.Send(reinterpret_cast<uint4*>(s.shares[group.part][field]) + four % kFours,
                          four / kFours, reinterpret_cast<const uint4*>(s.histogram)[i]);
    }
    group.exchange.Wait();
    group.exchange.Announce((fields > 1 ? 3 : 1) * kShareBytes);
    // A thread for each four, each block that is told, and count or rest.
    static_assert(2 * kFours * kParts <= kThreads, "threads have one each");
    const int four = group.thread % kFours, target = group.thread / kFours % kParts;
    const int what = group.thread / (kFours * kParts);
    const auto send = [&](int field, const uint4& value) {
      group.exchange.Send(
          reinterpret_cast<uint4*>(s.histogram + field * kBuckets + group.part * Shared::kShare) +
              four,
          target, value);
    };
    if (what == 0) {
      uint4 counts = make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int from = 0; from < kParts; ++from) {
        const uint4 more = reinterpret_cast<const uint4*>(s.shares[from][0])[four];
        counts =
            make_uint4(counts.x + more.x, counts.y + more.y, counts.z + more.z, counts.w + more.w);
      }
      send(0, counts);
    } else if (what == 1 && fields > 1) {
      uint64_t rests[4] = {0, 0, 0, 0};
#pragma unroll 4
      for (int from = 0; from < kParts; ++from) {
        const uint4 low = reinterpret_cast<const uint4*>(s.shares[from][1])[four];
        uint4 high = make_uint4(0, 0, 0, 0);
        if (fields > 2) high = reinterpret_cast<const uint4*>(s.shares[from][2])[four];
        rests[0] += RestOf(low.x, high.x);
        rests[1] += RestOf(low.y, high.y);
        rests[2] += RestOf(low.z, high.z);
        rests[3] += RestOf(low.w, high.w);
      }
      const auto low = [&](int i) { return static_cast<uint32_t>(rests[i]) % kRestPart; };
      const auto high = [&](int i) { return static_cast<uint32_t>(rests[i] / kRestPart); };
      send(1, make_uint4(low(0), low(1), low(2), low(3)));
      send(2, make_uint4(high(0), high(1), high(2), high(3)));
    }
    group.exchange.Wait();
  }

  static constexpr uint32_t kRestPart = 1024;
  __device__ static uint64_t RestOf(uint32_t low, uint32_t high) {
    return static_cast<uint64_t>(high) * kRestPart + low;
  }

  // Walks the histogram from the highest bucket to the first in which a walk ends; the bucket is -1
  // if none does.
  __device__ Crossing FindCrossing(const Range& range, uint32_t k, uint64_t limit,
                                   const Before& start, bool use_mass) const {
    const int bucket = kBuckets - 1 - group.thread;  // below 0: no bucket
    const uint32_t count = bucket >= 0 ? s.histogram[bucket] : 0;
    const uint64_t mass = bucket >= 0 && use_mass
                              ? range.MassOf(bucket, count,
                                             RestOf(s.histogram[kBuckets + bucket],
                                                    s.histogram[2 * kBuckets + bucket]),
                                             source.scale)
                              : 0;
    const uint32_t count_scan = ScanOverWarp(count, group.lane);
    const uint64_t mass_scan = use_mass ? ScanOverWarp(mass, group.lane) : 0;
    if (group.lane == 31) {
      s.warp_counts[group.warp] = count_scan;
      s.warp_masses[group.warp] = mass_scan;
    }
    if (group.thread < 2) s.crossings[group.thread].bucket = -1;
    __syncthreads();
    const bool earlier = group.lane < group.warp;
    Before before = {start.count + SumOverWarp(earlier ? s.warp_counts[group.lane] : 0),
                     start.mass};
    before.count += count_scan - count;
    if (use_mass) {
      before.mass += SumOverWarp(earlier ? s.warp_masses[group.lane] : 0) + mass_scan - mass;
    }
    if (before.count < k && k - before.count <= count) s.crossings[0] = {bucket, count, before};
    if (before.mass <= limit && mass > limit - before.mass) {
      s.crossings[1] = {bucket, count, before};
    }
    __syncthreads();
    return s.crossings[0].bucket >= s.crossings[1].bucket ? s.crossings[0] : s.crossings[1];
  }

  // A cut as a number: the larger one keeps less.
  __device__ static unsigned long long NumberOf(uint32_t bits, int32_t token) {
    return static_cast<unsigned long long>(bits) << 32 | static_cast<uint32_t>(kAllTokens - token);
  }

  // Where those listed by each block end, counted over all.
  struct Ends {
    uint32_t of[kParts];
  };
  __device__ Ends EndsOfListed() const {
    Ends ends;
    uint32_t total = 0;
    for (int from = 0; from < kParts; ++from) {
      total += s.listed_counts[from];
      ends.of[from] = total;
    }
    return ends;
  }
  __device__ Listed ListedAt(const Ends& ends, uint32_t at) const {
    uint32_t begin = 0;
    int source_part = 0;
    for (int from = 0; from + 1 < kParts; ++from) {
      if (at >= ends.of[from]) {
        begin = ends.of[from];
        source_part = from + 1;
      }
    }
    return s.listed[source_part][at - begin];
  }

  // visit(at, token), where `at` counts those of all blocks.
  template <typename Visit>
  __device__ void ForEachListed(const Visit& visit) const {
    const Ends ends = EndsOfListed();
#pragma unroll 1
    for (auto at = static_cast<uint32_t>(group.thread); at < ends.of[kParts - 1]; at += kThreads) {
      visit(at, ListedAt(ends, at));
    }
  }

  // The cut among equals: top-k keeps all of them, and what is as probable; top-p those of smallest
  // id.
  __device__ Cut CutTies(uint32_t bits, uint32_t count, const Before& before,
                         uint64_t limit) const {
    const Cut all = {source.LowestEqual(bits), kAllTokens};
    if (before.mass > limit) return all;
    const uint64_t keep = (limit - before.mass) / MassOf(__uint_as_float(bits), source.scale) + 1;
    if (keep > count) return all;
    // Rounds of whole warps, for the votes.
    const auto ties_at = [&](int32_t begin) {
      const int32_t i = begin + group.lane;
      return __ballot_sync(kAllLanes, i < group.warp_end && __float_as_uint(source.Exp(i)) == bits);
    };
    uint64_t ties = 0;
#pragma unroll 1
    for (int32_t i = group.warp_begin; i < group.warp_end; i += 32) ties += __popc(ties_at(i));
    group.exchange.Announce(RowGroup::kSpreadBytes);
    group.Spread(s.ties, ties);
    group.exchange.Wait();
    const auto place = group.FindPlace(s.ties, keep - 1);
    group.exchange.Announce(place.entry / kWarps == group.part ? sizeof(int32_t) : 0);
    if (group.IsMine(place.entry)) {
      uint64_t before_round = place.before;
#pragma unroll 1
      for (int32_t i = group.warp_begin; i < group.warp_end; i += 32) {
        const uint32_t mask = ties_at(i);
        const auto rank = static_cast<uint32_t>(__popc(mask & ((1u << group.lane) - 1)));
        if ((mask >> group.lane & 1) != 0 && before_round + rank == keep - 1) {
#pragma unroll 1
          for (int target = 0; target < kParts; ++target) {
            group.exchange.Send(&s.tie_token, target, group.id_begin + i + group.lane);
          }
        }
        before_round += __popc(mask);
      }
    }
    group.exchange.Wait();
    return {bits, s.tie_token};
  }

  RowGroup& group;
  Shared& s;
  Source& source;
  const int32_t chunk_size;  // ids of a block at most
};

}  // namespace cuda
}  // namespace fastgen
