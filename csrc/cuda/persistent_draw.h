// The draw of a row's token in the step, by one warp: from the few tokens that all blocks have listed, or
// from all logits where equal ones are too many to be listed.
#pragma once

#include "cuda/persistent_thread.h"
#include "cuda/sample_report.h"
#include "cuda/sample_softmax.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

// Of a warp's listed tokens, above the sum in its second word.
constexpr int kCountShift = 28;
constexpr uint32_t kTooMany = 15;

// Where blocks leave the best of a row.
__device__ __forceinline__ uint4* BestsOf(const Plan& plan, int row) {
  return plan.exchange + plan.bests + row * static_cast<int>(gridDim.x);
}

// visit(i, pieces) for i in [0, count) that are the lane's, some at a time, as they come or, if it does
// not wait, as they are; there are kPieces of each, the first at at(i).
template <int kPieces, typename At, typename Visit>
__device__ __forceinline__ void ForEachPieces(int lane, int count, uint32_t epoch, bool waits,
                                              const At& at, const Visit& visit) {
  constexpr int kAtOnce = 5;  // one round for 160 blocks
#pragma unroll 1
  for (int begin = lane; begin - lane < count; begin += 32 * kAtOnce) {
    const auto piece_at = [&](int i) { return at(begin + 32 * (i / kPieces)) + i % kPieces; };
    uint4 pieces[kAtOnce * kPieces];
#pragma unroll
    for (int i = 0; i < kAtOnce * kPieces; ++i) {
      pieces[i] = AskForPiece(piece_at(i), epoch, begin + 32 * (i / kPieces) < count);
    }
    if (waits) WaitForPieces(pieces, piece_at, epoch);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (begin + 32 * i < count) visit(begin + 32 * i, pieces + i * kPieces);
    }
  }
}

// A row's distribution.
struct Distribution {
  Softmax softmax;
  MassScale scale;
  uint64_t total, limit;
  float sum;
  uint32_t k;

  __device__ __forceinline__ float ProbOf(float exp) const { return __fdiv_rn(exp, sum); }
};

// A token by the few that are listed: in descending order of probability up to top-k and top-p, then
// by a draw in ascending order of ids.
__device__ __forceinline__ Chosen DrawFromFew(DrawSpace& space, int count, const Distribution& all,
                                              uint32_t draw, int lane) {
  for (int i = lane; i < count; i += 32) {
    const float exp = all.softmax(space.logits[i]);
    space.few[i].bits = __float_as_uint(exp);
    space.few[i].mass = MassOf(exp, all.scale);
    space.probs[i] = __float_as_uint(all.ProbOf(exp));
  }
  __syncwarp();
  for (int i = lane; i < count; i += 32) {
    const Candidate mine = space.few[i];
    const uint32_t prob = space.probs[i];
    uint32_t likelier = 0;
    uint64_t before = 0;
    for (int j = 0; j < count; ++j) {
      const Candidate other = space.few[j];
      likelier += space.probs[j] > prob ? 1 : 0;
      const bool first =
          other.bits > mine.bits || (other.bits == mine.bits && other.token < mine.token);
      before += first ? other.mass : 0;
    }
    space.kept[i] = likelier < all.k && before <= all.limit ? mine.mass : 0;
  }
  __syncwarp();
  Chosen chosen = {-1, 0.0f};
  for (int i = lane; i < count; i += 32) {
    const int32_t token = space.few[i].token;
    uint64_t kept = 0, running = 0;
    for (int j = 0; j < count; ++j) {
      kept += space.kept[j];
      running += space.few[j].token < token ? space.kept[j] : 0;
    }
    const uint64_t target = TargetOf(kept, draw);
    if (running <= target && running + space.kept[i] > target) chosen = {token, space.logits[i]};
  }
  const uint32_t found = __ballot_sync(0xffffffffu, chosen.token >= 0);
  const int source = __ffs(static_cast<int>(found)) - 1;
  chosen.token = __shfl_sync(0xffffffffu, chosen.token, source);
  chosen.score = __shfl_sync(0xffffffffu, chosen.score, source);
  return chosen;
}

