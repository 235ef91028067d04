// Linear on the tensor cores of sm_90, by clusters of blocks. A decode step is a chain of such products
// of a few microseconds each, so all that can be is done before the kernel before has ended: a block
// asks for as much of its weights as its part of shared memory holds, most often all of them, and works
// out where its inputs lie and its outputs go. What is left is short: a block reads its columns of x,
// once, as one number of 16 bits; its warps multiply and send their sums to the blocks of the cluster,
// each of which adds up and finishes a part of the outputs.
//
// A cluster has tiles of outputs, one at a time. Columns are cut into shares of whole steps, one for
// each block of the cluster and, of a block, for each of 1 << share_bits warps. Outputs are the m16
// operand of m16n8k16, rows of x the n8 operand: lane 4 g + m reads 16 bytes of outputs g and g + 8; a
// dot product may take its columns in any order, so they go to the fragments as they come, and x is
// laid out in shared memory to match. A share is summed in two chains of products, which are added;
// shares are added in order. How columns are cut depends on the shape and type of the weights alone, and
// so do the bits of a row's result.
//
// Sums travel as the fragments that they are, in units of 16 outputs by 8 rows, by stores that complete
// on a barrier of the block that they go to: nobody waits for the whole cluster.
//
// A norm is not waited for. With w and b its weight and bias, and sums_n = sum_k W_nk w_k,
//   y_n = scale * (sum_k W_nk w_k x_k - mean * sums_n) + bias_n,
// and mean and scale follow from sums of each block's columns, which travel like the others. Where the
// mean is large beside the deviation, x as 16 bits has lost the difference before its sums do.
#include "cuda/linear_cluster.h"

#include <algorithm>

#include "cuda/linear_cluster_outputs.h"
#include "cuda/linear_cluster_rows.h"

