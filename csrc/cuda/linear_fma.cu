// Linear on FMA units, in float32. A warp takes kOutputs outputs at a time, its lanes 16 bytes each
// of their weights: a chunk of columns. Warps that share outputs take chunks in turn. A lane's sum
// runs over its columns in order; then lanes are added as a tree, then warps in order: the result
// depends on the weights' row alone.
//
// x is laid out in shared memory, as many columns at a time as fit, so that lanes find their
// columns of a chunk in neighbouring float4s.
#include <algorithm>

#include "cuda/linear.h"

namespace fastgen {
namespace cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kOutputs = 4;
constexpr int kMaxRows = 8;
// Of its weights, that a block asks for before the kernel before has ended.
constexpr int64_t kPrefetchBytes = 64 * 1024;

// Types of weights. kColumns: in 16 bytes.
struct Single {
  static constexpr int kColumns = 4;
  static constexpr bool kScaled = false;
  __device__ static float4 Four(const uint4& raw, int) {
    return make_float4(__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z),
                       __uint_as_float(raw.w));
  }
};

__device__ inline uint2 Half16(const uint4& raw, int j) {
  return j == 0 ? make_uint2(raw.x, raw.y) : make_uint2(raw.z, raw.w);
}

struct Half {
  static constexpr int kColumns = 8;
  static constexpr bool kScaled = false;
  __device__ static float4 Four(const uint4& raw, int j) {
    const uint2 bits = Half16(raw, j);
    return make_float4(HalfToFloat(static_cast<uint16_t>(bits.x)),
                       HalfToFloat(static_cast<uint16_t>(bits.x >> 16)),
                       HalfToFloat(static_cast<uint16_t>(bits.y)),
                       HalfToFloat(static_cast<uint16_t>(bits.y >> 16)));
  }
};
struct Brain {
  static constexpr int kColumns = 8;
  static constexpr bool kScaled = false;
  __device__ static float4 Four(const uint4& raw, int j) {
    const uint2 bits = Half16(raw, j);
    return make_float4(__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u),
                       __uint_as_float(bits.y << 16), __uint_as_float(bits.y & 0xffff0000u));
  }
};

__device__ inline uint32_t Word(const uint4& raw, int i) {
  return i == 0 ? raw.x : i == 1 ? raw.y : i == 2 ? raw.z : raw.w;
}

struct Int8 {
  static constexpr int kColumns = 16;
  static constexpr bool kScaled = true;
  __device__ static float4 Four(const uint4& raw, int j) {
    const int32_t bits = static_cast<int32_t>(Word(raw, j));
    return make_float4(static_cast<float>(bits << 24 >> 24), static_cast<float>(bits << 16 >> 24),
                       static_cast<float>(bits << 8 >> 24), static_cast<float>(bits >> 24));
  }
};
struct Int4 {
  static constexpr int kColumns = 32;
  static constexpr bool kScaled = true;
  __device__ static float4 Four(const uint4& raw, int j) {
    const int32_t bits = static_cast<int32_t>(Word(raw, j / 2) >> (j % 2 * 16));
    return make_float4(
        static_cast<float>((bits & 15) - 8), static_cast<float>((bits >> 4 & 15) - 8),
        static_cast<float>((bits >> 8 & 15) - 8), static_cast<float>((bits >> 12 & 15) - 8));
  }
};

struct FmaPlan {
  LinearTask task;
  Parts outputs;        // of the blocks
  int32_t slice_warps;  // that share outputs; a power of two
  int32_t passes;
  int32_t chunks;       // of a row of weights
  int32_t tile_chunks;  // that x is in shared memory for
  // Offsets in shared memory; x is at 0.
  int32_t partial_at;
  int32_t sums_at;
  int32_t places_at;
};

