// What the three ways of computing Linear share. On tensor cores by clusters of blocks
// (linear_cluster.cu): weights of 16 bits and fewer on sm_90. On tensor cores (linear_mma.cu): the
// same on sm_80 and newer. On FMA units (linear_fma.cu): float32 weights everywhere, all weights on
// older devices, and rows too long for the former.
#pragma once

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/row.h"

namespace fastgen {
namespace cuda {

constexpr int32_t Quotient(int32_t size, int32_t unit) { return (size + unit - 1) / unit; }

// n / divisor as a product: right while n * divisor is below 2^32.
struct Divisor {
  uint32_t value = 1;
  uint32_t factor = 0;
};

inline Divisor DivisorOf(int32_t value) {
  Divisor result;
  result.value = static_cast<uint32_t>(value);
  result.factor = static_cast<uint32_t>(((uint64_t{1} << 32) + result.value - 1) / result.value);
  return result;
}

// LinearArgs as kernels take it: `norm` by value.
struct LinearTask {
  LinearArgs args;  // its `norm` points to host memory
  Norm norm;
  bool normed = false;
  float query_divisor = 1.0f;  // sqrt(head_size)
  Divisor head_size;           // of the cache; kQkv only
};

// The first two set *taken to false, and launches nothing, where the device or the shape is not for it.
cudaError_t LinearCluster(const LinearTask& task, cudaStream_t stream, bool* taken);
cudaError_t LinearMma(const LinearTask& task, cudaStream_t stream, bool* taken);
cudaError_t LinearFma(const LinearTask& task, cudaStream_t stream);

// A range of numbers cut into nearly equal parts, the larger ones first.
struct Parts {
  int32_t size = 0;    // of a part
  int32_t larger = 0;  // parts of one more
};

inline Parts CutInto(int32_t parts, int32_t size) {
  Parts result;
  result.size = size / parts;
  result.larger = size % parts;
  return result;
}

#ifdef __CUDACC__

__device__ inline int32_t BeginOf(const Parts& parts, int32_t i) {
  return i * parts.size + min(i, parts.larger);
}

__device__ inline int32_t Divide(int32_t n, const Divisor& divisor) {
  return divisor.value == 1
             ? n
             : static_cast<int32_t>(__umulhi(static_cast<uint32_t>(n), divisor.factor));
}

// The tanh form of GELU, as x * sigmoid(2 u).
__device__ inline float Gelu(float x) {
  const float u = __fmul_rn(0.7978845608028654f, fmaf(__fmul_rn(0.044715f, x), __fmul_rn(x, x), x));
  return x / (1.0f + expf(__fmul_rn(-2.0f, u)));
}

// What an output needs beside its sum, to be read while the sum is under way.
__device__ inline float ReadBias(const LinearTask& task, int32_t n) {
  return task.args.w.bias != nullptr ? __ldg(task.args.w.bias + n) : 0.0f;
}

__device__ inline float ReadResidual(const LinearTask& task, int32_t row, int32_t n) {
  return task.args.epilogue == Epilogue::kResidual ? __ldcg(task.args.y + row * task.args.ldy + n)
                                                   : 0.0f;
}

// Where an output goes in the cache, for kQkv: to `index` of a row's page, if its position were 0.
struct CacheColumn {
  int64_t index = -1;  // -1: not there
  bool last = false;   // of its head
};

__device__ inline CacheColumn CacheColumnOf(const LinearTask& task, int32_t n) {
  CacheColumn result;
  const CacheLayout& cache = task.args.cache;
  const int32_t width = cache.num_heads * cache.head_size;
  if (task.args.epilogue != Epilogue::kQkv || n < width) return result;
  const int32_t kind = n < 2 * width ? 0 : 1;
  const int32_t column = n - width * (kind + 1);
  const int32_t head = Divide(column, task.head_size);
  const int32_t d = column - head * cache.head_size;
  result.index = PageIndex(cache, task.args.layer, kind, head, 0) + d;
  result.last = d + 1 == cache.head_size;
  return result;
}

// Writes output n of a row. `place` is the row's; read for kQkv only.
__device__ inline void Finish(const LinearTask& task, int32_t row, int32_t n,
                              const CacheColumn& column, float sum, float bias, float residual,
                              const CachePlace* place) {
  const LinearArgs& args = task.args;
  float* y = args.y + row * args.ldy;
  float value = sum + bias;
  switch (args.epilogue) {
    case Epilogue::kStore: y[n] = value; return;
    case Epilogue::kGelu: y[n] = Gelu(value); return;
    case Epilogue::kResidual: y[n] = residual + value; return;
    case Epilogue::kQkv: break;
  }
  if (column.index < 0) {
    y[n] = value / task.query_divisor;
    return;
  }
  if (place->page == nullptr) return;
  const CacheLayout& cache = args.cache;
  const int64_t index =
      TurnedIndex(cache, column.index + place->in_page * cache.head_stride, place->in_page);
  StoreElement(cache.dtype, place->page, index, value);
  if (!column.last) return;
  for (int32_t pad = 1; pad <= cache.head_stride - cache.head_size; ++pad) {
    StoreElement(cache.dtype, place->page, index + pad, 0.0f);
  }
}

#endif  // __CUDACC__

}  // namespace cuda
}  // namespace fastgen
