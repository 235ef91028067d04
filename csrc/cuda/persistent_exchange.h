// Pieces of the exchange between the blocks of the persistent kernel: persistent_device.h says why.
#pragma once

#include "cuda/persistent_device.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

// To 16 significant bits, in the upper 24.
__device__ __forceinline__ uint32_t Round24(float x) {
  return x == x ? __float_as_uint(x) + 0x80u : 0x7fc00000u;
}

__device__ __forceinline__ uint4 PackPiece(float a, float b, float c, float d, uint32_t epoch) {
  const uint32_t i = Round24(a), j = Round24(b), k = Round24(c), l = Round24(d);
  return make_uint4(__byte_perm(i, j, 0x5321), __byte_perm(j, k, 0x6532), __byte_perm(k, l, 0x7653),
                    epoch);
}

__device__ __forceinline__ void UnpackPiece(const uint4& piece, float* x) {
  x[0] = __uint_as_float(piece.x << 8);
  x[1] = __uint_as_float(__byte_perm(piece.x, piece.y, 0x5430) & 0xffffff00u);
  x[2] = __uint_as_float(__byte_perm(piece.y, piece.z, 0x4320) & 0xffffff00u);
  x[3] = __uint_as_float(piece.z & 0xffffff00u);
}

// The piece of number n of a row of the residual stream.
__device__ __forceinline__ int ResidualPiece(int n) {
  const uint32_t i = static_cast<uint32_t>(n);  // whose division is a shift
  return static_cast<int>(i / kTile * kTileStride + i / 4 % 2);
}

// Four neighbouring lanes hold four numbers; the first of them writes the piece, if it shall.
__device__ __forceinline__ void Publish(uint4* to, float x, uint32_t epoch, bool shall) {
  const float b = __shfl_down_sync(0xffffffffu, x, 1);
  const float c = __shfl_down_sync(0xffffffffu, x, 2);
  const float d = __shfl_down_sync(0xffffffffu, x, 3);
  if (shall) StoreWhole(to, PackPiece(x, b, c, d, epoch));
}

// The same, as the numbers of 16 bits that are multiplied: what the next product takes as it is.
template <typename W>
__device__ __forceinline__ void PublishStaged(uint4* to, float x, uint32_t epoch, bool shall) {
  x *= 1.0f / W::kUnit;
  const uint32_t pair =
      RoundPairFinite<typename W::Element>(x, __shfl_down_sync(0xffffffffu, x, 1));
  const uint32_t next = __shfl_down_sync(0xffffffffu, pair, 2);
  if (shall) StoreWhole(to, make_uint4(pair, next, 0, epoch));
}

// The last two numbers of such a piece. The zeros are looked at because what nobody looks at would not
// be loaded, and the 16 bytes have to be read as one.
__device__ __forceinline__ uint32_t SecondPair(const uint4& piece) { return piece.y | piece.z; }

// A piece on its way, or zeros that have arrived where none is wanted.
__device__ __forceinline__ uint4 AskForPiece(const uint4* from, uint32_t epoch, bool wanted) {
  uint4 piece = make_uint4(0, 0, 0, epoch);
  if (wanted) piece = LoadWhole(from);
  return piece;
}

// Asks again until all that the warp wants are of the epoch; piece i is at(i). The whole warp goes on at
// once: lanes that went on by themselves would take the slow way through every exchange of lanes after.
template <int kCount, typename At>
__device__ __forceinline__ void WaitForPieces(uint4 (&pieces)[kCount], const At& at,
                                              uint32_t epoch) {
  for (;;) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < kCount; ++i) all = all && pieces[i].w == epoch;
    if (__all_sync(0xffffffffu, all)) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (pieces[i].w != epoch) pieces[i] = LoadWhole(at(i));
    }
  }
}

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
