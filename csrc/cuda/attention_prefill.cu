// Attention of prefill with tensor cores: a block attends from a tile of queries of a head to the
// sequence's keys, 16 or 32 queries a warp, with the softmax of the scores kept up to date in
// registers as keys come. Keys and values go to shared memory while the tile before is worked on.
//
// Tiles of keys start at multiples of their size from position 0 and those past a query's own
// position change nothing, so a query's result does not depend on where its tile or its run begins.
#include <atomic>
#include <climits>
#include <type_traits>

#include "cuda/attention.h"
#include "cuda/launch.h"

namespace fastgen {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr unsigned kAll = 0xffffffffu;

// kHead: head size, rounded up. kKeys: keys of a tile. kTiles: times 16 queries of a warp.
template <typename T, int kHead_, int kKeys_, int kTiles_>
struct Shape {
  using Type = T;
  static constexpr int kHead = kHead_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kTiles = kTiles_;
  static constexpr int kWarpRows = 16 * kTiles;
  static constexpr int kRows = kThreads / 32 * kWarpRows;
  static constexpr int kChunks = kHead / 8;  // times 16 bytes
  static constexpr int kRowBytes = kHead * 2;
  static constexpr int kPages = kKeys / kPage;
  // Queries, then two stages of keys and values.
  static constexpr int kStageBytes = 2 * kKeys * kRowBytes;
  static constexpr int kSharedBytes = kRows * kRowBytes + 2 * kStageBytes;
  static constexpr bool kKeepQueries = kHead <= 64;  // in registers
};

// Where 16 bytes of a row lie in shared memory: eight rows' same chunk are in different banks.
template <typename S>
__device__ inline char* At(char* rows, int row, int chunk) {
  return rows + row * S::kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Rows of `ld` elements can be read and written 16 bytes at a time.
__device__ inline bool IsVectorAligned(const void* data, int64_t ld, int head_size) {
  return (reinterpret_cast<uintptr_t>(data) & 15) == 0 && ld % 8 == 0 && head_size % 8 == 0;
}

template <typename S>
__device__ inline void LoadQueries(char* shared, const uint16_t* q, int64_t ld, int rows,
                                   int head_size, bool vectors) {
  for (int i = threadIdx.x; i < S::kRows * S::kChunks; i += kThreads) {
    const int row = i / S::kChunks, chunk = i % S::kChunks;
    char* to = At<S>(shared, row, chunk);
    if (vectors && row < rows && chunk * 8 < head_size) {
      Copy16(to, q + row * ld + chunk * 8, true);
      continue;
    }
    for (int e = 0; e < 8; ++e) {
      const int d = chunk * 8 + e;
      reinterpret_cast<uint16_t*>(to)[e] = row < rows && d < head_size ? q[row * ld + d] : 0;
    }
  }
}

// Where the keys and values of a head lie: in pages, but for positions from `fresh` on.
struct KeySource {
  int64_t keys, values;  // bytes from the start of a page
  int head_stride;
  int turn_mask;  // the cache's (row.h)
  int fresh;
  // Position p's are `row_bytes` times p behind these.
  const char* fresh_keys;
  const char* fresh_values;
  int64_t row_bytes;
};

// Starts copying the tile of keys and values at `position`; what is at or after `length` becomes
// zero, as it may hold anything.
template <typename S>
__device__ inline void LoadKeys(char* stage, const char* const (&pages)[S::kPages],
                                const KeySource& source, int position, int length) {
  constexpr int kPassRows = kThreads / S::kChunks;
  static_assert(kPage % kPassRows == 0, "a pass lies within a page");
  const int row = threadIdx.x / S::kChunks, chunk = threadIdx.x % S::kChunks;
  const bool inside = chunk * 8 < source.head_stride;
#pragma unroll
  for (int pass = 0; pass < S::kKeys / kPassRows; ++pass) {
    const int first = pass * kPassRows;
    const int at = position + first + row;
    const bool valid = inside && at < length;
    const char* page = pages[first / kPage];
    const int in_row = first % kPage + row;
    const int64_t in_page =
        (in_row * source.head_stride + (chunk ^ (in_row & source.turn_mask)) * 8) * 2;
    const char* key = page + source.keys + in_page;
    const char* value = page + source.values + in_page;
    if (at >= source.fresh) {
      const int64_t in_rows = at * source.row_bytes + chunk * 16;
      key = source.fresh_keys + in_rows;
      value = source.fresh_values + in_rows;
    }
    char* to = At<S>(stage, first + row, chunk);
    Copy16(to, valid ? key : page, valid);
    Copy16(to + S::kKeys * S::kRowBytes, valid ? value : page, valid);
  }
}

// Puts positions [begin, length) of a tile that has been copied into their pages. A thread takes what
// it has copied itself.
template <typename S>
__device__ inline void StoreKeys(char* stage, char* const* pages, const KeySource& source,
                                 int position, int begin, int length) {
  constexpr int kPassRows = kThreads / S::kChunks;
  const int row = threadIdx.x / S::kChunks, chunk = threadIdx.x % S::kChunks;
#pragma unroll
  for (int pass = 0; pass < S::kKeys / kPassRows; ++pass) {
    const int first = pass * kPassRows;
    const int at = position + first + row;
    if (at < begin || at >= length || chunk * 8 >= source.head_stride) continue;
    char* const to = pages[at / kPage] +
                     (at % kPage * source.head_stride + (chunk ^ (at & source.turn_mask)) * 8) * 2;
    const char* const from = At<S>(stage, first + row, chunk);
    *reinterpret_cast<uint4*>(to + source.keys) = *reinterpret_cast<const uint4*>(from);
    *reinterpret_cast<uint4*>(to + source.values) =
        *reinterpret_cast<const uint4*>(from + S::kKeys * S::kRowBytes);
  }
}

template <typename S>
__device__ inline void LoadQueryFragment(uint32_t (&a)[4], char* queries, int row, int step,
                                         int lane) {
  LoadMatrices(a, At<S>(queries, row + (lane & 15), step * 2 + (lane >> 4)));
}

__device__ inline float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAll, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAll, x, 2));
}