// The same by all logits, a pass for each number that is kept: slow, and seldom. Out of line, so that
// its instructions are not fetched otherwise.
static __device__ __noinline__ Chosen DrawFromAll(const float* logits, int vocab,
                                                  const Distribution& all, uint32_t draw,
                                                  int lane) {
  const auto bits_at = [&](int i) {
    return i < vocab ? __float_as_uint(all.softmax(__ldcg(logits + i))) : 0u;
  };
  Cut cut = {~0u, kAllTokens};  // exponentials below are left
  uint64_t before = 0, kept = 0;
  uint32_t taken = 0;
  float least = 0.0f;  // the probability of the k-th
  for (bool whole = true; whole && before <= all.limit;) {
    uint32_t next = 0, equal = 0;
    for (int i = lane; i < vocab; i += 32) {
      const uint32_t bits = bits_at(i);
      if (bits >= cut.bits || bits < next) continue;
      equal = bits == next ? equal + 1 : 1;
      next = bits;
    }
    const uint32_t bits = MaxOverWarp(next);
    if (bits == 0) break;
    equal = SumOverWarp(next == bits ? equal : 0u);
    const float prob = all.ProbOf(__uint_as_float(bits));
    if (taken >= all.k && prob < least) break;
    least = prob;
    const uint64_t mass = MassOf(__uint_as_float(bits), all.scale);
    const uint64_t room = (all.limit - before) / mass + 1;
    cut.bits = bits;
    whole = room >= equal;
    if (!whole) {  // those of smallest id
      uint32_t rank = 0;
      for (int i = lane; i - lane < vocab; i += 32) {
        const bool hit = bits_at(i) == bits;
        const uint32_t hits = __ballot_sync(0xffffffffu, hit);
        const uint32_t own = rank + static_cast<uint32_t>(__popc(hits & ((1u << lane) - 1u)));
        const uint32_t last = __ballot_sync(0xffffffffu, hit && own + 1 == room);
        if (last != 0) cut.token = i - lane + __ffs(static_cast<int>(last)) - 1;
        rank += static_cast<uint32_t>(__popc(hits));
      }
    }
    kept += (whole ? equal : room) * mass;
    before += equal * mass;
    taken += equal;
  }
  const uint64_t target = TargetOf(kept, draw);
  uint64_t running = 0;
  for (int i = lane; i - lane < vocab; i += 32) {
    const uint32_t bits = bits_at(i);
    const uint64_t mass =
        bits != 0 && cut.Keeps(bits, i) ? MassOf(__uint_as_float(bits), all.scale) : 0;
    const uint64_t scan = running + ScanOverWarp(mass, lane);
    const uint32_t above = __ballot_sync(0xffffffffu, scan > target);
    if (above != 0) {
      const int token = i - lane + __ffs(static_cast<int>(above)) - 1;
      return {token, __ldcg(logits + token)};
    }
    running = __shfl_sync(0xffffffffu, scan, 31);
  }
  return {-1, 0.0f};
}

// By a warp: the token of a row that is drawn, from what all blocks have published.
template <int kRows>
__device__ __forceinline__ Chosen DrawToken(const Thread<kRows>& self, ChoiceSpace<kRows>& space,
                                            int row, uint32_t epoch, bool is_real) {
  constexpr int kFinisherWarps = Threads<kRows>::kFinishers / 32;
  const Plan& plan = self.plan;
  const RowChoice& choice = self.shared.choices[row];
  const SamplingParams& params = choice.slot.sampling;
  const uint32_t draw = Draw(params.seed, params.sequence,
                             static_cast<uint32_t>(choice.slot.length - choice.slot.prompt_length));
  const BestOutput best = space.best[row];
  const auto place_of = [&](int i) {
    return (row * static_cast<int>(gridDim.x) + i / kFinisherWarps) * kMaxFinisherWarps +
           i % kFinisherWarps;
  };
  uint64_t total = 0, plain_total = 0;
  bool complete = true;
  ForEachPieces<2>(
      self.lane, static_cast<int>(gridDim.x) * kFinisherWarps, epoch, is_real,
      [&](int i) { return plan.exchange + plan.sums + 2 * place_of(i); },
      [&](int i, const uint4* pieces) {
        const uint32_t count = pieces[0].y >> kCountShift;
        const uint32_t high = pieces[0].y & ((1u << kCountShift) - 1);
        total += static_cast<uint64_t>(high) << 32 | pieces[0].x;
        plain_total += static_cast<uint64_t>(pieces[1].y) << 32 | pieces[1].x;
        if (count == kTooMany) complete = false;
        if (count == 0 || count == kTooMany) return;
        uint32_t to = atomicAdd(&space.num_listed, count);
        const auto take = [&](uint32_t logit, uint32_t token) {
          if (to < kMostListed) {
            space.draw.logits[to] = __uint_as_float(logit);
            space.draw.few[to].token = static_cast<int32_t>(token);
          }
          ++to;
        };
        take(pieces[0].z, pieces[1].z);
        const uint4* const list = plan.exchange + plan.listed + place_of(i) * kListedOfWarp;
        for (uint32_t j = 1; j < count; ++j) {
          uint4 token = LoadWhole(list + j);
          while (is_real && token.w != epoch) token = LoadWhole(list + j);
          take(token.x, token.y | token.z);
        }
      });
  total = SumOverWarp(total);
  const bool plain = params.temperature == 1.0f;
  if (!plain) plain_total = SumOverWarp(plain_total);
  __syncwarp();
  complete = __all_sync(0xffffffffu, complete) && space.num_listed <= kMostListed;
  const int listed = static_cast<int>(min(space.num_listed, kMostListed));
  __syncwarp();
  if (self.lane == 0) space.num_listed = 0;
  __syncwarp();

  const float largest = best.Largest();
  const float log_sum = LogOfSum(largest, plain ? total : plain_total, plan.scale);
  if (!best.IsDistribution(params.temperature)) {  // the best has a score, if it is a number
    Chosen chosen = {best.Token(), best.Logit() - log_sum};
    if (best.any_nan != 0 || !(fabsf(largest) <= FLT_MAX)) {
      chosen.score = __int_as_float(0x7fc00000);
    }
    return chosen;
  }
  const bool use_p = params.top_p > 0.0f && params.top_p < 1.0f;
  const Distribution all = {Softmax(params.temperature, largest),
                            plan.scale,
                            total,
                            use_p ? PartOf(total, params.top_p) : uint64_t{1} << 63,
                            static_cast<float>(SumOfMass(total, plan.scale)),
                            static_cast<uint32_t>(choice.few)};
  Chosen chosen;
  if (complete || !is_real) {
    chosen = DrawFromFew(space.draw, listed, all, draw, self.lane);
  } else {
    __threadfence();  // as before their sums: now the logits of all blocks are there
    chosen =
        DrawFromAll(plan.logits + row * plan.ld, plan.products[kHead].out, all, draw, self.lane);
  }
  chosen.score -= log_sum;
  return chosen;
}

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
