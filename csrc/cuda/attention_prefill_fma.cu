// Attention of prefill in float32 arithmetic: for float32, for queries of another type than the
// cache, and for architectures without tensor cores for the type. Like attention_prefill.cu, with
// everything in shared memory as float32 and one tile of keys at a time.
#include "cuda/attention.h"

namespace fastgen {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr unsigned kAll = 0xffffffffu;

// Threads form 16 rows of 8: thread (y, x) has queries y + 16 i, keys x + 8 i, and of the result
// four neighbouring columns of every 32 from 4 x.
template <typename T, int kHead_, int kRows_, int kKeys_>
struct Shape {
  using Type = T;
  static constexpr int kHead = kHead_;
  static constexpr int kRows = kRows_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kStride = kHead + 4;  // floats of a row in shared memory
  static constexpr int kPStride = kKeys + 4;
  static constexpr int kSharedBytes = 4 * ((kRows + 2 * kKeys) * kStride + kRows * kPStride);
  static_assert(kRows % 16 == 0 && kKeys % 8 == 0 && kPage % kKeys == 0, "whole tiles");
};

__device__ inline float LoadAs(const void* data, int64_t i, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  if (dtype == DType::kFloat16) return __half2float(static_cast<const __half*>(data)[i]);
  return __uint_as_float(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16);
}

__device__ inline void StoreAs(void* data, int64_t i, DType dtype, float x) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[i] = x;
  } else if (dtype == DType::kFloat16) {
    static_cast<__half*>(data)[i] = __float2half_rn(SaturateHalf(x));
  } else {
    static_cast<uint16_t*>(data)[i] = ToBFloat16(x);
  }
}

// Over the eight threads that share a query.
__device__ inline float GroupMax(float x) {
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, offset));
  return x;
}

__device__ inline float GroupSum(float x) {
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) x += __shfl_xor_sync(kAll, x, offset);
  return x;
}

