#include "cuda/pack.h"

#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fastgen {
namespace cuda {
namespace {

constexpr int kTile = 32;  // columns and outputs of a tile: one group of columns
constexpr int kWarps = 8;
static_assert(kTile == kGroup, "a tile holds whole groups");

__device__ inline float LargestMagnitude(float v) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, v, offset);
    // The signed value of larger magnitude; ties go to the positive one, so that all lanes agree.
    if (fabsf(other) > fabsf(v) || (fabsf(other) == fabsf(v) && other > v)) v = other;
  }
  return v;
}

__device__ inline unsigned short BFloat16(float v) {
  const unsigned bits = __float_as_uint(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<unsigned short>(bits >> 16 | 0x40u);
  return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

__device__ inline float WarpSum(float v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

__device__ inline int Quantize(float v, float step, bool wide) {
  const int q = __float2int_rn(step != 0.0f ? v / step : 0.0f);
  return wide ? min(max(q, -127), 127) : min(max(q, -8), 7);
}

// Scale of a group. int8: the largest magnitude is 127 steps. int4 has one more negative step, which
// the largest magnitude takes whatever its sign; clipping it somewhat often leaves the smaller error.
__device__ inline __half GroupScale(float v, bool wide) {
  const float largest = LargestMagnitude(v);
  if (wide) return __float2half_rn(fabsf(largest) / 127.0f);
  constexpr int kCandidates = 8;
  __half best = __float2half_rn(0.0f);
  float least = -1.0f;
  for (int i = 0; i < kCandidates; ++i) {
    const __half scale = __float2half_rn(largest / -8.0f * (1.0f - 0.04f * i));
    const float step = __half2float(scale);
    const float rest = v - step * Quantize(v, step, false);
    const float error = WarpSum(rest * rest);
    if (least < 0.0f || error < least) {
      least = error;
      best = scale;
    }
  }
  return best;
}

// Lane k holds the weight of column k of a group of one output.
__device__ inline void Store(const Matrix& to, int output, int column, float v) {
  char* const row = static_cast<char*>(const_cast<void*>(to.data)) + output * to.row_bytes;
  const bool inside = column < to.in;
  switch (to.dtype) {
    case DType::kFloat32:
      if (inside) reinterpret_cast<float*>(row)[column] = v;
      return;
    case DType::kFloat16:
      // Saturates: a weight beyond the type's range must not become infinite.
      if (inside) {
        reinterpret_cast<__half*>(row)[column] =
            __float2half_rn(v == v ? fminf(fmaxf(v, -65504.0f), 65504.0f) : v);
      }
      return;
    case DType::kBFloat16:
      if (inside) reinterpret_cast<unsigned short*>(row)[column] = BFloat16(v);
      return;
    case DType::kInt8:
    case DType::kInt4: {
      const bool wide = to.dtype == DType::kInt8;
      const __half scale = GroupScale(inside ? v : 0.0f, wide);
      const int q = inside ? Quantize(v, __half2float(scale), wide) : 0;
      if ((column & (kGroup - 1)) == 0) {
        __half* const scales = static_cast<__half*>(const_cast<void*>(to.scales));
        scales[static_cast<int64_t>(output) * to.scale_stride + column / kGroup] = scale;
      }
      if (wide) {
        if (column < to.row_bytes) row[column] = static_cast<char>(q);
        return;
      }
      const int odd = __shfl_down_sync(0xffffffffu, q, 1);
      if ((column & 1) == 0 && column / 2 < to.row_bytes) {
        row[column / 2] = static_cast<char>((q + 8) | (odd + 8) << 4);
      }
      return;
    }
  }
}

__device__ inline float BFloat16ToFloat(unsigned short bits) {
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

__device__ inline float Load(const PackSource& from, int column, int output) {
  const int64_t at = column * from.column_stride + output / from.group_size * from.group_stride +
                     output % from.group_size * from.output_stride;
  switch (from.dtype) {
    case DType::kFloat16: return __half2float(static_cast<const __half*>(from.data)[at]);
    case DType::kBFloat16:
      return BFloat16ToFloat(static_cast<const unsigned short*>(from.data)[at]);
    default: return static_cast<const float*>(from.data)[at];
  }
}

__global__ void PackKernel(Matrix to, int first, int count, PackSource from) {
  __shared__ float tile[kTile][kTile + 1];  // [column][output]
  const int lane = threadIdx.x;
  const int warp = threadIdx.y;
  const int column0 = blockIdx.y * kTile;
  const int output0 = blockIdx.x * kTile;
  for (int i = warp; i < kTile; i += kWarps) {
    // Lanes go along whatever lies side by side in memory.
    const int column = from.output_stride == 1 ? i : lane;
    const int output = from.output_stride == 1 ? lane : i;
    float v = 0.0f;
    if (column0 + column < to.in && output0 + output < count) {
      v = Load(from, column0 + column, output0 + output);
    }
    tile[column][output] = v;
  }
  __syncthreads();
  for (int i = warp; i < kTile; i += kWarps) {
    if (output0 + i < count) Store(to, first + output0 + i, column0 + lane, tile[lane][i]);
  }
}

// The weight that products see: integers times their scale are rounded to float16.
__device__ inline float Load(const Matrix& w, int output, int column) {
  const char* const row = static_cast<const char*>(w.data) + output * w.row_bytes;
  switch (w.dtype) {
    case DType::kFloat32: return reinterpret_cast<const float*>(row)[column];
    case DType::kFloat16: return __half2float(reinterpret_cast<const __half*>(row)[column]);
    case DType::kBFloat16: break;
    case DType::kInt8:
    case DType::kInt4: {
      const __half scale = static_cast<const __half*>(
          w.scales)[static_cast<int64_t>(output) * w.scale_stride + column / kGroup];
      const int q = w.dtype == DType::kInt8 ? reinterpret_cast<const signed char*>(row)[column]
                                            : (row[column / 2] >> (column % 2 * 4) & 15) - 8;
      return __half2float(__float2half_rn(static_cast<float>(q) * __half2float(scale)));
    }
  }
  return BFloat16ToFloat(reinterpret_cast<const unsigned short*>(row)[column]);
}

// A warp per output. Once per model, so in double.
__global__ void FoldKernel(Matrix w, Norm norm, float* sums, float* bias, float* most) {
  const int output = blockIdx.x * kWarps + threadIdx.y;
  if (output >= w.out) return;
  double sum = 0.0, shift = 0.0, squares = 0.0, shifts = 0.0;
  for (int k = threadIdx.x; k < w.in; k += 32) {
    const double weight = Load(w, output, k);
    const double scaled = weight * norm.weight[k], shifted = weight * norm.bias[k];
    sum += scaled;
    shift += shifted;
    squares += scaled * scaled;
    shifts += fabs(shifted);
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    shift += __shfl_xor_sync(0xffffffffu, shift, offset);
    squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    shifts += __shfl_xor_sync(0xffffffffu, shifts, offset);
  }
  if (threadIdx.x != 0) return;
  const double output_bias = w.bias != nullptr ? w.bias[output] : 0.0;
  sums[output] = static_cast<float>(sum);
  bias[output] = static_cast<float>(shift + output_bias);
  if (most == nullptr) return;
  // What is centred and scaled has squares that add up to w.in at most (Cauchy and Schwarz).
  const double here = sqrt(w.in * squares) + shifts + fabs(output_bias);
  // In the order of their bits, as none is negative; what is not a number comes last.
  atomicMax(reinterpret_cast<unsigned*>(most), __float_as_uint(static_cast<float>(here)));
}

__global__ void ReadKernel(const uint4* data, size_t count, float* sums) {
  constexpr int kUnroll = 8;
  unsigned sum = 0;
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x;
  for (; i + (kUnroll - 1) * stride < count; i += kUnroll * stride) {
    uint4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = __ldg(data + i + u * stride);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) sum += v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
  }
  for (; i < count; i += stride) sum += __ldg(data + i).x;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  // One lane of the block writes something that depends on what its warp has read.
  if (threadIdx.x == 0) sums[blockIdx.x] = static_cast<float>(sum);
  if (sum == 0xdeadbeefu && threadIdx.x != 0) sums[blockIdx.x] = 0.0f;
}

}  // namespace

cudaError_t CheckMachineCode() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(ReadKernel));
}

