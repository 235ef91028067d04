// How a warp of the streaming kernel attends over pages in shared memory: on tensor cores where the
// cache has 16 bits, in float32 arithmetic elsewhere. Both have the members
//   Worker(lane)
//   Query(query, head_size, lane)           takes a query
//   Clear()                                 starts a part
//   Page<kOnly>(page, lane, free_keys, wait_values)  attends over a page, of a part that has no other
//   Store(sums, stats, head_size, lane)     writes what the part has gathered, unscaled
// where `free_keys` is called when the keys are not needed any more, and `wait_values` before the
// values are.
#pragma once

#include "cuda/attention_decode.h"
#include "cuda/hopper.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {

struct SharedPage {
  const char* keys;
  char* values;  // what is behind the positions may be written to
  int row_bytes;
  int positions;  // at least 1; what is behind them may be anything
};

template <typename S>
struct FmaWorker {
  Gathered<S> gathered;

  // Of caches that are not turned (row.h).
  static constexpr int kTurnMask = 0;

  __device__ __forceinline__ explicit FmaWorker(int /*lane*/) {}
  __device__ __forceinline__ void Query(const float* query, int head_size, int lane) {
    gathered.Query(query, head_size, lane);
  }
  __device__ __forceinline__ void Clear() { gathered.Clear(); }

  template <bool kOnly, typename FreeKeys, typename WaitValues>
  __device__ __forceinline__ void Page(const SharedPage& page, int lane, const FreeKeys& free_keys,
                                       const WaitValues& wait_values) {
#pragma unroll 1
    for (int position = 0; position < page.positions; position += S::kTile) {
      uint4 tile[S::kLoads][S::kChunks];
      float scores[S::kLoads];
      LoadTile<S, true>(tile, page.keys, page.row_bytes, kTurnMask, position, page.positions, lane);
      gathered.Multiply(tile, scores);
      const float weight = gathered.Weigh(scores, position, page.positions, lane);
      // Not before lanes have exchanged what they made of the keys: a read that has only been issued
      // may be overtaken by the copy.
      if (position + S::kTile >= page.positions) free_keys();
      if (position == 0) wait_values();
      LoadTile<S, true>(tile, page.values, page.row_bytes, kTurnMask, position, page.positions,
                        lane);
      gathered.Add(tile, weight, lane);
    }
  }

  __device__ __forceinline__ void Store(float* sums, float* stats, int head_size, int lane) {
    gathered.Store(sums, stats, head_size, lane);
  }
};

// A float32 number as numbers of 16 bits: two of float16, of which the second has a unit of its own so
// that none is lost to underflow, or three of bfloat16.
template <typename T>
struct Pieces;

template <>
struct Pieces<__half> {
  static constexpr bool kThird = false;
  static constexpr float kQueryUnit = 16.0f;  // queries up to 2^20 are finite
  static constexpr float kSecondUnit = 1.0f / 4096.0f;
};

template <>
struct Pieces<BFloat16> {
  static constexpr bool kThird = true;
  static constexpr float kQueryUnit = 1.0f;
  static constexpr float kSecondUnit = 1.0f;
};

// Two numbers in pieces.
template <typename T>
struct PairPieces {
  uint32_t first, second, third;

  __device__ __forceinline__ void Set(float low, float high) {
    constexpr float kScale = 1.0f / Pieces<T>::kSecondUnit;
    float f[2];
    first = RoundPair<T>(low, high);
    Vector<T>::UnpackPair(first, f);
    low = (low - f[0]) * kScale;
    high = (high - f[1]) * kScale;
    second = RoundPair<T>(low, high);
    third = 0;
    if (Pieces<T>::kThird) {
      Vector<T>::UnpackPair(second, f);
      third = RoundPair<T>(low - f[0], high - f[1]);
    }
  }
};

// A query of a head in pieces, where a block has it, as MmaPiecesFirst takes it: of four numbers side by side
// the first two's first and second pieces, and the other two's; and third pieces by themselves.
template <typename T, int kSize>
struct alignas(16) QueryPieces {
  uint32_t of[kSize];
  uint32_t thirds[Pieces<T>::kThird ? kSize / 2 : 4];  // not used without; no array is empty

