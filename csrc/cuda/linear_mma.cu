// Linear on tensor cores. Weights are the n8 operand of m16n8k16: a lane reads 16 bytes of one
// output, 4 lanes 64 neighbouring bytes of it, a warp those of 8 outputs, one `step`. A dot product
// may take its columns in any order, so a lane's bytes go to the fragments as they come, and x is
// laid out in shared memory to match. x is the m16 operand: 8 rows, each split into a leading and a
// trailing part of 16 bits, so that its products keep 21 (float16) or 16 (bfloat16) bits.
//
// Columns are cut into kSlices slices of whole steps; each slice is summed in order of its columns,
// and slices are added in order. Blocks, warps and rows share the work in any other way: the result
// is the same bits. Warps stream weights through rings of their own in shared memory, which start
// to fill before the kernel before has ended.
#include "cuda/linear_mma.h"

#include <algorithm>

namespace fastgen {
namespace cuda {
namespace linear_mma {

template <typename W, int kRowTiles>
__global__ void __launch_bounds__(Shape<kRowTiles>::kThreads, Shape<kRowTiles>::kBlocks)
    MmaKernel(const MmaPlan plan) {
#if FASTGEN_ARCH_HAS_MMA_K16
  using Element = typename W::Element;
  constexpr int kDepth = Shape<kRowTiles>::kDepth;
  using Weights = Stream<W, kDepth, Shape<kRowTiles>::kOneSlice>;
  char* shared = SharedMemory();
  const LinearTask& task = plan.task;
  const int32_t warp = threadIdx.x / 32;
  const int32_t lane = threadIdx.x % 32;
  const int32_t cluster = 1 << plan.cluster_bits;
  const int32_t range = blockIdx.x >> plan.cluster_bits;

  Place at;
  at.rank = blockIdx.x & (cluster - 1);
  at.outputs_begin = BeginOf(plan.outputs, range);
  at.outputs_end = BeginOf(plan.outputs, range + 1);
  at.first_row = blockIdx.y * plan.rows;
  at.rows = min(plan.rows, task.args.rows - at.first_row);
  at.local_slices = kSlices >> plan.cluster_bits;
  // All powers of two.
  at.slice_warps = min(Shape<kRowTiles>::kWarps, at.local_slices);
  at.first_slice = warp & (at.slice_warps - 1);
  at.first_output = warp / at.slice_warps * plan.tiles * 8;
  at.pass_outputs = plan.pass_outputs.value;
  at.group = lane / 4;
  at.member = lane % 4;
  const int32_t first_step = SliceBegin(plan.steps, at.rank * at.local_slices);
  const int32_t end_step = SliceBegin(plan.steps, (at.rank + 1) * at.local_slices);
  constexpr int32_t kStepColumns = 32 * W::kPieces;
  const int32_t first_column = first_step * kStepColumns;
  const int32_t columns = (end_step - first_step) * kStepColumns;
  if (cluster > 1) ClusterArrive();

  // What no kernel writes is read before the kernel before has ended.
  float* norm_weight = reinterpret_cast<float*>(shared + plan.norm_at);
  if (task.normed) {
    for (int32_t i = threadIdx.x; i < columns && first_column + i < task.args.w.in;
         i += blockDim.x) {
      StreamCopy4(norm_weight + i, task.norm.weight + first_column + i, 4);
      StreamCopy4(norm_weight + plan.x_stride + i, task.norm.bias + first_column + i, 4);
    }
  }
  CommitCopies();
  char* ring = shared + warp * kDepth * W::kSlotBytes;
  Weights stream(plan, at, ring, lane);
#pragma unroll 1
  for (int i = 0; i < kDepth; ++i) stream.Next(i);
  if (task.args.w.bias != nullptr &&
      at.outputs_begin + static_cast<int32_t>(threadIdx.x) * 32 < at.outputs_end) {
    PrefetchL2(task.args.w.bias + at.outputs_begin + threadIdx.x * 32);
  }
  LetNextGridStart();
  WaitForGrid();

  CachePlace* places = reinterpret_cast<CachePlace*>(shared + plan.places_at);
  if (task.args.epilogue == Epilogue::kQkv) {
    const int32_t row = blockDim.x - 1 - threadIdx.x;
    if (row < at.rows) {
      places[row] = PlaceOf(task.args.row_list[at.first_row + row], task.args.slots);
    }
  }
  if (cluster > 1) ClusterWait();
  if (task.normed) {
    // The blocks of a cluster share the rows, and tell each other.
    float* sums = reinterpret_cast<float*>(shared + plan.sums_at);
    const int32_t norm_warps = cluster * Shape<kRowTiles>::kWarps;
    for (int32_t row = warp * cluster + at.rank; row < at.rows; row += norm_warps) {
      const float* x = task.args.x + (at.first_row + row) * task.args.ldx;
      const NormSums mine = SumsOf(x, task.args.w.in, task.norm.eps, lane);
      if (cluster == 1 && lane == 0) {
        sums[row * 2] = mine.mean;
        sums[row * 2 + 1] = mine.scale;
      } else if (lane < cluster && cluster > 1) {
        WriteInBlock(sums + row * 2, lane, mine.mean);
        WriteInBlock(sums + row * 2 + 1, lane, mine.scale);
      }
    }
    WaitCopies<kDepth>();
    if (cluster > 1) {
      ClusterSync();
    } else {
      __syncthreads();
    }
  }
  StageX<W>(plan, at, shared, first_column, columns);
  __syncthreads();

  const uint16_t* x = reinterpret_cast<const uint16_t*>(shared + plan.x_at) +
                      at.group * plan.x_stride + at.member * 8 - first_step * kStepColumns;
  const int32_t trail_at = plan.rows * plan.x_stride;
  const uint32_t first_output = at.outputs_begin + at.first_output + at.group;
  const int32_t slice_floats = plan.rows * plan.partial_stride;
  // The thread's first output of a pass, as an index into [rows][pass_outputs] over the cluster.
  const int32_t first_index = at.rank * blockDim.x + threadIdx.x;
  const int32_t index_stride = cluster * blockDim.x;
  uint32_t slot = 0;
  for (int32_t pass = 0; pass < plan.passes; ++pass) {
    float* partial = reinterpret_cast<float*>(shared + plan.partial_at) +
                     (pass & (plan.buffers - 1)) * at.local_slices * slice_floats;
    // Read now, needed at the end of the pass.
    const int32_t my_row = Divide(first_index, plan.pass_outputs);
    const int32_t my_output =
        at.outputs_begin + pass * at.pass_outputs + first_index - my_row * at.pass_outputs;
    float my_bias = 0.0f;
    float my_residual = 0.0f;
    if (my_row < at.rows && my_output < at.outputs_end) {
      my_bias = ReadBias(task, my_output);
      my_residual = ReadResidual(task, at.first_row + my_row, my_output);
    }

    for (int32_t slice = at.first_slice; slice < at.local_slices; slice += at.slice_warps) {
      float sum[kTiles][kRowTiles][4];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          sum[t][m][0] = sum[t][m][1] = sum[t][m][2] = sum[t][m][3] = 0.0f;
        }
      }
      const int32_t global_slice = at.rank * at.local_slices + slice;
      const int32_t end = SliceBegin(plan.steps, global_slice + 1);
      for (int32_t step = SliceBegin(plan.steps, global_slice); step < end; ++step) {
        WaitOldest<kDepth>(plan.tiles);
        const uint16_t* step_x = x + step * kStepColumns;
        const auto unpack = [&](int t, int j, uint32_t (&b)[4]) {
          const char* raw = ring + (slot + t) % kDepth * W::kSlotBytes;
          uint32_t scale = 0;
          if (W::kScaled) {
            scale = ScaleIn<W>(raw + 512 + lane * 4, task.args.w,
                               first_output + pass * at.pass_outputs + t * 8, step, at.member);
          }
          Unpack(W(), *reinterpret_cast<const uint4*>(raw + lane * 16), j, scale, b);
        };
        const auto read_x = [&](int m, int j, uint32_t (&a)[2][4]) {
          uint4 lead = make_uint4(0, 0, 0, 0);
          uint4 trail = make_uint4(0, 0, 0, 0);
          if (m * 8 + at.group < at.rows) {
            const uint16_t* piece = step_x + m * 8 * plan.x_stride + j * 32;
            lead = *reinterpret_cast<const uint4*>(piece);
            trail = *reinterpret_cast<const uint4*>(piece + trail_at);
          }
          a[0][0] = lead.x, a[0][1] = trail.x, a[0][2] = lead.y, a[0][3] = trail.y;
          a[1][0] = lead.z, a[1][1] = trail.z, a[1][2] = lead.w, a[1][3] = trail.w;
        };
#pragma unroll
        for (int j = 0; j < W::kPieces; ++j) {
          uint32_t a[2][4];
          uint32_t b[kTiles][4];
          if (kRowTiles == 1) read_x(0, j, a);
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            if (t >= plan.tiles) break;
            unpack(t, j, b[t]);
            if (kRowTiles > 1) continue;
            Mma<Element>(sum[t][0], a[0], b[t][0], b[t][1]);
            Mma<Element>(sum[t][0], a[1], b[t][2], b[t][3]);
          }
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            if (kRowTiles == 1) break;
            read_x(m, j, a);
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
              if (t >= plan.tiles) break;
              Mma<Element>(sum[t][m], a[0], b[t][0], b[t][1]);
              Mma<Element>(sum[t][m], a[1], b[t][2], b[t][3]);
            }
          }
        }
#pragma unroll 1
        for (int32_t t = 0; t < plan.tiles; ++t) stream.Next(slot + t);
        slot = (slot + plan.tiles) % kDepth;
      }
      float* to = partial + slice * slice_floats + at.first_output + at.member * 2;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const int32_t row = m * 8 + at.group;
        if (row < at.rows) {
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            if (t < plan.tiles) {
              *reinterpret_cast<float2*>(to + row * plan.partial_stride + t * 8) =
                  make_float2((sum[t][m][0] + sum[t][m][2]) * UnitOf(Element()),
                              (sum[t][m][1] + sum[t][m][3]) * UnitOf(Element()));
            }
          }
        }
      }
    }

    if (cluster > 1) {
      ClusterSync();
    } else {
      __syncthreads();
    }
    for (int32_t i = first_index; i < at.rows * at.pass_outputs; i += index_stride) {
      const bool first = i == first_index;
      const int32_t row = Divide(i, plan.pass_outputs);
      const int32_t column = i - row * at.pass_outputs;
      const int32_t output = at.outputs_begin + pass * at.pass_outputs + column;
      if (output >= at.outputs_end) continue;
      const float* from = partial + row * plan.partial_stride + column;
      const float total = cluster > 1 ? SumInCluster(from, slice_floats, 4 - plan.cluster_bits)
                                      : SumInBlock(from, slice_floats);
      const int32_t y_row = at.first_row + row;
      const float bias = first ? my_bias : ReadBias(task, output);
      const float residual = first ? my_residual : ReadResidual(task, y_row, output);
      Finish(task, y_row, output, CacheColumnOf(task, output), total, bias, residual, places + row);
    }
    // With one buffer, the next pass writes over the sums; at the end, other blocks still read them.
    const bool last = pass + 1 == plan.passes;
    if (cluster > 1 && (last || plan.buffers == 1)) {
      ClusterArrive();
      ClusterWait();
    } else if (plan.buffers == 1 && !last) {
      __syncthreads();
    }
  }
  WaitCopies<0>();
