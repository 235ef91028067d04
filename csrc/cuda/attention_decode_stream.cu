// Attention of decode steps where there are bulk copies (sm_90): one block per multiprocessor,
// whose warps each stream their parts' keys and values through a ring in shared memory, ahead of the part
// they work on. So memory waits neither for page tables nor for the end of a head. Which parts they
// are the step's plan says: in runs of neighbours, so that a query is taken up once for the parts of its
// head, and warps wait for each other once in a run. A head that blocks share is put together through
// device memory by the block that finishes last.
//
// What is in the cache from steps before is asked for before the kernel before has ended.
#include <algorithm>
#include <type_traits>

#include "cuda/attention_decode.h"
#include "cuda/attention_decode_worker.h"
#include "cuda/hopper.h"
#include "cuda/launch.h"
#include "cuda/linear_weights.h"
#include "cuda/row.h"

namespace fastgen {
namespace cuda {
namespace {

constexpr int32_t kMostPieces = 8;

struct StreamTask {
  DecodeAttentionArgs args;
  DecodePlan plan;
  int64_t layer_at, values_at;  // bytes from a page to the layer's keys, and from these to values
  int32_t row_bytes;            // of a position
  int32_t pieces;   // of a warp's ring; a piece is the keys or values of a head in a page
  int32_t results;  // parts whose results are kept
  int32_t queries_at, results_at, barriers_at;  // in shared memory; the rings are first
};

// The kernel's flavours: how warps work, how many there are, pieces of their rings, at most and by the step's
// rows, and parts of a run.
template <typename S, int kWarps_, int kRun_ = 1>
struct OnFma {
  static constexpr int kWarps = kWarps_;
  static constexpr int kPieces = kMostPieces;
  static constexpr int PiecesOf(int32_t) { return kPieces; }
  static constexpr int kRun = kRun_;
#if FASTGEN_ARCH_HAS_PERSISTENT
  using Worker = FmaWorker<S>;
#endif
};

template <typename T, int kChunks, bool kFull, int kWarps_, int kPieces_ = kMostPieces,
          int kRun_ = 1>
struct OnMma {
  static constexpr int kWarps = kWarps_;
  static constexpr int kPieces = kPieces_;
  // Of few rows warps have few pages: what they ask for early is in the way of what others wait for.
  static constexpr int PiecesOf(int32_t rows) {
    return !kFull || rows > 32 ? kPieces : rows > 16 ? 3 : 2;
  }
  static constexpr int kRun = kRun_;
#if FASTGEN_ARCH_HAS_PERSISTENT
  using Worker = MmaWorker<T, kChunks, kFull>;
#endif
};

#if FASTGEN_ARCH_HAS_PERSISTENT

__device__ __forceinline__ const DecodeItem* ItemOf(const StreamTask& task, int round, int warp,
                                                    int warps) {
  return task.plan.items + (static_cast<int64_t>(round) * gridDim.x + blockIdx.x) * warps + warp;
}

// Asks for keys and values in the order in which the warp needs them, a piece at a time.
struct Supply {
  const StreamTask& task;
  char* ring;
  uint64_t* barriers;
  int warp, warps;

  DecodeItem item;
  int round, left;  // positions of `item`
  const char* page;
  int kind, slot;

  // The row's own position in the piece in slot `lane`.
  const char* late_from;
  uint32_t late_to;  // from the ring's begin

  __device__ __forceinline__ void Start(const DecodeItem& first) {
    item = first;
    round = kind = slot = 0;
    left = item.positions;
    page = item.page;
    late_from = nullptr;
    late_to = 0;
  }