// x of chunks [first, first + count) as [kRows][count][columns / 4][lanes] float4.
template <typename W, int kRows>
__device__ void StageX(const FmaPlan& plan, char* shared, int32_t first_row, int32_t rows,
                       int32_t first, int32_t count) {
  const LinearTask& task = plan.task;
  const NormSums* sums = reinterpret_cast<const NormSums*>(shared + plan.sums_at);
  constexpr int32_t kFours = W::kColumns / 4;
  const int32_t fours = count * 32 * kFours;
  for (int32_t row = 0; row < kRows; ++row) {
    float4* to = reinterpret_cast<float4*>(shared) +
                 static_cast<int64_t>(row) * plan.tile_chunks * 32 * kFours;
    for (int32_t i = threadIdx.x; i < fours; i += kThreads) {
      const int32_t lane = i / kFours % 32;
      const int32_t place = i / (32 * kFours) * (32 * kFours) + i % kFours * 32 + lane;
      const int32_t k = (first * 32 * kFours + i) * 4;
      float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (row < rows && k < task.args.w.in) {
        const float4 four =
            *reinterpret_cast<const float4*>(task.args.x + (first_row + row) * task.args.ldx + k);
        x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (k + j >= task.args.w.in) {
            x[j] = 0.0f;
          } else if (task.normed) {
            x[j] = Normed(x[j], sums[row], __ldg(task.norm.weight + k + j),
                          __ldg(task.norm.bias + k + j));
          }
        }
      }
      to[place] = make_float4(x[0], x[1], x[2], x[3]);
    }
  }
}

// Adds each of kCount values over the lanes. Value i is then in values[0] of the lanes from
// i * 32 / kCount on; the tree is the same for every kCount.
template <int kCount>
__device__ inline void AddLanes(float (&values)[kCount], int32_t lane) {
  int count = kCount;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    if (count > 1) {
      count /= 2;
      const bool upper = (lane & offset) != 0;
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        if (i >= count) break;
        const float keep = upper ? values[i + count] : values[i];
        const float give = upper ? values[i] : values[i + count];
        values[i] = keep + __shfl_xor_sync(0xffffffffu, give, offset);
      }
    } else {
      values[0] += __shfl_xor_sync(0xffffffffu, values[0], offset);
    }
  }
}

// A lane's weights of one chunk.
template <typename W>
struct Weights {
  uint4 raw[kOutputs];
  float scale[kOutputs];
};

template <typename W>
__device__ inline void ReadWeights(const Matrix& w, int32_t first_output, int32_t end_output,
                                   int32_t chunk, int32_t lane, Weights<W>* weights) {
  const int64_t offset = (static_cast<int64_t>(chunk) * 32 + lane) * 16;
  const int32_t group = (chunk * 32 + lane) * W::kColumns / kGroup;
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    weights->raw[o] = make_uint4(0, 0, 0, 0);
    weights->scale[o] = 0.0f;
    const int32_t n = first_output + o;
    if (n < end_output && offset < w.row_bytes) {
      weights->raw[o] = __ldg(reinterpret_cast<const uint4*>(static_cast<const char*>(w.data) +
                                                             n * w.row_bytes + offset));
      if (W::kScaled && group < w.scale_stride) {
        weights->scale[o] = HalfToFloat(__ldg(static_cast<const uint16_t*>(w.scales) +
                                              static_cast<int64_t>(n) * w.scale_stride + group));
      }
    }
  }
}

template <typename W, int kRows>
__device__ inline void AddChunk(const Weights<W>& weights, const float4* x, int32_t row_stride,
                                float (&sum)[kOutputs * kRows]) {
#pragma unroll
  for (int j = 0; j < W::kColumns / 4; ++j) {
    float4 w[kOutputs];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      w[o] = W::Four(weights.raw[o], j);
      if (W::kScaled) {  // exact: 11 bits by 8
        w[o].x *= weights.scale[o], w[o].y *= weights.scale[o];
        w[o].z *= weights.scale[o], w[o].w *= weights.scale[o];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float4 four = x[r * row_stride + j * 32];
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        float& s = sum[o * kRows + r];
        s = fmaf(w[o].x, four.x, s);
        s = fmaf(w[o].y, four.y, s);
        s = fmaf(w[o].z, four.z, s);
        s = fmaf(w[o].w, four.w, s);
      }
    }
  }
}

