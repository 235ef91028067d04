// Attention of decode steps: one query against a sequence's pages, bound by reading them.
//
// The pages of a row are cut into at most kDecodeParts parts of neighbouring pages, by the row's
// length alone. A warp attends over a part on its own, in registers; whichever warps and blocks did
// the parts, one combine puts them together in one order. So a row's result is the same bits
// whatever `splits` is and whatever rows are beside it.
#include "cuda/attention.h"

namespace fastgen {
namespace cuda {
namespace {

constexpr int kWarps = 4;
constexpr unsigned kAll = 0xffffffffu;
static_assert(kDecodeParts == 32, "the combine holds one part per lane");

__device__ inline float WarpMax(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, offset));
  return x;
}

__device__ inline float WarpSum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAll, x, offset);
  return x;
}

// Sums value i of kCount over the kLanes lanes of a group, leaving it in `values[0]` of those lanes
// whose number within the group is in [i, i + 1) * kLanes / kCount.
template <int kLanes, int kCount>
__device__ inline void ReduceScatter(float (&values)[kCount], int lane) {
  static_assert(kCount <= kLanes, "every value needs a lane");
  int n = kCount;
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    if (n == 1) {
      values[0] += __shfl_xor_sync(kAll, values[0], offset);
      continue;
    }
    n /= 2;
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      if (i >= n) break;
      const float keep = upper ? values[i + n] : values[i];
      const float send = upper ? values[i] : values[i + n];
      values[i] = keep + __shfl_xor_sync(kAll, send, offset);
    }
  }
}

// How a warp reads keys or values of a page: kLanes lanes hold a position, kChunks times 16 bytes
// each, and the warp kLoads * 32 / kLanes positions at a time.
template <typename T, int kLanes_, int kChunks_, int kLoads_>
struct Shape {
  using Type = T;
  static constexpr int kLanes = kLanes_;
  static constexpr int kChunks = kChunks_;
  static constexpr int kLoads = kLoads_;
  static constexpr int kStep = 32 / kLanes;  // positions of a load
  static constexpr int kTile = kLoads * kStep;
  static constexpr int kSize = Vector<T>::kSize;
  static_assert(kPage % kTile == 0, "a tile lies within a page");
};

// What is at or after position `end` is not read: it may hold anything.
template <typename S>
__device__ inline void LoadTile(uint4 (&tile)[S::kLoads][S::kChunks], const char* head,
                                int row_bytes, int position, int end, int lane) {
  const int left = end - position - lane / S::kLanes;
  const char* from = head + (position % kPage + lane / S::kLanes) * row_bytes;
#pragma unroll
  for (int i = 0; i < S::kLoads; ++i) {
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      const int byte = (c * S::kLanes + lane % S::kLanes) * 16;
      tile[i][c] = make_uint4(0, 0, 0, 0);
      if (i * S::kStep < left && byte < row_bytes) {
        tile[i][c] = __ldg(reinterpret_cast<const uint4*>(from + byte));
      }
    }
    from += S::kStep * row_bytes;
  }
}

// Reads a part's numbers: shared memory of this block, or what other blocks wrote (past the L1).
template <bool kShared>
__device__ inline float Fetch(const float* p) {
  return kShared ? *p : __ldcg(p);
}

// out = the parts' sums, weighted by how far each part's maximum lies under the greatest.
template <bool kShared>
__device__ inline void Combine(const float* sums, const float* stats, int parts, int head_size,
                               float* out) {
  constexpr int kBatch = 8;
  const int lane = threadIdx.x % 32;
  float max = -Infinity(), sum = 0.0f;
  if (lane < parts) {
    max = Fetch<kShared>(stats + 2 * lane);
    sum = Fetch<kShared>(stats + 2 * lane + 1);
  }
  const float weight = exp2f(max - WarpMax(max));
  const float total = WarpSum(__fmul_rn(weight, sum));
  for (int begin = threadIdx.x - lane; begin < head_size; begin += kWarps * 32) {
    const int d = min(begin + lane, head_size - 1);
    float result = 0.0f;
    for (int first = 0; first < parts; first += kBatch) {
      float values[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        values[i] = Fetch<kShared>(sums + min(first + i, parts - 1) * head_size + d);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float w = __shfl_sync(kAll, weight, first + i);
        if (first + i < parts) result = __fmaf_rn(w, values[i], result);
      }
    }
    if (begin + lane < head_size) out[d] = __fdiv_rn(result, total);
  }
}

