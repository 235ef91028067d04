// The persistent kernel: a step of the decoder, and its launch. persistent_device.h says how its blocks
// talk to each other, persistent_product.h and persistent_attention.h what they compute.
#include "cuda/persistent.h"

#include <cmath>

#include "cuda/launch.h"
#include "cuda/persistent_attention.h"
#include "cuda/persistent_product.h"

namespace fastgen {
namespace cuda {
namespace persistent {
namespace {

#if FASTGEN_ARCH_HAS_PERSISTENT

// A position holds its token and all before it, so parts follow from the number of positions.
__device__ __forceinline__ void CutRow(RowState* row, int max_splits) {
  constexpr int kPart = 128;  // positions that are worth a block of their own
  const int positions = row->position + 1;
  const int wanted = max(1, min(max_splits, (positions + kPart - 1) / kPart));
  const int span = (positions + wanted - 1) / wanted;
  row->span = max(1, (span + kPage - 1) / kPage) * kPage;
  row->splits = max(1, (positions + row->span - 1) / row->span);
}

// What the block has to know of the step, read by its first threads.
template <int kRows>
__device__ __forceinline__ void ReadStep(const Plan& plan, Shared<kRows>& shared) {
  const int i = threadIdx.x;
  if (i < kRows) {
    RowState row = {nullptr, -1, 0, 1, kPage};
    if (i < plan.rows) {
      const Row here = plan.row_list[i];
      if (here.slot >= 0) {
        const Slot& slot = plan.slots_of_rows[here.slot];
        const int newest = slot.finished != 0 ? -1 : slot.length - 1;
        row.position = here.position >= 0 ? here.position : newest;
        row.pages = const_cast<const char* const*>(slot.pages);
        if (row.position >= 0) row.token = slot.tokens[row.position];
      }
    }
    CutRow(&row, plan.max_splits);
    shared.rows[i] = row;
  }
  if (i == 64) {
    for (int s = 0; s < plan.stages; ++s) {
      BarrierInit(shared.full + s, 1);
      BarrierInit(shared.empty + s, kWarps);
    }
    BarrierInitDone();
  }
}

// The warp that streams weights: blocks of weights in the order in which RunProduct takes them, a row
// of a block by a lane.
template <int kRows>
__device__ __forceinline__ void StreamWeights(const Plan& plan, Shared<kRows>& shared, char* ring) {
  const int lane = threadIdx.x % 32;
  const uint64_t policy = ReadOncePolicy();
  int stage = 0;
  uint32_t parity = 1;
  for (int p = 0; p <= 5 * plan.layers; ++p) {
    const int layer = p / 5;
    const int phase = layer == plan.layers ? kHead : p % 5;
    if (phase == kAttention) continue;
    const Product& product = plan.products[phase];
    const int tiles = TilesOf(product);
    const char* const weights = product.weights + (phase == kHead ? 0 : layer) * plan.layer_bytes;
    for (int group = 0; group < tiles; group += kRound) {
      for (int chunk = 0; chunk < product.chunks; ++chunk) {
        const int column = chunk * product.chunk_columns;
        const uint32_t bytes = 2u * min(product.chunk_columns, product.in - column);
        for (int j = group; j < min(group + kRound, tiles); ++j) {
          const int row = (j * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)) * kTile;
          const int rows = min(kTile, product.out - row);
          BarrierWait(shared.empty + stage, parity);
          if (lane == 0) BarrierArriveExpect(shared.full + stage, rows * bytes);
          __syncwarp();
          if (lane < rows) {
            BulkCopy(ring + stage * plan.stage_bytes + lane * plan.row_stride,
                     weights + (static_cast<int64_t>(row + lane) * product.in + column) * 2, bytes,
                     shared.full + stage, policy);
          }
          if (++stage == plan.stages) {
            stage = 0;
            parity ^= 1u;
          }
        }
      }
    }
  }
}

// The first layer's input, by the threads that keep the residual stream of those columns.
template <typename T, int kRows>
__device__ __forceinline__ void Embed(Thread<kRows>& self) {
  const Plan& plan = self.plan;
  const int i = static_cast<int>(threadIdx.x);
  const int outputs = TilesOf(plan.products[kOut]) * kRows * kTile;
  if (self.warp * 32 >= outputs) return;
  const int row = i / kTile % kRows;
  const int n =
      (i / (kTile * kRows) * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)) * kTile +
      i % kTile;
  const bool own = i < outputs && self.Active(row);
  if (own) {
    const RowState& state = self.shared.rows[row];
    float token[2];
    const int64_t at = static_cast<int64_t>(state.token) * plan.hidden + n;
    Vector<T>::UnpackPair(static_cast<const uint16_t*>(plan.embedding)[at], token);
    self.residual = token[0] + plan.positions[state.position * plan.position_stride + n];
  }
  PublishLanes(plan.exchange + plan.products[kQkv].source + (row * plan.hidden + n) / 4,
               self.residual, plan.epoch, own && self.lane % 4 == 0);
}

#endif  // FASTGEN_ARCH_HAS_PERSISTENT

template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, 1) StepKernel(const Plan plan) {
#if FASTGEN_ARCH_HAS_PERSISTENT
  extern __shared__ __align__(128) char persistent_memory[];
  Shared<kRows>& shared = *reinterpret_cast<Shared<kRows>*>(persistent_memory);
  char* const activations = persistent_memory + sizeof(Shared<kRows>);
  char* const ring = activations + plan.slots * (kWarps * Staged<T, kRows>::kSlot);
  ReadStep(plan, shared);
  if (threadIdx.x == 96) shared.plan = plan;
  __syncthreads();
  uint32_t active = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) active |= (shared.rows[r].position >= 0 ? 1u : 0u) << r;
  if (active == 0) return;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp == kWarps) {
    StreamWeights(plan, shared, ring);
    return;
  }
  Thread<kRows> self = {shared.plan,
                        shared,
                        activations + warp * plan.slots * Staged<T, kRows>::kSlot,
                        ring,
                        static_cast<int>(threadIdx.x),
                        warp,
                        static_cast<int>(threadIdx.x) % 32,
                        active};
  Embed<T>(self);
  int phase = kQkv, layer = 0;