#endif
}

// ---- host ---------------------------------------------------------------------------------------

// From here on, another block to share a row of x costs less than reading more of it.
constexpr int64_t kBlockXBytes = 32 * 1024;

int32_t RoundUp(int32_t size, int32_t unit) { return (size + unit - 1) / unit * unit; }

int32_t ClustersAtOnce(int32_t bits, const DeviceLimits& limits) {
  static KnownClusters known;
  return cuda::ClustersAtOnce(reinterpret_cast<const void*>(MmaKernel<Half, 1>), bits,
                              Shape<1>::kThreads, limits, &known);
}

// Fills the plan but for its task; returns the bytes of shared memory.
template <typename W, int kRowTiles>
int64_t Plan(const LinearTask& task, int32_t rows, int32_t cluster_bits, int32_t ranges,
             MmaPlan* plan) {
  constexpr int kWarps = Shape<kRowTiles>::kWarps;
  constexpr int32_t kStepColumns = 32 * W::kPieces;
  plan->rows = rows;
  plan->cluster_bits = cluster_bits;
  plan->outputs = CutInto(ranges, task.args.w.out);
  plan->steps = Quotient(task.args.w.in, kStepColumns);
  const int32_t local_slices = kSlices >> cluster_bits;
  const int32_t output_warps = kWarps / std::min(kWarps, local_slices);
  const int32_t range_tiles = Quotient(Quotient(task.args.w.out, ranges), 8);
  plan->passes = Quotient(range_tiles, output_warps * kTiles);
  plan->tiles = Quotient(range_tiles, output_warps * plan->passes);
  plan->pass_outputs = DivisorOf(output_warps * plan->tiles * 8);
  // Rows 4 chunks of 16 bytes apart, modulo 8, do not meet in a bank.
  const int64_t chunks =
      static_cast<int64_t>(Quotient(plan->steps, 1 << cluster_bits)) * (kStepColumns / 8);
  const int64_t x_stride = (chunks % 8 == 0 ? chunks + 4 : chunks) * 8;
  plan->x_chunks = DivisorOf(static_cast<int32_t>(chunks));
  plan->x_stride = static_cast<int32_t>(x_stride);
  plan->partial_stride = RoundUp(output_warps * plan->tiles * 8, 32) + 8;
  const int64_t ring = static_cast<int64_t>(kWarps) * Shape<kRowTiles>::kDepth * W::kSlotBytes;
  const int64_t norm = ring + 2 * rows * x_stride * 2;
  const int64_t sums = norm + (task.normed ? 2 * x_stride * 4 : 0);
  const int64_t places = sums + RoundUp(rows * 8, 16);
  const int64_t partial = places + rows * 16;
  plan->x_at = static_cast<int32_t>(ring);
  plan->norm_at = static_cast<int32_t>(norm);
  plan->sums_at = static_cast<int32_t>(sums);
  plan->places_at = static_cast<int32_t>(places);
  plan->partial_at = static_cast<int32_t>(partial);
  return partial + static_cast<int64_t>(local_slices) * rows * plan->partial_stride * 4;
}