template <typename S>
__global__ void __launch_bounds__(kWarps * 32, 3) DecodeKernel(const DecodeAttentionArgs args) {
  constexpr int kSize = S::kSize;
  extern __shared__ __align__(16) float decode_parts[];
  const int lane = threadIdx.x % 32;
  const int head = blockIdx.y, row = blockIdx.z;
  const int head_size = args.cache.head_size;
  float* const out = args.out + row * args.ldo + static_cast<int64_t>(head) * head_size;

  const Row here = args.row_list[row];
  const char* const* pages = nullptr;
  int length = 0;  // positions that the query sees
  if (here.slot >= 0) {
    const Slot* slot = args.slots + here.slot;
    pages = const_cast<const char* const*>(slot->pages);
    const int newest = slot->finished != 0 ? 0 : slot->length;
    length = here.position >= 0 ? here.position + 1 : newest;
  }
  if (length <= 0) {
    if (blockIdx.x != 0) return;
    for (int d = threadIdx.x; d < head_size; d += kWarps * 32) out[d] = 0.0f;
    return;
  }

  const int page_count = (length + kPage - 1) / kPage;
  const int pages_per_part = (page_count + kDecodeParts - 1) / kDecodeParts;
  const int parts = (page_count + pages_per_part - 1) / pages_per_part;
  const int span = pages_per_part * kPage;  // positions of a part
  const int blocks = min(static_cast<int>(gridDim.x), (parts + kWarps - 1) / kWarps);
  if (static_cast<int>(blockIdx.x) >= blocks) return;
  const bool alone = blocks == 1;
  const int64_t unit = static_cast<int64_t>(row) * args.cache.num_heads + head;
  float* const sums = alone ? decode_parts : args.partial + unit * kDecodeParts * (head_size + 2);
  float* const stats = sums + kDecodeParts * head_size;

  int part = blockIdx.x * kWarps + threadIdx.x / 32;
  if (part < parts) {
    const int64_t keys = HeadOffset(args.cache, args.layer, 0, head) * sizeof(typename S::Type);
    const int64_t values = HeadOffset(args.cache, args.layer, 1, head) * sizeof(typename S::Type);
    const int row_bytes = args.cache.head_stride * static_cast<int>(sizeof(typename S::Type));
    int position = part * span;
    int end = min(length, position + span);
    const char* page = pages[position / kPage];
    uint4 k[S::kLoads][S::kChunks], v[S::kLoads][S::kChunks];
    LoadTile<S>(k, page + keys, row_bytes, position, end, lane);
    LoadTile<S>(v, page + values, row_bytes, position, end, lane);

    float q[S::kChunks][kSize], acc[S::kChunks][kSize];
    const float* const query = args.q + row * args.ldq + static_cast<int64_t>(head) * head_size;
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const int d = (c * S::kLanes + lane % S::kLanes) * kSize + e;
        q[c][e] = d < head_size ? __fmul_rn(query[d], kLog2e) : 0.0f;
        acc[c][e] = 0.0f;
      }
    }
    float max = -Infinity(), sum = 0.0f;

    for (;;) {
      // The tile after this one is on its way while this one is worked on.
      int next_part = part, next = position + S::kTile;
      const bool part_ends = next >= end;
      if (part_ends) {
        next_part += gridDim.x * kWarps;
        next = next_part * span;
      }
      const bool more = next_part < parts;
      const int next_end = more ? min(length, (next_part + 1) * span) : 0;
      if (more) page = pages[next / kPage];

      float scores[S::kLoads];
#pragma unroll
      for (int i = 0; i < S::kLoads; ++i) {
        scores[i] = 0.0f;
#pragma unroll
        for (int c = 0; c < S::kChunks; ++c) {
          float f[kSize];
          Vector<typename S::Type>::Unpack(k[i][c], f);
#pragma unroll
          for (int e = 0; e < kSize; ++e) scores[i] = __fmaf_rn(q[c][e], f[e], scores[i]);
        }
      }
      LoadTile<S>(k, page + keys, row_bytes, next, next_end, lane);
      ReduceScatter<S::kLanes, S::kLoads>(scores, lane);
      const int mine = lane % S::kLanes * S::kLoads / S::kLanes * S::kStep + lane / S::kLanes;
      const float score = position + mine < end ? scores[0] : -Infinity();
      const float new_max = fmaxf(max, WarpMax(score));
      const float shrink = exp2f(max - new_max);
      const float weight = exp2f(score - new_max);
      max = new_max;
      sum = __fmaf_rn(sum, shrink, weight);
#pragma unroll
      for (int c = 0; c < S::kChunks; ++c) {
#pragma unroll
        for (int e = 0; e < kSize; ++e) acc[c][e] = __fmul_rn(acc[c][e], shrink);
      }
#pragma unroll
      for (int i = 0; i < S::kLoads; ++i) {
        const int owner = lane / S::kLanes * S::kLanes + i * (S::kLanes / S::kLoads);
        const float w = __shfl_sync(kAll, weight, owner);
#pragma unroll
        for (int c = 0; c < S::kChunks; ++c) {
          float f[kSize];
          Vector<typename S::Type>::Unpack(v[i][c], f);
#pragma unroll
          for (int e = 0; e < kSize; ++e) acc[c][e] = __fmaf_rn(w, f[e], acc[c][e]);
        }
      }
      LoadTile<S>(v, page + values, row_bytes, next, next_end, lane);

      if (part_ends) {
        // Lanes of a group each held one weight of the tile kLanes / kLoads times.
#pragma unroll
        for (int offset = 16; offset >= S::kLanes / S::kLoads; offset /= 2) {
          sum += __shfl_xor_sync(kAll, sum, offset);
        }
#pragma unroll
        for (int c = 0; c < S::kChunks; ++c) {
#pragma unroll
          for (int e = 0; e < kSize; ++e) {
#pragma unroll
            for (int offset = 16; offset >= S::kLanes; offset /= 2) {
              acc[c][e] += __shfl_xor_sync(kAll, acc[c][e], offset);
            }
            const int d = (c * S::kLanes + lane % S::kLanes) * kSize + e;
            if (e % S::kStep == lane / S::kLanes && d < head_size) {
              sums[part * head_size + d] = acc[c][e];
            }
            acc[c][e] = 0.0f;
          }
        }
        if (lane == 0) {
          stats[2 * part] = max;
          stats[2 * part + 1] = sum;
        }
        max = -Infinity();
        sum = 0.0f;
      }
      if (!more) break;
      part = next_part;
      position = next;
      end = next_end;
    }
  }

  if (alone) {
    __syncthreads();
    Combine<true>(sums, stats, parts, head_size, out);
    return;
  }
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(args.arrived + unit, 1) == blocks - 1;
    __threadfence();
  }
  if (!__syncthreads_or(last)) return;
  if (threadIdx.x == 0) args.arrived[unit] = 0;
  Combine<false>(sums, stats, parts, head_size, out);
}

