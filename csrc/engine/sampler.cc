#include "engine/sampler.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <functional>

#include "engine/rng.h"

namespace fastgen::engine {
namespace {

// Vocabulary loops go by blocks so that the compiler vectorises the test "is anything here worth a
// look" and the branch is taken rarely.
constexpr int32_t kScanBlock = 32;
// Blocks of the running sum of a draw.
constexpr int32_t kSumBlock = 256;
// Up to this k a buffer of candidates finds the k-th largest faster than a histogram does.
constexpr int32_t kBufferedTopK = 256;

// Non-negative floats order like their bits.
uint32_t BitsOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// True if any of block[0 .. count) fulfils `test`. Without early exit, so that it vectorises.
template <typename Test>
bool AnyOf(const float* block, int32_t count, const Test& test) {
  int any = 0;
  if (count == kScanBlock) {
    for (int32_t i = 0; i < kScanBlock; ++i) any |= static_cast<int>(test(block[i]));
  } else {
    for (int32_t i = 0; i < count; ++i) any |= static_cast<int>(test(block[i]));
  }
  return any != 0;
}

// Calls visit(begin, end) for every block of `values` that holds something fulfilling `test`.
template <typename Test, typename Visit>
void ForEachBlockWith(const float* values, int32_t n, const Test& test, const Visit& visit) {
  for (int32_t begin = 0; begin < n; begin += kScanBlock) {
    const int32_t count = std::min(kScanBlock, n - begin);
    if (AnyOf(values + begin, count, test)) visit(begin, begin + count);
  }
}

double Sum(const float* values, int32_t n) {
  constexpr int32_t kLanes = 8;
  double lanes[kLanes] = {};
  int32_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += static_cast<double>(values[i + lane]);
    }
  }
  for (; i < n; ++i) lanes[i % kLanes] += static_cast<double>(values[i]);
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) +
         ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// The bucket in which a walk from the highest one exceeds `limit`, and the sum before it. Rounding
// may keep the walk from ever exceeding it: then the lowest bucket that holds anything.
struct Crossing {
  int32_t bucket = -1;
  double before = 0.0;
};

Crossing FindCrossing(const double* sums, int32_t buckets, double before, double limit) {
  Crossing crossing;
  for (int32_t bucket = buckets - 1; bucket >= 0; --bucket) {
    if (!(sums[bucket] > 0.0)) continue;
    crossing.bucket = bucket;
    crossing.before = before;
    before += sums[bucket];
    if (before > limit) break;
  }
  return crossing;
}

struct ByMass {
  double operator()(float prob) const { return static_cast<double>(prob); }
};
struct ByCount {
  double operator()(float) const { return 1.0; }
};

}  // namespace

// A radix selection on the bits of the probabilities: a histogram of weights per bucket tells in
// which bucket the walk ends, the next digit narrows it down, and after three digits only equal
// probabilities are left, which lie in ascending id already. Nothing is sorted.
template <typename Weight>
Sampler::Cut Sampler::FindCut(const float* probs, int32_t vocab, double limit, float floor,
                              const Weight& weight) {
  constexpr int kFirstShift = 21;         // sign, exponent and two bits of the fraction
  constexpr int32_t kFirstBuckets = 512;  // up to 2.0
  constexpr int32_t kTables = 4;  // neighbours often share a bucket: do not wait for the last add
  double tables[kTables][kFirstBuckets] = {};
  const auto first_digit = [](float prob) {
    return static_cast<int32_t>(BitsOf(prob) >> kFirstShift & (kFirstBuckets - 1));
  };
  ForEachBlockWith(
      probs, vocab, [floor](float prob) { return prob >= floor; },
      [&](int32_t begin, int32_t end) {
        for (int32_t i = begin; i < end; ++i) {
          tables[i % kTables][first_digit(probs[i])] += weight(probs[i]);
        }
      });
  double* sums = tables[0];
  for (int32_t bucket = 0; bucket < kFirstBuckets; ++bucket) {
    for (int table = 1; table < kTables; ++table) sums[bucket] += tables[table][bucket];
  }
  Crossing crossing = FindCrossing(sums, kFirstBuckets, 0.0, limit);
  if (crossing.bucket < 0) return {0.0f, vocab - 1};  // nothing has weight: keep what there is

  const uint32_t lowest_bits = static_cast<uint32_t>(crossing.bucket) << kFirstShift;
  const uint32_t highest_bits = lowest_bits | ((1u << kFirstShift) - 1);
  float lowest, highest;
  std::memcpy(&lowest, &lowest_bits, sizeof lowest);
  std::memcpy(&highest, &highest_bits, sizeof highest);
  // Without a short circuit: which tokens are inside is no pattern that a branch predictor learns.
  const auto inside = [lowest, highest](float prob) {
    return static_cast<int32_t>(prob >= lowest) & static_cast<int32_t>(prob <= highest);
  };
  candidates_.resize(static_cast<size_t>(vocab));
  Candidate* const candidates = candidates_.data();
  int32_t count = 0;
  ForEachBlockWith(probs, vocab, inside, [&](int32_t begin, int32_t end) {
    int32_t kept = count;
    for (int32_t i = begin; i < end; ++i) {
      candidates[kept] = {probs[i], i};
      kept += inside(probs[i]);
    }
    count = kept;
  });

  struct Digit {
    int shift;
    int32_t buckets;
  };
  for (const Digit digit : {Digit{10, 2048}, Digit{0, 1024}}) {
    double digit_sums[2048] = {};
    const auto digit_of = [digit](float prob) {
      return static_cast<int32_t>(BitsOf(prob) >> digit.shift) & (digit.buckets - 1);
    };
    for (int32_t i = 0; i < count; ++i) {
      digit_sums[digit_of(candidates[i].prob)] += weight(candidates[i].prob);
    }
    const Crossing next = FindCrossing(digit_sums, digit.buckets, crossing.before, limit);
    if (next.bucket < 0) break;  // only zeros are left, and they are equal
    crossing = next;
    int32_t kept = 0;
    for (int32_t i = 0; i < count; ++i) {
      const Candidate c = candidates[i];
      candidates[kept] = c;
      kept += static_cast<int32_t>(digit_of(c.prob) == crossing.bucket);
    }
    count = kept;
  }

  Cut cut = {candidates[0].prob, candidates[0].token};
  double before = crossing.before;
  for (int32_t i = 0; i < count && before <= limit; ++i) {
    cut.token = candidates[i].token;
    before += weight(candidates[i].prob);
  }
  return cut;
}