__device__ inline float QuadSum(float x) {
  x += __shfl_xor_sync(kAll, x, 1);
  return x + __shfl_xor_sync(kAll, x, 2);
}

template <typename T>
__device__ inline float Saturate(float x) {
  return x;  // a mean of bfloat16 values is far from where bfloat16 ends, or was there already
}
template <>
__device__ inline float Saturate<__half>(float x) {
  return SaturateHalf(x);
}

// The softmax of 16 queries so far: each thread holds two rows, eight apart.
struct Running {
  float max[2];
  float sum[2];
};

// Turns scores, which count `log2_scale` times in a power of two, into weights, by which older sums
// shrink by `shrink`.
template <int kCount>
__device__ inline void Softmax(float (&s)[kCount][4], float log2_scale, Running* running,
                               float (&shrink)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float max = running->max[half];
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      max = fmaxf(max, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    }
    max = QuadMax(max);
    const float offset = __fmul_rn(max, -log2_scale);
    shrink[half] = Exp2(__fmul_rn(running->max[half] - max, log2_scale));  // 1 if max stays
    running->max[half] = max;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        s[n][e] = Exp2(__fmaf_rn(s[n][e], log2_scale, offset));
        sum = __fadd_rn(sum, s[n][e]);
      }
    }
    running->sum[half] = __fmaf_rn(running->sum[half], shrink[half], sum);
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads, 2) MmaKernel(const PrefillAttentionArgs args) {
  if (!HasMma<typename S::Type>::value) return;  // the launcher chose another kernel
  extern __shared__ __align__(128) char prefill_shared[];
  WaitForGrid();
  const PrefillRun run = args.runs[blockIdx.y];
  // Later queries see more keys: they start first.
  const int first = (gridDim.z - 1 - blockIdx.z) * S::kRows;
  if (run.slot < 0 || first >= run.count) return;
  const int head = blockIdx.x, head_size = args.cache.head_size;
  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 * S::kWarpRows;
  const int rows = min(S::kRows, run.count - first);
  const int begin = run.begin + first;  // position of the block's first query
  const int length = begin + rows;      // keys that its last query sees
  const int64_t column = static_cast<int64_t>(head) * head_size;
  const float log2_scale = __fmul_rn(args.scale, kLog2e);
  KeySource source;
  source.keys = HeadOffset(args.cache, args.layer, 0, head) * 2;
  source.values = HeadOffset(args.cache, args.layer, 1, head) * 2;
  source.head_stride = args.cache.head_stride;
  source.turn_mask = TurnMask(args.cache);
  source.fresh = args.k != nullptr ? run.begin : INT_MAX;
  source.row_bytes = args.ldq * 2;
  const int64_t of_zero = (run.first_row - run.begin) * source.row_bytes + column * 2;
  source.fresh_keys = static_cast<const char*>(args.k) + of_zero;
  source.fresh_values = static_cast<const char*>(args.v) + of_zero;

  char* const queries = prefill_shared;
  char* const stages = prefill_shared + S::kRows * S::kRowBytes;
  LoadQueries<S>(queries,
                 static_cast<const uint16_t*>(args.q) + (run.first_row + first) * args.ldq + column,
                 args.ldq, rows, head_size, IsVectorAligned(args.q, args.ldq, head_size));
  CommitCopies();

  char* const* page_list = args.slots[run.slot].pages;
  const int last_page = (length - 1) / kPage;
  const char* pages[S::kPages];
#pragma unroll
  for (int p = 0; p < S::kPages; ++p) pages[p] = page_list[min(p, last_page)];
  LoadKeys<S>(stages, pages, source, 0, length);
  CommitCopies();
#pragma unroll
  for (int p = 0; p < S::kPages; ++p) pages[p] = page_list[min(S::kPages + p, last_page)];

  uint32_t q[S::kKeepQueries ? S::kTiles : 1][S::kKeepQueries ? S::kHead / 16 : 1][4];
  if (S::kKeepQueries) {
    WaitCopies<1>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < S::kTiles; ++m) {
#pragma unroll
      for (int step = 0; step < S::kHead / 16; ++step) {
        LoadQueryFragment<S>(q[m][S::kKeepQueries ? step : 0], queries, warp_row + 16 * m, step,
                             lane);
      }
    }
  }

  float o[S::kTiles][S::kHead / 8][4];