template <typename W, int kRows>
__global__ void __launch_bounds__(kThreads, 2) FmaKernel(const FmaPlan plan) {
  char* shared = SharedMemory();
  const LinearTask& task = plan.task;
  const Matrix& w = task.args.w;
  const int32_t warp = threadIdx.x / 32;
  const int32_t lane = threadIdx.x % 32;
  const int32_t outputs_begin = BeginOf(plan.outputs, blockIdx.x);
  const int32_t outputs_end = BeginOf(plan.outputs, blockIdx.x + 1);
  const int32_t first_row = blockIdx.y * kRows;
  const int32_t rows = min(kRows, task.args.rows - first_row);
  const int32_t slice = warp & (plan.slice_warps - 1);
  const int32_t part = warp / plan.slice_warps;
  const int32_t pass_outputs = kWarps / plan.slice_warps * kOutputs;

  const char* data = static_cast<const char*>(w.data) + outputs_begin * w.row_bytes;
  const int64_t bytes = min((outputs_end - outputs_begin) * w.row_bytes, kPrefetchBytes);
  for (int64_t at = threadIdx.x * 128; at < bytes; at += kThreads * 128) PrefetchL2(data + at);
  LetNextGridStart();
  WaitForGrid();

  CachePlace* places = reinterpret_cast<CachePlace*>(shared + plan.places_at);
  const int32_t place_row = kThreads - 1 - threadIdx.x;
  if (task.args.epilogue == Epilogue::kQkv && place_row < rows) {
    places[place_row] = PlaceOf(task.args.row_list[first_row + place_row], task.args.slots);
  }
  if (task.normed) {
    NormSums* sums = reinterpret_cast<NormSums*>(shared + plan.sums_at);
    for (int32_t row = warp; row < rows; row += kWarps) {
      const NormSums mine =
          SumsOf(task.args.x + (first_row + row) * task.args.ldx, w.in, task.norm.eps, lane);
      if (lane == 0) sums[row] = mine;
    }
    __syncthreads();
  }

  constexpr int kCount = kOutputs * kRows;
  const float4* x = reinterpret_cast<const float4*>(shared) + lane;
  constexpr int32_t kChunkFours = 32 * (W::kColumns / 4);
  const bool tiled = plan.tile_chunks < plan.chunks;
  for (int32_t pass = 0; pass < plan.passes; ++pass) {
    const int32_t first_output = outputs_begin + pass * pass_outputs + part * kOutputs;
    float sum[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = 0.0f;
    for (int32_t first = 0; first < plan.chunks; first += plan.tile_chunks) {
      const int32_t count = min(plan.tile_chunks, plan.chunks - first);
      if (tiled || pass == 0) {
        if (tiled) __syncthreads();
        StageX<W, kRows>(plan, shared, first_row, rows, first, count);
        __syncthreads();
      }
      // Where registers allow it, the next chunk's weights are on their way while this one's are used.
      constexpr bool kAhead = kRows * (W::kScaled ? 2 : 1) <= 4;
      Weights<W> weights, next;
      if (kAhead && slice < count) {
        ReadWeights<W>(w, first_output, outputs_end, first + slice, lane, &next);
      }
      for (int32_t chunk = slice; chunk < count; chunk += plan.slice_warps) {
        const int32_t read = kAhead ? chunk + plan.slice_warps : chunk;
        if (kAhead) weights = next;
        if (read < count) ReadWeights<W>(w, first_output, outputs_end, first + read, lane, &next);
        if (!kAhead) weights = next;
        AddChunk<W, kRows>(weights, x + chunk * kChunkFours, plan.tile_chunks * kChunkFours, sum);
      }
    }
    AddLanes<kCount>(sum, lane);
    // [slice][part][output][row], of two passes in turn
    float* partial =
        reinterpret_cast<float*>(shared + plan.partial_at) + (pass & 1) * kWarps * kCount;
    const int32_t per_slice = kWarps / plan.slice_warps * kCount;
    if (lane % (32 / kCount) == 0) {
      partial[slice * per_slice + part * kCount + lane / (32 / kCount)] = sum[0];
    }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < per_slice; i += kThreads) {
      const int32_t row = i % kRows;
      const int32_t output = outputs_begin + pass * pass_outputs + i / kRows;
      if (row >= rows || output >= outputs_end) continue;
      const float bias = ReadBias(task, output);
      const float residual = ReadResidual(task, first_row + row, output);
      float total = partial[i];
      for (int32_t s = 1; s < plan.slice_warps; ++s) total += partial[s * per_slice + i];
      Finish(task, first_row + row, output, CacheColumnOf(task, output), total, bias, residual,
             places + row);
    }
  }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename W, int kRows>
cudaError_t Run(const LinearTask& task, const DeviceLimits& limits, cudaStream_t stream) {
  FmaPlan plan;
  plan.task = task;
  constexpr int32_t kChunkColumns = 32 * W::kColumns;
  plan.chunks = (task.args.w.in + kChunkColumns - 1) / kChunkColumns;
  plan.slice_warps = 1;
  while (plan.slice_warps < kWarps && plan.slice_warps * 4 <= plan.chunks) plan.slice_warps *= 2;
  const int32_t pass_outputs = kWarps / plan.slice_warps * kOutputs;
  const int32_t blocks =
      std::min(2 * limits.multiprocessors, (task.args.w.out + pass_outputs - 1) / pass_outputs);
  plan.outputs = CutInto(blocks, task.args.w.out);
  const int32_t most = plan.outputs.size + (plan.outputs.larger > 0 ? 1 : 0);
  plan.passes = (most + pass_outputs - 1) / pass_outputs;
  // Two blocks are to fit on a multiprocessor. Tiles begin where the first slice's turn is.
  const int64_t other = 2 * kWarps * kOutputs * kRows * 4 + kRows * (8 + 16) + 1024;
  const int64_t chunk_bytes = static_cast<int64_t>(kChunkColumns) * 4 * kRows;
  const int64_t half = limits.shared_bytes / 2 - other;
  const int64_t whole = limits.shared_bytes - other;
  if (plan.chunks * chunk_bytes <= half) {
    plan.tile_chunks = plan.chunks;
  } else {
    const int64_t room = plan.slice_warps * chunk_bytes <= half ? half : whole;
    plan.tile_chunks =
        static_cast<int32_t>(room / chunk_bytes / plan.slice_warps) * plan.slice_warps;
    plan.tile_chunks = std::min(plan.tile_chunks, plan.chunks);
    if (plan.tile_chunks < 1) return cudaErrorInvalidConfiguration;
  }
  plan.partial_at = static_cast<int32_t>(plan.tile_chunks * chunk_bytes);
  plan.sums_at = plan.partial_at + 2 * kWarps * kOutputs * kRows * 4;
  plan.places_at = plan.sums_at + (kRows * 8 + 15) / 16 * 16;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(blocks),
                    static_cast<unsigned>((task.args.rows + kRows - 1) / kRows));
  shape.threads = kThreads;
  shape.shared_bytes = static_cast<size_t>(plan.places_at + kRows * 16);
  shape.overlap = task.args.overlap;
  return Launch(FmaKernel<W, kRows>, shape, stream, plan);
}