// Keys or values of `count` positions as float32, zero where there are none and up to kHead. They begin at a
// multiple of 8 positions; `turn_mask` is the cache's (row.h).
template <typename S>
__device__ inline void LoadTile(float* shared, const char* head, int head_stride, int turn_mask,
                                int count) {
  constexpr int kSize = Vector<typename S::Type>::kSize;
  constexpr int kVectors = S::kHead / kSize;
#pragma unroll
  for (int first = 0; first < S::kKeys * kVectors; first += kThreads) {
    const int i = first + threadIdx.x;
    const int row = i / kVectors, column = i % kVectors * kSize;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row < count && column < head_stride) {
      const int piece = column / kSize ^ (row & turn_mask);
      v = __ldg(reinterpret_cast<const uint4*>(head) + row * head_stride / kSize + piece);
    }
    float f[kSize];
    Vector<typename S::Type>::Unpack(v, f);
    float4* const to = reinterpret_cast<float4*>(shared + row * S::kStride + column);
#pragma unroll
    for (int e = 0; e < kSize; e += 4) to[e / 4] = make_float4(f[e], f[e + 1], f[e + 2], f[e + 3]);
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads) FmaKernel(const PrefillAttentionArgs args) {
  constexpr int kQ = S::kRows / 16, kK = S::kKeys / 8, kD = S::kHead / 32;
  extern __shared__ __align__(16) float fma_shared[];
  float* const q_shared = fma_shared;
  float* const k_shared = q_shared + S::kRows * S::kStride;
  float* const v_shared = k_shared + S::kKeys * S::kStride;
  float* const p_shared = v_shared + S::kKeys * S::kStride;

  const PrefillRun run = args.runs[blockIdx.y];
  const int first = (gridDim.z - 1 - blockIdx.z) * S::kRows;
  if (run.slot < 0 || first >= run.count) return;
  const int head = blockIdx.x, head_size = args.cache.head_size;
  const int head_stride = args.cache.head_stride, turn_mask = TurnMask(args.cache);
  const int x = threadIdx.x % 8, y = threadIdx.x / 8;
  const int rows = min(S::kRows, run.count - first);
  const int begin = run.begin + first;
  const int length = begin + rows;
  const int64_t row0 = run.first_row + first;
  const int64_t column = static_cast<int64_t>(head) * head_size;
  const int64_t keys = HeadOffset(args.cache, args.layer, 0, head) * sizeof(typename S::Type);
  const int64_t values = HeadOffset(args.cache, args.layer, 1, head) * sizeof(typename S::Type);
  const char* const* pages = const_cast<const char* const*>(args.slots[run.slot].pages);

  for (int i = threadIdx.x; i < S::kRows * S::kHead; i += kThreads) {
    const int row = i / S::kHead, d = i % S::kHead;
    q_shared[row * S::kStride + d] =
        row < rows && d < head_size
            ? LoadAs(args.q, (row0 + row) * args.ldq + column + d, args.dtype) * args.scale
            : 0.0f;
  }

  float4 o[kQ][kD];
  float max[kQ], sum[kQ];
#pragma unroll
  for (int i = 0; i < kQ; ++i) {
    max[i] = -Infinity();
    sum[i] = 0.0f;
#pragma unroll
    for (int d = 0; d < kD; ++d) o[i][d] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  for (int position = 0; position < length; position += S::kKeys) {
    const char* page = pages[position / kPage];
    const int64_t in_page =
        static_cast<int64_t>(position % kPage) * head_stride * sizeof(typename S::Type);
    const int count = min(S::kKeys, length - position);
    __syncthreads();
    LoadTile<S>(k_shared, page + keys + in_page, head_stride, turn_mask, count);
    LoadTile<S>(v_shared, page + values + in_page, head_stride, turn_mask, count);
    __syncthreads();

    float s[kQ][kK];
#pragma unroll
    for (int i = 0; i < kQ; ++i) {
#pragma unroll
      for (int j = 0; j < kK; ++j) s[i][j] = 0.0f;
    }
#pragma unroll 4
    for (int d = 0; d < S::kHead; d += 4) {
      float4 q[kQ], k[kK];
#pragma unroll
      for (int i = 0; i < kQ; ++i) {
        q[i] = *reinterpret_cast<const float4*>(q_shared + (y + 16 * i) * S::kStride + d);
      }
#pragma unroll
      for (int j = 0; j < kK; ++j) {
        k[j] = *reinterpret_cast<const float4*>(k_shared + (x + 8 * j) * S::kStride + d);
      }
#pragma unroll
      for (int i = 0; i < kQ; ++i) {
#pragma unroll
        for (int j = 0; j < kK; ++j) {
          s[i][j] = __fmaf_rn(q[i].x, k[j].x, s[i][j]);
          s[i][j] = __fmaf_rn(q[i].y, k[j].y, s[i][j]);
          s[i][j] = __fmaf_rn(q[i].z, k[j].z, s[i][j]);
          s[i][j] = __fmaf_rn(q[i].w, k[j].w, s[i][j]);
        }
      }
    }

#pragma unroll
    for (int i = 0; i < kQ; ++i) {
      const int query = begin + y + 16 * i;
      float new_max = max[i];
#pragma unroll
      for (int j = 0; j < kK; ++j) {
        if (position + x + 8 * j > query) s[i][j] = -Infinity();
        new_max = fmaxf(new_max, s[i][j]);
      }
      new_max = GroupMax(new_max);
      const float shrink = exp2f(__fmul_rn(max[i] - new_max, kLog2e));
      max[i] = new_max;
      sum[i] = __fmul_rn(sum[i], shrink);
#pragma unroll
      for (int j = 0; j < kK; ++j) {
        const float p = exp2f(__fmul_rn(s[i][j] - new_max, kLog2e));
        sum[i] = __fadd_rn(sum[i], p);
        p_shared[(y + 16 * i) * S::kPStride + x + 8 * j] = p;
      }
#pragma unroll
      for (int d = 0; d < kD; ++d) {
        o[i][d].x = __fmul_rn(o[i][d].x, shrink);
        o[i][d].y = __fmul_rn(o[i][d].y, shrink);
        o[i][d].z = __fmul_rn(o[i][d].z, shrink);
        o[i][d].w = __fmul_rn(o[i][d].w, shrink);
      }
    }
    __syncwarp();  // a warp reads the weights of its own queries only

#pragma unroll 2
    for (int key = 0; key < S::kKeys; key += 4) {
      float p[kQ][4];
#pragma unroll
      for (int i = 0; i < kQ; ++i) {
        const float4 four =
            *reinterpret_cast<const float4*>(p_shared + (y + 16 * i) * S::kPStride + key);
        p[i][0] = four.x;
        p[i][1] = four.y;
        p[i][2] = four.z;
        p[i][3] = four.w;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int d = 0; d < kD; ++d) {
          const float4 v =
              *reinterpret_cast<const float4*>(v_shared + (key + e) * S::kStride + d * 32 + x * 4);
#pragma unroll
          for (int i = 0; i < kQ; ++i) {
            o[i][d].x = __fmaf_rn(p[i][e], v.x, o[i][d].x);
            o[i][d].y = __fmaf_rn(p[i][e], v.y, o[i][d].y);
            o[i][d].z = __fmaf_rn(p[i][e], v.z, o[i][d].z);
            o[i][d].w = __fmaf_rn(p[i][e], v.w, o[i][d].w);
          }
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kQ; ++i) {
    const int row = y + 16 * i;
    const float total = GroupSum(sum[i]);
    if (row >= rows) continue;
#pragma unroll
    for (int d = 0; d < kD; ++d) {
      const float four[4] = {o[i][d].x, o[i][d].y, o[i][d].z, o[i][d].w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = d * 32 + x * 4 + e;
        if (at >= head_size) continue;
        StoreAs(args.out, (row0 + row) * args.ldo + column + at, args.dtype,
                __fdiv_rn(four[e], total));
      }
    }
  }
}

template <typename S>
cudaError_t Launch(const PrefillAttentionArgs& args, cudaStream_t stream) {
  auto kernel = FmaKernel<S>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  if (status != cudaSuccess) return status;
  const dim3 grid(args.cache.num_heads, args.num_runs,
                  (args.longest_run + S::kRows - 1) / S::kRows);
  kernel<<<grid, kThreads, S::kSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchType(const PrefillAttentionArgs& args, cudaStream_t stream) {
  if (args.cache.head_size <= 64) return Launch<Shape<T, 64, 64, 32>>(args, stream);
  if (args.cache.head_size <= 128) return Launch<Shape<T, 128, 32, 32>>(args, stream);
  return Launch<Shape<T, 256, 16, 16>>(args, stream);
}

}  // namespace

cudaError_t PrefillAttentionFma(const PrefillAttentionArgs& args, cudaStream_t stream) {
  if (args.k != nullptr || args.v != nullptr) return cudaErrorInvalidValue;
  switch (args.cache.dtype) {
    case DType::kFloat32: return LaunchType<float>(args, stream);
    case DType::kFloat16: return LaunchType<__half>(args, stream);
    case DType::kBFloat16: return LaunchType<BFloat16>(args, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace cuda
}  // namespace fastgen