int64_t RowBytes(DType dtype, int32_t in) {
  int64_t bytes = 0;
  switch (dtype) {
    case DType::kFloat32: bytes = int64_t{4} * in; break;
    case DType::kFloat16:
    case DType::kBFloat16: bytes = int64_t{2} * in; break;
    case DType::kInt8: bytes = in; break;
    case DType::kInt4: bytes = (int64_t{in} + 1) / 2; break;
  }
  return (bytes + kAlign - 1) / kAlign * kAlign;
}

int32_t ScaleStride(DType dtype, int32_t in) {
  if (dtype != DType::kInt8 && dtype != DType::kInt4) return 0;
  constexpr int32_t kUnit = kAlign / 2;
  const int32_t groups = (in + kGroup - 1) / kGroup;
  return (groups + kUnit - 1) / kUnit * kUnit;
}

cudaError_t PackOutputs(const Matrix& to, int32_t first, int32_t count, const PackSource& from,
                        cudaStream_t stream) {
  const dim3 grid((count + kTile - 1) / kTile, (to.in + kTile - 1) / kTile);
  PackKernel<<<grid, dim3(kTile, kWarps), 0, stream>>>(to, first, count, from);
  return cudaGetLastError();
}

cudaError_t FoldNorm(const Matrix& w, const Norm& norm, float* sums, float* bias, float* most,
                     cudaStream_t stream) {
  FoldKernel<<<(w.out + kWarps - 1) / kWarps, dim3(32, kWarps), 0, stream>>>(w, norm, sums, bias,
                                                                             most);
  return cudaGetLastError();
}

cudaError_t ReadMemory(const void* data, size_t bytes, int32_t blocks, float* sums,
                       cudaStream_t stream) {
  ReadKernel<<<blocks, 512, 0, stream>>>(static_cast<const uint4*>(data), bytes / 16, sums);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fastgen
