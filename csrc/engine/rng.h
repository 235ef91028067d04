// Randomness as a function: Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as
// 1, 2, 3", SC'11). No state, no clock; CPU, CUDA and fastgen.testing give the same bits.
#pragma once

#include <cstdint>

namespace fastgen::engine {

// counter and key as four and two 32-bit words, word 0 first.
void Philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

// The draw of a step, uniform in [0, 1) with 32 bits: out[0] * 2^-32 of
// Philox(counter = {step, 0, sequence, 0}, key = {low, high half of seed}).
double UniformDraw(uint64_t seed, uint32_t sequence, uint32_t step);

// A seed from the operating system. Throws what std::random_device throws when there is none.
uint64_t RandomSeed();

}  // namespace fastgen::engine