template <typename S>
cudaError_t Launch(const DecodeAttentionArgs& args, cudaStream_t stream) {
  const dim3 grid(args.splits, args.cache.num_heads, args.rows);
  const size_t shared = sizeof(float) * kDecodeParts * (args.cache.head_size + 2);
  auto kernel = DecodeKernel<S>;
  kernel<<<grid, kWarps * 32, shared, stream>>>(args);
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchNarrow(const DecodeAttentionArgs& args, int chunks, cudaStream_t stream) {
  if (chunks <= 4) return Launch<Shape<T, 4, 1, 4>>(args, stream);
  if (chunks <= 8) return Launch<Shape<T, 8, 1, 8>>(args, stream);
  if (chunks <= 16) return Launch<Shape<T, 16, 1, 8>>(args, stream);
  return Launch<Shape<T, 32, 1, 4>>(args, stream);
}

}  // namespace

int32_t DecodeSplits(int32_t rows, int32_t heads, int32_t multiprocessors) {
  const int64_t units = static_cast<int64_t>(rows) * heads;
  const int64_t wanted = 4 * static_cast<int64_t>(multiprocessors);
  const int64_t splits = units > 0 ? (wanted + units - 1) / units : 1;
  return static_cast<int32_t>(splits < kDecodeParts / kWarps ? splits : kDecodeParts / kWarps);
}

cudaError_t DecodeAttention(const DecodeAttentionArgs& args, cudaStream_t stream) {
  if (args.rows <= 0) return cudaSuccess;
  if (args.splits < 1 || args.cache.head_size > 256) return cudaErrorInvalidValue;
  switch (args.cache.dtype) {
    case DType::kFloat32: {
      const int chunks = args.cache.head_stride / 4;
      if (chunks > 32) return Launch<Shape<float, 32, 2, 4>>(args, stream);
      return LaunchNarrow<float>(args, chunks, stream);
    }
    case DType::kFloat16: return LaunchNarrow<__half>(args, args.cache.head_stride / 8, stream);
    case DType::kBFloat16: return LaunchNarrow<BFloat16>(args, args.cache.head_stride / 8, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace cuda
}  // namespace fastgen