  // The scale of queries and weights is in it: what Exp2 takes.
  __device__ __forceinline__ static float Scaled(float x) {
    x *= kLog2e / Pieces<T>::kQueryUnit;
    return Pieces<T>::kThird ? x : SaturateHalf(x);
  }

  // Numbers `low` and `high` of the query.
  __device__ __forceinline__ void Set(int low, float low_x, int high, float high_x) {
    PairPieces<T> pair;
    pair.Set(Scaled(low_x), Scaled(high_x));
    uint16_t* const halves = reinterpret_cast<uint16_t*>(of);
    // Pairs of numbers have two words.
    const int at[2] = {low / 2 * 4 + low % 2, high / 2 * 4 + high % 2};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      halves[at[i]] = static_cast<uint16_t>(pair.first >> 16 * i);
      halves[at[i] + 2] = static_cast<uint16_t>(pair.second >> 16 * i);
    }
    if (Pieces<T>::kThird) {
      reinterpret_cast<uint16_t*>(thirds)[low] = static_cast<uint16_t>(pair.third);
      reinterpret_cast<uint16_t*>(thirds)[high] = static_cast<uint16_t>(pair.third >> 16);
    }
  }
};

// Four numbers of a query as a, the m16 operand: rows 0 to 7 are all the first pieces, rows 8 to 15 the second
// ones, so that every lane gets both sums of its columns.
struct QueryFragment {
  uint32_t first[4];
  uint32_t thirds[2];
};

// c += a b.
template <typename T>
__device__ __forceinline__ void MmaPiecesFirst(float (&c)[4], const QueryFragment& a, uint32_t b0,
                                               uint32_t b1) {
  Mma<T>(c, a.first, b0, b1);
  if (Pieces<T>::kThird) {
    const uint32_t thirds[4] = {a.thirds[0], 0, a.thirds[1], 0};
    Mma<T>(c, thirds, b0, b1);
  }
}

// How weights become b, the n8 operand, where a is values as they lie in memory. A lane's fragment of a is 16
// bytes of a position: four pairs of neighbouring numbers, two of which are in the lower eight columns of a
// and two in the upper eight. All four are numbers of their own, so a column of b sums one number of the pair
// (bit 1) of one half (bit 2), in first or second pieces (bit 0), and has zeros where the others are.
struct WeightSelectors {
  uint32_t lower[2], upper[2];  // for __byte_perm, of two positions whose weights are side by side

  __device__ __forceinline__ explicit WeightSelectors(int column) {
    constexpr uint32_t kZeros = 0x4444;
    const bool is_second = (column & 2) != 0, is_upper = (column & 4) != 0;
    const uint32_t of[2] = {is_second ? 0x1044u : 0x4410u, is_second ? 0x3244u : 0x4432u};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      lower[i] = is_upper ? kZeros : of[i];
      upper[i] = is_upper ? of[i] : kZeros;
    }
  }
  // They stay in registers from here on.
  __device__ __forceinline__ void Keep() {
#pragma unroll
    for (int i = 0; i < 2; ++i) lower[i] = Kept(lower[i]), upper[i] = Kept(upper[i]);
  }
};

// c += a b, of position i of the two; `odd`: the lane's column of b has second pieces.
template <typename T>
__device__ __forceinline__ void MmaPiecesSecond(float (&c)[4], const uint4& values,
                                                const PairPieces<T>& weights,
                                                const WeightSelectors& selectors, int i, bool odd) {
  const uint32_t a[4] = {values.x, values.y, values.z, values.w};
  const uint32_t pair = odd ? weights.second : weights.first;
  Mma<T>(c, a, __byte_perm(pair, 0, selectors.lower[i]), __byte_perm(pair, 0, selectors.upper[i]));
  if (Pieces<T>::kThird) {
    const uint32_t third = odd ? 0 : weights.third;
    Mma<T>(c, a, __byte_perm(third, 0, selectors.lower[i]),
           __byte_perm(third, 0, selectors.upper[i]));
  }
}