#pragma unroll 1
  for (int p = 0; p <= 5 * plan.layers; ++p) {
    // One copy of the code serves all phases, so that it stays in the instruction cache.
    phase = Opaque(layer == plan.layers ? static_cast<int>(kHead) : phase);
    const int here = Opaque(layer);
    self.Forget();
    if (phase == kAttention) {
      RunAttention<T>(self, here);
    } else {
      if (phase == kQkv) PrefetchUnit(self, here);
      RunProduct<T>(self, phase, here);
    }
    if (++phase == kHead) {
      phase = kQkv;
      ++layer;
    }
  }
#endif
}

// ---- the host's side --------------------------------------------------------------------------------

int32_t RowsOf(int32_t rows) { return rows <= 1 ? 1 : rows <= 2 ? 2 : 4; }

const void* KernelOf(DType dtype, int32_t rows) {
  const bool half = dtype == DType::kFloat16;
  switch (rows) {
    case 1:
      return half ? reinterpret_cast<const void*>(StepKernel<__half, 1>)
                  : reinterpret_cast<const void*>(StepKernel<BFloat16, 1>);
    case 2:
      return half ? reinterpret_cast<const void*>(StepKernel<__half, 2>)
                  : reinterpret_cast<const void*>(StepKernel<BFloat16, 2>);
    default:
      return half ? reinterpret_cast<const void*>(StepKernel<__half, 4>)
                  : reinterpret_cast<const void*>(StepKernel<BFloat16, 4>);
  }
}

int32_t SharedBytes(int32_t rows) {
  return static_cast<int32_t>(rows == 1   ? sizeof(Shared<1>)
                              : rows == 2 ? sizeof(Shared<2>)
                                          : sizeof(Shared<4>));
}

int32_t CeilOf(int32_t n, int32_t unit) { return (n + unit - 1) / unit; }