namespace fastgen {
namespace cuda {
namespace linear_cluster {

template <typename W, int kRowTiles>
__global__ void __launch_bounds__(kMaxThreads, kRowTiles* W::kPieces == 1 ? 3 : 2)
    ClusterKernel(const ClusterPlan plan) {
#if FASTGEN_ARCH_HAS_PERSISTENT
  using Element = typename W::Element;
  constexpr int32_t kStepColumns = 32 * W::kPieces;
  char* shared = SharedMemory();
  const LinearTask& task = plan.task;
  const Matrix& w = task.args.w;
  const int32_t thread = threadIdx.x;
  const int32_t warp = thread / 32;
  const int32_t lane = thread % 32;

  Place at;
  at.cluster = blockIdx.x >> plan.cluster_bits;
  at.rank = blockIdx.x & ((1 << plan.cluster_bits) - 1);
  at.first_row = blockIdx.y * (8 * kRowTiles);
  at.rows = min(8 * kRowTiles, task.args.rows - at.first_row);
  at.share_bits = plan.cluster_bits + plan.share_bits;
  at.share = (at.rank << plan.share_bits) + (warp & ((1 << plan.share_bits) - 1));
  at.first_output = (warp >> plan.share_bits) * kTileOutputs;
  at.tile_outputs = plan.output_warps * kTileOutputs;
  at.part_begin = ShareBegin(plan.steps, plan.cluster_bits, at.rank);
  at.part_end = ShareBegin(plan.steps, plan.cluster_bits, at.rank + 1);
  at.share_begin = ShareBegin(plan.steps, at.share_bits, at.share);
  at.share_end = ShareBegin(plan.steps, at.share_bits, at.share + 1);
  at.group = lane / 4;
  at.member = lane % 4;
  const int32_t shares = 1 << at.share_bits;
  // Units of a tile, 16 outputs by 8 rows, go round the blocks of the cluster, which finish them.
  const int32_t units = plan.output_warps * kRowTiles;
  const int32_t block_units = (units - at.rank + (1 << plan.cluster_bits) - 1) >> plan.cluster_bits;

  // The barriers wait for the bytes that the cluster sends: two buffers of sums, and statistics.
  uint64_t* sums_there = reinterpret_cast<uint64_t*>(shared + plan.barriers_at);
  uint64_t* stats_there = sums_there + 2;
  const uint32_t sums_bytes = block_units * shares * kUnitBytes;
  if (thread == 0) {
    BarrierInit(stats_there, 1);
    BarrierInit(&sums_there[0], 1);
    BarrierInit(&sums_there[1], 1);
    BarrierInitDone();
    if (task.normed) {
      BarrierArriveExpect(stats_there, (plan.stat_parts << plan.cluster_bits) * kRowTiles * 64);
    }
    BarrierArriveExpect(&sums_there[0], sums_bytes);
    BarrierArriveExpect(&sums_there[1], sums_bytes);
  }
  __syncwarp();
  ClusterArrive();

  // What no kernel writes is read before the kernel before has ended; first what is little, which
  // would have to queue behind the weights.
  CachePlace* places = reinterpret_cast<CachePlace*>(shared + plan.places_at);
  if (task.args.epilogue == Epilogue::kQkv) {
    for (int32_t row = blockDim.x - 1 - thread; row < at.rows; row += blockDim.x) {
      places[row] = PlaceOf(task.args.row_list[at.first_row + row], task.args.slots);
    }
  }
  Stager<W, kRowTiles> stager(plan, at, shared, stats_there, lane);
  // The thread finishes every finishers-th of the outputs of the block's units.
  const int32_t block_outputs = block_units * kTileOutputs * 8;
  const int32_t finishers = blockDim.x / (kTileOutputs * 8) * (kTileOutputs * 8);
  const auto target_of = [&](int32_t tile, int32_t index) {
    return TargetOf<kRowTiles>(plan, at, tile, index, block_outputs);
  };
  const int32_t first_index = thread < finishers ? thread : block_outputs;
  Target target = target_of(at.cluster, first_index);
  if (target.there) {
    const float2 column = ReadColumn(task, at.cluster * at.tile_outputs + target.column);
    target.bias = column.x;
    target.norm_sum = column.y;
  }
  const auto read_column = [&](int32_t tile) {
    const int32_t n = tile * at.tile_outputs + thread;
    return thread < at.tile_outputs && n < w.out ? ReadColumn(task, n) : make_float2(0.0f, 0.0f);
  };
  float2 column = read_column(at.cluster);
  char* ring = shared + warp * plan.ring_steps * (2 * W::kSlotBytes);
  Stream<W> stream(plan, at, ring, lane);
#pragma unroll 1
  for (int i = 0; i < kDepth; ++i) stream.Next(i);
  LetNextGridStart();
  stager.Prepare();
  float2* columns = reinterpret_cast<float2*>(shared + plan.columns_at);
  if (thread < at.tile_outputs) columns[thread] = column;
  if (task.args.epilogue == Epilogue::kQkv) __syncthreads();  // places
  FindPlace(task, at, at.cluster, places, &target);
  float residual = 0.0f;

  NormSums* norms = reinterpret_cast<NormSums*>(shared + plan.norms_at);
  const float2* stats = reinterpret_cast<const float2*>(shared + plan.stats_at);
  NormSums my_norm = {};  // of the target's row, where a thread has few targets
  uint32_t sums = SharedAddress(plan.buffers == 0 ? shared : shared + plan.sums_at);
  const int32_t buffer_bytes = plan.block_units * shares * kUnitBytes;
  const uint16_t* x = reinterpret_cast<const uint16_t*>(shared + plan.x_at) +
                      at.group * plan.x_stride + at.member * 8 +
                      (at.share_begin - at.part_begin) * kStepColumns;
  // Where the warp's sums go: unit `unit` + t is block (unit + t) % blocks's.
  const int32_t unit = (warp >> plan.share_bits) * kRowTiles;
  const int32_t blocks = 1 << plan.cluster_bits;
  uint32_t to =
      sums + ((unit >> plan.cluster_bits << at.share_bits) + at.share) * kUnitBytes + lane * 16;
  uint32_t to_there = SharedAddress(sums_there);
  if (kRowTiles == 1) {
    to = AddressInBlock(to, unit & (blocks - 1));
    to_there = AddressInBlock(to_there, unit & (blocks - 1));
  }
  Pin(to);
  Pin(to_there);
  Pin(sums);
  Pin(target.sums);
  Pin(target.y);
  Pin(target.cache);
  Pin(target.bias);
  Pin(target.norm_sum);
  ClusterWait();
  WaitForGrid();

  stager.Read();
  if (task.args.epilogue == Epilogue::kResidual && target.there) residual = __ldcg(target.y);
  stager.Run();
  __syncthreads();

  // A tile's outputs are finished while the sums of the next one are on their way.
  int32_t tile = at.cluster;
  uint32_t slot = 0;
#pragma unroll 1
  for (int32_t round = 0;; ++round, tile += plan.clusters) {
    float sum[2][kRowTiles][4];
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[0][t][i] = sum[1][t][i] = 0.0f;
    }
    if (tile < plan.tiles) {
      if (round > 0) column = read_column(tile);
      const uint32_t output = tile * at.tile_outputs + at.first_output + at.group;
      const uint16_t* step_x = x;
      if (plan.resident) WaitCopies<0>();
#pragma unroll 1
      for (int32_t step = at.share_begin; step < at.share_end; ++step) {
        if (!plan.resident) WaitCopies<kDepth - 1>();
        const StepWeights weights =
            ReadStep<W>(w, ring + slot % kDepth * (2 * W::kSlotBytes), output, step, lane);
        Multiply<W, kRowTiles>(weights, step_x, plan.x_stride, sum);
        if (!plan.resident) stream.Next(slot);
        ++slot;
        step_x += kStepColumns;
      }
    }
    float4 mine[kRowTiles];
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
      mine[t] = make_float4(sum[0][t][0] + sum[1][t][0], sum[0][t][1] + sum[1][t][1],
                            sum[0][t][2] + sum[1][t][2], sum[0][t][3] + sum[1][t][3]);
    }
    if (round > 0) {
      const int32_t buffer = (round - 1) & 1;
      if (block_units > 0) {
        BarrierWait(&sums_there[buffer], (round - 1) >> 1 & 1);
        if (thread == 0) BarrierArriveExpect(&sums_there[buffer], sums_bytes);
      }
#pragma unroll 1
      for (int32_t index = first_index; index < block_outputs;) {
        if (target.there) {
          float total = SumOfShares(sums + buffer * buffer_bytes + target.sums, shares);
          total = __fmul_rn(total, UnitOf(Element()));
          if (task.normed) {
            const NormSums norm = kRowTiles == 1 ? my_norm : norms[target.row];
            total = __fmul_rn(norm.scale, fmaf(-norm.mean, target.norm_sum, total));
          }
          WriteTarget(task, target, total, residual);
        }
        index += finishers;
        if (index >= block_outputs) break;
        target = target_of(tile - plan.clusters, index);
        target.bias = columns[target.column].x;
        target.norm_sum = columns[target.column].y;
        FindPlace(task, at, tile - plan.clusters, places, &target);
        if (kRowTiles == 1 && task.normed) {
          my_norm = JoinStats(plan, stats + target.row, 8 * kRowTiles);
        }
        if (task.args.epilogue == Epilogue::kResidual && target.there) residual = __ldcg(target.y);
      }
      if (tile >= plan.tiles) break;
      __syncthreads();
      if (thread < at.tile_outputs) columns[thread] = column;
      __syncthreads();
      target = target_of(tile, first_index);
      if (target.there) {
        target.bias = columns[target.column].x;
        target.norm_sum = columns[target.column].y;
      }
      FindPlace(task, at, tile, places, &target);
      if (kRowTiles == 1 && task.normed) {
        my_norm = JoinStats(plan, stats + target.row, 8 * kRowTiles);
      }
      if (task.args.epilogue == Epilogue::kResidual && target.there) residual = __ldcg(target.y);
    }
    // The sums that are about to be sent take the place of those of the tile before the last, or of
    // weights: all blocks must have read these.
    if (plan.buffers == 0) ClusterArrive();
    if (plan.buffers == 0 || round > 1) ClusterWait();
    if (round > 0 && tile + plan.clusters < plan.tiles) ClusterArrive();
    const uint32_t there = to_there + (round & 1) * 8;
    const uint32_t to_buffer = to + (round & 1) * buffer_bytes;
    if (kRowTiles == 1) {
      StoreAsync(to_buffer, mine[0], there);
    } else {
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        const int32_t further = ((unit + t) >> plan.cluster_bits) - (unit >> plan.cluster_bits);
        const int32_t block = (unit + t) & (blocks - 1);
        StoreAsync(AddressInBlock(to_buffer + (further << at.share_bits) * kUnitBytes, block),
                   mine[t], AddressInBlock(there, block));
      }
    }
    if (round == 0 && task.normed) {
      BarrierWait(stats_there, 0);
      if (kRowTiles == 1) {
        my_norm = JoinStats(plan, stats + target.row, 8 * kRowTiles);
      } else {
        if (thread < 8 * kRowTiles) {
          norms[thread] = JoinStats(plan, stats + thread, 8 * kRowTiles);
        }
        __syncthreads();
      }
    }
  }
  WaitCopies<0>();
#endif
}

