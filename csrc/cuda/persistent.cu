// The persistent kernel: a step of the decoder, and its launch. persistent_device.h says how its blocks
// talk to each other, the other persistent_*.h what their warps do.
#include "cuda/persistent.h"

#include <cmath>

#include "cuda/launch.h"
#include "cuda/pack.h"
#include "cuda/persistent_attention.h"
#include "cuda/persistent_choice.h"
#include "cuda/persistent_finish.h"
#include "cuda/persistent_step.h"
#include "cuda/persistent_stream.h"
#include "cuda/persistent_work.h"

namespace fastgen {
namespace cuda {
namespace persistent {
namespace {

template <typename W, int kRows>
__global__ void __launch_bounds__(Threads<kRows>::kCount, 1)
    StepKernel(const FASTGEN_GRID_CONSTANT Plan plan) {
#if FASTGEN_ARCH_HAS_PERSISTENT
  Shared<kRows>& shared = SharedOfBlock<kRows>();
  char* const ring =
      block_memory + sizeof(Shared<kRows>) + plan.lines * Activations<kRows>::kWarpsBytes;
  constexpr int kFinisherWarps = Threads<kRows>::kFinishers / 32;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);
  if (thread == 0) {
    // All lanes arrive where memory is given back: racecheck follows an arrival to what that lane has read.
    for (int s = 0; s < kMaxStages; ++s) {
      BarrierInit(shared.full + s, 1);
      BarrierInit(shared.empty + s, 32 * kWarps);
    }
    BarrierInit(shared.finished, 32 * kFinisherWarps);
    BarrierInit(shared.finished + 1, 32 * kFinisherWarps);
    BarrierInit(&shared.started, kRows);
    BarrierInitDone();
    shared.copied = 0;
  }
  for (int i = thread * 16; i < plan.clear; i += Threads<kRows>::kCount * 16) {
    *reinterpret_cast<uint4*>(ring + i) = make_uint4(0, 0, 0, 0);
  }
  if (plan.clear > 0) FenceForBulkEngine();
  __syncthreads();
  const int streamer = warp - kWarps - kFinisherWarps;
  if (streamer >= 0 && streamer < plan.copiers) {
    if (ElectLane()) Streamer<W, kRows>(plan, shared, ring, streamer).Run();
    return;
  }
  if (streamer > plan.copiers) return;
  if (streamer < 0) {
    WaitForGrid();
    ReadStep<W>(plan, shared);
    WaitAt<Threads<kRows>::kReaders>(kReaders);
    if (thread < kRows) BarrierArrive(&shared.started);
    ArriveAt<Threads<kRows>::kTold>(kTold);
    if (ActiveRows(shared) == 0) {
      if (plan.chooses == 0) return;
      if (warp == kWarps) ReportNone(plan, shared);
      if (thread == 0) CountStep(plan, shared.epoch, shared.step);
      return;
    }
  }
  if (warp >= kWarps) {
    const bool finisher = warp < kWarps + kFinisherWarps;
    if (finisher) {
      Thread<kRows> self = ThisThread<kRows>(plan, Role::kFinisher);
      float residual[Threads<kRows>::kOutputs];
      Embed<W>(self, residual);
#pragma unroll 1
      for (int layer = 0; layer < plan.layers; ++layer) {
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
          FinishProduct<W, kRows, true>(self, half == 0 ? kQkv : kIn, layer, residual);
          if (half == 0) FinishAttention<W>(self, layer);
          FinishProduct<W, kRows, false>(self, half == 0 ? kOut : kDown, layer, residual);
        }
      }
      LetNextGridStart();
      FinishProduct<W, kRows, true>(self, kHead, plan.layers, residual);
    } else if (!Prefetcher<kRows>(plan, shared).Run()) {
      return;
    }
    if (plan.chooses == 0) return;
    ChooseTokens<kRows>(plan, finisher ? Role::kFinisher : Role::kPrefetcher);
    return;
  }
  Thread<kRows> self = ThisThread<kRows>(plan, Role::kWorker);
  Unit unit;
  const bool attends = FindUnit(self, FirstUnit(), &unit);
  const char* const first_key = attends ? FirstKey(self, unit) : nullptr;
  // A copy of the code serves as many phases as it can, so that all stay in the instruction cache.
  int phase = kQkv;
#pragma unroll 1
  for (int layer = 0; layer <= plan.layers;) {
    if (layer == plan.layers) phase = kHead;
    // Where two warps copy for several rows, there is none that prefetches.
    if (kRows > 1 && plan.copiers == 2 && phase == kQkv && self.warp == 0) {
      PrefetchUnits(self, layer);
    }
    const uint32_t epoch = self.epoch + static_cast<uint32_t>(layer);
    if (phase == kAttention) {
      WorkOnAttention<W>(self, attends, unit, first_key, layer);
    } else if (phase == kOut && plan.hidden <= kChunk) {
      WorkOnProduct<W, kRows, false, true>(self, phase, layer, epoch + 1u);
    } else if (phase == kOut || phase == kDown) {
      WorkOnProduct<W, kRows, false, false>(self, phase, layer, epoch + 1u);
    } else {
      const uint32_t inputs = epoch + (phase == kIn ? 1u : 0u);
      if (plan.hidden <= kChunk) {
        WorkOnProduct<W, kRows, true, true>(self, phase, layer, inputs);
      } else {
        WorkOnProduct<W, kRows, true, false>(self, phase, layer, inputs);
      }
    }
    if (++phase >= kHead) {
      phase = kQkv;
      ++layer;
    }
  }
  // While the finishers end the step.
  if (thread == 0) CountStep(plan, shared.epoch, shared.step);
#endif
}

// ---- the host's side --------------------------------------------------------------------------------

int32_t RowsOf(int32_t rows) { return rows <= 1 ? 1 : rows <= 2 ? 2 : 4; }

template <typename W>
const void* KernelFor(int32_t rows) {
  return rows == 1   ? reinterpret_cast<const void*>(StepKernel<W, 1>)
         : rows == 2 ? reinterpret_cast<const void*>(StepKernel<W, 2>)
                     : reinterpret_cast<const void*>(StepKernel<W, 4>);
}

const void* KernelOf(DType dtype, int32_t rows) {
  switch (dtype) {
    case DType::kFloat16: return KernelFor<Half>(rows);
    case DType::kBFloat16: return KernelFor<Brain>(rows);
    case DType::kInt8: return KernelFor<Int8>(rows);
    case DType::kInt4: return KernelFor<Int4>(rows);
    case DType::kFloat32: break;
  }
  return nullptr;
}

int32_t SharedBytes(int32_t rows) {
  return static_cast<int32_t>(rows == 1   ? sizeof(Shared<1>)
                              : rows == 2 ? sizeof(Shared<2>)
                                          : sizeof(Shared<4>));
}

int32_t ThreadsOf(int32_t rows) {
  return rows == 1 ? Threads<1>::kCount : rows == 2 ? Threads<2>::kCount : Threads<4>::kCount;
}

// Of a line of activations in all warps.
int32_t LineBytes(int32_t rows) { return rows * Activations<1>::kWarpsBytes; }

int32_t CeilOf(int32_t n, int32_t unit) { return (n + unit - 1) / unit; }

Product MakeProduct(Phase phase, const PersistentProduct& from, DType dtype, int32_t rows,
                    int32_t in, int32_t out, int32_t blocks, int32_t first) {
  Product to = {};
  to.weights = static_cast<const char*>(from.weights);
  to.scales = static_cast<const char*>(from.scales);
  to.bias = from.bias;
  to.norm_weight = from.norm_weight;
  to.sums = from.sums;
  to.row_bytes = RowBytes(dtype, in);
  to.scale_bytes = int64_t{2} * ScaleStride(dtype, in);
  to.in = in;
  to.out = out;
  const int32_t tiles = CeilOf(out, kTile);
  to.tiles_each = tiles / blocks;
  to.tiles_left = tiles % blocks;
  to.first = first % blocks;
  to.chunks = CeilOf(in, kChunk);
  to.whole = to.chunks == 1 && phase != kDown ? 1 : 0;
  to.round = StagesAtOnce(rows, false, phase == kOut && to.chunks == 1);
  return to;
}

// Places of the exchange, in pieces.
struct Places {
  int32_t state, input, after_attention, qkv, split_values, split_stats, attended, wide, bests,
      sums, listed, end;
};

Places PlacesOf(const PersistentArgs& args) {
  const int32_t row = kPersistentRows * args.hidden / 4;
  Places p;
  p.state = 0;
  p.input = 8;  // a line of its own
  const int32_t residual_row = kPersistentRows * args.hidden / kTile * kTileStride;
  p.after_attention = p.input + residual_row;
  p.qkv = p.after_attention + residual_row;
  p.split_values = p.qkv + 3 * row;
  p.split_stats = p.split_values + kMaxSplits * row;
  p.attended = p.split_stats + kMaxSplits * kPersistentRows * args.heads;
  p.wide = p.attended + row;  // the only row's parts lie there as rows would
  static_assert(kMaxJoins <= kPersistentRows, "places of rows");
  p.bests = p.wide + kPersistentRows * args.intermediate / 4;
  p.sums = p.bests + kPersistentRows * kMaxBlocks;
  p.listed = p.sums + 2 * kPersistentRows * kMaxBlocks * kMaxFinisherWarps;
  p.end = p.listed +
          kPersistentRows * kMaxBlocks * kMaxFinisherWarps * static_cast<int32_t>(kListedOfWarp);
  return p;
}

int32_t StageBytes(DType dtype) {
  switch (dtype) {
    case DType::kInt8: return Stage<Int8>::kBytes;
    case DType::kInt4: return Stage<Int4>::kBytes;
    default: return Stage<Half>::kBytes;
  }
}

// The plan for a device; false where the step does not fit.
bool MakePlan(const PersistentArgs& args, int blocks, int memory, Plan* plan) {
  const int32_t rows = RowsOf(args.rows);
  const int32_t h = args.hidden, wide = args.intermediate;
  if (args.rows < 1 || args.rows > kPersistentRows || h <= 0 || args.layers <= 0) return false;
  if (args.dtype == DType::kFloat32 || blocks > kMaxBlocks) return false;
  if (args.stamps != nullptr && FASTGEN_CUDA_STAMPS == 0) return false;
  const DType cache = args.dtype == DType::kBFloat16 ? DType::kBFloat16 : DType::kFloat16;
  if (args.cache.dtype != cache || args.heads <= 0 || h % args.heads != 0) return false;
  const int32_t head_size = h / args.heads;
  if (head_size % 8 != 0 || head_size > kMaxHeadSize) return false;
  if (h % kGroup != 0 || wide % kGroup != 0 || wide <= 0) return false;

  *plan = Plan();
  const auto product = [&](Phase phase, const PersistentProduct& from, int32_t in, int32_t out,
                           int32_t first) {
    plan->products[phase] = MakeProduct(phase, from, args.dtype, rows, in, out, blocks, first);
    return plan->products[phase].first + plan->products[phase].tiles_left;
  };
  // Where tiles do not come out even, others have one more in the next product. The two that add to
  // the residual stream have their outputs in the same threads.
  const int32_t after_qkv = product(kQkv, args.qkv, h, 3 * h, 0);
  const int32_t after_out = product(kOut, args.attention_out, h, h, after_qkv);
  const int32_t after_in = product(kIn, args.feed_forward_in, h, wide, after_out);
  product(kDown, args.feed_forward_out, wide, h, after_qkv);
  product(kHead, args.head, h, args.vocab, after_in);
  const Places places = PlacesOf(args);
  plan->products[kQkv].source = plan->products[kDown].target = places.input;
  plan->products[kHead].source = places.input;
  plan->products[kQkv].target = places.qkv;
  plan->products[kOut].source = places.attended;
  plan->products[kOut].target = plan->products[kIn].source = places.after_attention;
  plan->products[kIn].target = plan->products[kDown].source = places.wide;
  plan->split_values = places.split_values;
  plan->split_stats = places.split_stats;
  // A thread keeps one number of the residual stream at most.
  if (CeilOf(h, kTile) > kRound * blocks) return false;

  const int32_t narrow_chunks = CeilOf(h, kChunk), wide_chunks = CeilOf(wide, kChunk);
  if (wide_chunks > kMaxChunks) return false;
  plan->lines = 2 * narrow_chunks > wide_chunks ? 2 * narrow_chunks : wide_chunks;
  const int32_t left = memory - SharedBytes(rows) - plan->lines * LineBytes(rows);
  plan->stages = left / StageBytes(args.dtype);
  if (plan->stages > kMaxStages) plan->stages = kMaxStages;
  if (plan->stages < kRound) return false;
  int32_t layer_stages = 0;  // of the block that has most
  for (const Phase phase : {kQkv, kOut, kIn, kDown}) {
    const Product& p = plan->products[phase];
    layer_stages += (p.tiles_each + (p.tiles_left > 0 ? 1 : 0)) * p.chunks;
  }
  const bool scaled = args.dtype == DType::kInt8 || args.dtype == DType::kInt4;
  plan->hurry = scaled || layer_stages > plan->stages ? 1 : 0;
  plan->pace = plan->hurry != 0 ? 0 : 975;
  // Where rows are in chunks there are so many copies of scales that one warp would not get through them in time.
  plan->copiers = scaled && narrow_chunks > 1 ? 2 : 1;
  if (h % kSpan != 0 || wide % kSpan != 0) plan->clear = plan->stages * StageBytes(args.dtype);

  plan->layer_bytes = args.layer_bytes;
  plan->layers = args.layers;
  plan->hidden = h;
  plan->heads = args.heads;
  plan->head_size = head_size;
  plan->rows = args.rows;
  plan->eps = args.eps;
  plan->query_scale = static_cast<float>(kLog2e / std::sqrt(static_cast<double>(head_size)));
  plan->exchange = static_cast<uint4*>(args.exchange);
  plan->state = reinterpret_cast<uint32_t*>(plan->exchange + places.state);
  plan->embedding = args.embedding;
  plan->positions = args.positions;
  plan->position_stride = args.position_stride;
  plan->cache = args.cache;
  plan->row_list = args.row_list;
  plan->slots_of_rows = args.slots;
  plan->logits = args.logits;
  plan->ld = args.ld;
  plan->chooses = args.choice != nullptr ? 1 : 0;
  plan->bests = places.bests;
  plan->sums = places.sums;
  plan->listed = places.listed;
  plan->scale = MassScaleOf(args.vocab);
  if (args.choice != nullptr) plan->choice = *args.choice;
  const Product& head = plan->products[kHead];
  const int32_t head_tiles = head.tiles_each + (head.tiles_left > 0 ? 1 : 0);
  const bool keeps = CeilOf(head_tiles, kRound) * kRound * kTile * rows <= kMostKept;
  // Of many rows only where a warp is left to rehearse it.
  const bool gains = rows <= 2 || plan->copiers == 1;
  if (args.choice != nullptr && !(keeps && gains)) return false;
  plan->stamps = args.stamps;
  return true;
}

int32_t PlanBytes(const Plan& plan, DType dtype, int32_t rows) {
  return SharedBytes(rows) + plan.lines * LineBytes(rows) + plan.stages * StageBytes(dtype);
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
  const int bytes = PlanBytes(*plan, args.dtype, RowsOf(args.rows));
  status = AllowSharedBytes(kernel, static_cast<size_t>(bytes));
  int per_processor = 0;
  if (status == cudaSuccess) {
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &per_processor, kernel, ThreadsOf(RowsOf(args.rows)), static_cast<size_t>(bytes));
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
#if FASTGEN_CUDA_HAS_PERSISTENT
  const int32_t rows = persistent::RowsOf(args.rows);
  const void* const kernel = persistent::KernelOf(args.dtype, rows);
  void* arguments[] = {&plan};
  // Cooperative: all blocks run at once or none does, whatever else is on the device.
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(persistent::ThreadsOf(rows)));
  config.dynamicSmemBytes = static_cast<size_t>(persistent::PlanBytes(plan, args.dtype, rows));
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = args.overlap ? 2 : 1;
  return cudaLaunchKernelExC(&config, kernel, arguments);
#else
  static_cast<void>(stream);
  return cudaErrorNotSupported;
#endif
}

}  // namespace cuda
}  // namespace fastgen
