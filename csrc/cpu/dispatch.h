// Which kernel table runs: the compiled ones, what this machine can run, and the one chosen.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace fastgen::cpu {

// Compiled tables, slowest first. The first ("generic") runs everywhere.
const std::vector<const Kernels*>& AllKernels();

// The table named `isa`; when empty, the one FASTGEN_ISA names; when that is unset, the best this
// machine runs. Throws Error for an unknown name or one that this machine cannot run.
const Kernels& ChooseKernels(const std::string& isa);

}  // namespace fastgen::cpu