// ---- host ---------------------------------------------------------------------------------------

// Two kernels in sequence are on a multiprocessor together as long as neither takes more than this.
constexpr int64_t kSharedBytes = 112 * 1024;

// How the columns of a matrix are cut, by its shape alone. Few outputs are few tiles, so that more
// blocks have to share them, and tiles have to be lower.
struct Cut {
  int32_t cluster_bits;
  int32_t share_bits;
};

Cut CutOf(const Matrix& w) {
  constexpr int32_t kManyOutputs = 2048;
  return w.out >= kManyOutputs ? Cut{2, 0} : Cut{3, 1};
}

// Warps of a block with outputs of their own, half of the most that can be or more, so that all tiles
// take the least time.
int32_t OutputWarps(int32_t out, int32_t most, int32_t clusters) {
  int32_t best = most;
  int32_t least = 0;
  for (int32_t warps = most; 2 * warps >= most; --warps) {
    const int32_t rounds = Quotient(Quotient(out, warps * kTileOutputs), clusters);
    const int32_t time = rounds * (warps + 1);
    if (least == 0 || time < least) {
      least = time;
      best = warps;
    }
  }
  return best;
}

// Fills the plan but for its task; returns the bytes of shared memory.
template <typename W>
int64_t Plan(const LinearTask& task, int32_t row_tiles, int32_t clusters, ClusterPlan* plan) {
  const int32_t rows = 8 * row_tiles;
  constexpr int32_t kStepColumns = 32 * W::kPieces;
  const Matrix& w = task.args.w;
  const Cut cut = CutOf(w);
  const int32_t blocks = 1 << cut.cluster_bits;
  const int32_t shares = blocks << cut.share_bits;
  plan->cluster_bits = cut.cluster_bits;
  plan->share_bits = cut.share_bits;
  plan->output_warps = OutputWarps(w.out, kMaxWarps >> cut.share_bits, clusters);
  plan->tiles = Quotient(w.out, plan->output_warps * kTileOutputs);
  plan->clusters = std::min(clusters, plan->tiles);
  plan->steps = Quotient(w.in, kStepColumns);
  const int32_t rounds = Quotient(plan->tiles, plan->clusters);
  const int32_t most_steps = rounds * Quotient(plan->steps, shares);
  plan->ring_steps = std::min(kDepth, most_steps);
  plan->resident = most_steps <= kDepth;
  // Rows 4 chunks of 16 bytes apart, modulo 8, do not meet in a bank.
  const int32_t chunks = Quotient(plan->steps, blocks) * (kStepColumns / 8);
  plan->x_stride = (chunks % 8 == 0 ? chunks + 4 : chunks) * 8;
  plan->stat_parts = Quotient(chunks, 32);
  plan->inverse_in = 1.0f / static_cast<float>(w.in);
  plan->block_units = Quotient(plan->output_warps * row_tiles, blocks);
  const int64_t ring = int64_t{plan->output_warps} * plan->ring_steps * 2 * W::kSlotBytes
                       << cut.share_bits;
  const int64_t sums = int64_t{plan->block_units} * shares * kUnitBytes;
  const int64_t stats = int64_t{blocks} * plan->stat_parts * rows * 8;
  const int64_t rest =
      int64_t{rows} * (plan->x_stride * 2 + sizeof(NormSums) + sizeof(CachePlace)) + stats;
  plan->buffers = rounds > 1 ? 2 : ring + sums + rest <= kSharedBytes ? 1 : 0;
  const int64_t x_at = plan->buffers == 0 ? std::max(ring, sums) : ring + plan->buffers * sums;
  plan->sums_at = static_cast<int32_t>(ring);
  plan->x_at = static_cast<int32_t>(x_at);
  plan->stats_at = static_cast<int32_t>(x_at + int64_t{rows} * plan->x_stride * 2);
  plan->norms_at = static_cast<int32_t>(plan->stats_at + stats);
  plan->places_at = plan->norms_at + rows * static_cast<int32_t>(sizeof(NormSums));
  plan->columns_at = plan->places_at + rows * static_cast<int32_t>(sizeof(CachePlace));
  plan->barriers_at = plan->columns_at + plan->output_warps * kTileOutputs * 8;
  const int64_t bytes = plan->barriers_at + int64_t{kBarriers} * 8;
  // Of two blocks, one can have its weights come while the other multiplies.
  if (rounds > 1 && bytes <= kSharedBytes) plan->clusters = std::min(2 * clusters, plan->tiles);
  return bytes;
}

