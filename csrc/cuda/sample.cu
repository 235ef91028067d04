// From logits to tokens. A cluster of eight blocks works on a row where there are clusters, else a
// block. No result depends on how the row is divided: maxima and sums are of whole numbers.
#include <cstddef>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/sample_group.h"

namespace fastgen {
namespace cuda {
namespace {

// Says what a row came to, by one thread; the last row of the step counts the step.
__device__ void Report(const SampleArgs& args, int32_t row, int32_t step, int32_t token,
                       float score, int32_t finished) {
  auto* const arrived = static_cast<int32_t*>(args.workspace);
  const bool last = atomicAdd(arrived, 1) == args.rows - 1;
  const auto place = static_cast<int64_t>(step % args.result_steps) * args.result_rows + row;
  volatile StepResult* const result = args.results + place;
  result->token = token;
  result->score = score;
  result->finished = finished;
  __threadfence_system();
  result->ready = step + 1;
  if (last) {
    *arrived = 0;
    *args.step = step + 1;
  }
}

// Appends a token to the row's sequence.
__device__ void Append(const SampleArgs& args, int32_t row, const Slot& before, int32_t slot_index,
                       int32_t step, int32_t token, float score) {
  Slot* const slot = args.slots + slot_index;
  const int32_t new_tokens = before.length - before.prompt_length;
  const int32_t finished =
      token == before.sampling.eos_token_id || new_tokens + 1 >= before.sampling.max_length;
  before.tokens[before.length] = token;
  slot->length = before.length + 1;
  slot->finished = finished;
  Report(args, row, step, token, score, finished);
}

// Reads what a step needs to know of its row; by one warp, while the others read the logits.
template <typename Shared>
__device__ void LoadState(const SampleArgs& args, int32_t row, int lane, Shared* s) {
  if (lane != 0) return;
  s->step = *args.step;
  s->slot_index = args.row_list[row].slot;
  if (s->slot_index < 0) return;
  s->slot = args.slots[s->slot_index];
  const SamplingParams& params = s->slot.sampling;
  s->draw = Draw(params.seed, params.sequence,
                 static_cast<uint32_t>(s->slot.length - s->slot.prompt_length));
}

__device__ void CopyLogits(const float* from, float* to, int32_t count, int thread, int threads) {
  int32_t i = 0;
  if (reinterpret_cast<uintptr_t>(from) % sizeof(float4) == 0) {
    const int32_t vectors = count / 4;
#pragma unroll 4
    for (int32_t v = thread; v < vectors; v += threads) {
      reinterpret_cast<float4*>(to)[v] = reinterpret_cast<const float4*>(from)[v];
    }
    i = vectors * 4;
  }
  for (i += thread; i < count; i += threads) to[i] = from[i];
}

// The largest logit and the smallest of its ids, as a number that is larger for what wins; 0 if all
// is NaN.
template <typename Group>
__device__ uint64_t BestOfWarp(const Group& group, const float* logits) {
  float best = 0.0f;
  int32_t id = -1;
#pragma unroll 4
  for (int32_t i = group.warp_begin + group.lane; i < group.warp_end; i += 32) {
    const float logit = logits[i];
    if (logit > best || (id < 0 && logit == logit)) {
      best = logit;
      id = group.id_begin + i;
    }
  }
  const uint64_t number = static_cast<uint64_t>(OrderOf(best)) << 32 | static_cast<uint32_t>(~id);
  return MaxOverWarp(id < 0 ? 0 : number);
}

// The softmax of a row before it is divided by its sum.
struct Softmax {
  Divider by_temperature;
  bool plain;  // the temperature is 1
  float shift;

  __device__ Softmax(float temperature, float largest)
      : by_temperature(temperature),
        plain(temperature == 1.0f),
        shift(plain ? largest : by_temperature(largest)) {}
  __device__ float operator()(float logit) const {
    return ExpOf((plain ? logit : by_temperature(logit)) - shift);
  }
  // The same of several, without a branch for each.
  __device__ void Apply(float (&logits)[kBatch]) const {
    if (!plain) {
      bool inside = true;
      float quotients[kBatch];
      for (int j = 0; j < kBatch; ++j) {
        quotients[j] = by_temperature.Inside(logits[j]);
        inside = inside && by_temperature.IsInside(logits[j]);
      }
      if (!inside) {
        for (int j = 0; j < kBatch; ++j) quotients[j] = by_temperature(logits[j]);
      }
      for (int j = 0; j < kBatch; ++j) logits[j] = quotients[j];
    }
    for (int j = 0; j < kBatch; ++j) logits[j] = ExpOf(logits[j] - shift);
  }
};

// Adds numbers in [0, 1] up as whole numbers of 1 / scale.
struct Adder {
  float scale;
  uint64_t sum;
  bool no_sum;