Product MakeProduct(const PersistentProduct& from, int32_t in, int32_t out, int32_t blocks) {
  Product to = {};
  to.weights = static_cast<const char*>(from.weights);
  to.bias = from.bias;
  to.norm_weight = from.norm_weight;
  to.sums = from.sums;
  to.in = in;
  to.out = out;
  to.tiles = CeilOf(out, kTile);
  to.tiles_each = to.tiles / blocks;
  to.tiles_left = to.tiles % blocks;
  to.chunk_columns = CeilOf(CeilOf(in, CeilOf(in, kBlockColumns)), kUnit) * kUnit;
  to.chunks = CeilOf(in, to.chunk_columns);
  to.warp_units = CeilOf(to.chunk_columns, kWarps * kUnit);
  return to;
}

// Places of the exchange, in pieces.
struct Places {
  int32_t input, after_attention, qkv, attended, split_stats, wide, end;
};

Places PlacesOf(const PersistentArgs& args) {
  const int32_t row = kPersistentRows * args.hidden / 4;
  Places p;
  p.input = 0;
  p.after_attention = p.input + row;
  p.qkv = p.after_attention + row;
  p.attended = p.qkv + 3 * row;
  p.split_stats = p.attended + kMaxSplits * row;
  p.wide = p.split_stats + kMaxSplits * kPersistentRows * args.heads;
  p.end = p.wide + kPersistentRows * args.intermediate / 4;
  return p;
}

// The plan for a device; false where the step does not fit.
bool MakePlan(const PersistentArgs& args, int blocks, int memory, Plan* plan) {
  const int32_t rows = RowsOf(args.rows);
  const int32_t h = args.hidden;
  if (args.rows < 1 || args.rows > kPersistentRows || h <= 0 || args.layers <= 0) return false;
  if (args.dtype != DType::kFloat16 && args.dtype != DType::kBFloat16) return false;
  if (args.cache.dtype != args.dtype || args.heads <= 0 || h % args.heads != 0) return false;
  const int32_t head_size = h / args.heads;
  if (head_size % 8 != 0 || head_size > kMaxHeadSize) return false;
  if (h % kUnit != 0 || args.intermediate % kUnit != 0 || args.intermediate <= 0) return false;

  *plan = Plan();
  plan->products[kQkv] = MakeProduct(args.qkv, h, 3 * h, blocks);
  plan->products[kOut] = MakeProduct(args.attention_out, h, h, blocks);
  plan->products[kIn] = MakeProduct(args.feed_forward_in, h, args.intermediate, blocks);
  plan->products[kDown] = MakeProduct(args.feed_forward_out, args.intermediate, h, blocks);
  plan->products[kHead] = MakeProduct(args.head, h, args.vocab, blocks);
  const Places places = PlacesOf(args);
  plan->products[kQkv].source = plan->products[kDown].target = places.input;
  plan->products[kHead].source = places.input;
  plan->products[kQkv].target = places.qkv;
  plan->products[kOut].source = places.attended;
  plan->products[kOut].target = plan->products[kIn].source = places.after_attention;
  plan->products[kIn].target = plan->products[kDown].source = places.wide;
  plan->split_stats = places.split_stats;
  // A thread keeps one number of the residual stream at most.
  if (plan->products[kOut].tiles > kRound * blocks) return false;

  const int32_t h_chunks = plan->products[kQkv].chunks;
  const int32_t most_chunks = plan->products[kDown].chunks;
  plan->slots = h_chunks > most_chunks ? h_chunks : most_chunks;
  // A round of several blocks of columns stages as many as it can hold.
  if (plan->slots > 1) plan->slots = h_chunks > kRound ? h_chunks : kRound;
  if (plan->slots > kMaxSlots) return false;
  int32_t columns = plan->products[kQkv].chunk_columns;
  if (plan->products[kDown].chunk_columns > columns) columns = plan->products[kDown].chunk_columns;
  // Neighbouring rows start 64 bytes apart among the banks.
  plan->row_stride = CeilOf(2 * columns, 128) * 128 + 64;
  plan->stage_bytes = kTile * plan->row_stride;
  const int32_t left = memory - SharedBytes(rows) - ActivationBytes(rows, plan->slots);
  if (left < 3 * plan->stage_bytes) return false;
  plan->stages = left / plan->stage_bytes;
  if (plan->stages > kMaxStages) plan->stages = kMaxStages;

  plan->layer_bytes = args.layer_bytes;
  plan->layers = args.layers;
  plan->hidden = h;
  plan->heads = args.heads;
  plan->head_size = head_size;
  plan->rows = args.rows;
  plan->max_splits = kMaxSplits / rows;
  plan->eps = args.eps;
  plan->query_scale = static_cast<float>(kLog2e / std::sqrt(static_cast<double>(head_size)));
  plan->exchange = static_cast<uint4*>(args.exchange);
  plan->epoch = args.epoch;
  plan->embedding = args.embedding;
  plan->positions = args.positions;
  plan->position_stride = args.position_stride;
  plan->cache = args.cache;
  plan->row_list = args.row_list;
  plan->slots_of_rows = args.slots;
  plan->logits = args.logits;
  plan->ld = args.ld;
  plan->stamps = args.stamps;
  return true;
}

