// Four lanes with the compiler's own vectors: what every x86-64 and every other target has.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastgen::cpu::FASTGEN_KERNELS_ISA {
namespace {  // what is not inlined must not be a symbol that another set could be given

struct Vec {
  typedef float T __attribute__((vector_size(16), may_alias, aligned(4)));
  static constexpr int kWidth = 4;
  // Rows a tile of the whole panel may have, and rows a tile of kPartVecs vectors may have, within
  // 16 registers; and the same where whole numbers are summed, which take as many registers again.
  static constexpr int kFullRows = 1, kPartRows = 6;
  static constexpr int kFullWholeRows = 1, kPartWholeRows = 3;
  static constexpr int kPartVecs = 2;

  static T Load(const float* p) { return *reinterpret_cast<const T*>(p); }
  // By the bits of the numbers: no function of another file may be used here (see kernels_inl.h).
  static float FromBits(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
  }
  static T LoadInt8(const int8_t* p) {
    T v;
    for (int i = 0; i < kWidth; ++i) v[i] = static_cast<float>(p[i]);
    return v;
  }

  // Whole numbers: 32 bits a lane, or four bytes a lane.
  typedef int32_t I __attribute__((vector_size(16), may_alias, aligned(1)));
  static I LoadInt(const char* p) { return *reinterpret_cast<const I*>(p); }
  static void StoreInt(void* p, I v) { *static_cast<I*>(p) = v; }
  static I ZeroInt() { return I{0, 0, 0, 0}; }
  static I SetInt(const char* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return I{x, x, x, x};
  }
  static T FromInt(I v) { return __builtin_convertvector(v, T); }
  static T LoadHalf(const uint16_t* p) {
    typedef uint16_t Four __attribute__((vector_size(8), may_alias, aligned(2)));
    const I half = __builtin_convertvector(*reinterpret_cast<const Four*>(p), I);
    const I magnitude = half & SetAll(0x7fff);
    const I shifted = magnitude << 13;
    // All ones where it is infinite or NaN, and where it is a number of units of 2^-24.
    const I odd = magnitude >= SetAll(0x7c00), small = magnitude < SetAll(0x0400);
    const I units = reinterpret_cast<I>(FromInt(magnitude) * Set(0x1p-24f));
    const I large = shifted + SetAll((127 - 15) << 23);
    const I bits =
        (small & units) | (~small & ~odd & large) | (odd & (shifted | SetAll(0x7f800000)));
    return reinterpret_cast<T>(bits | (half & SetAll(0x8000)) << 16);
  }
  // The two bfloat16 of a lane.
  static T LowBrain(I v) { return reinterpret_cast<T>(v << 16); }
  static T HighBrain(I v) { return reinterpret_cast<T>(v & SetAll(-65536)); }
  // The first of them beside a zero.
  static I FirstBrain(I v) { return v & SetAll(0xffff); }
  static constexpr bool kBrainPairs = false;
  static I LowNibbles(I v) { return v & SetAll(0x0f0f0f0f); }
  static I HighNibbles(I v) { return (v >> 4) & SetAll(0x0f0f0f0f); }

  // Four signed bytes for every lane; as pairs of 16 bits, those of even and those of odd place.
  typedef int16_t Pairs __attribute__((vector_size(16), may_alias));
  struct Quad {
    Pairs even, odd;
  };
  static Quad SetQuad(const char* p) {
    const auto* q = reinterpret_cast<const signed char*>(p);
    return {Pairs{q[0], q[2], q[0], q[2], q[0], q[2], q[0], q[2]},
            Pairs{q[1], q[3], q[1], q[3], q[1], q[3], q[1], q[3]}};
  }
  // acc + the sum of the products of four bytes, of w as unsigned numbers. A product fits 16 bits.
  static constexpr bool kSignedBytes = false;
  static I DotBytes(I acc, I w, const Quad& x) {
    const I even = reinterpret_cast<I>(reinterpret_cast<Pairs>(w & SetAll(0x00ff00ff)) * x.even);
    const I odd =
        reinterpret_cast<I>(reinterpret_cast<Pairs>((w >> 8) & SetAll(0x00ff00ff)) * x.odd);
    return acc + ((even << 16 >> 16) + (even >> 16)) + ((odd << 16 >> 16) + (odd >> 16));
  }
  static I DotNibbles(I acc, I w, const Quad& x) { return DotBytes(acc, w, x); }

