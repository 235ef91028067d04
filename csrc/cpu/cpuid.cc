#include "cpu/cpuid.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastgen::cpu::cpuid {

bool generic() { return true; }

#if defined(__x86_64__)
namespace {

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers Leaf(uint32_t leaf, uint32_t part = 0) {
  Registers r;
  if (!__get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d)) return Registers();
  return r;
}

// XCR0, the register state that the operating system saves; 0 where it does not say.
uint64_t SavedState() {
  if (!(Leaf(1).c & (1u << 27))) return 0;  // OSXSAVE
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

constexpr uint64_t kYmmState = 0x6;   // SSE, AVX
constexpr uint64_t kZmmState = 0xe6;  // and opmask, the upper halves, registers 16 to 31

}  // namespace

bool avx2() {
  const uint32_t leaf1 = (1u << 12) | (1u << 28) | (1u << 29);  // FMA, AVX, F16C
  return (SavedState() & kYmmState) == kYmmState && (Leaf(1).c & leaf1) == leaf1 &&
         (Leaf(7).b & (1u << 5)) != 0;
}

bool avx512() {
  const uint32_t leaf7 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  return avx2() && (SavedState() & kZmmState) == kZmmState && (Leaf(7).b & leaf7) == leaf7;
}

bool avx512_vnni() { return avx512() && (Leaf(7).c & (1u << 11)) != 0; }

bool avx512_bf16() { return avx512_vnni() && (Leaf(7, 1).a & (1u << 5)) != 0; }

#else

bool avx2() { return false; }
bool avx512() { return false; }
bool avx512_vnni() { return false; }
bool avx512_bf16() { return false; }

#endif

}  // namespace fastgen::cpu::cpuid
