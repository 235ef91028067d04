// What is done per row besides products: embedding, layer norm, and taking the attention's input
// apart; and weights as another type, row by row.
#include <algorithm>
#include <cmath>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pack_rows.h"
#include "cuda/row.h"

namespace fastgen {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// Columns k to k + 3 of output n; k is a multiple of 4 and below `in`. Rows are 16 bytes at least.
__device__ float4 WeightFour(const Matrix& w, int64_t n, int32_t k) {
  const char* row = static_cast<const char*>(w.data) + n * w.row_bytes;
  if (w.dtype != DType::kInt8 && w.dtype != DType::kInt4) return LoadFour(w.dtype, row, k);
  const float scale =
      HalfToFloat(static_cast<const uint16_t*>(w.scales)[n * w.scale_stride + k / kGroup]);
  if (w.dtype == DType::kInt8) {
    const int32_t bits = *reinterpret_cast<const int32_t*>(row + k);
    return make_float4(
        scale * static_cast<float>(bits << 24 >> 24), scale * static_cast<float>(bits << 16 >> 24),
        scale * static_cast<float>(bits << 8 >> 24), scale * static_cast<float>(bits >> 24));
  }
  const int32_t bits = *reinterpret_cast<const uint16_t*>(row + k / 2);
  return make_float4(scale * static_cast<float>((bits & 15) - 8),
                     scale * static_cast<float>((bits >> 4 & 15) - 8),
                     scale * static_cast<float>((bits >> 8 & 15) - 8),
                     scale * static_cast<float>((bits >> 12 & 15) - 8));
}

// Zeros in columns from `size` on.
__device__ float4 CutAt(float4 x, int32_t k, int32_t size) {
  if (k >= size) x.x = 0.0f;
  if (k + 1 >= size) x.y = 0.0f;
  if (k + 2 >= size) x.z = 0.0f;
  if (k + 3 >= size) x.w = 0.0f;
  return x;
}

__global__ void __launch_bounds__(kThreads) EmbedKernel(const EmbedArgs args) {
  LetNextGridStart();
  if (!args.beside) WaitForGrid();
  const Row row = args.row_list[blockIdx.x];
  const int32_t position = PositionOf(row, args.slots);
  float* out = args.out + blockIdx.x * args.ldo;
  const int32_t size = args.table.in;
  if (args.places != nullptr && threadIdx.x == 0) {
    args.places[blockIdx.x] = WholePlaceOf(row, args.slots);
  }
  const int32_t token = position < 0 ? 0 : args.slots[row.slot].tokens[position];
  const float* places = args.positions + position * args.position_stride;
  for (int32_t k = threadIdx.x; k * 4 < args.ldo; k += kThreads) {
    const int32_t column = k * 4;
    float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (position >= 0 && column < size) {
      x = CutAt(WeightFour(args.table, token, column), column, size);
      x.x += places[column];
      if (column + 1 < size) x.y += places[column + 1];
      if (column + 2 < size) x.z += places[column + 2];
      if (column + 3 < size) x.w += places[column + 3];
    }
    *reinterpret_cast<float4*>(out + column) = x;
  }
#if FASTGEN_ARCH_HAS_PERSISTENT
  if (args.packed.data != nullptr) {
    __syncthreads();
    for (int32_t part = threadIdx.x / 32 * 2; part * kPartColumns < size; part += kThreads / 16) {
      const int32_t lane = threadIdx.x % 32, row = blockIdx.x;
      if (args.dtype == DType::kFloat16) {
        PackParts<__half>(out, size, args.weight, part, args.packed, row, lane);
      } else {
        PackParts<BFloat16>(out, size, args.weight, part, args.packed, row, lane);
      }
    }
  }
#endif
  // Who waits for this kernel has waited for the one before.
  WaitForGrid();
}

// Few warps a block, so that few rows are on many multiprocessors too; each takes a row at a time.
constexpr int kNormThreads = 128;
constexpr int32_t kNormWarps = kNormThreads / 32;
constexpr int32_t kNormBlocks = 512;  // fill the largest device

__device__ float4 NormedFour(float4 x, NormSums sums, float4 weight, float4 bias) {
  return make_float4(Normed(x.x, sums, weight.x, bias.x), Normed(x.y, sums, weight.y, bias.y),
                     Normed(x.z, sums, weight.z, bias.z), Normed(x.w, sums, weight.w, bias.w));
}

// Rows whose columns a warp reads at once: nothing is read twice, and the norm before its time has come.
template <DType kType>
__global__ void __launch_bounds__(kNormThreads) ShortNormKernel(const LayerNormArgs args) {
  const int32_t first = threadIdx.x % 32 * 4;
  float4 weight[kNormLoads], bias[kNormLoads];
  ReadNormPart<true>(args.norm.weight, first, args.size, weight);
  ReadNormPart<true>(args.norm.bias, first, args.size, bias);
  WaitForGrid();
  for (int32_t row = blockIdx.x * kNormWarps + threadIdx.x / 32; row < args.rows;
       row += gridDim.x * kNormWarps) {
    float4 x[kNormLoads];
    const NormSums sums =
        SumsOf<true, true>(args.x + row * args.ldx, args.size, args.norm.eps, threadIdx.x % 32, x);
    char* out = static_cast<char*>(args.out) + row * args.ldo * ElementBytes(kType);
#pragma unroll
    for (int i = 0; i < kNormLoads; ++i) {
      const int32_t k = first + i * 128;
      if (k >= args.ldo) continue;
      const float4 y = NormedFour(x[i], sums, weight[i], bias[i]);
      StoreFour(kType, out, k, k < args.size ? y : make_float4(0.0f, 0.0f, 0.0f, 0.0f));
    }
  }
}

// kFours: `size` is a multiple of 4, and the norm's vectors are aligned.
template <bool kFours>
__global__ void __launch_bounds__(kNormThreads) LayerNormKernel(const LayerNormArgs args) {
  WaitForGrid();
  for (int32_t row = blockIdx.x * kNormWarps + threadIdx.x / 32; row < args.rows;
       row += gridDim.x * kNormWarps) {
    const int32_t lane = threadIdx.x % 32;
    const float* x = args.x + row * args.ldx;
    float4 part[kNormLoads];
    const NormSums sums = SumsOf<kFours>(x, args.size, args.norm.eps, lane, part);
    char* out = static_cast<char*>(args.out) + row * args.ldo * ElementBytes(args.dtype);
    for (int32_t k = lane * 4; k < args.ldo; k += 128) {
      float4 weight = make_float4(0.0f, 0.0f, 0.0f, 0.0f), bias = weight;
      if (kFours) {
        weight = NormFour<true>(args.norm.weight, k, args.size);
        bias = NormFour<true>(args.norm.bias, k, args.size);
      } else {
        for (int j = 0; j < 4 && k + j < args.size; ++j) {
          (&weight.x)[j] = __ldg(args.norm.weight + k + j);
          (&bias.x)[j] = __ldg(args.norm.bias + k + j);
        }
      }
      const float4 y = NormedFour(NormFour<kFours>(x, k, args.size), sums, weight, bias);
      StoreFour(args.dtype, out, k, CutAt(y, k, args.size));
    }
  }
}

// Of two numbers of 16 bits.
__device__ uint32_t SaturatePair(uint32_t pair) {
  uint32_t saturated = pair;
  if ((pair & 0x7fffu) == 0x7c00u) saturated -= 1;
  if ((pair & 0x7fff0000u) == 0x7c000000u) saturated -= 0x10000u;
  return saturated;
}

__global__ void __launch_bounds__(kThreads) SaturateKernel(const SaturateArgs args) {
  uint4* const row =
      reinterpret_cast<uint4*>(static_cast<uint16_t*>(args.x) + blockIdx.x * args.ld);
  for (int32_t i = threadIdx.x; i * 8 < args.ld; i += kThreads) {
    const uint4 eight = row[i];
    row[i] = make_uint4(SaturatePair(eight.x), SaturatePair(eight.y), SaturatePair(eight.z),
                        SaturatePair(eight.w));
  }
}

struct QkvTask {
  QkvArgs args;
  float query_divisor;
};

// kFours: heads are whole groups of 4 columns, also in the cache.
template <bool kFours>
__global__ void __launch_bounds__(kThreads) QkvKernel(const QkvTask task) {
  const QkvArgs& args = task.args;
  const CacheLayout& cache = args.cache;
  const CachePlace place = PlaceOf(args.row_list[blockIdx.x], args.slots);
  if (place.page == nullptr) return;
  const int32_t width = cache.num_heads * cache.head_size;
  constexpr int32_t kUnit = kFours ? 4 : 1;
  char* row = static_cast<char*>(args.qkv) + blockIdx.x * args.ld * ElementBytes(args.dtype);
  for (int32_t n = threadIdx.x * kUnit; n < 3 * width; n += kThreads * kUnit) {
    float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (kFours) {
      x = LoadFour(args.dtype, row, n);
    } else {
      x.x = LoadElement(args.dtype, row, n);
    }
    if (n < width) {
      const float by = task.query_divisor;
      x = make_float4(x.x / by, x.y / by, x.z / by, x.w / by);
      if (kFours) {
        StoreFour(args.dtype, row, n, x);
      } else {
        StoreElement(args.dtype, row, n, x.x);
      }
      continue;
    }
    const int32_t kind = n < 2 * width ? 0 : 1;
    const int32_t column = n - width * (kind + 1);
    const int32_t head = column / cache.head_size;
    const int32_t d = column - head * cache.head_size;
    const int64_t index = PageIndex(cache, args.layer, kind, head, place.in_page);
    const int64_t at = TurnedIndex(cache, index + d, place.in_page);
    if (kFours) {
      StoreFour(cache.dtype, place.page, at, x);
    } else {
      StoreElement(cache.dtype, place.page, at, x.x);
    }
    if (d + kUnit == cache.head_size) {
      for (int32_t pad = d + kUnit; pad < cache.head_stride; ++pad) {
        StoreElement(cache.dtype, place.page, index + pad, 0.0f);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) KeepLastKernel(const LastRowsArgs args) {
  const PrefillRun run = args.runs[blockIdx.x];
  if (run.slot < 0 || run.begin + run.count != args.slots[run.slot].prompt_length) return;
  const float* from = args.x + (run.first_row + run.count - 1) * args.ld;
  float* to = args.last + run.slot * args.ld;
  for (int32_t k = threadIdx.x * 4; k < args.ld; k += kThreads * 4) {
    *reinterpret_cast<float4*>(to + k) = *reinterpret_cast<const float4*>(from + k);
  }
}

__global__ void __launch_bounds__(kThreads) TakeLastKernel(const LastRowsArgs args) {
  const int32_t slot = args.row_list[blockIdx.x].slot;
  float* to = args.x + blockIdx.x * args.ld;
  for (int32_t k = threadIdx.x * 4; k < args.ld; k += kThreads * 4) {
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (slot >= 0) four = *reinterpret_cast<const float4*>(args.last + slot * args.ld + k);
    *reinterpret_cast<float4*>(to + k) = four;
  }
}

cudaError_t LaunchLastRows(void (*kernel)(LastRowsArgs), const LastRowsArgs& args,
                           cudaStream_t stream) {
  if (args.count == 0) return cudaSuccess;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(args.count));
  shape.threads = kThreads;
  return Launch(kernel, shape, stream, args);
}

struct DequantizeTask {
  Matrix w;
  DType dtype;
  void* out;
  int64_t ldo;
};

__global__ void __launch_bounds__(kThreads) DequantizeKernel(const DequantizeTask task) {
  const int32_t row_bytes = static_cast<int32_t>(task.ldo) * ElementBytes(task.dtype);
  for (int64_t n = blockIdx.x; n < task.w.out; n += gridDim.x) {
    char* out = static_cast<char*>(task.out) + n * row_bytes;
    for (int32_t k = threadIdx.x * 4; k < task.ldo; k += kThreads * 4) {
      float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (k < task.w.in) x = CutAt(WeightFour(task.w, n, k), k, task.w.in);
      StoreFour(task.dtype, out, k, x);
    }
  }
}

}  // namespace

cudaError_t Embed(const EmbedArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(args.rows));
  shape.threads = kThreads;
  shape.overlap = args.overlap;
  return Launch(EmbedKernel, shape, stream, args);
}

cudaError_t LayerNorm(const LayerNormArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  LaunchShape shape;
  shape.grid =
      dim3(static_cast<unsigned>(std::min((args.rows + kNormWarps - 1) / kNormWarps, kNormBlocks)));
  shape.threads = kNormThreads;
  shape.overlap = args.overlap;
  const bool fours = args.size % 4 == 0 &&
                     reinterpret_cast<uintptr_t>(args.norm.weight) % 16 == 0 &&
                     reinterpret_cast<uintptr_t>(args.norm.bias) % 16 == 0;
  if (!fours) return Launch(LayerNormKernel<false>, shape, stream, args);
  if (args.ldo > kNormLoads * 128) return Launch(LayerNormKernel<true>, shape, stream, args);
  switch (args.dtype) {
    case DType::kFloat32: return Launch(ShortNormKernel<DType::kFloat32>, shape, stream, args);
    case DType::kFloat16: return Launch(ShortNormKernel<DType::kFloat16>, shape, stream, args);
    case DType::kBFloat16: return Launch(ShortNormKernel<DType::kBFloat16>, shape, stream, args);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t Saturate(const SaturateArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(args.rows));
  shape.threads = kThreads;
  return Launch(SaturateKernel, shape, stream, args);
}

cudaError_t StoreQkv(const QkvArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(args.rows));
  shape.threads = kThreads;
  QkvTask task;
  task.args = args;
  task.query_divisor = std::sqrt(static_cast<float>(args.cache.head_size));
  return args.cache.head_size % 4 == 0 ? Launch(QkvKernel<true>, shape, stream, task)
                                       : Launch(QkvKernel<false>, shape, stream, task);
}

cudaError_t KeepLastRows(const LastRowsArgs& args, cudaStream_t stream) {
  return LaunchLastRows(KeepLastKernel, args, stream);
}

cudaError_t TakeLastRows(const LastRowsArgs& args, cudaStream_t stream) {
  return LaunchLastRows(TakeLastKernel, args, stream);
}

cudaError_t Dequantize(const Matrix& w, DType dtype, void* out, int64_t ldo, cudaStream_t stream) {
  if (w.out == 0) return cudaSuccess;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(std::min(w.out, 65535)));
  shape.threads = kThreads;
  DequantizeTask task;
  task.w = w;
  task.dtype = dtype;
  task.out = out;
  task.ldo = ldo;
  return Launch(DequantizeKernel, shape, stream, task);
}

}  // namespace cuda
}  // namespace fastgen
