#include <algorithm>

#include "cuda/cublaslt_trial.h"
#include "cuda/launch.h"

namespace fastgen {
namespace cuda {
namespace {

constexpr int kThreads = 256;

__device__ uint32_t Mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// From 1 to 256, of either sign.
__device__ uint16_t Number(DType dtype, uint32_t random) {
  const uint32_t sign = random >> 31 << 15;
  const uint32_t power = random >> 16 & 7;
  return static_cast<uint16_t>(dtype == DType::kFloat16
                                   ? sign | (15 + power) << 10 | (random & 0x3ffu)
                                   : sign | (127 + power) << 7 | (random & 0x7fu));
}

// Rows of w, then of x.
__global__ void __launch_bounds__(kThreads) FillKernel(const TrialOperandsArgs args) {
  for (int64_t n = blockIdx.x; n < int64_t{args.out} + args.rows; n += gridDim.x) {
    const bool is_x = n >= args.out;
    const int64_t ld = is_x ? args.ldx : args.ldw;
    uint16_t* const row =
        static_cast<uint16_t*>(is_x ? args.x : args.w) + (is_x ? n - args.out : n) * ld;
    for (int32_t k = threadIdx.x; k < ld; k += kThreads) {
      const int32_t other = args.in - 1 - k;
      uint16_t bits = 0;
      if (k < args.in && k != other) {
        const uint32_t column = static_cast<uint32_t>(k < other ? k : other);
        bits = Number(args.dtype, Mixed(Mixed(static_cast<uint32_t>(n)) + column));
        if (is_x && k > other) bits ^= 0x8000u;
      }
      row[k] = bits;
    }
  }
}

}  // namespace

cudaError_t FillTrialOperands(const TrialOperandsArgs& args, cudaStream_t stream) {
  if (args.dtype != DType::kFloat16 && args.dtype != DType::kBFloat16) {
    return cudaErrorInvalidValue;
  }
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(std::min<int64_t>(int64_t{args.out} + args.rows, 4096)));
  shape.threads = kThreads;
  return Launch(FillKernel, shape, stream, args);
}

}  // namespace cuda
}  // namespace fastgen