struct Choice {
  const LinearTask* task;
  DeviceLimits limits;
  int32_t clusters;
  cudaStream_t stream;
};

template <typename W, int kRowTiles>
cudaError_t TryRows(const Choice& choice, bool* taken) {
  const LinearArgs& args = choice.task->args;
  ClusterPlan plan;
  const int64_t bytes = Plan<W>(*choice.task, kRowTiles, choice.clusters, &plan);
  if (bytes > choice.limits.shared_bytes) return cudaSuccess;
  plan.task = *choice.task;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(plan.clusters << plan.cluster_bits),
                    static_cast<unsigned>(Quotient(args.rows, 8 * kRowTiles)));
  shape.threads = 32 * plan.output_warps << plan.share_bits;
  shape.shared_bytes = static_cast<size_t>(bytes);
  shape.cluster = 1 << plan.cluster_bits;
  shape.overlap = args.overlap;
  *taken = true;
  return Launch(ClusterKernel<W, kRowTiles>, shape, choice.stream, plan);
}

// As many rows to a block as there are and its memory holds; whether it holds any does not depend on
// how many there are.
template <typename W>
cudaError_t Try(const Choice& choice, bool* taken) {
  const int32_t rows = choice.task->args.rows;
  cudaError_t status = cudaSuccess;
  if (rows > 32) status = TryRows<W, 8>(choice, taken);
  if (rows > 16 && status == cudaSuccess && !*taken) status = TryRows<W, 4>(choice, taken);
  if (rows > 8 && status == cudaSuccess && !*taken) status = TryRows<W, 2>(choice, taken);
  if (status == cudaSuccess && !*taken) status = TryRows<W, 1>(choice, taken);
  return status;
}

}  // namespace linear_cluster

