// How a warp of the streaming kernel attends over pages in shared memory: on tensor cores where the
// cache has 16 bits, in float32 arithmetic elsewhere. Both have the members
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
      LoadTile<S, true>(tile, page.keys, page.row_bytes, position, page.positions, lane);
      gathered.Multiply(tile, scores);
      const float weight = gathered.Weigh(scores, position, page.positions, lane);
      // Not before lanes have exchanged what they made of the keys: a read that has only been issued
      // may be overtaken by the copy.
      if (position + S::kTile >= page.positions) free_keys();
      if (position == 0) wait_values();
      LoadTile<S, true>(tile, page.values, page.row_bytes, position, page.positions, lane);
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

// A query of a head in pieces, where a block has it: each piece of all numbers side by side.
template <typename T, int kSize>
struct alignas(16) QueryPieces {
  static constexpr int kKinds = Pieces<T>::kThird ? 3 : 2;
  uint16_t of[kKinds][kSize];

  // The scale of queries and weights is in it: what Exp2 takes.
  __device__ __forceinline__ static float Scaled(float x) {
    x *= kLog2e / Pieces<T>::kQueryUnit;
    return Pieces<T>::kThird ? x : SaturateHalf(x);
  }

  // Numbers `low` and `high` of the query.
  __device__ __forceinline__ void Set(int low, float low_x, int high, float high_x) {
    PairPieces<T> pair;
    pair.Set(Scaled(low_x), Scaled(high_x));
    const uint32_t pieces[3] = {pair.first, pair.second, pair.third};
#pragma unroll
    for (int i = 0; i < kKinds; ++i) {
      of[i][low] = static_cast<uint16_t>(pieces[i]);
      of[i][high] = static_cast<uint16_t>(pieces[i] >> 16);
    }
  }
};

// c += a b with the pieces of two pairs as a, the m16 operand: rows 0 to 7 are all the first pieces,
// rows 8 to 15 the second ones, so that every lane gets both sums of its columns.
template <typename T>
__device__ __forceinline__ void MmaPiecesFirst(float (&c)[4], const PairPieces<T>& low,
                                               const PairPieces<T>& high, uint32_t b0,
                                               uint32_t b1) {
  const uint32_t pieces[4] = {low.first, low.second, high.first, high.second};
  Mma<T>(c, pieces, b0, b1);
  if (Pieces<T>::kThird) {
    const uint32_t thirds[4] = {low.third, 0, high.third, 0};
    Mma<T>(c, thirds, b0, b1);
  }
}

// c += a b with the pieces as b, the n8 operand: even columns are all the first pieces, odd ones the
// second ones, so that every lane gets both sums of its rows.
template <typename T>
__device__ __forceinline__ void MmaPiecesSecond(float (&c)[4], const uint32_t (&a)[4],
                                                const PairPieces<T>& low, const PairPieces<T>& high,
                                                bool odd) {
  Mma<T>(c, a, odd ? low.second : low.first, odd ? high.second : high.first);
  if (Pieces<T>::kThird) Mma<T>(c, a, odd ? 0 : low.third, odd ? 0 : high.third);
}

// Lane 4 g + m reads 16 bytes of position g of 8 keys, and of the values of positions that its m has,
// as they go to fragments: a product may take its columns in any order. Heads of up to kChunks times 16
// bytes, or of so many if they are kFull.
template <typename T, int kChunks, bool kFull>
struct MmaWorker {
  static constexpr int kKeyLoads = kChunks / 4;
  static constexpr int kValueLoads = kChunks / 8;
  static constexpr int kTiles = kPage / 8;  // of 8 positions
  using Split = QueryPieces<T, 8 * kChunks>;

  PairPieces<T> q[kKeyLoads][4];
  // [j][u]: numbers 2 u and 2 u + 1 of piece g + 8 j of 16 bytes, each with two sums.
  float acc[kValueLoads][4][4];
  float max, sum;

  __device__ __forceinline__ void Query(const float* query, int head_size, int lane) {
#pragma unroll
    for (int j = 0; j < kKeyLoads; ++j) {
      const float* const from = query + (lane % 4 + 4 * j) * 8;
      float x[8];
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        if (kFull) {
          const float4 four = *reinterpret_cast<const float4*>(from + i);
          x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
        } else {
#pragma unroll
          for (int e = i; e < i + 4; ++e) {
            x[e] = (lane % 4 + 4 * j) * 8 + e < head_size ? from[e] : 0.0f;
          }
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        q[j][e].Set(Split::Scaled(x[2 * e]), Split::Scaled(x[2 * e + 1]));
      }
    }
  }

