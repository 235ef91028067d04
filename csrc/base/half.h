// Numbers of 16 bits as float32 and back, by their bits: for code that any processor runs.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastgen::base {

inline float BitsToFloat(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t FloatToBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// All ones where `condition` holds, else 0.
inline uint32_t MaskOf(bool condition) { return 0u - static_cast<uint32_t>(condition); }

// Selects with masks, so that a loop over it vectorises, and makes no float32 subnormals, so that
// it does not matter whether the thread flushes those to zero.
inline float HalfToFloat(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t shifted = magnitude << 13;
  // A subnormal half is its mantissa times 2^-24, a normal float32.
  const float scaled = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const uint32_t is_subnormal = MaskOf(magnitude < 0x0400u);
  const uint32_t is_special = MaskOf(magnitude >= 0x7c00u);  // infinity or NaN
  const uint32_t other = (shifted + ((127u - 15u) << 23)) | (is_special & 0x7f800000u);
  return BitsToFloat((half & 0x8000u) << 16 | (is_subnormal & FloatToBits(scaled)) |
                     (~is_subnormal & other));
}

inline float BrainToFloat(uint16_t bits) { return BitsToFloat(static_cast<uint32_t>(bits) << 16); }

// To the nearest, ties to even. Finite numbers stay finite; NaN stays NaN.
inline uint16_t FloatToHalf(float value) {
  const uint32_t bits = FloatToBits(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude == 0x7f800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7bffu);  // would round beyond
  if (magnitude < 0x38800000u) {
    // Below 2^-14: in units of 2^-24, rounded by an addition whose last place is that unit.
    const float units = BitsToFloat(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (FloatToBits(units) - FloatToBits(0.5f)));
  }
  const uint32_t odd = magnitude >> 13 & 1u;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

inline uint16_t FloatToBrain(float value) {
  const uint32_t bits = FloatToBits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  if (magnitude >= 0x7f7f8000u && magnitude < 0x7f800000u) {  // would round beyond
    return static_cast<uint16_t>((bits >> 16 & 0x8000u) | 0x7f7fu);
  }
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace fastgen::base
