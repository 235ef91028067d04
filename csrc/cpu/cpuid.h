// What this processor can run and this operating system saves across a context switch.
#pragma once

namespace fastgen::cpu::cpuid {

bool generic();
bool avx2();         // AVX2, FMA, F16C
bool avx512();       // AVX-512 F, BW, DQ, VL and all of avx2
bool avx512_vnni();  // VNNI and all of avx512
bool avx512_bf16();  // BF16 and all of avx512_vnni

}  // namespace fastgen::cpu::cpuid