  // A query that is in pieces already, of kChunks times 8 numbers.
  __device__ __forceinline__ void Query(const Split& query, int lane) {
#pragma unroll
    for (int j = 0; j < kKeyLoads; ++j) {
      uint4 read[3] = {};
#pragma unroll
      for (int i = 0; i < query.kKinds; ++i) {
        read[i] = *reinterpret_cast<const uint4*>(query.of[i] + (lane % 4 + 4 * j) * 8);
      }
      q[j][0] = {read[0].x, read[1].x, read[2].x};
      q[j][1] = {read[0].y, read[1].y, read[2].y};
      q[j][2] = {read[0].z, read[1].z, read[2].z};
      q[j][3] = {read[0].w, read[1].w, read[2].w};
    }
  }

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int j = 0; j < kValueLoads; ++j) {
#pragma unroll
      for (int u = 0; u < 4; ++u) acc[j][u][0] = acc[j][u][1] = acc[j][u][2] = acc[j][u][3] = 0.0f;
    }
    max = -Infinity();
    sum = 0.0f;
  }

  template <bool kOnly, typename FreeKeys, typename WaitValues>
  __device__ __forceinline__ void Page(const SharedPage& page, int lane, const FreeKeys& free_keys,
                                       const WaitValues& wait_values) {
    const int g = lane / 4, m = lane % 4;
    const int row_bytes = kFull ? 16 * kChunks : page.row_bytes;
    float scores[kTiles][2];  // of positions 8 t + 2 m, and the next
    const char* const keys = page.keys + g * row_bytes + m * 16;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int j = 0; j < kKeyLoads; ++j) {
        uint4 k = make_uint4(0, 0, 0, 0);
        if (kFull || (m + 4 * j) * 16 < row_bytes) {
          k = *reinterpret_cast<const uint4*>(keys + t * 8 * row_bytes + j * 64);
        }
        MmaPiecesFirst<T>(c, q[j][0], q[j][1], k.x, k.y);
        MmaPiecesFirst<T>(c, q[j][2], q[j][3], k.z, k.w);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        constexpr float kUnit = Pieces<T>::kQueryUnit;
        const float score = fmaf(c[2 + i], kUnit * Pieces<T>::kSecondUnit, c[i] * kUnit);
        scores[t][i] = t * 8 + 2 * m + i < page.positions ? score : -Infinity();
      }
    }
    float new_max = max;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) new_max = fmaxf(new_max, fmaxf(scores[t][0], scores[t][1]));
    new_max = fmaxf(new_max, __shfl_xor_sync(kAllLanes, new_max, 1));
    new_max = fmaxf(new_max, __shfl_xor_sync(kAllLanes, new_max, 2));
    free_keys();  // not before, as above
    const float shrink = kOnly ? 1.0f : Exp2(max - new_max);
    max = new_max;
    sum *= shrink;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      scores[t][0] = Exp2(scores[t][0] - max);  // weights from here on
      scores[t][1] = Exp2(scores[t][1] - max);
      sum += scores[t][0] + scores[t][1];
    }
#pragma unroll
    for (int j = 0; j < kValueLoads; ++j) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[j][u][i] *= shrink;
      }
    }
    wait_values();
    if (page.positions < kPage) {
      // Their weights are 0, so numbers will do.
      for (int byte = page.positions * row_bytes + lane * 16; byte < kPage * row_bytes;
           byte += 512) {
        *reinterpret_cast<uint4*>(page.values + byte) = make_uint4(0, 0, 0, 0);
      }
      __syncwarp();
    }

    const char* const values = page.values + 2 * m * row_bytes + g * 16;
#pragma unroll
    for (int s = 0; s < kTiles / 2; ++s) {
      PairPieces<T> low, high;
      low.Set(scores[2 * s][0], scores[2 * s][1]);
      high.Set(scores[2 * s + 1][0], scores[2 * s + 1][1]);
#pragma unroll
      for (int j = 0; j < kValueLoads; ++j) {
        // Positions 16 s + 2 m, and 1, 8 and 9 behind it.
        uint4 v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int position = 16 * s + i / 2 * 8 + i % 2;
          v[i] = make_uint4(0, 0, 0, 0);
          if (kFull || (g + 8 * j) * 16 < row_bytes) {
            v[i] = *reinterpret_cast<const uint4*>(values + position * row_bytes + j * 128);
          }
        }
        const uint32_t words[4][4] = {{v[0].x, v[0].y, v[0].z, v[0].w},
                                      {v[1].x, v[1].y, v[1].z, v[1].w},
                                      {v[2].x, v[2].y, v[2].z, v[2].w},
                                      {v[3].x, v[3].y, v[3].z, v[3].w}};
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          const uint32_t a[4] = {__byte_perm(words[0][u], words[1][u], 0x5410),
                                 __byte_perm(words[0][u], words[1][u], 0x7632),
                                 __byte_perm(words[2][u], words[3][u], 0x5410),
                                 __byte_perm(words[2][u], words[3][u], 0x7632)};
          MmaPiecesSecond<T>(acc[j][u], a, low, high, g % 2 != 0);
        }
      }
    }
  }

  __device__ __forceinline__ void Store(float* sums, float* stats, int head_size, int lane) {
    const int g = lane / 4, m = lane % 4;
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
#pragma unroll
    for (int j = 0; j < kValueLoads; ++j) {
      // All m have the same sums; each writes two of them.
      float mine[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = m % 2 == 0 ? acc[j][0][i] : acc[j][1][i];
        const float high = m % 2 == 0 ? acc[j][2][i] : acc[j][3][i];
        mine[i] = m < 2 ? low : high;
      }
      const int d = (g + 8 * j) * 8 + 2 * m;
      const float first = fmaf(mine[1], Pieces<T>::kSecondUnit, mine[0]);
      const float second = fmaf(mine[3], Pieces<T>::kSecondUnit, mine[2]);
      if (kFull) {
        *reinterpret_cast<float2*>(sums + d) = make_float2(first, second);
      } else {
        if (d < head_size) sums[d] = first;
        if (d + 1 < head_size) sums[d + 1] = second;
      }
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
