// Eight lanes: AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace fastgen::cpu::FASTGEN_KERNELS_ISA {
namespace {  // what is not inlined must not be a symbol that another set could be given

struct Vec {
  using T = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kFullRows = 3, kPartRows = 6;
  static constexpr int kFullWholeRows = 1, kPartWholeRows = 3;
  static constexpr int kPartVecs = 2;

  static T Load(const float* p) { return _mm256_loadu_ps(p); }
  static T LoadHalf(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static T LoadInt8(const int8_t* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }

  // Whole numbers: 32 bits a lane, or four bytes a lane.
  using I = __m256i;
  static I LoadInt(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static void StoreInt(void* p, I v) { _mm256_storeu_si256(static_cast<I*>(p), v); }
  static I ZeroInt() { return _mm256_setzero_si256(); }
  static I SetInt(const char* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return _mm256_set1_epi32(x);
  }
  static T FromInt(I v) { return _mm256_cvtepi32_ps(v); }
  // The two bfloat16 of a lane.
  static T LowBrain(I v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
  static T HighBrain(I v) {
    return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(-65536)));
  }
  // The first of them beside a zero.
  static I FirstBrain(I v) { return _mm256_and_si256(v, _mm256_set1_epi32(0xffff)); }
  static constexpr bool kBrainPairs = false;
  static I LowNibbles(I v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
  static I HighNibbles(I v) { return LowNibbles(_mm256_srli_epi16(v, 4)); }

  // Four signed bytes for every lane. The instruction multiplies unsigned by signed bytes and adds
  // pairs in 16 bits, which magnitudes of at most 127 do not overflow: the sign of x goes to w.
  struct Quad {
    I bytes, magnitudes;
  };
  static Quad SetQuad(const char* p) {
    const I bytes = SetInt(p);
    return {bytes, _mm256_abs_epi8(bytes)};
  }
  // acc + the sum of the products of four bytes, of w less 128.
  static constexpr bool kSignedBytes = true;
  static I DotBytes(I acc, I w, const Quad& x) {
    const I signed_w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    const I pairs = _mm256_maddubs_epi16(x.magnitudes, _mm256_sign_epi8(signed_w, x.bytes));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static I DotNibbles(I acc, I w, const Quad& x) {
    const I pairs = _mm256_maddubs_epi16(w, x.bytes);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static void Store(float* p, T v) { _mm256_storeu_ps(p, v); }
  static T Set(float x) { return _mm256_set1_ps(x); }
  static T Fma(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
  static T Add(T a, T b) { return _mm256_add_ps(a, b); }
  static T Sub(T a, T b) { return _mm256_sub_ps(a, b); }
  static T Mul(T a, T b) { return _mm256_mul_ps(a, b); }
  static T Div(T a, T b) { return _mm256_div_ps(a, b); }
  static T Max(T a, T b) { return _mm256_max_ps(a, b); }
  static T Min(T a, T b) { return _mm256_min_ps(a, b); }
  static __m256i Mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static T LoadPart(const float* p, int n, float fill) {
    const __m256i mask = Mask(n);
    return _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask),
                            _mm256_castsi256_ps(mask));
  }
  static void StorePart(float* p, T v, int n) { _mm256_maskstore_ps(p, Mask(n), v); }
  static float ReduceAdd(T v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static float ReduceMax(T v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  // Lane i of v[k] becomes lane k of v[i].
  static void Transpose(T* v) {
    float lanes[kWidth][kWidth];
    for (int k = 0; k < kWidth; ++k) {
      for (int i = 0; i < kWidth; ++i) lanes[i][k] = v[k][i];
    }
    for (int i = 0; i < kWidth; ++i) v[i] = Load(lanes[i]);
  }
  static T PowerOfTwo(T n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static T ZeroBelow(T x, float bound, T value) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(bound), _CMP_LT_OQ), value);
  }
  static void StoreHalf(uint16_t* p, T v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Both as bfloat16, to nearest and ties to even: two in a lane.
  static I BrainPair(T low, T high) {
    return _mm256_blend_epi16(_mm256_srli_epi32(Brain(low), 16), Brain(high), 0xaa);
  }
  static void StoreInt8(int8_t* p, T v) {
    const __m256i whole = _mm256_cvtps_epi32(v);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }

 private:
  // Its bfloat16 in the upper half of each lane.
  static I Brain(T v) {
    const I bits = _mm256_castps_si256(v);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    return _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000),
                              _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  }
};

}  // namespace
}  // namespace fastgen::cpu::FASTGEN_KERNELS_ISA