cudaError_t LinearCluster(const LinearTask& task, cudaStream_t stream, bool* taken) {
  using namespace linear_cluster;
  *taken = false;
  if (!FASTGEN_CUDA_HAS_PERSISTENT || task.args.cluster != 0) return cudaSuccess;
  // Where a norm is of few columns, they may be so alike that differences of sums are all rounding.
  constexpr int32_t kNormColumns = 32;
  if (task.normed && (task.args.norm_sums == nullptr || task.args.w.in < kNormColumns)) {
    return cudaSuccess;
  }
  Choice choice;
  choice.task = &task;
  choice.stream = stream;
  int architecture = 0;
  cudaError_t status =
      CompiledArchitecture(reinterpret_cast<const void*>(ClusterKernel<Half, 1>), &architecture);
  if (status != cudaSuccess || architecture < 90) return status;
  status = GetDeviceLimits(&choice.limits);
  if (status != cudaSuccess) return status;
  const int32_t bits = CutOf(task.args.w).cluster_bits;
  static KnownClusters known;
  if (ClustersAtOnce(reinterpret_cast<const void*>(ClusterKernel<Half, 1>), bits, kMaxThreads,
                     choice.limits, &known) == 0) {
    return cudaSuccess;
  }
  // Clusters that find no multiprocessors of their own share those of others.
  choice.clusters = std::max(1, choice.limits.multiprocessors >> bits);
  switch (task.args.w.dtype) {
    case DType::kFloat32: return cudaSuccess;
    case DType::kFloat16: return Try<Half>(choice, taken);
    case DType::kBFloat16: return Try<Brain>(choice, taken);
    case DType::kInt8: return Try<Int8>(choice, taken);
    case DType::kInt4: return Try<Int4>(choice, taken);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace fastgen