template <typename W>
cudaError_t RunRows(const LinearTask& task, const DeviceLimits& limits, cudaStream_t stream) {
  // Warps that share outputs each need a chunk of every row in shared memory.
  const int64_t columns = std::min<int64_t>(task.args.w.in, int64_t{kWarps} * 32 * W::kColumns);
  int64_t rows = kMaxRows;
  while (rows > 1 && rows * (columns * 4 + 4096) > limits.shared_bytes - 4096) rows /= 2;
  rows = std::min<int64_t>(rows, task.args.rows);
  if (rows > 4) return Run<W, 8>(task, limits, stream);
  if (rows > 2) return Run<W, 4>(task, limits, stream);
  return rows > 1 ? Run<W, 2>(task, limits, stream) : Run<W, 1>(task, limits, stream);
}

}  // namespace

cudaError_t LinearFma(const LinearTask& task, cudaStream_t stream) {
  DeviceLimits limits;
  const cudaError_t status = GetDeviceLimits(&limits);
  if (status != cudaSuccess) return status;
  switch (task.args.w.dtype) {
    case DType::kFloat32: return RunRows<Single>(task, limits, stream);
    case DType::kFloat16: return RunRows<Half>(task, limits, stream);
    case DType::kBFloat16: return RunRows<Brain>(task, limits, stream);
    case DType::kInt8: return RunRows<Int8>(task, limits, stream);
    case DType::kInt4: return RunRows<Int4>(task, limits, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace fastgen