  __device__ void Add(float value) {
    sum += __float2ull_rn(value * scale);
    no_sum |= !(value <= 1.0f);
  }
  __device__ uint64_t OfWarp() const {
    return __any_sync(kAllLanes, no_sum) ? kNoSum : SumOverWarp(sum);
  }
};

// kShared: logits lie in shared memory, and so do exponentials; else they are read again from
// device memory and computed again.
template <int kParts, int kThreads, bool kShared>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    SampleKernel(SampleArgs args, int32_t chunk, float sum_scale) {
  using RowGroup = Group<kParts, kThreads>;
  __shared__ typename RowGroup::Shared s;
  extern __shared__ float4 chunk_memory[];
  const auto row = static_cast<int32_t>(blockIdx.x) / kParts;
  const int32_t part = static_cast<int32_t>(blockIdx.x) % kParts;
  const auto begin = static_cast<int32_t>(
      min(static_cast<int64_t>(part) * chunk, static_cast<int64_t>(args.vocab)));
  const int32_t count = min(chunk, args.vocab - begin);
  RowGroup group(s, begin, count);
  float* const row_logits = args.logits + row * args.ld + begin;
  float* const logits = kShared ? reinterpret_cast<float*>(chunk_memory) : row_logits;
  float* const exps = reinterpret_cast<float*>(chunk_memory) + chunk;

  if (group.warp == RowGroup::kWarps - 1) {
    LoadState(args, row, group.lane, &s);
  } else if (kShared) {
    CopyLogits(row_logits, logits, count, group.thread, kThreads - 32);
  }
  __syncthreads();
  if (s.slot_index < 0 || s.slot.finished) {
    if (part == 0 && group.thread == 0) Report(args, row, s.step, -1, 0.0f, 1);
    return;
  }
  ArriveAtGroup<kParts>();  // nothing is stored in a block before it runs
  ProcessLogits(s.slot, logits, begin, count, s.histogram[0], 3 * kBuckets);
  const uint64_t best_of_warp = BestOfWarp(group, logits);
  WaitForGroup<kParts>();
  group.Spread(s.best, best_of_warp);
  SyncGroup<kParts>();
  const uint64_t best = group.MaxOf(s.best);
  const int32_t best_token = best == 0 ? 0 : static_cast<int32_t>(~static_cast<uint32_t>(best));
  const bool has_best = group.thread == 0 && best_token >= begin && best_token < begin + count;
  const SamplingParams& params = s.slot.sampling;
  const auto append = [&](int32_t token, float score) {
    Append(args, row, s.slot, s.slot_index, s.step, token, score);
  };
  if (!params.sample) {
    if (has_best) append(best_token, logits[best_token - begin]);
    return;
  }

  const float largest =
      best == 0 ? __int_as_float(0xFF800000) : LogitOf(static_cast<uint32_t>(best >> 32));
  const Softmax softmax(params.temperature, largest);
  Adder sum = {sum_scale, 0, false};
  Adder plain_sum = {sum_scale, 0, false};
  for (int32_t first = group.warp_begin + group.lane; first < group.warp_end;
       first += 32 * kBatch) {
    const auto has = [&](int j) { return first + 32 * j < group.warp_end; };
    float values[kBatch];
    for (int j = 0; j < kBatch; ++j) values[j] = has(j) ? logits[first + 32 * j] : largest;
    softmax.Apply(values);
    for (int j = 0; j < kBatch; ++j) {
      sum.Add(has(j) ? values[j] : 0.0f);
      if (kShared && has(j)) exps[first + 32 * j] = values[j];
    }
    if (softmax.plain) continue;
    for (int j = 0; j < kBatch; ++j) values[j] = has(j) ? logits[first + 32 * j] : largest;
    for (int j = 0; j < kBatch; ++j) {
      plain_sum.Add(has(j) ? ExpOf(values[j] - largest) : 0.0f);
    }
  }
  group.Spread(s.sums, sum.OfWarp());
  if (!softmax.plain) group.Spread(s.plain_sums, plain_sum.OfWarp());
  SyncGroup<kParts>();
  const uint64_t total = group.SumOf(s.sums);
  const auto score_of = [&](int32_t token, uint64_t plain_total) {
    if (plain_total == kNoSum) return __int_as_float(0x7FC00000);
    const double sum_of_exps = static_cast<double>(plain_total) / static_cast<double>(sum_scale);
    const auto log_sum = static_cast<float>(static_cast<double>(largest) + log(sum_of_exps));
    return logits[token - begin] - log_sum;
  };
  if (total == kNoSum) {  // no distribution
    const uint64_t plain_total = group.SumOf(softmax.plain ? s.sums : s.plain_sums);
    if (has_best) append(best_token, score_of(best_token, plain_total));
    return;
  }

  const Divider by_sum(
      static_cast<float>(static_cast<double>(total) / static_cast<double>(sum_scale)));
  const auto prob_of = [&](int32_t i) {
    return by_sum.Inside(kShared ? exps[i] : softmax(logits[i]));
  };
  const bool use_k = params.top_k > 0 && params.top_k < args.vocab;
  const bool use_p = params.top_p > 0.0f && params.top_p < 1.0f;
  Cut cut = {0, kAllTokens};
  if (use_k || use_p) {
    // All tokens below the floor together have less than half of what lies beyond top_p. The margin
    // dwarfs what rounding makes of the sum of probabilities.
    const float beyond = 1.0f - params.top_p - 1e-5f;
    const float floor =
        use_p && beyond > 0.0f ? 0.5f * beyond / static_cast<float>(args.vocab) : 0.0f;
    const uint64_t limit = use_p ? static_cast<uint64_t>(__float2ull_rd(params.top_p * kMassScale))
                                 : uint64_t{1} << 63;
    cut = group.FindCut(prob_of, use_k ? static_cast<uint32_t>(params.top_k) : 0xFFFFFFFFu, limit,
                        use_p, floor);
  }

  const auto mass_of = [&](int32_t i) {
    const float prob = prob_of(i);
    return cut.Keeps(prob, begin + i) ? MassOf(prob) : 0;
  };
  uint64_t mass = 0;
#pragma unroll 2
  for (int32_t i = group.warp_begin + group.lane; i < group.warp_end; i += 32) mass += mass_of(i);
  group.Spread(s.masses, SumOverWarp(mass));
  SyncGroup<kParts>();
  const uint64_t kept = group.SumOf(s.masses);
  // A running sum is above draw * kept / 2^32 when it is above its whole part.
  const uint64_t target = __umul64hi(kept, s.draw) << 32 | kept * s.draw >> 32;
  const typename RowGroup::Place place = group.FindPlace(s.masses, target);
  if (!group.IsMine(place.entry)) return;
  // This warp has the token: each lane takes a piece of its stretch.
  const int32_t piece = group.stretch / 32;
  const int32_t piece_begin = min(group.warp_begin + group.lane * piece, group.warp_end);
  const int32_t piece_end = min(piece_begin + piece, group.warp_end);
  uint64_t piece_mass = 0;
  for (int32_t i = piece_begin; i < piece_end; ++i) piece_mass += mass_of(i);
  uint64_t running = place.before + ScanOverWarp(piece_mass, group.lane);
  const uint64_t plain_total = group.SumOf(softmax.plain ? s.sums : s.plain_sums);
  if (running <= target || running - piece_mass > target) return;
  running -= piece_mass;
  int32_t i = piece_begin;
  for (; i < piece_end; ++i) {
    running += mass_of(i);
    if (running > target) break;
  }
  append(begin + i, score_of(begin + i, plain_total));
}

#if FASTGEN_CUDA_HAS_CLUSTERS
constexpr int kClusterParts = 8;
constexpr int kClusterThreads = 512;

// Whether the device, and what this was compiled to for it, has clusters.
template <typename Kernel>
cudaError_t AskForClusters(Kernel kernel, bool* has, int* shared_bytes) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  cudaFuncAttributes attributes;
  status = cudaFuncGetAttributes(&attributes, kernel);
  if (status != cudaSuccess) return status;
  *has = attributes.ptxVersion >= 90;
  *shared_bytes -= static_cast<int>(attributes.sharedSizeBytes);
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t LaunchClusters(Kernel kernel, const SampleArgs& args, int32_t chunk, float sum_scale,
                           size_t bytes, cudaStream_t stream) {
  const cudaError_t status = AllowSharedBytes(reinterpret_cast<const void*>(kernel), bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kClusterParts;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(args.rows) * kClusterParts);
  config.blockDim = dim3(kClusterThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args, chunk, sum_scale);
}
#endif

}  // namespace

size_t SampleWorkspaceBytes(int32_t /*rows*/, int32_t /*vocab*/) { return 16; }

cudaError_t Sample(const SampleArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  // A sum of `vocab` numbers up to 1 stays below 2^63.
  float sum_scale = kMassScale;
  for (int64_t largest = 1; largest < args.vocab; largest *= 2) sum_scale *= 0.5f;

#if FASTGEN_CUDA_HAS_CLUSTERS
  const auto shared_kernel = SampleKernel<kClusterParts, kClusterThreads, true>;
  bool has_clusters = false;
  int shared_bytes = 0;
  const cudaError_t status = AskForClusters(shared_kernel, &has_clusters, &shared_bytes);
  if (status != cudaSuccess) return status;
  if (has_clusters) {
    const int64_t share = (static_cast<int64_t>(args.vocab) + kClusterParts - 1) / kClusterParts;
    const auto chunk = static_cast<int32_t>((share + 3) / 4 * 4);  // whole vectors of 16 bytes
    const size_t bytes = 2 * sizeof(float) * static_cast<size_t>(chunk);
    if (static_cast<int64_t>(bytes) <= shared_bytes) {
      return LaunchClusters(shared_kernel, args, chunk, sum_scale, bytes, stream);
    }
    return LaunchClusters(SampleKernel<kClusterParts, kClusterThreads, false>, args, chunk,
                          sum_scale, 0, stream);
  }
#endif
  constexpr int kBlockThreads = 1024;
  SampleKernel<1, kBlockThreads, false>
      <<<static_cast<unsigned>(args.rows), kBlockThreads, 0, stream>>>(args, args.vocab, sum_scale);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fastgen