  // kEarly: what the kernel before writes is left for AskLate, and `second` is the second item.
  template <bool kEarly>
  __device__ __forceinline__ void Ask(int lane, const DecodeItem& second = DecodeItem()) {
    if (left <= 0) return;
    const int row_bytes = task.row_bytes;
    const char* const from = page + task.layer_at +
                             static_cast<int64_t>(item.head) * kPage * row_bytes +
                             (kind == 0 ? 0 : task.values_at);
    const uint32_t to = slot * kPage * row_bytes;
    const bool late = kEarly && (item.flags & kItemNewest) != 0 && left <= kPage;
    const int bytes = (min(kPage, left) - (late ? 1 : 0)) * row_bytes;
    if (ElectLane()) {
      BarrierArriveExpect(barriers + slot, bytes);
      if (bytes > 0) BulkCopy(ring + to, from, bytes, barriers + slot, ReadOncePolicy());
    }
    if (late && lane == slot) {
      late_from = from + bytes;
      late_to = to + bytes;
    }
    slot = slot + 1 == task.pieces ? 0 : slot + 1;
    kind ^= 1;
    if (kind == 1) return;
    left -= kPage;
    if (left > 0) {
      page = *item.later++;
    } else if ((item.flags & kItemMore) != 0) {
      ++round;
      item = kEarly && round == 1 ? second : *ItemOf(task, round, warp, warps);
      left = item.positions;
      page = item.page;
    }
  }

  // Copies what the first Asks left out; done for the warp after WaitCopies and __syncwarp.
  __device__ __forceinline__ void AskLate(int lane) const {
#pragma unroll 1
    for (int s = 0; s < task.pieces; ++s) {
      const uint64_t from =
          __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(late_from), s);
      const uint32_t to = __shfl_sync(kAllLanes, late_to, s);
      if (from == 0) continue;
      for (int byte = lane * 16; byte < task.row_bytes; byte += 512) {
        StreamCopy16(ring + to + byte, reinterpret_cast<const char*>(from) + byte, true);
      }
    }
  }
};

// Writes a row's numbers, from one on: as float32, or packed.
struct StoreOut {
  const DecodeAttentionArgs& args;
  int64_t at;

