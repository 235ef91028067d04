// The multiplication of the persistent kernel: activations staged as numbers of 16 bits, weights of the
// ring, and what mma.m16n8k16 makes of them.
//
// Weights are the left operand: 8 of its 16 rows are a tile of outputs; its 8 columns are activations,
// each as the sum of two numbers of 16 bits. A warp's 128 columns are four fragments of 32: in each a
// lane has 8 columns of one output, and the activations are staged in the order that this makes.
// With up to two rows the lower 8 rows of the operand take the tile's last two fragments, and the
// upper 4 activation columns belong to them; with more rows, the next tile.
#pragma once

#include "cuda/persistent_bytes.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

// With 16 bits a load is a fragment. What rows of odd number swap are neighbours among the loads, and with up to two
// rows of activations fragments i and i + 2 are multiplied at once. Its own inverse.
__host__ __device__ constexpr int FragmentOfLoad(int load) { return load % 2 * 2 + load / 2; }

// Where four columns of a warp's are staged in a line, in units of 8 bytes: [fragment][4 lanes][8
// columns], by the order in which a lane's 16 bytes of weights are multiplied.
template <typename W>
__device__ __forceinline__ int StagedPlace(int lane) {
  const int eight = lane / 2;
  const int fragment = W::kBits == 16  ? FragmentOfLoad(eight / 4)
                       : W::kBits == 8 ? eight / 8 * 2 + eight % 2
                                       : eight % 4;
  const int member = W::kBits == 16 ? eight % 4 : W::kBits == 8 ? eight / 2 % 4 : eight / 4;
  return (fragment * 4 + member) * 2 + lane % 2;
}

// int4 weights are unpacked in pairs of columns (0, 4), (1, 5), (2, 6), (3, 7): a lane and its
// neighbour, which have four of the eight columns each, swap halves.
__device__ __forceinline__ void PairWithNeighbour(uint32_t (&pairs)[2], int lane) {
  const bool odd = lane % 2 != 0;
  const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? pairs[0] : pairs[1], 1);
  const uint32_t low = odd ? got : pairs[0];
  const uint32_t high = odd ? pairs[1] : got;
  pairs[0] = __byte_perm(low, high, 0x5410);
  pairs[1] = __byte_perm(low, high, 0x7632);
}

// Fragments of odd lines are swapped in pairs, so that a quarter of a warp reads from all banks.
template <typename W, int kRows>
__device__ __forceinline__ void StorePairs(Thread<kRows>& self, int line, int place,
                                           const uint32_t (&pairs)[2]) {
  uint32_t to[2] = {pairs[0], pairs[1]};
  if (W::kBits == 4) PairWithNeighbour(to, self.lane);
  *reinterpret_cast<uint2*>(self.activations + line * kLine + (place ^ line % 2 * 8) * 8) =
      make_uint2(to[0], to[1]);
}

// Splits four numbers of a chunk's row into two of 16 bits each and stages them. Finite numbers stay
// finite.
template <typename W, int kRows>
__device__ __forceinline__ void StageFour(Thread<kRows>& self, int chunk, int row, int place,
                                          const float (&x)[4]) {
  using T = typename W::Element;
  uint32_t high[2], low[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float back[2];
    high[i] = RoundPairFinite<T>(x[2 * i], x[2 * i + 1]);
    Vector<T>::UnpackPair(high[i], back);
    low[i] = RoundPairFinite<T>(x[2 * i] - back[0], x[2 * i + 1] - back[1]);
  }
  const int line = 2 * (chunk * kRows + row);
  StorePairs<W>(self, line, place, high);
  StorePairs<W>(self, line + 1, place, low);
}

// Stages four numbers that are rounded already.
template <typename W, int kRows>
__device__ __forceinline__ void StageTwoPairs(Thread<kRows>& self, int chunk, int row, int place,
                                              uint32_t first, uint32_t second) {
  const uint32_t pairs[2] = {first, second};
  StorePairs<W>(self, chunk * kRows + row, place, pairs);
}

// The 8 columns of a fragment that this lane multiplies, of a line.
template <int kRows>
__device__ __forceinline__ const char* StagedEight(const Thread<kRows>& self, int line,
                                                   int fragment) {
  return self.activations + line * kLine + (fragment ^ (line & 1)) * 64 + self.lane % 4 * 16;
}