struct Choice {
  const LinearTask* task;
  DeviceLimits limits;
  int32_t max_cluster_bits;
  cudaStream_t stream;
};

template <typename W, int kRowTiles>
cudaError_t TryRows(const Choice& choice, int32_t rows, bool* taken) {
  const LinearArgs& args = choice.task->args;
  int32_t bits = 0;
  int32_t last = choice.max_cluster_bits;
  if (args.cluster > 0) {
    while (bits < last && 1 << bits < args.cluster) ++bits;
    last = bits;
  } else {
    const int64_t x_bytes = static_cast<int64_t>(rows) * args.w.in * 4;
    while (bits < last && x_bytes >> bits > kBlockXBytes) ++bits;
  }
  for (; bits <= last; ++bits) {
    const int32_t ranges = std::min(ClustersAtOnce(bits, choice.limits), Quotient(args.w.out, 8));
    MmaPlan plan;
    const int64_t bytes = Plan<W, kRowTiles>(*choice.task, rows, bits, ranges, &plan);
    if (bytes > choice.limits.shared_bytes) continue;
    plan.task = *choice.task;
    const int64_t second = bytes - plan.partial_at;
    plan.buffers = plan.passes > 1 && bytes + second <= choice.limits.shared_bytes ? 2 : 1;
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(ranges << bits),
                      static_cast<unsigned>(Quotient(args.rows, rows)));
    shape.threads = Shape<kRowTiles>::kThreads;
    shape.shared_bytes = static_cast<size_t>(bytes + (plan.buffers - 1) * second);
    shape.cluster = 1 << bits;
    shape.overlap = args.overlap;
    *taken = true;
    return Launch(MmaKernel<W, kRowTiles>, shape, choice.stream, plan);
  }
  return cudaSuccess;
}

