// How keys and values of a head lie in a block of the KV cache, of one of several types.
//
// A head's area of a block holds, one after the other,
//   keys          [head_size, kBlock]: transposed, a vector of positions per element
//   values        [kBlock, value_stride] rows, zero behind a head's elements
//   scales        int8 only: float32 [kBlock] of the keys, then of the values
// and an integer's number is scale * q, with one scale for a position's key and one for its value.
// bfloat16 lies in the pairs that instructions multiply:
//   keys          [(head_size + 1) / 2, kBlock, 2]: two elements of a position side by side
//   values        [kBlock / 2, value_stride, 2]: two positions of an element side by side
// and is zero where there is no second element.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastgen::cpu {

// Positions of the KV cache come in blocks of this many.
constexpr int64_t kBlock = 32;

// Kernels have room for a row of this many elements.
constexpr int64_t kMostHeadSize = 1024;

enum class CacheType { kFloat32, kFloat16, kBFloat16, kInt8 };

struct HeadLayout {
  CacheType type;
  int64_t head_size;
  int64_t value_stride;  // head_size rounded up to kRowAlign
  int64_t values_at;     // bytes from the beginning of the area
  int64_t scales_at;
  int64_t bytes;  // of the area
};

// The type of that name, "float32", "float16", "bfloat16" or "int8"; false for another.
bool ParseCacheType(const char* name, CacheType* type);
const char* CacheTypeName(CacheType type);

HeadLayout MakeHeadLayout(CacheType type, int64_t head_size);

}  // namespace fastgen::cpu