// The activations of a chunk as the matrix units take them: fragments of this lane's half, or all. A
// row has two columns, the second of which is zero where numbers have one part.
template <bool kTwoParts, int kRows>
__device__ __forceinline__ void ReadStaged(const Thread<kRows>& self, int chunk, uint4 (&x)[4]) {
  const int group = self.lane / 4;
  // With one row, columns 2 and 3 of a half repeat the first two; nobody reads their sums.
  const int column = kRows <= 2 ? group % (2 * kRows) : group;
  const int first = kRows <= 2 ? group / 4 * 2 : 0;
  const int line = kTwoParts ? 2 * kRows * chunk + column : kRows * chunk + column / 2;
#pragma unroll
  for (int i = 0; i < (kRows <= 2 ? 2 : 4); ++i) {
    const char* const from = StagedEight(self, line, first + i);
    x[i] = kTwoParts ? *reinterpret_cast<const uint4*>(from) : LoadSharedIf(from, column % 2 == 0);
  }
}

__device__ __forceinline__ uint32_t ScaledPair(uint32_t pair, uint32_t minus, uint32_t scale) {
  const auto halves = [](uint32_t bits) { return *reinterpret_cast<const __half2*>(&bits); };
  const __half2 product = __hmul2(__hsub2(halves(pair), halves(minus)), halves(scale));
  return *reinterpret_cast<const uint32_t*>(&product);
}

// Fragment i of what a lane has read, in numbers of 16 bits: float16 ones are built by their bits, as
// 1024 + q.
__device__ __forceinline__ uint4 Fragment(const Raw<Half>& raw, int i) {
  return raw.weights[FragmentOfLoad(i)];
}
__device__ __forceinline__ uint4 Fragment(const Raw<Brain>& raw, int i) {
  return raw.weights[FragmentOfLoad(i)];
}
__device__ __forceinline__ uint4 Fragment(const Raw<Int8>& raw, int i) {
  const uint4& w = raw.weights[i / 2];
  const uint32_t low = (i % 2 == 0 ? w.x : w.z) ^ 0x80808080u;
  const uint32_t high = (i % 2 == 0 ? w.y : w.w) ^ 0x80808080u;
  const uint32_t scale = raw.scales[i / 2];
  return make_uint4(ScaledPair(__byte_perm(low, 0x64646464u, 0x4140), 0x64806480u, scale),
                    ScaledPair(__byte_perm(low, 0x64646464u, 0x4342), 0x64806480u, scale),
                    ScaledPair(__byte_perm(high, 0x64646464u, 0x4140), 0x64806480u, scale),
                    ScaledPair(__byte_perm(high, 0x64646464u, 0x4342), 0x64806480u, scale));
}
__device__ __forceinline__ uint4 Fragment(const Raw<Int4>& raw, int i) {
  const uint4& w = raw.weights[0];
  const uint32_t bits = i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w;
  const uint32_t scale = raw.scales[0];
  const auto pair = [&](int shift) {
    return ScaledPair((bits >> shift & 0x000f000fu) | 0x64006400u, 0x64086408u, scale);
  };
  return make_uint4(pair(0), pair(4), pair(8), pair(12));
}

template <typename T>
__device__ __forceinline__ void MultiplyEight(float (&sums)[4], const uint4& upper,
                                              const uint4& lower, const uint4& x) {
  const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
  const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
  Mma<T>(sums, first, x.x, x.y);
  Mma<T>(sums, second, x.z, x.w);
}

// Of one stage. Up to two rows: lanes hold output lane / 4 of row lane % 2, lane % 4 / 2 says which
// half of the columns; outputs of odd number have their halves swapped. More: of row lane % 4.
template <typename W, int kRows>
__device__ __forceinline__ float MultiplyOne(const Held& held, const uint4 (&x)[4], int lane) {
  using T = typename W::Element;
  float a[4] = {}, b[4] = {};
  if (kRows <= 2) {
    MultiplyEight<T>(a, held.fragments[0], held.fragments[2], x[0]);
    MultiplyEight<T>(b, held.fragments[1], held.fragments[3], x[1]);
    const bool swapped = Stage<W>::kSwaps && lane / 4 % 2 != 0;
    return (lane % 4 < 2) != swapped ? (a[0] + a[1]) + (b[0] + b[1])
                                     : (a[2] + a[3]) + (b[2] + b[3]);
  }
  const uint4 none = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    MultiplyEight<T>(a, held.fragments[i], none, x[i]);
    MultiplyEight<T>(b, held.fragments[i + 1], none, x[i + 1]);
  }
  return (a[0] + a[1]) + (b[0] + b[1]);
}

// Of two tiles' stages of the same columns.
template <typename W>
__device__ __forceinline__ float2 MultiplyTwo(const Held& first, const Held& second,
                                              const uint4 (&x)[4]) {
  using T = typename W::Element;
  float a[4] = {}, b[4] = {};
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    MultiplyEight<T>(a, first.fragments[i], second.fragments[i], x[i]);
    MultiplyEight<T>(b, first.fragments[i + 1], second.fragments[i + 1], x[i + 1]);
  }
  return make_float2((a[0] + a[1]) + (b[0] + b[1]), (a[2] + a[3]) + (b[2] + b[3]));
}

