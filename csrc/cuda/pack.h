// Weights on their way to the device, and reading memory to measure it. Launchers as in kernels.h.
#pragma once

#include "cuda/types.h"

namespace fastgen {
namespace cuda {

// cudaSuccess if this library has machine code for the current device, or code that its driver can
// compile.
cudaError_t CheckMachineCode();

// Bytes of a weight row of `in` columns, and scales from one to the next: multiples of kAlign bytes both.
int64_t RowBytes(DType dtype, int32_t in);
int32_t ScaleStride(DType dtype, int32_t in);

// Where weights are packed from. The element of column k and output n is, in elements,
//   k * column_stride + n / group_size * group_stride + n % group_size * output_stride
// behind `data`. One of column_stride and output_stride is 1; outputs are one group unless those of
// several matrices take turns.
struct PackSource {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;  // or kFloat16 or kBFloat16
  int64_t column_stride = 0;
  int64_t output_stride = 0;
  int32_t group_size = INT32_MAX;
  int64_t group_stride = 0;
};

// Writes outputs [first, first + count) of `to` from the outputs [0, count) of `from`.
// int8 and int4: a group's scale is a float16 chosen so that its largest magnitude is representable.
cudaError_t PackOutputs(const Matrix& to, int32_t first, int32_t count, const PackSource& from,
                        cudaStream_t stream);

// For an input that is normed: sums[n] = sum_k W_nk w_k and bias[n] = w.bias[n] + sum_k W_nk b_k, with
// the norm's weight w and bias b, so that the product with what is not normed yet is enough. Raises *most,
// unless it is null, to what no output's magnitude exceeds, whatever is normed.
cudaError_t FoldNorm(const Matrix& w, const Norm& norm, float* sums, float* bias, float* most,
                     cudaStream_t stream);

// Sums `bytes` (a multiple of 16) at `data` into sums[blocks]: every byte is read once.
cudaError_t ReadMemory(const void* data, size_t bytes, int32_t blocks, float* sums,
                       cudaStream_t stream);

}  // namespace cuda
}  // namespace fastgen