#pragma unroll
  for (int m = 0; m < S::kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < S::kHead / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o[m][n][e] = 0.0f;
    }
  }
  Running running[S::kTiles];
#pragma unroll
  for (int m = 0; m < S::kTiles; ++m) {
    running[m].max[0] = running[m].max[1] = -Infinity();
    running[m].sum[0] = running[m].sum[1] = 0.0f;
  }

  for (int tile = 0; tile * S::kKeys < length; ++tile) {
    const int position = tile * S::kKeys;
    WaitCopies<0>();
    __syncthreads();
    char* const k_shared = stages + (tile & 1) * S::kStageBytes;
    char* const v_shared = k_shared + S::kKeys * S::kRowBytes;
    if (position + S::kKeys < length) {
      LoadKeys<S>(stages + (~tile & 1) * S::kStageBytes, pages, source, position + S::kKeys,
                  length);
      CommitCopies();
#pragma unroll
      for (int p = 0; p < S::kPages; ++p) {
        pages[p] = page_list[min((tile + 2) * S::kPages + p, last_page)];
      }
    }
    // The block whose queries they belong to, of all that read them.
    if (args.k != nullptr && position + S::kKeys > begin) {
      StoreKeys<S>(k_shared, page_list, source, position, begin, length);
    }
    if (position >= begin + warp_row + S::kWarpRows)
      continue;  // none of this warp's queries sees it

    float s[S::kTiles][S::kKeys / 8][4];
#pragma unroll
    for (int m = 0; m < S::kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < S::kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[m][n][e] = 0.0f;
      }
    }
