// Matrices on their way into files of fewer bits, rounded by the code that packs them when a model is
// loaded: io/quantized.h has the layouts of what is written.
#pragma once

#include <cstdint>

#include "cpu/panels.h"
#include "cpu/thread_pool.h"
#include "io/tensor.h"

namespace fastgen::engine {

// `tensor` is a matrix of floats: a table [out, in], or [in, out].
//   float16, bfloat16  values as `tensor`, 2 bytes each
//   int8               values as `tensor`, scales [out, groups] or [groups, out]
//   int4               of no table: values [(in + 1) / 2, out], scales [groups, out]
// `scales` is not looked at where there are none.
void QuantizeMatrix(const io::TensorView& tensor, bool is_table, cpu::WeightType type,
                    cpu::ThreadPool& pool, void* values, uint16_t* scales);

}  // namespace fastgen::engine
