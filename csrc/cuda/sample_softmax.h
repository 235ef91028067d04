// What the threads of a block do with its logits: they look for the largest, and make exponentials
// of them, whose sums go to the group.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/sample_group.h"

namespace fastgen {
namespace cuda {

constexpr float kMinusInfinity = -HUGE_VALF;

// What a thread has seen of the logits.
struct Seen {
  float largest;  // but for NaN
  bool any_nan;

  __device__ void See(float logit) {
    largest = fmaxf(largest, logit);
    any_nan = any_nan || logit != logit;
  }
};

// How a block's logits are shared: by fours, where they lie so, or one by one.
struct Sharing {
  int32_t count;
  int threads;
  bool by_fours;
};

// visit(i, logit) of the thread's share, several loads at a time.
template <typename Visit>
__device__ __forceinline__ void ForEachLogit(const float* logits, const Sharing& sharing,
                                             int thread, Visit& visit) {
  const int32_t count = sharing.count;
  const int threads = sharing.threads;
  int32_t i = 0;
  if (sharing.by_fours) {
    const auto* const vectors = reinterpret_cast<const float4*>(logits);
    const int32_t num_vectors = count / 4;
#pragma unroll 1
    for (int32_t first = thread; first < num_vectors; first += kBatch * threads) {
      float4 batch[kBatch];
      for (int j = 0; j < kBatch; ++j) {
        if (first + j * threads < num_vectors) batch[j] = vectors[first + j * threads];
      }
      for (int j = 0; j < kBatch; ++j) {
        const int32_t v = first + j * threads;
        if (v < num_vectors) visit(4 * v, batch[j]);
      }
    }
    i = num_vectors * 4;
  }
#pragma unroll 1
  for (i += thread; i < count; i += threads) visit(i, logits[i]);
}

struct Copy {
  float* to;
  Seen seen;

  __device__ void operator()(int32_t i, float logit) {
    seen.See(logit);
    to[i] = logit;
  }
  __device__ void operator()(int32_t i, const float4& four) {
    seen.See(four.x);
    seen.See(four.y);
    seen.See(four.z);
    seen.See(four.w);
    *reinterpret_cast<float4*>(to + i) = four;
  }
};

struct Look {
  Seen seen;

  __device__ void operator()(int32_t, float logit) { seen.See(logit); }
  __device__ void operator()(int32_t, const float4& four) {
    seen.See(four.x);
    seen.See(four.y);
    seen.See(four.z);
    seen.See(four.w);
  }
};

// The first that is as large as `order` says.
struct Find {
  uint32_t order;
  int32_t found;  // -1: none

  __device__ void operator()(int32_t i, float logit) {
    if (OrderOf(logit) == order && (found < 0 || i < found)) found = i;
  }
  __device__ void operator()(int32_t i, const float4& four) {
    (*this)(i, four.x);
    (*this)(i + 1, four.y);
    (*this)(i + 2, four.z);
    (*this)(i + 3, four.w);
  }
};

// The softmax of a row before it is divided by its sum.
struct Softmax {
  Divider by_temperature;
  bool plain;  // the temperature is 1
  float shift;

  __device__ Softmax(float temperature, float largest)
      : by_temperature(temperature),
        plain(temperature == 1.0f),
        shift(plain ? largest : by_temperature(largest)) {}
  __device__ float operator()(float logit) const {
    return ExpOf((plain ? logit : by_temperature(logit)) - shift);
  }
  // The same of several, without a branch for each.
  __device__ void Apply(float (&logits)[kBatch]) const {
    if (!plain) {
      bool inside = true;
      float quotients[kBatch];
      for (int j = 0; j < kBatch; ++j) {
        quotients[j] = by_temperature.Inside(logits[j]);
        inside = inside && by_temperature.IsInside(logits[j]);
      }
      if (!inside) {
        for (int j = 0; j < kBatch; ++j) quotients[j] = by_temperature(logits[j]);
      }
      for (int j = 0; j < kBatch; ++j) logits[j] = quotients[j];
    }
    for (int j = 0; j < kBatch; ++j) logits[j] = ExpOf(logits[j] - shift);
  }
};

__device__ __forceinline__ void LoadBatch(const float* from, float (&values)[kBatch]) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
}

// Where a block's logits and their exponentials lie. What lies in shared memory is aligned and
// filled up to whole batches.
enum class Storage {
  kBoth,    // both in shared memory
  kLogits,  // the logits in shared memory, exponentials are computed again
  kNone,    // logits in device memory, which are read again
};

// -inf from `end` on.
template <Storage kStorage>
__device__ __forceinline__ void LoadLogits(const float* logits, int32_t i, int32_t end,
                                           float (&values)[kBatch]) {
  if (kStorage != Storage::kNone) {
    LoadBatch(logits + i, values);
  } else {
    for (int j = 0; j < kBatch; ++j) values[j] = i + j < end ? logits[i + j] : kMinusInfinity;
  }
}

// The exponentials of a block's logits.
template <Storage kStorage>
struct Exponentials {
  const float* logits;
  const float* exps;
  Softmax softmax;
  MassScale scale;
  float sum;  // of the row's, once it is known

