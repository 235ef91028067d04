// Sixteen lanes: AVX-512 F, BW, DQ and VL, and VNNI and BF16 where the file is compiled for them.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined pass-through operand in its own AVX-512 header for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace fastgen::cpu::FASTGEN_KERNELS_ISA {
namespace {  // what is not inlined must not be a symbol that another set could be given

struct Vec {
  using T = __m512;
  static constexpr int kWidth = 16;
  // Twelve rows have registers too, but not all of their addresses: 8 % slower.
  static constexpr int kFullRows = 8, kPartRows = 8;
  static constexpr int kFullWholeRows = 6, kPartWholeRows = 6;
  static constexpr int kPartVecs = 2;

  static T Load(const float* p) { return _mm512_loadu_ps(p); }
  static T LoadHalf(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static T LoadInt8(const int8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }

  // Whole numbers: 32 bits a lane, or four bytes a lane.
  using I = __m512i;
  static I LoadInt(const char* p) { return _mm512_loadu_si512(p); }
  static void StoreInt(void* p, I v) { _mm512_storeu_si512(p, v); }
  static I ZeroInt() { return _mm512_setzero_si512(); }
  static I SetInt(const char* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return _mm512_set1_epi32(x);
  }
  static T FromInt(I v) { return _mm512_cvtepi32_ps(v); }
  // The two bfloat16 of a lane.
  static T LowBrain(I v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
  static T HighBrain(I v) {
    return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(-65536)));
  }
  // The first of them beside a zero.
  static I FirstBrain(I v) { return _mm512_and_si512(v, _mm512_set1_epi32(0xffff)); }
#if defined(__AVX512BF16__)
  static constexpr bool kBrainPairs = true;
  static T DotBrain(T acc, I w, I x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
  static void StoreBrainPairs(uint16_t* p, T v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }
#else
  static constexpr bool kBrainPairs = false;
#endif
  static I LowNibbles(I v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  static I HighNibbles(I v) { return LowNibbles(_mm512_srli_epi16(v, 4)); }
#if defined(__AVX512VNNI__)
  // Four signed bytes for every lane, and acc + the sum of their products with unsigned bytes.
  using Quad = I;
  static Quad SetQuad(const char* p) { return SetInt(p); }
  static constexpr bool kSignedBytes = false;
  static I DotBytes(I acc, I w, Quad x) { return _mm512_dpbusd_epi32(acc, w, x); }
  static I DotNibbles(I acc, I w, Quad x) { return _mm512_dpbusd_epi32(acc, w, x); }
#else
  // Four signed bytes for every lane. The instruction multiplies unsigned by signed bytes and adds
  // pairs in 16 bits, which magnitudes of at most 127 do not overflow: the sign of x goes to w.
  struct Quad {
    I bytes, magnitudes;
    __mmask64 negative;
  };
  static Quad SetQuad(const char* p) {
    const I bytes = SetInt(p);
    return {bytes, _mm512_abs_epi8(bytes), _mm512_movepi8_mask(bytes)};
  }
  // acc + the sum of the products of four bytes, of w less 128.
  static constexpr bool kSignedBytes = true;
  static I DotBytes(I acc, I w, const Quad& x) {
    const I signed_w = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
    const I turned = _mm512_mask_sub_epi8(signed_w, x.negative, ZeroInt(), signed_w);
    const I pairs = _mm512_maddubs_epi16(x.magnitudes, turned);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
  static I DotNibbles(I acc, I w, const Quad& x) {
    const I pairs = _mm512_maddubs_epi16(w, x.bytes);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
#endif
  static void Store(float* p, T v) { _mm512_storeu_ps(p, v); }
  static T Set(float x) { return _mm512_set1_ps(x); }
  static T Fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
  static T Add(T a, T b) { return _mm512_add_ps(a, b); }
  static T Sub(T a, T b) { return _mm512_sub_ps(a, b); }
  static T Mul(T a, T b) { return _mm512_mul_ps(a, b); }
  static T Div(T a, T b) { return _mm512_div_ps(a, b); }
  static T Max(T a, T b) { return _mm512_max_ps(a, b); }
  static T Min(T a, T b) { return _mm512_min_ps(a, b); }
  static __mmask16 Mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static T LoadPart(const float* p, int n, float fill) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), Mask(n), p);
  }
  static void StorePart(float* p, T v, int n) { _mm512_mask_storeu_ps(p, Mask(n), v); }
  static __m256 High(T v) {
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
  }
  static float ReduceAdd(T v) {
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), High(v));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static float ReduceMax(T v) {
    const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(v), High(v));
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  // Lane i of v[k] becomes lane k of v[i].
  static void Transpose(T* v) {
    T quads[kWidth];  // 4 k + i has elements 4 l + i of vectors 4 k .. 4 k + 3, l by l
#pragma GCC unroll 4
    for (int k = 0; k < kWidth; k += 4) {
      const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[k], v[k + 1]));
      const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(v[k], v[k + 1]));
      const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(v[k + 2], v[k + 3]));
      const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(v[k + 2], v[k + 3]));
      quads[k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
      quads[k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
      quads[k + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
      quads[k + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const T even0 = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x88);
      const T odd0 = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xdd);
      const T even1 = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x88);
      const T odd1 = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xdd);
      v[i] = _mm512_shuffle_f32x4(even0, even1, 0x88);
      v[i + 4] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
      v[i + 8] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
      v[i + 12] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
    }
  }
  static T PowerOfTwo(T n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
  }
  static T ZeroBelow(T x, float bound, T value) {
    return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), _CMP_LT_OQ),
                              _mm512_setzero_ps());
  }
  static void StoreHalf(uint16_t* p, T v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Both as bfloat16, to nearest and ties to even: two in a lane.
  static I BrainPair(T low, T high) {
    return _mm512_or_si512(_mm512_srli_epi32(Brain(low), 16),
                           _mm512_and_si512(Brain(high), _mm512_set1_epi32(-65536)));
  }
  static void StoreInt8(int8_t* p, T v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }

 private:
  // Its bfloat16 in the upper half of each lane.
  static I Brain(T v) {
    const I bits = _mm512_castps_si512(v);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                                 _mm512_set1_epi32(0x7fc00000));
  }
};

}  // namespace
}  // namespace fastgen::cpu::FASTGEN_KERNELS_ISA