int32_t PlanBytes(const Plan& plan, int32_t rows) {
  return SharedBytes(rows) + ActivationBytes(rows, plan.slots) + plan.stages * plan.stage_bytes;
}

// The plan for the current device; *blocks is 0 where there is none.
cudaError_t PlanForDevice(const PersistentArgs& args, Plan* plan, int* blocks) {
  *blocks = 0;
  if (FASTGEN_CUDA_HAS_PERSISTENT == 0) return cudaSuccess;
  int device = 0, processors = 0, memory = 0, major = 0, cooperative = 0;
  cudaError_t status = cudaGetDevice(&device);
  const auto ask = [&](int* value, cudaDeviceAttr what) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(value, what, device);
  };
  ask(&processors, cudaDevAttrMultiProcessorCount);
  ask(&memory, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&cooperative, cudaDevAttrCooperativeLaunch);
  if (status != cudaSuccess || major < 9 || cooperative == 0) return status;
  if (!MakePlan(args, processors, memory, plan)) return cudaSuccess;
  const void* const kernel = KernelOf(args.dtype, RowsOf(args.rows));
  cudaFuncAttributes attributes;
  status = cudaFuncGetAttributes(&attributes, kernel);
  // Compiled for an older architecture the kernel is empty.
  if (status != cudaSuccess || attributes.ptxVersion < 90) return status;
  const int bytes = PlanBytes(*plan, RowsOf(args.rows));
  status = AllowSharedBytes(kernel, static_cast<size_t>(bytes));
  int per_processor = 0;
  if (status == cudaSuccess) {
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kThreads,
                                                           static_cast<size_t>(bytes));
  }
  if (status == cudaSuccess && per_processor > 0) *blocks = processors;
  return status;
}

}  // namespace
}  // namespace persistent

int32_t PersistentBlocks(const PersistentArgs& args) {
  persistent::Plan plan;
  int blocks = 0;
  if (persistent::PlanForDevice(args, &plan, &blocks) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return blocks;
}

size_t PersistentExchangeBytes(const PersistentArgs& args) {
  return static_cast<size_t>(persistent::PlacesOf(args).end) * sizeof(uint4);
}

cudaError_t PersistentStep(const PersistentArgs& args, cudaStream_t stream) {
  persistent::Plan plan;
  int blocks = 0;
  cudaError_t status = persistent::PlanForDevice(args, &plan, &blocks);
  if (status != cudaSuccess) return status;
  if (blocks == 0) return cudaErrorNotSupported;
  void* arguments[] = {&plan};
  const int32_t rows = persistent::RowsOf(args.rows);
  return cudaLaunchCooperativeKernel(
      persistent::KernelOf(args.dtype, rows), dim3(static_cast<unsigned>(blocks)),
      dim3(persistent::kThreads), arguments, static_cast<size_t>(persistent::PlanBytes(plan, rows)),
      stream);
}

}  // namespace cuda
}  // namespace fastgen
