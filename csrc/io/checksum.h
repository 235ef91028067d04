// Whether memory has been written to.
#pragma once

#include <cstdint>
#include <vector>

#include "io/tensor.h"

namespace fastgen::io {

// Sum of the bytes of tensors in memory of the host, read by several threads: a change of one element
// always gives another sum. Throws std::bad_alloc.
uint64_t Checksum(const std::vector<TensorView>& tensors);

}  // namespace fastgen::io