// Lane 4 g + m reads 16 bytes of position g of 8 keys, and of the values of positions that its m has, and
// these bytes are its fragments as they are: a product may take its columns in any order. Heads of up to
// kChunks times 16 bytes; kFull: of 128, and turned (row.h), so that lanes side by side read from different
// banks.
template <typename T, int kChunks, bool kFull>
struct MmaWorker {
  static constexpr int kKeyLoads = kChunks / 4;
  static constexpr int kValueLoads = kChunks / 8;
  static constexpr int kTiles = kPage / 8;  // of 8 positions
  using Split = QueryPieces<T, 8 * kChunks>;
  static_assert(!kFull || kChunks == 8, "a turn is of 8 pieces");

  // The j-th of the pieces of a key, or of the query, that lanes of an m have.
  __device__ __forceinline__ static int KeyPiece(int m, int j) {
    return kFull ? kKeyLoads * m + j : m + 4 * j;
  }

  QueryFragment q[kKeyLoads][2];
  // [j]: of piece g + 8 j of 16 bytes numbers m / 2 * 4 + m % 2 and two behind, each with two sums.
  float acc[kValueLoads][4];
  float max, sum;
  WeightSelectors selectors;

  __device__ __forceinline__ explicit MmaWorker(int lane) : selectors(lane / 4) {}

  struct Keys {
    uint4 of[kTiles][kKeyLoads];
  };

  __device__ __forceinline__ void Query(const float* query, int head_size, int lane) {
#pragma unroll
    for (int j = 0; j < kKeyLoads; ++j) {
      const int piece = KeyPiece(lane % 4, j);
      const float* const from = query + piece * 8;
      float x[8];
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        if (kFull) {
          const float4 four = *reinterpret_cast<const float4*>(from + i);
          x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
        } else {
#pragma unroll
          for (int e = i; e < i + 4; ++e) {
            x[e] = piece * 8 + e < head_size ? from[e] : 0.0f;
          }
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        PairPieces<T> pair;
        pair.Set(Split::Scaled(x[2 * e]), Split::Scaled(x[2 * e + 1]));
        q[j][e / 2].first[e % 2 * 2] = pair.first;
        q[j][e / 2].first[e % 2 * 2 + 1] = pair.second;
        q[j][e / 2].thirds[e % 2] = pair.third;
      }
    }
  }

  // A query that is in pieces already, of kChunks times 8 numbers.
  __device__ __forceinline__ void Query(const Split& query, int lane) {
#pragma unroll
    for (int j = 0; j < kKeyLoads; ++j) {
      const int piece = KeyPiece(lane % 4, j);
      uint4 thirds = make_uint4(0, 0, 0, 0);
      if (Pieces<T>::kThird) {
        thirds = *reinterpret_cast<const uint4*>(query.thirds + piece * 4);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 four = *reinterpret_cast<const uint4*>(query.of + piece * 8 + i * 4);
        q[j][i] = {{four.x, four.y, four.z, four.w},
                   {i == 0 ? thirds.x : thirds.z, i == 0 ? thirds.y : thirds.w}};
      }
    }
  }

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int j = 0; j < kValueLoads; ++j) {
      acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.0f;
    }
    max = -Infinity();
    sum = 0.0f;
  }

  __device__ __forceinline__ static Keys ReadKeys(const SharedPage& page, int lane) {
    const int g = lane / 4, m = lane % 4;
    const int row_bytes = kFull ? 16 * kChunks : page.row_bytes;
    Keys keys;
#pragma unroll
    for (int j = 0; j < kKeyLoads; ++j) {
      const int piece = KeyPiece(m, j);
      const char* const at = page.keys + g * row_bytes + (kFull ? piece ^ g : piece) * 16;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        keys.of[t][j] = make_uint4(0, 0, 0, 0);
        if (kFull || piece * 16 < row_bytes) {
          keys.of[t][j] = *reinterpret_cast<const uint4*>(at + t * 8 * row_bytes);
        }
      }
    }
    return keys;
  }

  template <bool kOnly, typename FreeKeys, typename WaitValues>
  __device__ __forceinline__ void Page(const SharedPage& page, int lane, const FreeKeys& free_keys,
                                       const WaitValues& wait_values) {
    PageOf<kOnly>(ReadKeys(page, lane), page, lane, free_keys, [&] {
      wait_values();
      ClearBehind(page, lane);
    });
  }

  // Zeros behind the positions' values: their weights are 0, but 0 times what is there may be NaN.
  __device__ __forceinline__ static void ClearBehind(const SharedPage& page, int lane) {
    if (page.positions == kPage) return;
    const int row_bytes = kFull ? 16 * kChunks : page.row_bytes;
#pragma unroll 1
    for (int byte = page.positions * row_bytes + lane * 16; byte < kPage * row_bytes; byte += 512) {
      *reinterpret_cast<uint4*>(page.values + byte) = make_uint4(0, 0, 0, 0);
    }
    __syncwarp();
  }

  // As Page, of keys that have been read, and of values with zeros behind them.
  template <bool kOnly, typename FreeKeys, typename WaitValues>
  __device__ __forceinline__ void PageOf(const Keys& keys, const SharedPage& page, int lane,
                                         const FreeKeys& free_keys, const WaitValues& wait_values) {
    constexpr float kUnit = Pieces<T>::kQueryUnit;
    const int g = lane / 4, m = lane % 4;
    const int row_bytes = kFull ? 16 * kChunks : page.row_bytes;
    const int left = page.positions - 2 * m;
    float scores[kTiles][2];  // of positions 8 t + 2 m, and the next; to be multiplied by the unit
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int j = 0; j < kKeyLoads; ++j) {
        const uint4& k = keys.of[t][j];
        MmaPiecesFirst<T>(c, q[j][0], k.x, k.y);
        MmaPiecesFirst<T>(c, q[j][1], k.z, k.w);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float score = fmaf(c[2 + i], Pieces<T>::kSecondUnit, c[i]);
        scores[t][i] = t * 8 + i < left ? score : -Infinity();
      }
    }
    float most = fmaxf(scores[0][0], scores[0][1]);