// Has the compiler compute it here, before inputs are waited for.
__device__ __forceinline__ void Pin(uint4& x) {
  asm volatile("" : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w));
}

// Loads in their order.
template <typename W>
__device__ __forceinline__ void SwapBack(bool swapped, Raw<W>* raw) {
#pragma unroll
  for (int i = 0; i + 1 < W::kLoads; i += 2) {
    const uint4 first = raw->weights[i], second = raw->weights[i + 1];
    raw->weights[i] = swapped ? second : first;
    raw->weights[i + 1] = swapped ? first : second;
  }
#pragma unroll
  for (int i = 0; i + 1 < W::kScales; i += 2) {
    const uint32_t first = raw->scales[i], second = raw->scales[i + 1];
    raw->scales[i] = swapped ? second : first;
    raw->scales[i + 1] = swapped ? first : second;
  }
}

template <typename W>
__device__ __forceinline__ void Convert(Raw<W>& raw, Held& held) {
#pragma unroll
  for (int i = 0; i < W::kScales; ++i) raw.scales[i] |= raw.scales[i] << 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    held.fragments[i] = Fragment(raw, i);
    if (W::kScales > 0) Pin(held.fragments[i]);
  }
}
template <typename W>
__device__ __forceinline__ void Convert(Raw<W>& raw, HeldBytes& held) {
  ToBytes(raw, held);
#pragma unroll
  for (int i = 0; i < 2; ++i) Pin(held.operands[i]);
  asm volatile("" : "+f"(held.scale));
}

// The warp's part of the next batch of the ring, `count` stages. `meanwhile` is done once they have been read, before
// they are converted.
template <typename W, bool kOneChunk, int kRows, typename H, int kHeld, typename Meanwhile>
__device__ __forceinline__ void TakeWeights(Thread<kRows>& self, const Work& work, int count,
                                            H (&held)[kHeld], const Meanwhile& meanwhile) {
  constexpr bool kBytes = TakesBytes<W, kRows>();
  BarrierWait(self.shared.full + self.batch, self.batch_parity);
  const int output = self.lane / 4;
  const int swap = Stage<W>::kSwaps ? output % 2 : 0;
  const int at_weights = output * (kOneChunk ? work.pitch : Stage<W>::kWeightBytes) +
                         self.warp * (kSpan * W::kBits / 8) + self.lane % 4 * 16;
  const int at_scales = Stage<W>::kScalesAt +
                        output * (kOneChunk ? work.scale_pitch : Stage<W>::kScaleBytes) +
                        self.warp * (kSpan / kGroup) * 2;
  int stage = self.stage;
  Raw<W> raw[kHeld];
  uint32_t read = 0;  // something of each load
  // The last stage of a batch that is shorter is read again and again: it costs less than not to.
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const char* const from = self.ring + stage * Stage<W>::kBytes;
#pragma unroll
    for (int i = 0; i < W::kLoads; ++i) {
      raw[j].weights[i] = *reinterpret_cast<const uint4*>(from + at_weights + (i ^ swap) * 64);
    }
#pragma unroll
    for (int i = 0; i < (kBytes ? 1 : W::kScales); ++i) {
      // A group of 32 columns each: two of a load's 64, or one of a lane's 32; of bytes, that of the lane's sums.
      const int group =
          W::kBits == 8 && !kBytes ? (i ^ swap) * 2 + self.lane % 4 / 2 : self.lane % 4;
      raw[j].scales[i] = *reinterpret_cast<const uint16_t*>(from + at_scales + group * 2);
    }
#pragma unroll
    for (int i = 0; i < W::kLoads; ++i) read |= raw[j].weights[i].w;
#pragma unroll
    for (int i = 0; i < (kBytes ? 1 : W::kScales); ++i) read |= raw[j].scales[i];
    const int next = stage + 1 == self.plan.stages ? 0 : stage + 1;
    if (j + 1 < count) stage = next;
    if (j + 1 == count) self.stage = next;
  }
  self.read = read;
  meanwhile();
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    if (Stage<W>::kSwaps && kRows > 2) SwapBack(swap != 0, &raw[j]);
    Convert(raw[j], held[j]);
  }
}

// Lets the batch that has been taken be written over. What the warp has read of it may still be on its way: reads that
// wait behind others are overtaken by the arrival, and the bulk engine does not queue. So where the barrier lies is made
// to depend on all that has been read. A fence would wait for what is read from the other memory, too.
template <int kRows>
__device__ __forceinline__ void ReleaseWeights(Thread<kRows>& self) {
  BarrierArriveAfter(self.shared.empty + self.batch, self.read & self.plan.zero);
  if (++self.batch == kMaxStages) {
    self.batch = 0;
    self.batch_parity ^= 1u;
  }
}

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
