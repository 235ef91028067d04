// From logits to tokens. A cluster of blocks works on a row where there are clusters, else a block.
// No result depends on how the row is divided: maxima and sums are of whole numbers.
#include <cstddef>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/sample_filter.h"
#include "cuda/sample_report.h"
#include "cuda/sample_softmax.h"

namespace fastgen {
namespace cuda {
namespace {

// What no kernel writes of a row's slot, by one warp, before the kernels before have ended. Past
// the first-level cache, where the rest of the line would be found stale afterwards.
template <typename Shared>
__device__ void LoadSlot(const SampleArgs& args, int32_t row, int lane, Shared* s) {
  constexpr int kWords = sizeof(Slot) / sizeof(uint32_t);
  static_assert(sizeof(Slot) % sizeof(uint32_t) == 0 && kWords <= 32, "a lane takes a word");
  const int32_t index = __ldcg(&args.row_list[row].slot);
  if (lane == 0) s->slot_index = index;
  if (index >= 0 && lane < kWords) {
    reinterpret_cast<uint32_t*>(&s->slot)[lane] =
        __ldcg(reinterpret_cast<const uint32_t*>(args.slots + index) + lane);
  }
  __syncwarp();
}

// What the step before has left.
template <typename Shared>
__device__ void LoadState(const SampleArgs& args, int lane, Shared* s) {
  if (lane != 0) return;
  s->step = __ldcg(args.step);
  s->bound = 0;
  s->own_count = 0;
  if (s->slot_index < 0) return;
  s->slot.length = __ldcg(&args.slots[s->slot_index].length);
  s->slot.finished = __ldcg(&args.slots[s->slot_index].finished);
}

// The last row of the step counts the step.
__device__ void CountRow(const SampleArgs& args, int32_t step) {
  auto* const arrived = static_cast<int32_t*>(args.workspace);
  if (atomicAdd(arrived, 1) != args.rows - 1) return;
  *arrived = 0;
  *args.step = step + 1;
}

// Of processed logits, by s.slot's options. `seen` is what the thread has seen of its share.
template <int kParts, int kThreads, Storage kStorage>
__device__ __forceinline__ Chosen Choose(Group<kParts, kThreads>& group, const float* logits,
                                         float* exps, int32_t chunk, int32_t vocab, MassScale scale,
                                         const Seen& seen, const Sharing& sharing) {
  using RowGroup = Group<kParts, kThreads>;
  using Exps = Exponentials<kStorage>;
  using RowFilter = Filter<kParts, kThreads, Exps>;
  constexpr Chosen kNotHere = {-1, 0.0f};
  auto& s = group.s;
  const int32_t begin = group.id_begin;
  const SamplingParams& params = s.slot.sampling;
  const bool use_k = params.top_k > 0 && params.top_k < vocab;
  const bool use_p = params.top_p > 0.0f && params.top_p < 1.0f;
  const uint32_t k = use_k ? static_cast<uint32_t>(params.top_k) : 0xFFFFFFFFu;
  const bool few_wanted = params.sample != 0 && k <= RowGroup::kMostBounded;

  const bool spread_bounds = few_wanted && k > RowGroup::kFewest;

  // The best token is looked for only where it may be chosen: in greedy search, and where there
  // turns out to be no distribution, in a second round.
  Best best;
  float largest;
  bool is_distribution = false;
  bool find_token = params.sample == 0;
  const uint32_t order = group.thread < sharing.threads ? OrderOf(seen.largest) : 0;
  for (uint64_t* entries = s.best;; entries = s.masses) {
    const uint32_t order_of_warp = MaxOverWarp(order);
    Find find = {order, find_token ? -1 : 0};
    if (find_token && order != 0 && order == order_of_warp) {
      ForEachLogit(logits, sharing, group.thread, find);  // who has the warp's best
    }
    __syncwarp();
    const uint64_t best_of_warp =
        group.BestOfWarp(order, find.found < 0 ? -1 : begin + find.found, seen.any_nan);
    group.exchange.Announce(RowGroup::kSpreadBytes +
                            (spread_bounds ? RowGroup::kSpreadBytes / 2 : 0));
    group.Spread(entries, best_of_warp);
    if (spread_bounds) {
      group.Spread(s.bounds,
                   group.BoundOf(best_of_warp, group.part * RowGroup::kWarps + group.warp));
    }
    if (!find_token && group.warp == RowGroup::kWarps - 1) {
      s.draw = Draw(params.seed, params.sequence,
                    static_cast<uint32_t>(s.slot.length - s.slot.prompt_length));
    }
    group.exchange.Wait();
    best = group.BestOf(entries);
    largest = best.order == 0 ? kMinusInfinity : LogitOf(best.order);
    const float scaled = params.temperature == 1.0f ? largest : largest / params.temperature;
    is_distribution = !best.any_nan && fabsf(largest) <= FLT_MAX && fabsf(scaled) <= FLT_MAX;
    if (find_token || is_distribution) break;
    find_token = true;
  }
  Chosen chosen = kNotHere;
  if (find_token) {
    if (group.thread == 0 && best.token >= begin && best.token < begin + sharing.count) {
      chosen = {best.token, logits[best.token - begin]};
    }
    if (!params.sample) return chosen;
    if (best.any_nan || !(fabsf(largest) <= FLT_MAX)) {  // it has no score
      chosen.score = __int_as_float(0x7FC00000);
      return chosen;
    }
  }

  float listed_from = __int_as_float(0x7F800000);
  if (few_wanted && is_distribution) {
    uint32_t bound;
    if (spread_bounds) {
      group.FindBound(k);
      __syncthreads();
      bound = s.bound;
    } else {
      bound = group.FindBoundOfFewest(s.best, k);
    }
    listed_from = kMasked;  // what is lower has no probability
    if (bound > OrderOf(kMasked)) {
      // Lower ones may have the same probability.
      const float logit = LogitOf(bound);
      listed_from = logit - (fabsf(logit) * 1e-6f + params.temperature * 4e-6f);
    }
  }
  Exps source = {logits, exps, Softmax(params.temperature, largest), scale, 0.0f};
  const Softmax& softmax = source.softmax;
  const uint32_t sum_bytes =
      AddUp<kStorage>(group, logits, exps, softmax, largest, listed_from, scale);
  uint64_t total = 0, limit = 0;
  const auto find_limit = [&] {
    total = group.SumOf(s.sums);
    source.sum = static_cast<float>(SumOfMass(total, scale));
    limit = use_p ? PartOf(total, params.top_p) : uint64_t{1} << 63;
    return limit;
  };
  const auto log_sum = [&] {
    return LogOfSum(largest, softmax.plain ? total : group.SumOf(s.plain_sums), scale);
  };
  if (!is_distribution) {  // the best has a score all the same
    group.exchange.Announce(sum_bytes);
    group.exchange.Wait();
    find_limit();
    chosen.score -= log_sum();
    return chosen;
  }

  // In the same round goes what the filters need to know first: the few that may be among the first
  // k, or a histogram.
  const RowFilter filter(group, source, chunk);
  Cut cut = {0, kAllTokens};
  typename RowFilter::Candidates candidates = {0, 0, 0, {0, 0}};
  bool few = false;  // all that is kept is among those listed
  if (few_wanted) {
    few = filter.HandOut(&candidates.count, sum_bytes) && candidates.count <= kFew;
    if (few) {
      if (group.part != 0) return kNotHere;
      find_limit();
      if (candidates.count <= RowFilter::kOfOneWarp) {
        // While one warp draws, another one takes the logarithm.
        Listed drawn = {0.0f, -1};
        if (group.warp == 0) {
          drawn = filter.DrawFromFewest(candidates.count, k, limit, s.draw);
        } else if (group.warp == RowGroup::kWarps - 1) {
          s.log_sum = log_sum();
        }
        __syncthreads();
        return {drawn.token, drawn.logit - s.log_sum};
      }
      const Listed drawn = filter.DrawFromListed(candidates.count, k, limit, s.draw, [&] {
        if (group.warp == RowGroup::kWarps - 1) s.log_sum = log_sum();
      });
      return {drawn.token, drawn.logit - s.log_sum};
    }
  }
  const uint64_t* masses = s.sums;
  const auto parts_of = [&](int32_t i, float exp) {
    return MassPartsOf(cut.Keeps(__float_as_uint(exp), begin + i) ? exp : 0.0f, scale);
  };
  float sum_log = 0.0f;
  if (use_k || use_p) {
    // All tokens below the floor together have less than half of what lies beyond top_p, as the sum
    // of exponentials is 1 or more. The margin dwarfs what rounding makes of it.
    const float beyond = 1.0f - params.top_p - 1e-5f;
    const float floor = use_p && beyond > 0.0f ? 0.5f * beyond / static_cast<float>(vocab) : 0.0f;
    candidates = filter.FindCut(floor, k, find_limit, use_p, few_wanted ? 0 : sum_bytes, &cut);
    if (candidates.count > 0) {
      filter.TakeFew(candidates);
      __syncthreads();
      cut = filter.RankFew(candidates, k, limit);
    }
    uint64_t mass = 0;
    group.ForEachOwn([&](int32_t i) {
      float values[kBatch];
      source.Exps(i, group.warp_end, values);
      MassParts parts = {0, 0};
      for (int j = 0; j < kBatch; ++j) parts.Add(parts_of(i + j, values[j]));
      mass += parts.Whole(scale);
    });
    group.exchange.Announce(RowGroup::kSpreadBytes);
    group.Spread(s.masses, SumOverWarp(mass));
    sum_log = log_sum();
    group.exchange.Wait();
    masses = s.masses;
  } else {
    group.exchange.Announce(sum_bytes);
    group.exchange.Wait();
    find_limit();
    sum_log = log_sum();
    __syncthreads();  // for the draw
  }
  const uint64_t target = TargetOf(group.SumOf(masses), s.draw);
  const typename RowGroup::Place place = group.FindPlace(masses, target);
  if (!group.IsMine(place.entry)) return kNotHere;

  // This warp has the token, in one of its tiles.
  uint64_t running = place.before;
#pragma unroll 1
  for (int32_t tile = group.warp_begin; tile < group.warp_end; tile += kTile) {
    const int32_t i = tile + group.lane * kBatch;
    float values[kBatch] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (i < group.warp_end) source.Exps(i, group.warp_end, values);
    MassParts parts = {0, 0};
    for (int j = 0; j < kBatch; ++j) parts.Add(parts_of(i + j, values[j]));
    const uint64_t own = parts.Whole(scale);
    uint64_t scan = running + ScanOverWarp(own, group.lane);
    running = __shfl_sync(kAllLanes, scan, 31);
    if (running <= target) continue;
    scan -= own;
    if (scan > target || scan + own <= target) return kNotHere;
    int j = 0;
    for (; j < kBatch - 1; ++j) {
      scan += parts_of(i + j, values[j]).Whole(scale);
      if (scan > target) break;
    }
    return {begin + i + j, logits[i + j] - sum_log};
  }
  return kNotHere;
}

struct SampleWork {
  SampleArgs args;
  int32_t chunk;  // ids of a block
  MassScale scale;
};

template <int kParts, int kThreads, Storage kStorage>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads) SampleKernel(const SampleWork work) {
  using RowGroup = Group<kParts, kThreads>;
  constexpr bool kShared = kStorage != Storage::kNone;
  __shared__ typename RowGroup::Shared s;
  extern __shared__ float4 chunk_memory[];
  const SampleArgs& args = work.args;
  const auto row = static_cast<int32_t>(blockIdx.x) / kParts;
  const int32_t part = static_cast<int32_t>(blockIdx.x) % kParts;
  const auto begin = static_cast<int32_t>(
      min(static_cast<int64_t>(part) * work.chunk, static_cast<int64_t>(args.vocab)));
  const int32_t count = min(work.chunk, args.vocab - begin);
  RowGroup group(s, begin, count);
  float* const row_logits = args.logits + row * args.ld + begin;
  float* const logits = kShared ? reinterpret_cast<float*>(chunk_memory) : row_logits;
  float* const exps = reinterpret_cast<float*>(chunk_memory) + work.chunk;

  LetNextGridStart();
  group.exchange.Start();
  const bool loads_state = group.warp == RowGroup::kWarps - 1;
  if (loads_state) LoadSlot(args, row, group.lane, &s);
  group.exchange.WaitForStart();  // while there are no logits to work on
  WaitForGrid();
  Sharing sharing = {count, kThreads - 32,
                     reinterpret_cast<uintptr_t>(row_logits) % sizeof(float4) == 0};
  Copy copy = {logits, {kMinusInfinity, false}};
  if (loads_state) {
    LoadState(args, group.lane, &s);
  } else if (kShared) {
    ForEachLogit(row_logits, sharing, group.thread, copy);
    if (group.thread < kBatch && count % kBatch != 0 && count % kBatch + group.thread < kBatch) {
      logits[count + group.thread] = kMinusInfinity;  // up to whole batches
    }
  }
  __syncthreads();
  Chosen chosen = {-1, 0.0f};
  const bool idle = s.slot_index < 0 || s.slot.finished != 0;
  if (!idle) {
    const bool has_processors = HasProcessors(s.slot);
    if (has_processors) {
      ProcessLogits(s.slot, logits, begin, count, s.histogram, 3 * kBuckets);
    }
    if (has_processors || !kShared) {
      sharing.threads = kThreads;
      Look look = {{kMinusInfinity, false}};
      ForEachLogit(logits, sharing, group.thread, look);
      copy.seen = look.seen;
    }
    chosen = Choose<kParts, kThreads, kStorage>(group, logits, exps, work.chunk, args.vocab,
                                                work.scale, copy.seen, sharing);
  }
  int32_t finished = 1;
  if (chosen.token >= 0) {
    finished = Ends(s.slot, chosen.token) ? 1 : 0;
    Append(args, s.slot, s.slot_index, chosen.token, finished);
  }
  if (chosen.token >= 0 || (idle && part == 0 && group.thread == 0)) {
    CountRow(args, s.step);
    Report(args, row, s.step, chosen, finished);
  }
}

template <typename Kernel>
cudaError_t LaunchRows(Kernel kernel, const SampleArgs& args, int32_t parts, int32_t threads,
                       int32_t chunk, MassScale scale, size_t bytes, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(args.rows) * static_cast<unsigned>(parts));
  shape.threads = threads;
  shape.shared_bytes = bytes;
  shape.cluster = parts;
  shape.overlap = args.overlap;
  return Launch(kernel, shape, stream, SampleWork{args, chunk, scale});
}

#if FASTGEN_CUDA_HAS_EXCHANGE
constexpr int kClusterThreads = 512;

// Launches clusters of kParts blocks if the device, and what this was compiled to for it, has them,
// and if their shared memory holds what it should.
template <int kParts, Storage kStorage>
cudaError_t TryClusters(const SampleArgs& args, MassScale scale, const DeviceLimits& limits,
                        cudaStream_t stream, bool* launched) {
  const auto kernel = SampleKernel<kParts, kClusterThreads, kStorage>;
  cudaFuncAttributes attributes;
  const cudaError_t status =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (status != cudaSuccess) return status;
  const int64_t share = (static_cast<int64_t>(args.vocab) + kParts - 1) / kParts;
  const int64_t chunk = (share + kBatch - 1) / kBatch * kBatch;
  constexpr int kArrays = kStorage == Storage::kBoth ? 2 : kStorage == Storage::kLogits ? 1 : 0;
  const int64_t bytes = chunk * kArrays * static_cast<int64_t>(sizeof(float));
  *launched = attributes.ptxVersion >= 90 &&
              bytes + static_cast<int64_t>(attributes.sharedSizeBytes) <= limits.shared_bytes;
  if (!*launched) return cudaSuccess;
  return LaunchRows(kernel, args, kParts, kClusterThreads, static_cast<int32_t>(chunk), scale,
                    static_cast<size_t>(bytes), stream);
}
#endif

}  // namespace

