// The choice of tokens inside the step. Finishers keep the outputs of the head in shared memory; blocks
// tell each other the best of a row, then the sums of its exponentials and the few tokens that may be
// drawn, and a block for each row draws (persistent_draw.h). All is decided as the sampling kernel
// decides it, on the same whole numbers, so that tokens and scores are the same bits, but for a best
// logit of -0.
#pragma once

#include "cuda/persistent_draw.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

// What attention leaves there is read by then.
template <int kRows>
__device__ __forceinline__ float* OutputsOf(Shared<kRows>& shared) {
  static_assert(sizeof(shared.attended) == kMostKept * sizeof(float), "outputs of a block");
  return &shared.attended[0][0][0];
}

// Keeps a finisher's output `i` of the head; what is not its own as -inf.
template <int kRows>
__device__ __forceinline__ void Keep(const Thread<kRows>& self, int i, float logit, bool own) {
  OutputsOf(self.shared)[i * Threads<kRows>::kFinishers + self.thread] = own ? logit : -Infinity();
}

// The choice as a finisher sees it: its outputs of the head, all of one row. A step goes through this code
// once, and most of its time would be that of the instructions' way to the multiprocessor: another warp
// goes through it before, on what the step before has left, and changes nothing that counts.
template <int kRows>
class Chooser {
  static constexpr int kFinishers = Threads<kRows>::kFinishers;
  static constexpr int kFinisherWarps = kFinishers / 32;
  static constexpr int kOutputs = Threads<kRows>::kOutputs;
  static_assert(kFinisherWarps <= kMaxFinisherWarps, "places of the exchange");

 public:
  __device__ __forceinline__ explicit Chooser(const Thread<kRows>& self)
      : is_real_(self.role == Role::kFinisher),
        space_(is_real_ ? self.shared.choice : self.shared.rehearsal),
        outputs_(is_real_ ? OutputsOf(self.shared) : reinterpret_cast<const float*>(&space_)) {
    static_assert(sizeof(space_) >= kBatch * kFinishers * sizeof(float), "read, whatever it is");
    const int tiles = TilesOf(self.plan.products[kHead]);
    kept_ = is_real_ ? (tiles + kRound - 1) / kRound * kOutputs : kBatch;
  }