#pragma unroll
    for (int step = 0; step < S::kHead / 16; ++step) {
      if (!S::kKeepQueries) LoadQueryFragment<S>(q[0][0], queries, warp_row, step, lane);
#pragma unroll
      for (int n = 0; n < S::kKeys / 16; ++n) {
        uint32_t b[4];
        LoadMatrices(
            b, At<S>(k_shared, n * 16 + (lane & 7) + (lane >> 4) * 8, step * 2 + (lane >> 3 & 1)));
#pragma unroll
        for (int m = 0; m < S::kTiles; ++m) {
          const uint32_t (&a)[4] = q[m][S::kKeepQueries ? step : 0];
          Mma<typename S::Type>(s[m][2 * n], a, b[0], b[1]);
          Mma<typename S::Type>(s[m][2 * n + 1], a, b[2], b[3]);
        }
      }
    }

    if (position + S::kKeys - 1 > begin + warp_row) {
#pragma unroll
      for (int m = 0; m < S::kTiles; ++m) {
#pragma unroll
        for (int n = 0; n < S::kKeys / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int key = position + n * 8 + lane % 4 * 2 + (e & 1);
            const int query = begin + warp_row + m * 16 + lane / 4 + (e >> 1) * 8;
            if (key > query) s[m][n][e] = -Infinity();
          }
        }
      }
    }

    uint32_t p[S::kTiles][S::kKeys / 16][4];
#pragma unroll
    for (int m = 0; m < S::kTiles; ++m) {
      float shrink[2];
      Softmax(s[m], log2_scale, &running[m], shrink);
#pragma unroll
      for (int n = 0; n < S::kHead / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[m][n][e] = __fmul_rn(o[m][n][e], shrink[e >> 1]);
      }
      // Scores lie in registers as an operand of the next product wants them.
#pragma unroll
      for (int n = 0; n < S::kKeys / 16; ++n) {
        p[m][n][0] = PackPair<typename S::Type>(s[m][2 * n][0], s[m][2 * n][1]);
        p[m][n][1] = PackPair<typename S::Type>(s[m][2 * n][2], s[m][2 * n][3]);
        p[m][n][2] = PackPair<typename S::Type>(s[m][2 * n + 1][0], s[m][2 * n + 1][1]);
        p[m][n][3] = PackPair<typename S::Type>(s[m][2 * n + 1][2], s[m][2 * n + 1][3]);
      }
    }
#pragma unroll
    for (int n = 0; n < S::kKeys / 16; ++n) {
#pragma unroll
      for (int d = 0; d < S::kHead / 16; ++d) {
        uint32_t b[4];
        LoadMatricesTransposed(b, At<S>(v_shared, n * 16 + (lane & 15), d * 2 + (lane >> 4)));
#pragma unroll
        for (int m = 0; m < S::kTiles; ++m) {
          Mma<typename S::Type>(o[m][2 * d], p[m][n], b[0], b[1]);
          Mma<typename S::Type>(o[m][2 * d + 1], p[m][n], b[2], b[3]);
        }
      }
    }
  }

  // The results go out through the shared memory of the warp's own queries, 16 bytes at a time.
  __syncwarp();
#pragma unroll
  for (int m = 0; m < S::kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + m * 16 + half * 8 + lane / 4;
      const float scale = __fdiv_rn(1.0f, QuadSum(running[m].sum[half]));
#pragma unroll
      for (int n = 0; n < S::kHead / 8; ++n) {
        const float low = Saturate<typename S::Type>(o[m][n][2 * half] * scale);
        const float high = Saturate<typename S::Type>(o[m][n][2 * half + 1] * scale);
        reinterpret_cast<uint32_t*>(At<S>(queries, row, n))[lane % 4] =
            PackPair<typename S::Type>(low, high);
      }
    }
  }
  __syncwarp();
  const bool vectors = IsVectorAligned(args.out, args.ldo, head_size);
  uint16_t* const out =
      static_cast<uint16_t*>(args.out) + (run.first_row + first) * args.ldo + column;
  for (int i = lane; i < S::kWarpRows * S::kChunks; i += 32) {
    const int row = warp_row + i / S::kChunks, d = i % S::kChunks * 8;
    if (row >= rows || d >= head_size) continue;
    const char* from = At<S>(queries, row, d / 8);
    if (vectors) {
      *reinterpret_cast<uint4*>(out + row * args.ldo + d) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int e = 0; e < 8 && d + e < head_size; ++e) {
        out[row * args.ldo + d + e] = reinterpret_cast<const uint16_t*>(from)[e];
      }
    }
  }
}