#pragma unroll
    for (int t = 1; t < kTiles; ++t) most = fmaxf(most, fmaxf(scores[t][0], scores[t][1]));
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
    const float new_max = kOnly ? most * kUnit : fmaxf(max, most * kUnit);
    free_keys();  // not before, as above
    const float shrink = kOnly ? 1.0f : Exp2(max - new_max);
    max = new_max;
    sum *= shrink;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      scores[t][0] = Exp2(fmaf(scores[t][0], kUnit, -max));  // weights from here on
      scores[t][1] = Exp2(fmaf(scores[t][1], kUnit, -max));
      sum += scores[t][0] + scores[t][1];
    }
#pragma unroll
    for (int j = 0; j < kValueLoads; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[j][i] *= shrink;
    }
    wait_values();

    // Two sums each, so that a product has not to wait for the one before.
    float others[kValueLoads][4] = {};
    const char* values[2];  // of positions 2 m and the next
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int position = 2 * m + i;
      values[i] = page.values + position * row_bytes + (kFull ? g ^ position : g) * 16;
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      PairPieces<T> weights;
      weights.Set(scores[t][0], scores[t][1]);
#pragma unroll
      for (int j = 0; j < kValueLoads; ++j) {
        uint4 v[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
        if (kFull || (g + 8 * j) * 16 < row_bytes) {
          const int further = 8 * t * row_bytes + j * 128;
          v[0] = *reinterpret_cast<const uint4*>(values[0] + further);
          v[1] = *reinterpret_cast<const uint4*>(values[1] + further);
        }
        MmaPiecesSecond<T>(acc[j], v[0], weights, selectors, 0, g % 2 != 0);
        MmaPiecesSecond<T>(others[j], v[1], weights, selectors, 1, g % 2 != 0);
      }
    }
#pragma unroll
    for (int j = 0; j < kValueLoads; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[j][i] += others[j][i];
    }
  }

  __device__ __forceinline__ void Store(float* sums, float* stats, int head_size, int lane) {
    const int g = lane / 4, m = lane % 4;
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
#pragma unroll
    for (int j = 0; j < kValueLoads; ++j) {
      const int d = (g + 8 * j) * 8 + m / 2 * 4 + m % 2;
      const float first = fmaf(acc[j][1], Pieces<T>::kSecondUnit, acc[j][0]);
      const float second = fmaf(acc[j][3], Pieces<T>::kSecondUnit, acc[j][2]);
      if (kFull || d < head_size) sums[d] = first;
      if (kFull || d + 2 < head_size) sums[d + 2] = second;
    }
    if (lane == 0) {
      stats[0] = max;
      stats[1] = sum;
    }
  }
};

}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