float Sampler::KthLargest(const float* probs, int32_t vocab, int32_t k) {
  if (k > kBufferedTopK) return FindCut(probs, vocab, k - 1, 0.0f, ByCount()).prob;
  // Collect what exceeds the k-th largest seen so far; when the buffer is full, find that again.
  const std::ptrdiff_t kth = k - 1;
  const size_t capacity = static_cast<size_t>(2 * k);
  float bound = -1.0f;
  largest_.clear();
  largest_.reserve(capacity);
  const auto shrink = [&] {
    std::nth_element(largest_.begin(), largest_.begin() + kth, largest_.end(),
                     std::greater<float>());
    largest_.resize(static_cast<size_t>(k));
    bound = largest_.back();
  };
  for (int32_t begin = 0; begin < vocab; begin += kScanBlock) {
    const int32_t count = std::min(kScanBlock, vocab - begin);
    const float* block = probs + begin;
    if (!AnyOf(block, count, [bound](float prob) { return prob > bound; })) continue;
    for (int32_t i = 0; i < count; ++i) {
      if (!(block[i] > bound)) continue;
      largest_.push_back(block[i]);
      if (largest_.size() == capacity) shrink();
    }
  }
  if (largest_.size() > static_cast<size_t>(k)) shrink();
  return *std::min_element(largest_.begin(), largest_.end());
}

void Sampler::KeepTopP(float top_p, float* probs, int32_t vocab) {
  const double limit = static_cast<double>(top_p);
  const double total = Sum(probs, vocab);
  if (!(total > limit)) return;  // the mass before any token is within the limit
  // All tokens below this together have less than half of what lies beyond the limit, so the walk
  // ends before them. The margin must dwarf the rounding of the sums.
  constexpr double kMargin = 1e-6;
  const double beyond = total - limit;
  const float floor = beyond > kMargin ? static_cast<float>(0.5 * beyond / vocab) : 0.0f;
  const Cut cut = FindCut(probs, vocab, limit, floor, ByMass());
  const int32_t ties_end = cut.token + 1;
  for (int32_t i = 0; i < ties_end; ++i) probs[i] = probs[i] >= cut.prob ? probs[i] : 0.0f;
  for (int32_t i = ties_end; i < vocab; ++i) probs[i] = probs[i] > cut.prob ? probs[i] : 0.0f;
}

void Sampler::Filter(const SamplingParams& params, float* probs, int32_t vocab) {
  if (params.top_k > 0 && params.top_k < vocab) {
    const float bound = KthLargest(probs, vocab, params.top_k);
    for (int32_t i = 0; i < vocab; ++i) probs[i] = probs[i] >= bound ? probs[i] : 0.0f;
  }
  if (params.top_p > 0.0f && params.top_p < 1.0f) KeepTopP(params.top_p, probs, vocab);
}

int32_t Sampler::Draw(double uniform, const float* probs, int32_t vocab) {
  block_sums_.clear();
  double mass = 0.0;
  for (int32_t begin = 0; begin < vocab; begin += kSumBlock) {
    const double sum = Sum(probs + begin, std::min(kSumBlock, vocab - begin));
    block_sums_.push_back(sum);
    mass += sum;
  }
  if (!(mass > 0.0)) return -1;

  const double target = uniform * mass;
  double running = 0.0;
  size_t block = 0;
  while (block < block_sums_.size() && running + block_sums_[block] <= target) {
    running += block_sums_[block++];
  }
  for (int32_t i = static_cast<int32_t>(block) * kSumBlock; i < vocab; ++i) {
    running += static_cast<double>(probs[i]);
    if (probs[i] > 0.0f && running > target) return i;
  }
  // Rounding kept the running sum at or below the target: the last kept token.
  int32_t last = vocab - 1;
  while (last > 0 && !(probs[last] > 0.0f)) --last;
  return last;
}

Choice Sampler::Choose(const SamplingParams& params, uint32_t step, const float* logits,
                       int32_t vocab) {
  if (!params.sample) {
    const int32_t token = static_cast<int32_t>(kernels_.argmax(logits, vocab));
    return {token, logits[token]};
  }
  probs_.resize(static_cast<size_t>(vocab));
  kernels_.softmax(logits, vocab, params.temperature, probs_.data());
  int32_t token = -1;
  // The softmax divides by one sum: if that is not a number, no element is.
  if (probs_[0] >= 0.0f) {
    Filter(params, probs_.data(), vocab);
    token = Draw(UniformDraw(params.seed, params.sequence, step), probs_.data(), vocab);
  }
  if (token < 0) token = static_cast<int32_t>(kernels_.argmax(logits, vocab));
  return {token, logits[token] - kernels_.log_sum_exp(logits, vocab)};
}

}  // namespace fastgen::engine
