// LinearRows: products of decode steps on the warpgroups of sm_90a. A step is a chain of such products of
// few microseconds each, bound by reading the weights, so a kernel asks for as much of its weights as its
// part of shared memory holds before the kernel before has ended. What is left when that has ended is
// short: the rows come as 16 bits, as they are multiplied, by the bulk engine; four warps multiply; the
// blocks of a cluster, each of which has a share of the columns, exchange their sums; each finishes some
// rows, and writes them as the next product wants them.
//
// A tile has 64 outputs, the m64 operand of the products, and up to 64 rows, the other operand. Columns
// come in chunks of 64, the width of a swizzled line, of which the blocks of a cluster have a share each.
// One warp has them copied: where there is room for the whole share, in one go and without anybody being
// told of the pieces, else through a ring. Four warps multiply, three read meanwhile what the norm needs,
// and all eight finish. How columns are cut depends on the shape of the weights alone; a share is summed in
// the order of its columns, and shares in theirs: the bits of a row's result do not depend on the rows
// beside it.
//
// Sums travel as the fragments that they are, two rows of 64 outputs as a unit, by stores that complete on a
// barrier of the block that finishes these rows. A norm is not waited for: see FoldNorm and PackedRows.
#include <algorithm>
#include <cmath>
#include <cstddef>

#include "cuda/linear_rows.h"

namespace fastgen {
namespace cuda {
namespace linear_rows {

#if FASTGEN_ARCH_HAS_WARPGROUP

struct Barriers {
  uint64_t there[kMaxStages], read[kMaxStages];
  uint64_t sums_there;
};

__device__ __forceinline__ int32_t ShareBegin(const RowsPlan& plan, int32_t rank) {
  return static_cast<int32_t>(static_cast<uint32_t>(plan.chunks) * rank >> plan.cluster_bits);
}

// Has the block's share of weights and rows copied; by one thread. Where all of it has room, it is waited
// for as one, and asked for in one if rows are whole chunks; the last of its chunks may not be used.
template <int kRows, bool kResident>
struct Supply {
  static constexpr int32_t kRowBytes = kRows * kChunkColumns * 2;

  const RowsPlan& plan;
  Barriers& barriers;
  uint32_t weights_to, rows_to;
  int32_t first_output, first_row, first_chunk, chunks;

  __device__ __forceinline__ void CopyWeights(int32_t chunk, int32_t stage) const {
    StreamTile(weights_to + stage * kWeightBytes, plan.weights, plan.whole, first_chunk + chunk,
               first_output, &barriers.there[kResident ? 0 : stage]);
  }
  __device__ __forceinline__ void CopyRows(int32_t chunk, int32_t stage) const {
    CopyTile(rows_to + stage * kRowBytes, plan.rows, plan.whole, first_chunk + chunk, first_row,
             &barriers.there[kResident ? 0 : stage]);
  }

  __device__ __forceinline__ void Early() const {
    if (kResident) {
      BarrierArriveExpect(&barriers.there[0], plan.stages * (kWeightBytes + kRowBytes));
    }
#pragma unroll 1
    for (int32_t i = 0; i < plan.stages; i += plan.copied_at_once) {
      if (!kResident) BarrierArriveExpect(&barriers.there[i], kWeightBytes + kRowBytes);
      CopyWeights(i, i);
    }
  }