size_t SampleWorkspaceBytes(int32_t /*rows*/, int32_t /*vocab*/) { return 16; }

cudaError_t Sample(const SampleArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  const MassScale scale = MassScaleOf(args.vocab);

#if FASTGEN_CUDA_HAS_EXCHANGE
  DeviceLimits limits;
  cudaError_t status = GetDeviceLimits(&limits);
  if (status != cudaSuccess) return status;
  bool launched = false;
  // More rows: fewer blocks for each. With two, fewer tokens would be known to hold the first k.
  if (args.rows * 8 > limits.multiprocessors) {
    status = TryClusters<4, Storage::kLogits>(args, scale, limits, stream, &launched);
    if (launched || status != cudaSuccess) return status;
  }
  status = TryClusters<8, Storage::kBoth>(args, scale, limits, stream, &launched);
  if (launched || status != cudaSuccess) return status;
  status = TryClusters<8, Storage::kNone>(args, scale, limits, stream, &launched);
  if (launched || status != cudaSuccess) return status;
#endif
  constexpr int kBlockThreads = 1024;
  return LaunchRows(SampleKernel<1, kBlockThreads, Storage::kNone>, args, 1, kBlockThreads,
                    args.vocab, scale, 0, stream);
}

}  // namespace cuda
}  // namespace fastgen
