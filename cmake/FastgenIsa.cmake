# One file of kernels per instruction set, each compiled with its own flags and only if the compiler
# has them. csrc/cpu/dispatch.cc sees FASTGEN_HAVE_<ISA> for each set that is in the library.
#
#   -DFASTGEN_WITHOUT_AVX512=ON    as if the compiler did not have this set; others likewise
include(CheckCXXSourceCompiles)

set(FASTGEN_FLAGS_generic "")
set(FASTGEN_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(FASTGEN_FLAGS_avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512dq -mavx512bw -mavx512vl)
# A set of another set and more: left out where the other is.
set(FASTGEN_BASE_avx512_vnni avx512)
set(FASTGEN_BASE_avx512_bf16 avx512_vnni)
set(FASTGEN_FLAGS_avx512_vnni ${FASTGEN_FLAGS_avx512} -mavx512vnni)
set(FASTGEN_FLAGS_avx512_bf16 ${FASTGEN_FLAGS_avx512_vnni} -mavx512bf16)

# An intrinsic that needs the whole set: a compiler that knows the flags but not the instructions
# (or one for another processor) is found out here.
set(FASTGEN_PROBE_avx2 [[
#include <immintrin.h>
int main() {
  __m256 x = _mm256_fmadd_ps(_mm256_set1_ps(1.f), _mm256_set1_ps(2.f), _mm256_cvtph_ps(_mm_setzero_si128()));
  __m256i i = _mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(1));
  return _mm256_extract_epi32(i, 0) == 7;
}]])
set(FASTGEN_PROBE_avx512 [[
#include <immintrin.h>
int main() {
  __m512 x = _mm512_fmadd_ps(_mm512_set1_ps(1.f), _mm512_set1_ps(2.f), _mm512_setzero_ps());
  x = _mm512_and_ps(x, x);
  __m512i b = _mm512_adds_epi8(_mm512_castps_si512(x), _mm512_set1_epi8(1));
  __m256 y = _mm256_maskz_mov_ps(__mmask8(3), _mm512_castps512_ps256(_mm512_castsi512_ps(b)));
  return _mm256_cvtss_f32(y) == 7.f;
}]])

set(FASTGEN_PROBE_avx512_vnni [[
#include <immintrin.h>
int main() {
  __m512i x = _mm512_set1_epi8(1);
  x = _mm512_dpbusd_epi32(x, x, x);
  return _mm_cvtsi128_si32(_mm512_castsi512_si128(x)) == 7;
}]])
set(FASTGEN_PROBE_avx512_bf16 [[
#include <immintrin.h>
int main() {
  __m512 x = _mm512_set1_ps(1.f);
  __m512bh pairs = _mm512_cvtne2ps_pbh(x, x);
  x = _mm512_dpbf16_ps(x, pairs, pairs);
  return _mm512_cvtss_f32(x) == 7.f;
}]])

option(FASTGEN_WITHOUT_AVX2 "Leave out the kernels for AVX2" OFF)
option(FASTGEN_WITHOUT_AVX512 "Leave out the kernels for AVX-512" OFF)
option(FASTGEN_WITHOUT_AVX512_VNNI "Leave out the kernels for AVX-512 with VNNI" OFF)
option(FASTGEN_WITHOUT_AVX512_BF16 "Leave out the kernels for AVX-512 with VNNI and BF16" OFF)

function(fastgen_add_isa target isa)
  set(source "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cpu/kernels_${isa}.cc")
  string(TOUPPER "${isa}" isa_upper)
  if(NOT EXISTS "${source}")
    message(FATAL_ERROR "${source} is missing")
  endif()
  if(DEFINED FASTGEN_PROBE_${isa})
    if(FASTGEN_WITHOUT_${isa_upper})
      message(STATUS "Kernels ${isa}: left out, FASTGEN_WITHOUT_${isa_upper} is on")
      return()
    endif()
    get_property(isas GLOBAL PROPERTY FASTGEN_ISAS)
    if(DEFINED FASTGEN_BASE_${isa} AND NOT FASTGEN_BASE_${isa} IN_LIST isas)
      message(STATUS "Kernels ${isa}: left out, as ${FASTGEN_BASE_${isa}} is")
      return()
    endif()
    string(REPLACE ";" " " CMAKE_REQUIRED_FLAGS "${FASTGEN_FLAGS_${isa}}")
    check_cxx_source_compiles("${FASTGEN_PROBE_${isa}}" FASTGEN_COMPILER_HAS_${isa_upper})
    if(NOT FASTGEN_COMPILER_HAS_${isa_upper})
      message(STATUS "Kernels ${isa}: left out, the compiler or the target does not have them")
      return()
    endif()
  endif()
  target_sources(${target} PRIVATE "${source}")
  set_property(GLOBAL APPEND PROPERTY FASTGEN_ISAS "${isa}")
  set_source_files_properties("${source}" PROPERTIES COMPILE_OPTIONS "${FASTGEN_FLAGS_${isa}}")
  set_property(SOURCE "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cpu/dispatch.cc" APPEND
               PROPERTY COMPILE_DEFINITIONS "FASTGEN_HAVE_${isa_upper}=1")
endfunction()
