// Operands that show in which order a product adds up. Launchers as in kernels.h.
#pragma once

#include "cuda/types.h"

namespace fastgen {
namespace cuda {

// Numbers of a 16-bit type whose products cancel: column k of every row has the size of column
// in - 1 - k, and of `x` the opposite sign. The sum over the columns of x and w would be zero; what is
// left of it are the roundings on the way, which are those of an order and of no other, and large
// enough to be seen in a result of 16 bits too.
struct TrialOperandsArgs {
  DType dtype = DType::kFloat16;  // or kBFloat16
  int32_t in = 0;
  void* w = nullptr;  // [out, ldw]
  int64_t ldw = 0;
  int32_t out = 0;
  void* x = nullptr;  // [rows, ldx]
  int64_t ldx = 0;
  int32_t rows = 0;
};
cudaError_t FillTrialOperands(const TrialOperandsArgs& args, cudaStream_t stream);

}  // namespace cuda
}  // namespace fastgen