  static void Store(float* p, T v) { *reinterpret_cast<T*>(p) = v; }
  static T Set(float x) { return T{x, x, x, x}; }
  static T Fma(T a, T b, T c) { return a * b + c; }
  static T Add(T a, T b) { return a + b; }
  static T Sub(T a, T b) { return a - b; }
  static T Mul(T a, T b) { return a * b; }
  static T Div(T a, T b) { return a / b; }
  // The larger, the smaller lane; b where either is NaN.
  static T Max(T a, T b) { return a > b ? a : b; }
  static T Min(T a, T b) { return a < b ? a : b; }
  static T LoadPart(const float* p, int n, float fill) {
    T v = Set(fill);
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
  }
  static void StorePart(float* p, T v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
  static float ReduceAdd(T v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static float ReduceMax(T v) {
    const float a = v[0] > v[1] ? v[0] : v[1];
    const float b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  }
  // Lane i of v[k] becomes lane k of v[i].
  static void Transpose(T* v) {
    float lanes[kWidth][kWidth];
    for (int k = 0; k < kWidth; ++k) {
      for (int i = 0; i < kWidth; ++i) lanes[i][k] = v[k][i];
    }
    for (int i = 0; i < kWidth; ++i) v[i] = Load(lanes[i]);
  }
  // 2^n for whole n in [-126, 127].
  static T PowerOfTwo(T n) {
    T r;
    for (int i = 0; i < kWidth; ++i) {
      const int32_t bits = (static_cast<int32_t>(n[i]) + 127) << 23;
      float f;
      std::memcpy(&f, &bits, sizeof f);
      r[i] = f;
    }
    return r;
  }
  // value where x >= bound or x is NaN, else 0.
  static T ZeroBelow(T x, float bound, T value) { return x < Set(bound) ? Set(0.0f) : value; }
  // To the nearest, ties to even; beyond the largest half it is infinity.
  static uint16_t ToHalf(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
      // Below 2^-14: in units of 2^-24, rounded by an addition whose last place is that unit.
      const float units = FromBits(magnitude) + 0.5f;
      uint32_t rounded;
      std::memcpy(&rounded, &units, sizeof rounded);
      return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
    }
    const uint32_t odd = magnitude >> 13 & 1u;
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
  }
  static void StoreHalf(uint16_t* p, T v) {
    for (int i = 0; i < kWidth; ++i) p[i] = ToHalf(v[i]);
  }
  // Both as bfloat16, to nearest and ties to even: two in a lane.
  static I BrainPair(T low, T high) {
    return (Brain(low) >> 16 & SetAll(0xffff)) | (Brain(high) & SetAll(-65536));
  }
  // Whole numbers in [-128, 127].
  static void StoreInt8(int8_t* p, T v) {
    for (int i = 0; i < kWidth; ++i) p[i] = static_cast<int8_t>(v[i]);
  }

 private:
  static I SetAll(int32_t x) { return I{x, x, x, x}; }
  // Its bfloat16 in the upper half of each lane.
  static I Brain(T v) {
    I rounded;
    for (int i = 0; i < kWidth; ++i) {
      const float value = v[i];
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      bits = value != value ? 0x7fc00000u : bits + 0x7fffu + (bits >> 16 & 1u);
      std::memcpy(reinterpret_cast<char*>(&rounded) + sizeof bits * i, &bits, sizeof bits);
    }
    return rounded;
  }
};

}  // namespace
}  // namespace fastgen::cpu::FASTGEN_KERNELS_ISA