  __device__ StoreOut(const DecodeAttentionArgs& a, int row, int first)
      : args(a), at(row * a.ldo + first) {}
  __device__ void operator()(int d, float x) const {
    if (args.packed == nullptr) {
      args.out[at + d] = x;
      return;
    }
    const float unit = args.cache.dtype == DType::kFloat16 ? 1.0f / linear_weights::kUnit : 1.0f;
    StoreElement(args.cache.dtype, args.packed, at + d, __fmul_rn(x, unit));
  }
};

// Puts the parts of a head together that blocks share, once all have arrived; by one warp.
__device__ inline void FinishCutHead(const StreamTask& task, const DecodeItem& item, int lane) {
  const DecodeAttentionArgs& args = task.args;
  const int head_size = args.cache.head_size;
  const int64_t unit = static_cast<int64_t>(item.row) * args.cache.num_heads + item.head;
  const float* const sums = args.partial + unit * kDecodeParts * (head_size + 2);
  const float* const stats = sums + kDecodeParts * head_size;
  bool last = false;
  if (lane == 0) {
    __threadfence();
    last = atomicAdd(args.arrived + unit, item.count) + item.count == item.parts;
    __threadfence();
  }
  if (!__any_sync(kAllLanes, last)) return;
  if (lane == 0) args.arrived[unit] = 0;
  // What other blocks wrote is past the first-level cache.
  CombineParts<kDecodeParts>(
      [=](int p) { return make_float2(__ldcg(stats + 2 * p), __ldcg(stats + 2 * p + 1)); },
      [=](int p, int d) { return __ldcg(sums + p * head_size + d); }, item.parts, head_size, 0, 32,
      lane, StoreOut(args, item.row, item.head * head_size));
}

#endif  // FASTGEN_ARCH_HAS_PERSISTENT

template <typename Flavour>
__global__ void __launch_bounds__(Flavour::kWarps * 32) StreamKernel(const StreamTask task) {
#if FASTGEN_ARCH_HAS_PERSISTENT
  constexpr int kWarps = Flavour::kWarps;
  static_assert(Flavour::kRun <= 32, "a bit for each round of a run");
  const DecodeAttentionArgs& args = task.args;
  char* const shared = SharedMemory();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int head_size = args.cache.head_size;
  const int piece_bytes = kPage * task.row_bytes;
  char* const ring = shared + warp * task.pieces * piece_bytes;
  uint64_t* const barriers =
      reinterpret_cast<uint64_t*>(shared + task.barriers_at) + warp * task.pieces;

  LetNextGridStart();
  const DecodeItem* at = ItemOf(task, 0, warp, kWarps);
  DecodeItem item = *at;
  Supply supply = {task, ring, barriers, warp, kWarps};
  supply.Start(item);
  // There is room for it, if nothing else.
  const DecodeItem second = *ItemOf(task, 1, warp, kWarps);
  if (lane < task.pieces) {
    BarrierInit(barriers + lane, 1);
    BarrierInitDone();
  }
  __syncwarp();
#pragma unroll 1
  for (int i = 0; i < task.pieces; ++i) supply.Ask<true>(lane, second);
  WaitForGrid();

  // Two queries of a warp: the one it works with, and the next.
  float* const queries = reinterpret_cast<float*>(shared + task.queries_at) + warp * 2 * head_size;
  float* query = queries;  // the next
  const auto copy_query = [&](int row, int head) {
    const float* const from = args.q + row * args.ldq + static_cast<int64_t>(head) * head_size;
    for (int d = lane; d < head_size; d += 32) StreamCopy4(query + d, from + d, 4);
    CommitCopies();
  };
  supply.AskLate(lane);
  bool first = true;
  if (item.positions > 0) copy_query(item.row, item.head);

  float* const sums = reinterpret_cast<float*>(shared + task.results_at);
  float* const stats = sums + task.results * head_size;
  int slot = 0;
  uint32_t parity = 0;
  const auto next_slot = [&] {
    if (++slot == task.pieces) {
      slot = 0;
      parity ^= 1;
    }
  };
  const auto ask = [&] {
    __syncwarp();
    supply.Ask<false>(lane);
  };
  const auto wait = [&] { BarrierWait(barriers + slot, parity); };
  typename Flavour::Worker worker(lane);
  const auto attend = [&](auto only, int positions) {
    SharedPage page;
    page.row_bytes = task.row_bytes;
    page.positions = min(kPage, positions);
    page.keys = ring + slot * piece_bytes;
    wait();
    next_slot();
    page.values = ring + slot * piece_bytes;
    worker.template Page<decltype(only)::value>(page, lane, ask, wait);
    if (positions < kPage) FenceForBulkEngine();  // Page may have written behind them
    ask();
    next_slot();
  };
  // Cut heads that the warp ends: at most the block's first and last.
  const DecodeItem* first_cut = nullptr;
  const DecodeItem* last_cut = nullptr;
  bool query_wanted = item.positions > 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
#pragma unroll 1
  for (bool more = true; more;) {
    const DecodeItem* const run = at;
    uint32_t ended = 0;  // of the run
#pragma unroll 1
    for (int i = 0; i < Flavour::kRun && more; ++i) {
      at += stride;
      more = (item.flags & kItemMore) != 0;
      if (item.positions > 0) {
        if (query_wanted) {
          WaitCopies<0>();
          if (first) FenceForBulkEngine();
          first = false;
          __syncwarp();
          worker.Query(query, head_size, lane);
          query = query == queries ? queries + head_size : queries;
        }
        query_wanted = (item.flags & kItemTurns) != 0;
        if (query_wanted) copy_query(at->row, at->head);
        worker.Clear();
        if (item.positions <= kPage) {
          attend(std::true_type(), item.positions);
        } else {
#pragma unroll 1
          for (int left = item.positions; left > 0; left -= kPage) attend(std::false_type(), left);
        }
        float* part_sums = sums + item.result * head_size;
        float* part_stats = stats + 2 * item.result;
        if ((item.flags & kItemCut) != 0) {
          const int64_t unit = static_cast<int64_t>(item.row) * args.cache.num_heads + item.head;
          part_sums = args.partial + unit * kDecodeParts * (head_size + 2) + item.part * head_size;
          part_stats = part_sums + (kDecodeParts - item.part) * head_size + 2 * item.part;
        }
        worker.Store(part_sums, part_stats, head_size, lane);
        if ((item.flags & kItemEnds) != 0) ended |= 1u << i;
      }
      item = *at;  // there is room for it, if nothing else
    }
    __syncthreads();
#pragma unroll 1
    for (; ended != 0; ended &= ended - 1) {
      const DecodeItem* const end = run + (__ffs(ended) - 1) * stride;
      if ((end->flags & kItemCut) != 0) {
        (first_cut == nullptr ? first_cut : last_cut) = end;
        continue;
      }
      const int start = end->result - end->part, results = task.results, last = end->parts - 1;
      const auto place = [=](int p) {
        const int at = start + min(p, last);
        return at < 0 ? at + results : at;
      };
      const auto stats_of = [=](int p) {
        const float* const from = stats + 2 * place(p);
        return make_float2(from[0], from[1]);
      };
      CombineParts<8>(
          stats_of, [=](int p, int d) { return sums[place(p) * head_size + d]; }, end->parts,
          head_size, 0, 32, lane, StoreOut(args, end->row, end->head * head_size));
    }
  }

#pragma unroll 1
  while (first_cut != nullptr) {
    FinishCutHead(task, *first_cut, lane);
    first_cut = last_cut;
    last_cut = nullptr;
  }
  const int empty = task.plan.empty_rows[0];
  for (int i = blockIdx.x; i < empty; i += gridDim.x) {
    const StoreOut store(args, task.plan.empty_rows[1 + i], 0);
    for (int d = threadIdx.x; d < args.cache.num_heads * head_size; d += blockDim.x) store(d, 0.0f);
  }
#endif
}

// ---- host ---------------------------------------------------------------------------------------

template <typename Call>
cudaError_t WithFlavour(const CacheLayout& cache, const Call& call) {
  if (cache.head_size > kMostHeadSize) return cudaErrorInvalidValue;
  switch (cache.dtype) {
    case DType::kFloat32: {
      const int chunks = cache.head_stride / 4;
      if (chunks <= 8) return call(OnFma<DecodeShape<float, 8, 1, 8>, 16>());
      if (chunks <= 16) return call(OnFma<DecodeShape<float, 16, 1, 8>, 8, 4>());
      if (chunks <= 32) return call(OnFma<DecodeShape<float, 32, 1, 4>, 4>());
      return call(OnFma<DecodeShape<float, 32, 2, 4>, 2>());
    }
    case DType::kFloat16: {
      const int chunks = cache.head_stride / 8;
      if (cache.head_size == 64) return call(OnMma<__half, 8, true, 12, 4, 6>());
      if (chunks <= 8) return call(OnMma<__half, 8, false, 16, 2>());
      if (chunks <= 16) return call(OnMma<__half, 16, false, 8>());
      return call(OnFma<DecodeShape<__half, 32, 1, 4>, 4>());
    }
    case DType::kBFloat16: {
      const int chunks = cache.head_stride / 8;
      if (cache.head_size == 64) return call(OnMma<BFloat16, 8, true, 12, 4, 6>());
      if (chunks <= 8) return call(OnMma<BFloat16, 8, false, 12>());
      if (chunks <= 16) return call(OnMma<BFloat16, 16, false, 8>());
      return call(OnFma<DecodeShape<BFloat16, 32, 1, 4>, 4>());
    }
    default: return cudaErrorInvalidValue;
  }
}

template <typename Flavour>
StreamGrid GridOf(const DeviceLimits& limits) {
  StreamGrid grid;
  grid.blocks = limits.multiprocessors;
  grid.warps = Flavour::kWarps;
  grid.run = Flavour::kRun;
  return grid;
}

// Shares shared memory out; returns the bytes, 0 where it does not suffice. It is most of a
// multiprocessor's, so that no two blocks meet on one.
template <typename Flavour>
int32_t Arrange(const CacheLayout& cache, const DeviceLimits& limits, int32_t pieces,
                StreamTask* task) {
  constexpr int32_t kWarps = Flavour::kWarps;
  task->row_bytes = cache.head_stride * (cache.dtype == DType::kFloat32 ? 4 : 2);
  const int32_t piece_bytes = kPage * task->row_bytes;
  task->results = GridOf<Flavour>(limits).results();
  const int32_t query_bytes = (kWarps * 2 * cache.head_size * 4 + 15) / 16 * 16;
  const int32_t result_bytes = (task->results * (cache.head_size + 2) * 4 + 15) / 16 * 16;
  task->pieces = std::min(
      pieces, (limits.shared_bytes - query_bytes - result_bytes) / (kWarps * (piece_bytes + 8)));
  if (task->pieces < 2) return 0;
  task->queries_at = kWarps * task->pieces * piece_bytes;
  task->results_at = task->queries_at + query_bytes;
  task->barriers_at = task->results_at + result_bytes;
  const int32_t bytes = task->barriers_at + kWarps * task->pieces * 8;
  return std::max(bytes, limits.shared_bytes / 2 + 1024);
}

struct AskGrid {
  const CacheLayout& cache;
  StreamGrid* grid;