template <typename W>
cudaError_t Try(const Choice& choice, bool* taken) {
  cudaError_t status = cudaSuccess;
  for (int32_t rows = std::min(choice.task->args.rows, 8 * kMaxRowTiles);
       status == cudaSuccess && !*taken && rows > 0; rows /= 2) {
    if (rows > 32) {
      status = TryRows<W, 8>(choice, rows, taken);
    } else if (rows > 16) {
      status = TryRows<W, 4>(choice, rows, taken);
    } else if (rows > 8) {
      status = TryRows<W, 2>(choice, rows, taken);
    } else {
      status = TryRows<W, 1>(choice, rows, taken);
    }
  }
  return status;
}

}  // namespace linear_mma

cudaError_t LinearMma(const LinearTask& task, cudaStream_t stream, bool* taken) {
  using namespace linear_mma;
  *taken = false;
  if (!FASTGEN_CUDA_HAS_11) return cudaSuccess;
  Choice choice;
  choice.task = &task;
  choice.stream = stream;
  int architecture = 0;
  cudaError_t status =
      CompiledArchitecture(reinterpret_cast<const void*>(MmaKernel<Half, 1>), &architecture);
  if (status != cudaSuccess || architecture < 80) return status;
  status = GetDeviceLimits(&choice.limits);
  if (status != cudaSuccess) return status;
  choice.max_cluster_bits = architecture >= 90 && FASTGEN_CUDA_HAS_CLUSTERS ? kMaxClusterBits : 0;
  while (ClustersAtOnce(choice.max_cluster_bits, choice.limits) == 0) --choice.max_cluster_bits;
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