  __device__ float Logit(int32_t i) const { return logits[i]; }
  __device__ float Exp(int32_t i) const {
    return kStorage == Storage::kBoth ? exps[i] : softmax(logits[i]);
  }
  __device__ void Exps(int32_t i, int32_t end, float (&values)[kBatch]) const {
    if (kStorage == Storage::kBoth) {
      LoadBatch(exps + i, values);
    } else if (kStorage == Storage::kLogits) {
      LoadBatch(logits + i, values);
      softmax.Apply(values);
    } else {
      for (int j = 0; j < kBatch; ++j) values[j] = i + j < end ? Exp(i + j) : 0.0f;
    }
  }
  __device__ float ExpOfLogit(float logit) const { return softmax(logit); }
  __device__ float ProbOf(float exp) const { return __fdiv_rn(exp, sum); }
  __device__ uint32_t LowestEqual(uint32_t bits) const {
    const float prob = ProbOf(__uint_as_float(bits));
    // Neighbours lie at least half as far apart as what they are rounded to.
#pragma unroll 1
    for (int i = 0; i < kNeighbours; ++i) {
      if (bits == 0 || ProbOf(__uint_as_float(bits - 1)) != prob) break;
      --bits;
    }
    return bits;
  }
  static constexpr int kNeighbours = 3;
};

// Adds the row's exponentials up, of the logits by the temperature and, for the score, of the plain
// ones; keeps the first, and on the block's list the logits from `listed_from` on. Sums go to all
// blocks in this round of the exchange; returns the bytes.
template <Storage kStorage, typename RowGroup>
__device__ __forceinline__ uint32_t AddUp(const RowGroup& group, const float* logits, float* exps,
                                          const Softmax& softmax, float largest, float listed_from,
                                          MassScale scale) {
  uint64_t sum = 0, plain_sum = 0;
  uint32_t hits = 0;
  group.ForEachOwn([&](int32_t i) {
    float plain[kBatch], values[kBatch];
    LoadLogits<kStorage>(logits, i, group.warp_end, plain);
    for (int j = 0; j < kBatch; ++j) hits += plain[j] >= listed_from ? 1 : 0;
    for (int j = 0; j < kBatch; ++j) values[j] = plain[j];
    softmax.Apply(values);
    if (kStorage == Storage::kBoth) {
      *reinterpret_cast<float4*>(exps + i) =
          make_float4(values[0], values[1], values[2], values[3]);
    }
    MassParts parts = {0, 0};
    for (int j = 0; j < kBatch; ++j) parts.Add(MassPartsOf(values[j], scale));
    sum += parts.Whole(scale);
    if (softmax.plain) return;
    parts = {0, 0};
    for (int j = 0; j < kBatch; ++j) parts.Add(MassPartsOf(ExpOf(plain[j] - largest), scale));
    plain_sum += parts.Whole(scale);
  });
  uint32_t place = group.Reserve(hits);
  if (hits > 0) {
    group.ForEachOwn([&](int32_t i) {
      float plain[kBatch];
      LoadLogits<kStorage>(logits, i, group.warp_end, plain);
      for (int j = 0; j < kBatch; ++j) {
        if (plain[j] >= listed_from) group.Keep(place++, i + j, plain[j]);
      }
    });
  }
  __syncwarp();
  group.Spread(group.s.sums, SumOverWarp(sum));
  if (softmax.plain) return RowGroup::kSpreadBytes;
  group.Spread(group.s.plain_sums, SumOverWarp(plain_sum));
  return 2 * RowGroup::kSpreadBytes;
}

}  // namespace cuda
}  // namespace fastgen