  // Ends the step, by all finishers. A block looks for the best of the rows that are drawn, and of those that
  // it ends itself.
  __device__ __forceinline__ void Run(Thread<kRows>& self) {
    const Plan& plan = self.plan;
    const uint32_t epoch = self.epoch;
    See(self);
    PublishBests(self, epoch);
    __threadfence();  // logits come before the sums, for whoever has to look at all of them
    bool any_draws = false;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const bool active = self.Active(row);
      any_draws = any_draws || (active && self.shared.choices[row].few > 0);
      const bool reads =
          self.shared.choices[row].few > 0 || row % static_cast<int>(gridDim.x) == blockIdx.x;
      if (active && reads && row % kFinisherWarps == self.warp) FindBest(self, row, epoch);
    }
    WaitForFinishers();
    if (any_draws) PublishSums(self, epoch);
    if (self.warp != 0) return;
#pragma unroll 1
    for (int row = static_cast<int>(blockIdx.x); row < plan.rows;
         row += static_cast<int>(gridDim.x)) {
      EndRow(self, row, epoch);
    }
  }

 private:
  // Lanes whose outputs are of the same row.
  __device__ static __forceinline__ uint32_t LanesOf(int row) {
    return (kRows == 1 ? 0xffffffffu : kRows == 2 ? 0x00ff00ffu : 0x000000ffu) << (8 * row);
  }
  __device__ static __forceinline__ uint64_t Sum(uint32_t lanes, uint64_t value) {
    constexpr int kPiece = 22;  // of numbers whose sum is below 2^64, piece by piece
    constexpr uint32_t kMask = (1u << kPiece) - 1;
    const uint32_t low = __reduce_add_sync(lanes, static_cast<uint32_t>(value) & kMask);
    const uint32_t middle =
        __reduce_add_sync(lanes, static_cast<uint32_t>(value >> kPiece) & kMask);
    const uint32_t high = __reduce_add_sync(lanes, static_cast<uint32_t>(value >> 2 * kPiece));
    return (static_cast<uint64_t>(high) << 2 * kPiece) + (static_cast<uint64_t>(middle) << kPiece) +
           low;
  }

  __device__ __forceinline__ void WaitForFinishers() const {
    if (kFinisherWarps == 1 || !is_real_) {
      __syncwarp();
    } else {
      WaitAt<kFinishers>(kChoosers);
    }
  }

  __device__ static __forceinline__ int RowOf(const Thread<kRows>& self) {
    return self.lane / kTile % kRows;
  }

  // The best of the thread's outputs.
  __device__ __forceinline__ void See(const Thread<kRows>& self) {
    const Product& head = self.plan.products[kHead];
    const int first = OutputOf(head, 0);
    const int end = min(first + TilesOf(head) * kTile, head.out);
    ForEachFour(self, [&](int i, float (&logits)[kBatch]) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int token = TokenOf(self, i + j);
        if (i + j < kept_ && token < end) best_.See(logits[j], token);
      }
    });
  }

  // By all blocks, also those without outputs: that a block has spoken means that it has read which
  // tokens there were.
  __device__ __forceinline__ void PublishBests(Thread<kRows>& self, uint32_t epoch) {
    const int row = RowOf(self);
    const uint32_t lanes = LanesOf(row);
    const uint32_t order = __reduce_max_sync(lanes, best_.order);
    const uint32_t first = __reduce_max_sync(lanes, best_.order == order ? best_.first : 0u);
    const uint32_t any_nan = __reduce_max_sync(lanes, best_.any_nan);
    __syncwarp();  // a rehearsal's outputs are the same memory
    if (self.lane == row * kTile) space_.bests[self.warp][row] = {order, first, any_nan};
    WaitForFinishers();
    if (self.warp == 0 && self.lane < kRows && self.Active(self.lane)) {
      BestOutput best = space_.bests[0][self.lane];
      for (int i = 1; i < kFinisherWarps; ++i) best.Merge(space_.bests[i][self.lane]);
      Publish(BestsOf(self.plan, self.lane) + blockIdx.x,
              make_uint4(best.order, best.first, best.any_nan, epoch));
    }
  }

  // The best of a row over all blocks, and from where on its tokens have to be listed.
  __device__ __forceinline__ void FindBest(const Thread<kRows>& self, int row, uint32_t epoch) {
    const uint4* const from = BestsOf(self.plan, row);
    const int count = static_cast<int>(gridDim.x);
    BestOutput best = {0u, 0u, 0u};
    ForEachPieces<1>(
        self.lane, count, epoch, is_real_, [&](int i) { return from + i; },
        [&](int, const uint4* piece) { best.Merge({piece->x, piece->y, piece->z}); });
    const RowChoice& choice = self.shared.choices[row];
    // An order that `few` tokens have or exceed: no two lanes have the same, so one is the last.
    uint32_t own = (best.order & ~31u) | static_cast<uint32_t>(self.lane);
    uint32_t bound = 0;
    for (int i = 0; i < choice.few; ++i) {
      bound = MaxOverWarp(own);
      if (own == bound) own = 0;
    }
    bound &= ~31u;
    const uint32_t order = MaxOverWarp(best.order);
    const uint32_t first = MaxOverWarp(best.order == order ? best.first : 0u);
    const uint32_t any_nan = MaxOverWarp(best.any_nan);
    if (self.lane == 0) {
      const float temperature = choice.slot.sampling.temperature;
      space_.best[row] = {order, first, any_nan};
      space_.listed_from[row] = choice.few > 0 && space_.best[row].IsDistribution(temperature)
                                    ? ListedFrom(bound, temperature)
                                    : __int_as_float(0x7fc00000);
    }
  }

  // All that may be drawn when this order is among the first: lower ones may have the same
  // probability, and what is masked has none.
  __device__ static __forceinline__ float ListedFrom(uint32_t order, float temperature) {
    if (order <= OrderOf(kMasked)) return kMasked;
    const float logit = LogitOf(order);
    return logit - (fabsf(logit) * 1e-6f + temperature * 4e-6f);
  }

  // visit(i, logits) of the thread's outputs from i on, four at a time; -inf for those that are none.
  template <typename Visit>
  __device__ __forceinline__ void ForEachFour(const Thread<kRows>& self, const Visit& visit) const {
    const float* const from = outputs_ + self.thread;
#pragma unroll 1
    for (int i = 0; i < kept_; i += kBatch) {
      float logits[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        logits[j] = i + j < kept_ ? from[(i + j) * kFinishers] : kMinusInfinity;
      }
      visit(i, logits);
    }
  }

  // The order of the `few`-th of the warp's outputs of a row.
  __device__ __forceinline__ uint32_t FindOrder(const Thread<kRows>& self, uint32_t lanes,
                                                int few) const {
    uint32_t last = ~0u;
    for (int found = 0; found < few;) {
      uint32_t next = 0;
      int equal = 0;
      ForEachFour(self, [&](int, float (&logits)[kBatch]) {
        for (int j = 0; j < kBatch; ++j) {
          const uint32_t order = OrderOf(logits[j]);
          if (order >= last || order < next) continue;
          equal = order == next ? equal + 1 : 1;
          next = order;
        }
      });
      last = __reduce_max_sync(lanes, next);
      if (last == 0) break;
      found += static_cast<int>(
          __reduce_add_sync(lanes, next == last ? static_cast<uint32_t>(equal) : 0u));
    }
    return last;
  }

  // The tokens of this warp that may be drawn, and the sums of its exponentials: two pieces with the
  // first of the tokens, and a piece for each of the others.
  __device__ __forceinline__ void PublishSums(Thread<kRows>& self, uint32_t epoch) {
    const Plan& plan = self.plan;
    const int row = RowOf(self);
    const RowChoice& choice = self.shared.choices[row];
    if (!self.Active(row) || choice.few == 0) return;  // all lanes of the row
    const uint32_t lanes = LanesOf(row);
    const int place =
        (row * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)) * kMaxFinisherWarps +
        self.warp;
    const float temperature = choice.slot.sampling.temperature;
    const float largest = space_.best[row].Largest();
    const Softmax softmax(temperature, largest);
    float least = space_.listed_from[row];
    uint64_t sum = 0, plain_sum = 0;
    uint32_t hits = 0;
    ForEachFour(self, [&](int, float (&logits)[kBatch]) {
      MassParts parts = {0, 0};
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        hits += logits[j] >= least ? 1 : 0;
        if (!softmax.plain) parts.Add(MassPartsOf(ExpOf(logits[j] - largest), plan.scale));
      }
      plain_sum += parts.Whole(plan.scale);
      softmax.Apply(logits);
      parts = {0, 0};
#pragma unroll
      for (int j = 0; j < kBatch; ++j) parts.Add(MassPartsOf(logits[j], plan.scale));
      sum += parts.Whole(plan.scale);
    });
    uint32_t count = __reduce_add_sync(lanes, hits);
    if (count > kListedOfWarp) {
      // The first few of them are enough, and what may be as probable.
      least = fmaxf(least, ListedFrom(FindOrder(self, lanes, choice.few), temperature));
      hits = 0;
      ForEachFour(self, [&](int, float (&logits)[kBatch]) {
        for (int j = 0; j < kBatch; ++j) hits += logits[j] >= least ? 1 : 0;
      });
      count = __reduce_add_sync(lanes, hits);
    }
    uint32_t first_logit = 0, first_token = 0;  // in the lane that has them
    if (hits > 0 && count <= kListedOfWarp) {
      uint4* const list = plan.exchange + plan.listed + place * kListedOfWarp;
      uint32_t to = atomicAdd(&space_.listed[self.warp][row], hits);
      ForEachFour(self, [&](int i, float (&logits)[kBatch]) {
        for (int j = 0; j < kBatch; ++j) {
          if (!(logits[j] >= least)) continue;
          const auto token = static_cast<uint32_t>(TokenOf(self, i + j));
          if (to == 0) {
            first_logit = __float_as_uint(logits[j]);
            first_token = token;
          } else {
            Publish(list + to, make_uint4(__float_as_uint(logits[j]), token, 0u, epoch));
          }
          ++to;
        }
      });
    }
    sum = Sum(lanes, sum);
    if (!softmax.plain) plain_sum = Sum(lanes, plain_sum);
    first_logit = __reduce_or_sync(lanes, first_logit);
    first_token = __reduce_or_sync(lanes, first_token);
    if (self.lane == row * kTile) {
      // A warp's outputs are few: their sum leaves room for the count.
      static_assert(kMostKept <= 1 << 11 && kListedOfWarp < 15, "58 bits and four");
      // Of what is no distribution, none is listed and the sum may be anything.
      const uint32_t high = (static_cast<uint32_t>(sum >> 32) & ((1u << kCountShift) - 1)) |
                            (count <= kListedOfWarp ? count : kTooMany) << kCountShift;
      uint4* const to = plan.exchange + plan.sums + 2 * place;
      Publish(to, make_uint4(static_cast<uint32_t>(sum), high, first_logit, epoch));
      Publish(to + 1, make_uint4(static_cast<uint32_t>(plain_sum),
                                 static_cast<uint32_t>(plain_sum >> 32), first_token, epoch));
    }
  }

  // The token of the i-th output.
  __device__ static __forceinline__ int TokenOf(const Thread<kRows>& self, int i) {
    const int at = self.thread + i % kOutputs * kFinishers;
    const int tile = i / kOutputs * kRound + at / (kTile * kRows);
    return OutputOf(self.plan.products[kHead], tile) + at % kTile;
  }

  // By a warp: the row's token, to its slot and the host.
  __device__ __forceinline__ void EndRow(Thread<kRows>& self, int row, uint32_t epoch) {
    const Plan& plan = self.plan;
    const RowChoice& choice = self.shared.choices[row];
    Chosen chosen = {-1, 0.0f};
    int32_t finished = 1;
    if (self.Active(row)) {
      const BestOutput& best = space_.best[row];
      chosen = choice.few > 0 ? DrawToken(self, space_, row, epoch, is_real_)
                              : Chosen{best.Token(), best.Logit()};
      finished = Ends(choice.slot, chosen.token) ? 1 : 0;
    }
    if (self.lane != 0 || !is_real_) return;
    if (self.Active(row)) {
      Append(plan.choice, choice.slot, choice.slot_index, chosen.token, finished);
    }
    Report(plan.choice, row, self.shared.step, chosen, finished);
  }

  __device__ __forceinline__ void Publish(uint4* to, const uint4& piece) const {
    if (is_real_) StoreWhole(to, piece);
  }

  const bool is_real_;
  ChoiceSpace<kRows>& space_;
  const float* const outputs_;
  BestOutput best_ = {0u, ~0u, 0u};
  int kept_;
};

// Ends a step, by all finishers.
template <int kRows>
__device__ __forceinline__ void ChooseTokens(const Plan& plan, Role role) {
  Thread<kRows> self = ThisThread<kRows>(plan, role);
  Chooser<kRows>(self).Run(self);
}

// Of a step in which no row has a token, by a warp.
template <int kRows>
__device__ __forceinline__ void ReportNone(const Plan& plan, const Shared<kRows>& shared) {
  for (int row = static_cast<int>(blockIdx.x); row < plan.rows;
       row += static_cast<int>(gridDim.x)) {
    if (threadIdx.x % 32 == 0) Report(plan.choice, row, shared.step, {-1, 0.0f}, 1);
  }
}

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