  // The rows, once there are any, and what there was no room for.
  __device__ __forceinline__ void Rest() const {
    // By itself, for the copy to be asked for at once: all that it takes is known before.
    if (kResident && plan.copied_at_once == plan.stages) {
      WaitForGrid();
      CopyRows(0, 0);
      if (plan.next == NextStarts::kWithRows) LetNextGridStart();
      return;
    }
    WaitForGrid();
#pragma unroll 1
    for (int32_t i = 0; i < plan.stages; i += plan.copied_at_once) CopyRows(i, i);
    if (plan.next == NextStarts::kWithRows) LetNextGridStart();
    if (kResident) return;
    int32_t stage = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (int32_t i = plan.stages; i < chunks; ++i) {
      BarrierWait(&barriers.read[stage], parity);
      BarrierArriveExpect(&barriers.there[stage], kWeightBytes + kRowBytes);
      CopyWeights(i, stage);
      CopyRows(i, stage);
      if (++stage == plan.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
};

// The products of the block's share, whose tiles lie at these places. `barriers` is where they lie.
template <typename Element, int kRows, bool kResident>
__device__ __forceinline__ void MultiplyShare(uint32_t barriers, uint32_t weights, uint32_t rows,
                                              int32_t chunks, int32_t stages, int32_t lane,
                                              float (&sums)[kRows / 2]) {
  constexpr uint32_t kThere = offsetof(Barriers, there), kRead = offsetof(Barriers, read);
  if (kResident) {
    BarrierWait(barriers + kThere, 0);
    MultiplyChunks<Element, kRows>(&weights, &rows, chunks, sums);
    return;
  }
  constexpr uint32_t kWeightStep = kWeightBytes / 16;
  constexpr uint32_t kRowStep = Supply<kRows, kResident>::kRowBytes / 16;
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) sums[i] = 0.0f;
  int32_t stage = 0, before = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (int32_t i = 0; i < chunks; ++i) {
    BarrierWait(barriers + kThere + stage * 8, parity);
    WarpgroupFence();
    MultiplyChunk<Element, kRows>(DescriptorOf(weights + stage * kWeightStep),
                                  DescriptorOf(rows + stage * kRowStep), sums);
    WarpgroupCommit();
    WarpgroupWait<1>();
    if (i > 0 && lane == 0) BarrierArrive(barriers + kRead + before * 8);
    before = stage;
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  EndProducts(sums);
}

#endif  // FASTGEN_ARCH_HAS_WARPGROUP

// What is on the way from the end of the kernel before to the outputs is computed before that end, and kept: after it
// each instruction costs all that follow some cycles, in a kernel that has just begun more than in loops.
template <typename Element, int kRows, Epilogue kEpilogue, bool kResident>
__global__ void __launch_bounds__(kThreads, kRows <= 16 ? 3 : 2)
    RowsKernel(const FASTGEN_GRID_CONSTANT RowsPlan plan) {
#if FASTGEN_ARCH_HAS_WARPGROUP
  __shared__ Barriers barriers;
  if (plan.next == NextStarts::kAtOnce) LetNextGridStart();
  // A swizzled line's place follows from its address.
  char* const shared = SharedMemory() + (1024 - SharedAddress(SharedMemory()) % 1024) % 1024;
  const LinearRowsArgs& args = plan.args;
  const int32_t warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int32_t lane = Kept(threadIdx.x % 32);
  const int32_t blocks = Kept(1 << plan.cluster_bits);
  const int32_t rank = blockIdx.x & (blocks - 1);
  const int32_t tile = blockIdx.x >> plan.cluster_bits;
  const int32_t first_row = blockIdx.y * kRows;
  const int32_t rows = min(args.rows - first_row, kRows);
  const int32_t pairs = (rows + 1) / 2;
  const int32_t my_pairs = Kept((pairs - rank + blocks - 1) >> plan.cluster_bits);
  const int32_t first_chunk = ShareBegin(plan, rank);
  const int32_t chunks = Kept(ShareBegin(plan, rank + 1) - first_chunk);
  const uint32_t barriers_at = Kept(SharedAddress(&barriers));
  const uint32_t weights_at = SharedAddress(shared);
  const uint32_t rows_at = weights_at + plan.rows_at;

  const Supply<kRows, kResident> supply = {
      plan, barriers, weights_at, rows_at, tile * kTileOutputs, first_row, first_chunk, chunks};
  if (warp == kSupplyWarp && ElectLane()) {
    for (int32_t i = 0; i < plan.stages; ++i) {
      BarrierInit(&barriers.there[i], 1);
      BarrierInit(&barriers.read[i], kMultipliers / 32);
    }
    // Besides the norm: bytes from a cluster's blocks, or a lone block's warps.
    BarrierInit(&barriers.sums_there, kNormWarps + (blocks > 1 ? 1 : kMultipliers / 32));
    BarrierInitDone();
    if (blocks > 1) BarrierArriveExpect(&barriers.sums_there, my_pairs * blocks * kPairBytes);
    supply.Early();
    PrefetchMap(plan.rows);
  }
  __syncwarp();

  // What no kernel writes is read before the kernel before has ended.
  const Outputs outputs = OutputsOf<kEpilogue>(plan, tile * kTileOutputs + FirstOutput(lane));
  CachePlace* const places = reinterpret_cast<CachePlace*>(shared + plan.places_at);
  NormSums* const norms = reinterpret_cast<NormSums*>(shared + plan.norms_at);
  // The block's pairs of rows are dealt out to warps, the first to those that do not multiply.
  const int32_t first_pair = warp ^ 6;
  Target target;
  const auto aim = [&](int32_t pair) {
    target.Set<kEpilogue>(plan, outputs, tile, rank, first_row, rows, pair, weights_at, lane);
  };
  aim(first_pair);
  target.Keep<kEpilogue>();
  // A lane has sums of two neighbouring rows, of outputs lane / 4 and 8 further of its warp's 16.
  const uint32_t sums_to =
      Kept(weights_at + plan.sums_at + rank * kPairBytes + (warp * 8 + lane / 4) * 16 +
           (lane % 4 & ~(blocks - 1)) * kPairBytes);
  const int32_t sums_block = Kept(lane & (min(blocks, 4) - 1));
  const uint32_t weights_place = Kept(TilePlace(weights_at)), rows_place = Kept(TilePlace(rows_at));
  const int32_t pairs_left = Kept(pairs - lane % 4);
  const int32_t stages = kResident ? 0 : Kept(plan.stages);
  const int32_t count = min(args.w.out - tile * kTileOutputs, kTileOutputs);
  float residual[kLaneOutputs] = {};
  const auto read_residual = [&] {
    constexpr int kRead = kEpilogue == Epilogue::kResidual ? kLaneOutputs : 0;
#pragma unroll
    for (int i = 0; i < kRead; i += 2) {
      if (Further(i) + 1 < target.left) {
        const float2 x = __ldcg(reinterpret_cast<const float2*>(target.y + Further(i)));
        residual[i] = x.x, residual[i + 1] = x.y;
      } else if (Further(i) < target.left) {
        residual[i] = __ldcg(target.y + Further(i));
      }
    }
  };
  if (args.first) WaitForGrid();
  __syncthreads();
  if (plan.next == NextStarts::kReady) LetNextGridStart();
  if (blocks > 1) ClusterArrive();
  // Nobody but the warp waits for what it reads, which may be one read after another.
  if (kEpilogue == Epilogue::kQkv && warp == kWarps - 1) {
#pragma unroll 1
    for (int32_t local = lane; local < 2 * my_pairs; local += 32) {
      const int32_t row = RowOf(plan, rank, local);
      if (row >= rows) continue;
      if (args.places != nullptr) {
        const RowPlace& place = args.places[first_row + row];
        places[local] = CachePlace{place.page, place.in_page};
      } else {
        places[local] = PlaceOf(args.row_list[first_row + row], args.slots);
      }
    }
  }
  if (blocks > 1) ClusterWait();

  if (warp == kSupplyWarp) {
    if (ElectLane()) supply.Rest();
    __syncwarp();
  }
  WaitForGrid();
  read_residual();
  // Those who multiply come last: what all wait for goes on without a jump.
  if (warp > kSupplyWarp) {
    if (args.norm_sums != nullptr) {
      const auto row_of = [&](int32_t local) {
        return first_row + min(RowOf(plan, rank, local), rows - 1);
      };
      ReadNorms(args, plan.inverse_in, row_of, 2 * my_pairs, warp, lane, norms);
    }
    __syncwarp();
    if (lane == 0) BarrierArrive(barriers_at + offsetof(Barriers, sums_there));
    if (warp == kWarps - 1) PrefetchPieces(args.ahead, lane);
  }
  if (warp < kSupplyWarp) {
    float sums[kRows / 2];
    MultiplyShare<Element, kRows, kResident>(barriers_at, weights_place, rows_place, chunks, stages,
                                             lane, sums);
    const uint32_t there = barriers_at + offsetof(Barriers, sums_there);
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      if (4 * j >= pairs_left) break;
      // With eight blocks four pairs are half a round.
      const int32_t round = blocks == 8 ? j / 2 * 8 : 4 * j;
      const int32_t block = blocks == 8 ? j % 2 * 4 + sums_block : sums_block;
      const uint32_t to = sums_to + round * kPairBytes;
      const float4 mine =
          make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
      if (blocks > 1) {
        StoreAsync(AddressInBlock(to, block), mine, AddressInBlock(there, block));
      } else {
        StoreShared4(to, mine);
      }
    }
    if (blocks == 1) {
      __syncwarp();
      if (lane == 0) BarrierArrive(there);
    }
  }
  if (first_pair >= my_pairs) return;
  BarrierWait(barriers_at + offsetof(Barriers, sums_there), 0);
#pragma unroll 1
  for (int32_t pair = first_pair;;) {
    FinishRow<Element, kEpilogue>(plan, outputs, target, blocks, count, residual, lane);
    pair += kWarps;
    // Up to 16 rows a warp has no second pair.
    if (kRows / 2 <= kWarps || pair >= my_pairs) break;
    aim(pair);
    read_residual();
  }
#endif
}

template <typename Element>
__global__ void __launch_bounds__(256) PackKernel(const PackRowsArgs args) {
#if FASTGEN_ARCH_HAS_PERSISTENT
  LetNextGridStart();
  WaitForGrid();
  const int32_t parts = (args.size + kPartColumns - 1) / kPartColumns;
  for (int32_t part = threadIdx.x / 32 * 2; part < parts; part += blockDim.x / 16) {
    PackParts<Element>(args.x + blockIdx.x * args.ldx, args.size, args.weight, part, args.out,
                       blockIdx.x, threadIdx.x % 32);
  }
#endif
}

// ---- host ---------------------------------------------------------------------------------------

constexpr int32_t kMaxClusterBits = 3;

int32_t ClusterBits(const Matrix& w) {
  constexpr int32_t kBlocks = 160;
  const int32_t tiles = Quotient(w.out, kTileOutputs);
  const int32_t chunks = Quotient(w.in, kChunkColumns);
  int32_t bits = 0;
  while (bits < kMaxClusterBits && tiles << (bits + 1) <= kBlocks && chunks >> (bits + 1) > 0) {
    ++bits;
  }
  return bits;
}

cudaError_t MakeMaps(const LinearRowsArgs& args, int32_t kernel_rows, int32_t chunks,
                     TensorMap* weights, TensorMap* rows) {
  TiledMatrix w;
  w.data = args.w.data;
  w.row_bytes = args.w.row_bytes;
  w.rows = args.w.out;
  w.columns = args.w.in;
  w.tile_rows = kTileOutputs;
  w.chunks = chunks;
  const cudaError_t status = MakeTensorMap(w, weights);
  if (status != cudaSuccess) return status;
  TiledMatrix x;
  x.data = args.x.data;
  x.row_bytes = args.x.stride * 2;
  x.rows = args.rows;
  x.columns = args.w.in;
  x.tile_rows = kernel_rows;
  x.chunks = chunks;
  return MakeTensorMap(x, rows);
}

// Whether the kernel was compiled for a device that has what it needs: it has barriers then.
cudaError_t HasKernel(bool* has) {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(
      &attributes, reinterpret_cast<const void*>(RowsKernel<__half, 8, Epilogue::kStore, true>));
  *has = status == cudaSuccess && attributes.sharedSizeBytes > 0;
  return status;
}

// Fills the plan's sizes; returns the bytes of shared memory.
int64_t Arrange(int32_t kernel_rows, RowsPlan* plan) {
  const int32_t blocks = 1 << plan->cluster_bits;
  const int32_t share = Quotient(plan->chunks, blocks);
  const int64_t row_bytes = int64_t{kernel_rows} * kChunkColumns * 2;
  // Of all shares; pairs are dealt out by blocks, and the last round may be no whole one.
  const int64_t sums = int64_t{Quotient(kernel_rows / 2, blocks)} * blocks * kPairBytes;
  const int32_t locals = Quotient(kernel_rows / 2, blocks) * 2;
  const int64_t rest =
      sums + locals * static_cast<int64_t>(sizeof(NormSums) + sizeof(CachePlace)) + 1024;
  const int64_t room = (kSharedBytes - kFixedBytes - rest) / (kWeightBytes + row_bytes);
  plan->stages = static_cast<int32_t>(std::min({room, int64_t{share}, int64_t{kMaxStages}}));
  plan->resident = plan->stages >= share;
  plan->whole = plan->args.w.in % kChunkColumns == 0;
  plan->copied_at_once = plan->resident && plan->whole ? plan->stages : 1;
  plan->rows_at = plan->stages * kWeightBytes;
  plan->sums_at = static_cast<int32_t>(plan->rows_at + plan->stages * row_bytes);
  plan->norms_at = plan->sums_at + static_cast<int32_t>(sums);
  plan->places_at = plan->norms_at + locals * static_cast<int32_t>(sizeof(NormSums));
  return plan->places_at + locals * static_cast<int64_t>(sizeof(CachePlace)) + 1024;
}

NextStarts NextStartsOf(const LinearRowsArgs& args) {
  if (args.rows > 32) return NextStarts::kWithRows;
  const bool at_once = args.rows <= 8 || args.after_attention;
  return at_once && !args.first ? NextStarts::kAtOnce : NextStarts::kReady;
}

template <typename Element, int kRows, Epilogue kEpilogue>
cudaError_t LaunchRows(RowsPlan* plan, cudaStream_t stream) {
  const LinearRowsArgs& args = plan->args;
  LaunchShape shape;
  plan->next = NextStartsOf(args);
  const int64_t shared_bytes = Arrange(kRows, plan);
  // Where two blocks have room all take half: beside blocks of other sizes the next kernel's do not find room
  // everywhere, and crowd where they do.
  constexpr int64_t kLeast = kRows == 16 || kRows == 32 ? kSharedBytes - kFixedBytes : 0;
  shape.shared_bytes = static_cast<size_t>(std::max(shared_bytes, kLeast));
  const cudaError_t status =
      MakeMaps(args, kRows, plan->copied_at_once, &plan->weights, &plan->rows);
  if (status != cudaSuccess) return status;
  shape.grid = dim3(static_cast<unsigned>(Quotient(args.w.out, kTileOutputs) << plan->cluster_bits),
                    static_cast<unsigned>(Quotient(args.rows, kRows)));
  shape.threads = kThreads;
  shape.cluster = 1 << plan->cluster_bits;
  shape.packed = PackedClusters(args.rows);
  shape.overlap = args.overlap;
  return plan->resident
             ? Launch(RowsKernel<Element, kRows, kEpilogue, true>, shape, stream, *plan)
             : Launch(RowsKernel<Element, kRows, kEpilogue, false>, shape, stream, *plan);
}

template <typename Element, Epilogue kEpilogue>
cudaError_t LaunchFor(RowsPlan* plan, cudaStream_t stream) {
  const int32_t rows = plan->args.rows;
  if (rows <= 8) return LaunchRows<Element, 8, kEpilogue>(plan, stream);
  if (rows <= 16) return LaunchRows<Element, 16, kEpilogue>(plan, stream);
  if (rows <= 32) return LaunchRows<Element, 32, kEpilogue>(plan, stream);
  return LaunchRows<Element, kMaxRows, kEpilogue>(plan, stream);
}

template <typename Element>
cudaError_t LaunchWith(RowsPlan* plan, cudaStream_t stream) {
  switch (plan->args.epilogue) {
    case Epilogue::kStore: return LaunchFor<Element, Epilogue::kStore>(plan, stream);
    case Epilogue::kGelu: return LaunchFor<Element, Epilogue::kGelu>(plan, stream);
    case Epilogue::kResidual: return LaunchFor<Element, Epilogue::kResidual>(plan, stream);
    case Epilogue::kQkv: return LaunchFor<Element, Epilogue::kQkv>(plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace linear_rows

cudaError_t LinearRowsSupported(DType weights, int32_t normed_columns, bool* supported) {
  using namespace linear_rows;
  *supported = false;
  // Where a norm is of few columns, they may be so alike that differences of sums are all rounding.
  constexpr int32_t kNormColumns = 32;
  if (!FASTGEN_CUDA_HAS_PERSISTENT || normed_columns < kNormColumns) return cudaSuccess;
  if (weights != DType::kFloat16 && weights != DType::kBFloat16) return cudaSuccess;
  bool has = false;
  cudaError_t status = HasKernel(&has);
  if (status != cudaSuccess || !has || !TensorMapsSupported()) return status;
  DeviceLimits limits;
  status = GetDeviceLimits(&limits);
  if (status != cudaSuccess) return status;
  static KnownClusters known;
  const void* const kernel =
      reinterpret_cast<const void*>(RowsKernel<__half, 8, Epilogue::kStore, true>);
  limits.shared_bytes -= kFixedBytes;
  *supported = ClustersAtOnce(kernel, kMaxClusterBits, kThreads, limits, &known) > 0;
  return cudaSuccess;
}

cudaError_t LinearRows(const LinearRowsArgs& args, cudaStream_t stream) {
  using namespace linear_rows;
  if (args.rows == 0 || args.w.out == 0) return cudaSuccess;
  RowsPlan plan = {};
  plan.args = args;
  if (args.epilogue == Epilogue::kQkv) {
    plan.query_factor = 1.0f / std::sqrt(static_cast<float>(args.cache.head_size));
    plan.head_size = DivisorOf(args.cache.head_size);
  }
  plan.chunks = Quotient(args.w.in, kChunkColumns);
  plan.inverse_in = 1.0f / static_cast<float>(args.w.in);
  plan.cluster_bits = ClusterBits(args.w);
  if (args.cluster > 0) {
    plan.cluster_bits = 0;
    while (1 << plan.cluster_bits < args.cluster && plan.cluster_bits < kMaxClusterBits) {
      ++plan.cluster_bits;
    }
  }
  switch (args.w.dtype) {
    case DType::kFloat16: return LaunchWith<__half>(&plan, stream);
    case DType::kBFloat16: return LaunchWith<BFloat16>(&plan, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t PackRows(const PackRowsArgs& args, cudaStream_t stream) {
  using namespace linear_rows;
  if (args.rows == 0) return cudaSuccess;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(args.rows));
  shape.threads = 256;
  shape.overlap = args.overlap;
  switch (args.dtype) {
    case DType::kFloat16: return Launch(PackKernel<__half>, shape, stream, args);
    case DType::kBFloat16: return Launch(PackKernel<BFloat16>, shape, stream, args);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace cuda
}  // namespace fastgen