// Whether the kernel was compiled for an architecture with the products and fits the device; then it
// may have its shared memory. Asked once per device.
template <typename S>
bool CanRun(int device) {
  constexpr int kDevices = 16;
  enum : int8_t { kUnknown, kCan, kCannot };
  static std::atomic<int8_t> known[kDevices];
  if (device < kDevices && known[device].load() != kUnknown) return known[device].load() == kCan;
  const void* const kernel = reinterpret_cast<const void*>(MmaKernel<S>);
  int architecture = 0;
  const bool can = CompiledArchitecture(kernel, &architecture) == cudaSuccess &&
                   architecture >= (std::is_same<typename S::Type, __half>::value ? 75 : 80) &&
                   AllowSharedBytes(kernel, S::kSharedBytes) == cudaSuccess;
  if (!can) static_cast<void>(cudaGetLastError());  // said by the answer
  if (device < kDevices) known[device].store(can ? kCan : kCannot);
  return can;
}

template <typename S>
cudaError_t LaunchShapeOf(const PrefillAttentionArgs& args, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid =
      dim3(static_cast<unsigned>(args.cache.num_heads), static_cast<unsigned>(args.num_runs),
           static_cast<unsigned>((args.longest_run + S::kRows - 1) / S::kRows));
  shape.threads = kThreads;
  shape.shared_bytes = S::kSharedBytes;
  shape.overlap = args.overlap;
  return LaunchAllowed(MmaKernel<S>, shape, stream, args);
}

template <typename T>
using Small = Shape<T, 64, 64, 1>;
template <typename T>
using Large = Shape<T, 64, 64, 2>;
template <typename T>
using Wide = Shape<T, 128, 64, 1>;
template <typename T>
using Widest = Shape<T, 256, 32, 1>;

template <typename T>
bool CanRunHead(int head_size, int device) {
  if (head_size > 128) return CanRun<Widest<T>>(device);
  if (head_size > 64) return CanRun<Wide<T>>(device);
  return CanRun<Small<T>>(device) && CanRun<Large<T>>(device);
}

template <typename T>
cudaError_t LaunchType(const PrefillAttentionArgs& args, cudaStream_t stream) {
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const int head_size = args.cache.head_size;
  if (!CanRunHead<T>(head_size, device)) return PrefillAttentionFma(args, stream);
  if (head_size > 128) return LaunchShapeOf<Widest<T>>(args, stream);
  if (head_size > 64) return LaunchShapeOf<Wide<T>>(args, stream);
  const int64_t blocks = static_cast<int64_t>(args.cache.num_heads) * args.num_runs *
                         ((args.longest_run + Large<T>::kRows - 1) / Large<T>::kRows);
  if (blocks >= 2 * multiprocessors) return LaunchShapeOf<Large<T>>(args, stream);
  return LaunchShapeOf<Small<T>>(args, stream);
}

}  // namespace

cudaError_t PrefillAttention(const PrefillAttentionArgs& args, cudaStream_t stream) {
  if (args.num_runs <= 0 || args.longest_run <= 0) return cudaSuccess;
  if (args.cache.head_size > kMostHeadSize) return cudaErrorInvalidValue;
  if (args.dtype == args.cache.dtype) {
    if (args.dtype == DType::kFloat16) return LaunchType<__half>(args, stream);
#if FASTGEN_CUDA_HAS_11
    if (args.dtype == DType::kBFloat16) return LaunchType<BFloat16>(args, stream);
#endif
  }
  return PrefillAttentionFma(args, stream);
}

cudaError_t PrefillAttentionStores(DType dtype, const CacheLayout& cache, bool* stores) {
  *stores = false;
  if (dtype != cache.dtype || cache.head_size > kMostHeadSize || cache.head_size % 8 != 0)
    return cudaSuccess;
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  if (dtype == DType::kFloat16) *stores = CanRunHead<__half>(cache.head_size, device);
#if FASTGEN_CUDA_HAS_11
  if (dtype == DType::kBFloat16) *stores = CanRunHead<BFloat16>(cache.head_size, device);
#endif
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace fastgen