  template <typename Flavour>
  cudaError_t operator()(Flavour) const {
    int architecture = 0;
    cudaError_t status =
        CompiledArchitecture(reinterpret_cast<const void*>(StreamKernel<Flavour>), &architecture);
    if (status != cudaSuccess || architecture < 90) return status;
    DeviceLimits limits;
    status = GetDeviceLimits(&limits);
    if (status != cudaSuccess) return status;
    StreamTask task;
    if (Arrange<Flavour>(cache, limits, Flavour::kPieces, &task) == 0) return cudaSuccess;
    *grid = GridOf<Flavour>(limits);
    return cudaSuccess;
  }
};

struct LaunchStream {
  const DecodeAttentionArgs& args;
  cudaStream_t stream;

  template <typename Flavour>
  cudaError_t operator()(Flavour) const {
    DeviceLimits limits;
    cudaError_t status = GetDeviceLimits(&limits);
    if (status != cudaSuccess) return status;
    status = PreferSharedMemory(reinterpret_cast<const void*>(StreamKernel<Flavour>));
    if (status != cudaSuccess) return status;
    const StreamGrid grid = GridOf<Flavour>(limits);
    StreamTask task;
    const int32_t bytes = Arrange<Flavour>(args.cache, limits, Flavour::PiecesOf(args.rows), &task);
    if (bytes == 0) return cudaErrorInvalidValue;
    task.args = args;
    PlaceDecodePlan(grid, args.cache, args.rows, args.plan, &task.plan);
    const int64_t kind_bytes = static_cast<int64_t>(args.cache.num_heads) * kPage * task.row_bytes;
    task.layer_at = args.layer * 2 * kind_bytes;
    task.values_at = kind_bytes;
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(grid.blocks));
    shape.threads = grid.warps * 32;
    shape.shared_bytes = static_cast<size_t>(bytes);
    shape.overlap = args.overlap;
    return Launch(StreamKernel<Flavour>, shape, stream, task);
  }
};

}  // namespace

cudaError_t GetStreamGrid(const CacheLayout& cache, StreamGrid* grid) {
  *grid = StreamGrid();
  if (!FASTGEN_CUDA_HAS_PERSISTENT) return cudaSuccess;
  return WithFlavour(cache, AskGrid{cache, grid});
}

cudaError_t DecodeAttentionStream(const DecodeAttentionArgs& args, cudaStream_t stream) {
  return WithFlavour(args.cache, LaunchStream{args, stream});
}

}  // namespace cuda
}  // namespace fastgen
