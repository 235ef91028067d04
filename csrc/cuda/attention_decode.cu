// Attention of decode steps: one query against a sequence's pages, bound by reading them. This kernel
// loads through registers and runs on any device; see attention_decode_stream.cu for sm_90.
#include "cuda/attention_decode.h"
#include "cuda/launch.h"

namespace fastgen {
namespace cuda {
namespace {

constexpr int kWarps = 4;

template <typename S>
__global__ void __launch_bounds__(kWarps * 32, 3) DecodeKernel(const DecodeAttentionArgs args) {
  extern __shared__ __align__(16) float decode_parts[];
  const int lane = threadIdx.x % 32;
  const int head = blockIdx.y, row = blockIdx.z;
  const int head_size = args.cache.head_size;
  float* const out = args.out + row * args.ldo + static_cast<int64_t>(head) * head_size;

  const char* const* pages = nullptr;
  const int length = VisibleLength(args.row_list[row], args.slots, &pages);
  if (length <= 0) {
    if (blockIdx.x != 0) return;
    for (int d = threadIdx.x; d < head_size; d += kWarps * 32) out[d] = 0.0f;
    return;
  }

  const RowParts cut = PartsOf(length);
  const int parts = cut.parts;
  const int span = cut.pages_per_part * kPage;  // positions of a part
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
    const int turn_mask = TurnMask(args.cache);
    int position = part * span;
    int end = min(length, position + span);
    const char* page = pages[position / kPage];
    uint4 k[S::kLoads][S::kChunks], v[S::kLoads][S::kChunks];
    LoadTile<S, false>(k, page + keys, row_bytes, turn_mask, position, end, lane);
    LoadTile<S, false>(v, page + values, row_bytes, turn_mask, position, end, lane);

    Gathered<S> gathered;
    gathered.Query(args.q + row * args.ldq + static_cast<int64_t>(head) * head_size, head_size,
                   lane);
    gathered.Clear();
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
      gathered.Multiply(k, scores);
      LoadTile<S, false>(k, page + keys, row_bytes, turn_mask, next, next_end, lane);
      const float weight = gathered.Weigh(scores, position, end, lane);
      gathered.Add(v, weight, lane);
      LoadTile<S, false>(v, page + values, row_bytes, turn_mask, next, next_end, lane);

      if (part_ends) {
        gathered.Store(sums + part * head_size, stats + 2 * part, head_size, lane);
        gathered.Clear();
      }
      if (!more) break;
      part = next_part;
      position = next;
      end = next_end;
    }
  }

  const int first = threadIdx.x - lane;
  const auto store = [=](int d, float x) { out[d] = x; };
  if (alone) {
    __syncthreads();
    CombineParts<8>([=](int p) { return make_float2(stats[2 * p], stats[2 * p + 1]); },
                    [=](int p, int d) { return sums[p * head_size + d]; }, parts, head_size, first,
                    kWarps * 32, lane, store);
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
  // What other blocks wrote is past the first-level cache.
  CombineParts<8>(
      [=](int p) { return make_float2(__ldcg(stats + 2 * p), __ldcg(stats + 2 * p + 1)); },
      [=](int p, int d) { return __ldcg(sums + p * head_size + d); }, parts, head_size, first,
      kWarps * 32, lane, store);
}

struct LaunchDecode {
  const DecodeAttentionArgs& args;
  cudaStream_t stream;

  template <typename S>
  cudaError_t operator()(S) const {
    LaunchShape shape;
    shape.grid = dim3(args.splits, args.cache.num_heads, args.rows);
    shape.threads = kWarps * 32;
    shape.shared_bytes = sizeof(float) * kDecodeParts * (args.cache.head_size + 2);
    return Launch(DecodeKernel<S>, shape, stream, args);
  }
};

// Calls `launch` with the shape for the cache.
template <typename T, typename Launch>
cudaError_t WithNarrowShape(int chunks, const Launch& launch) {
  if (chunks <= 4) return launch(DecodeShape<T, 4, 1, 4>());
  if (chunks <= 8) return launch(DecodeShape<T, 8, 1, 8>());
  if (chunks <= 16) return launch(DecodeShape<T, 16, 1, 8>());
  return launch(DecodeShape<T, 32, 1, 4>());
}

template <typename Launch>
cudaError_t WithDecodeShape(const CacheLayout& cache, const Launch& launch) {
  if (cache.head_size > kMostHeadSize) return cudaErrorInvalidValue;
  switch (cache.dtype) {
    case DType::kFloat32: {
      const int chunks = cache.head_stride / 4;
      if (chunks > 32) return launch(DecodeShape<float, 32, 2, 4>());
      return WithNarrowShape<float>(chunks, launch);
    }
    case DType::kFloat16: return WithNarrowShape<__half>(cache.head_stride / 8, launch);
    case DType::kBFloat16: return WithNarrowShape<BFloat16>(cache.head_stride / 8, launch);
    default: return cudaErrorInvalidValue;
  }
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
  if (args.splits < 1) return cudaErrorInvalidValue;
  if (args.plan != nullptr) return DecodeAttentionStream(args, stream);
  if (args.packed != nullptr) return cudaErrorInvalidValue;
  return WithDecodeShape(args.cache, LaunchDecode{args, stream});
}

}  // namespace cuda
}  // namespace fastgen
