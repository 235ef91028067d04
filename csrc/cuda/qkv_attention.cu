// QkvAttention: a decode step's product before attention, and attention, as one kernel of sm_90a, for up to
// eight rows of short contexts. A cluster of eight blocks has a head. Six of them multiply, each a half of the
// columns by the head's queries, keys or values, as the blocks of linear_rows.cu do, and send every row's
// sums to one block, which finishes the row and attends with it. So what a product and attention say to each
// other goes through shared memory, not through a kernel's end, and pages of the cache come while weights are
// multiplied.
//
// A block's shared memory holds weights and rows, what comes from other blocks, and pages: a few from the
// start, more in the place of the weights once these have been multiplied. Warps attend as in
// attention_decode_stream.cu, each with a ring of pages of its own; rows are so short that a part is a page.
// The bits of a row's result are those of LinearRows and DecodeAttention.
#include <algorithm>
#include <cmath>
#include <cstddef>

#include "cuda/attention_decode.h"
#include "cuda/attention_decode_worker.h"
#include "cuda/linear_rows.h"

namespace fastgen {
namespace cuda {
namespace qkv_attention {

using linear_rows::kChunkColumns;
using linear_rows::kFixedBytes;
using linear_rows::kSharedBytes;
using linear_rows::kSupplyWarp;
using linear_rows::kThreads;
using linear_rows::kTileOutputs;
using linear_rows::kWarps;
using linear_rows::kWeightBytes;

constexpr int kRows = 8;                 // of a cluster: one of each block
constexpr int kBlocks = kRows;           // of a cluster
constexpr int kHeadSize = kTileOutputs;  // so queries, keys and values of a head are a tile each
constexpr int kTiles = 3;
constexpr int kUnits = kTileOutputs / 2;   // of a tile: a lane's two outputs of a row, 8 apart
constexpr int kSumBytes = kUnits * 2 * 4;  // of a tile and a row, of a share of the columns
constexpr int kRowChunkBytes = kRows * kChunkColumns * 2;
constexpr int kPositionBytes = kHeadSize * 2;
constexpr int kPageBytes = kPage * kPositionBytes;  // of keys or values
constexpr int kSlotBytes = 2 * kPageBytes;          // a page's keys, then its values
constexpr int kMostSlots = 32;
constexpr int kResultBytes = kDecodeParts * (kHeadSize + 2) * 4;
static_assert(kBlocks <= linear_rows::kMaxBlocks, "as clusters are asked for");
static_assert(kResultBytes % 16 == 0, "slots lie behind");

struct AttendPlan {
  TensorMap weights, rows;
  QkvAttentionArgs args;
  float query_factor;           // 1 / sqrt(head_size)
  float inverse_in;             // 1 / columns
  int32_t chunks;               // of a row
  int32_t most_chunks;          // of these, a block's
  int32_t share_bits;           // log2 of the shares that are summed apart, as in LinearRows
  bool whole;                   // rows are whole chunks
  int32_t copied_at_once;       // chunks
  int32_t early_slots, slots;   // that pages come to from the start, and in all
  int64_t layer_at, values_at;  // bytes from a page to the layer's keys, and from these to values
  // Offsets in shared memory, where weights come first, and later results and then late slots.
  int32_t rows_at, sums_at, slots_at;
};

#if FASTGEN_ARCH_HAS_WARPGROUP

constexpr int kMultiplying = 2 * kTiles;  // blocks of a cluster: two have a tile
constexpr int kCacheWarp = kWarps - 1;    // stores the row's own keys and values at the end

// Whose warp finishes which tile of the row's sums: the last ones, which neither multiply nor copy.
constexpr int kFinishers = kSupplyWarp + 1;
static_assert(kWarps - kFinishers == kTiles, "a warp for each");

template <typename Element>
struct Shared {
  uint64_t there, multiplied, sums_there, slots[kMostSlots];  // barriers
  QueryPieces<Element, kHeadSize> query;
  alignas(16) uint16_t newest[2][kHeadSize];  // the row's own keys and values
};

__device__ __forceinline__ int32_t ShareBegin(const AttendPlan& plan, int32_t share) {
  return static_cast<int32_t>(static_cast<uint32_t>(plan.chunks) * share >> plan.share_bits);
}

// A warp's pages, one a part, in their order, and where they come to; all lanes have the same.
struct Pages {
  const AttendPlan& plan;
  const RowPlace& place;
  int32_t count;      // of the row
  int64_t head_at;    // bytes from a page to the head's keys
  int32_t warp, own;  // its slots

  int32_t page;
  const char* at;
  int32_t slot;  // of the warp's, for the page

  __device__ __forceinline__ Pages(const AttendPlan& p, const RowPlace& r, int32_t head, int32_t w)
      : plan(p), place(r), head_at(p.layer_at + int64_t{head} * kPageBytes) {
    count = (r.length + kPage - 1) / kPage;
    warp = w, own = SlotsOf(p.slots), slot = 0, at = nullptr;
    Go(w);
  }
  __device__ __forceinline__ void Go(int32_t to) {
    page = to;
    if (!Done()) at = place.pages[page];
  }
  __device__ __forceinline__ bool Done() const { return page >= count; }
  // Bytes of the page's keys that are there already: all but the row's own position.
  __device__ __forceinline__ uint32_t Bytes() const {
    const int32_t left = place.length - page * kPage;
    return (left <= kPage ? left - 1 : kPage) * kPositionBytes;
  }

  // Of the block's first `number` slots, the warp's; its slots are warp, warp + kWarps, ...
  __device__ __forceinline__ int32_t SlotsOf(int32_t number) const {
    return (number - warp + kWarps - 1) / kWarps;
  }
  __device__ __forceinline__ uint32_t SlotAt(int32_t number) const {
    return number < plan.early_slots ? plan.slots_at + number * kSlotBytes
                                     : kResultBytes + (number - plan.early_slots) * kSlotBytes;
  }

  // Asks for the next page.
  __device__ __forceinline__ void Ask(char* memory, uint64_t* barriers, int32_t lane) {
    if (Done()) return;
    const int32_t number = slot * kWarps + warp;
    const uint32_t bytes = Bytes();
    if (lane == 0) {
      BarrierArriveExpect(barriers + number, 2 * bytes);
      if (bytes > 0) {
        char* const to = memory + SlotAt(number);
        const char* const from = at + head_at;
        BulkCopy(to, from, bytes, barriers + number, ReadOncePolicy());
        BulkCopy(to + kPageBytes, from + plan.values_at, bytes, barriers + number,
                 ReadOncePolicy());
      }
    }
    if (++slot == own) slot = 0;
    Go(page + kWarps);
  }
  __device__ __forceinline__ void Prefetch(int32_t lane) const {
    if (lane != 0 || Bytes() == 0) return;
    BulkPrefetch(at + head_at, Bytes());
    BulkPrefetch(at + head_at + plan.values_at, Bytes());
  }
};

template <typename Element>
using Worker = MmaWorker<Element, kHeadSize / 8, true>;

__device__ __forceinline__ SharedPage PageAt(char* slot, int32_t positions) {
  return SharedPage{slot, slot + kPageBytes, kPositionBytes, positions};
}

// Attends over a page, whose first positions the row sees, whose keys have been read and whose values have zeros
// behind them.
template <typename Element>
__device__ __forceinline__ void AttendPage(Worker<Element> worker,
                                           const QueryPieces<Element, kHeadSize>& query,
                                           const typename Worker<Element>::Keys& keys,
                                           const SharedPage& page, float* sums, float* stats,
                                           int32_t lane) {
  worker.Query(query, lane);
  worker.Clear();
  worker.template PageOf<true>(keys, page, lane, [] {}, [] {});
  worker.Store(sums, stats, kHeadSize, lane);
}

#endif  // FASTGEN_ARCH_HAS_WARPGROUP

// As in linear_rows.cu, what is on the way from the end of the kernel before to the outputs is computed before it.
template <typename Element>
__global__ void __launch_bounds__(kThreads, 2)
    AttendKernel(const FASTGEN_GRID_CONSTANT AttendPlan plan) {
#if FASTGEN_ARCH_HAS_WARPGROUP
  using InShared = Shared<Element>;
  __shared__ InShared shared;
  if (!plan.args.qkv.first) LetNextGridStart();
  // A swizzled line's place follows from its address.
  char* const memory = SharedMemory() + (1024 - SharedAddress(SharedMemory()) % 1024) % 1024;
  const LinearRowsArgs& args = plan.args.qkv;
  const int32_t warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int32_t lane = Kept(threadIdx.x % 32);
  const int32_t rank = blockIdx.x % kBlocks;
  const int32_t head = blockIdx.x / kBlocks;
  const int32_t width = args.cache.num_heads * kHeadSize;
  const int32_t first_row = blockIdx.y * kRows;
  const int32_t rows = min(args.rows - first_row, kRows);
  const int32_t my_row = first_row + rank;
  const bool has_row = rank < rows;
  const int32_t shares = Kept(1 << (plan.share_bits - 1));  // of the block, if it multiplies
  const int32_t first_share = rank % 2 * shares;
  const int32_t first_chunk = ShareBegin(plan, first_share);
  const int32_t chunks =
      rank < kMultiplying ? ShareBegin(plan, first_share + shares) - first_chunk : 0;
  const uint32_t weights_at = SharedAddress(memory);
  const uint32_t rows_at = weights_at + plan.rows_at;
  const uint32_t barriers = Kept(SharedAddress(&shared));

  if (warp == kSupplyWarp && ElectLane()) {
    BarrierInit(&shared.there, 1);
    BarrierInit(&shared.multiplied, kSupplyWarp);
    BarrierInit(&shared.sums_there, 1);
    for (int32_t i = 0; i < plan.slots; ++i) BarrierInit(shared.slots + i, 1);
    BarrierInitDone();
    BarrierArriveExpect(&shared.sums_there, has_row ? kTiles * 2 * shares * kSumBytes : 0);
    const int32_t copied = plan.whole && chunks > 0 ? plan.most_chunks : chunks;
    BarrierArriveExpect(&shared.there, copied * (kWeightBytes + kRowChunkBytes));
#pragma unroll 1
    for (int32_t i = 0; i < chunks; i += plan.copied_at_once) {
      StreamTile(weights_at + i * kWeightBytes, plan.weights, plan.whole, first_chunk + i,
                 rank / 2 * width + head * kHeadSize, &shared.there);
    }
    PrefetchMap(plan.rows);
  }
  __syncwarp();
  // What no kernel writes is read before the kernel before has ended: of the outputs that the lane finishes,
  const int32_t tile = warp - kFinishers;
  const int32_t in_head = lane / 8 * 16 + lane % 8;
  const bool normed = args.norm_sums != nullptr;
  float bias[2] = {}, norm_sums[2] = {};
  if (tile >= 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t n = tile * width + head * kHeadSize + in_head + 8 * i;
      const float* const from = normed ? args.norm_bias : args.w.bias;
      bias[i] = from != nullptr ? __ldg(from + n) : 0.0f;
      norm_sums[i] = normed ? __ldg(args.norm_sums + n) : 0.0f;
    }
  }
  // and of the row that the block attends with.
  RowPlace place = {nullptr, nullptr, 0, 0};
  if (has_row) {
    place = args.places != nullptr ? args.places[my_row]
                                   : WholePlaceOf(args.row_list[my_row], args.slots);
  }
  __syncthreads();
  ClusterArrive();

  Pages pages(plan, place, head, warp);
  // Where no weights come, none are in the way of pages.
  const int32_t early = chunks > 0 ? pages.SlotsOf(plan.early_slots) : pages.own;
#pragma unroll 1
  for (int32_t i = 0; i < early; ++i) pages.Ask(memory, shared.slots, lane);
  Pages ahead = pages;
#pragma unroll 1
  for (int32_t i = early; i <= pages.own && !ahead.Done(); ++i) {
    ahead.Prefetch(lane);
    ahead.Go(ahead.page + kWarps);
  }
  // A lane has sums of two neighbouring rows, of outputs lane / 4 and 8 further of its warp's 16.
  uint32_t sums_to =
      Kept(weights_at + plan.sums_at + (rank / 2 * 2 * shares + first_share) * kSumBytes +
           (warp * 8 + lane / 4) * 8);
  const int32_t two_rows = Kept(lane % 4 * 2), rows_left = Kept(rows - lane % 4 * 2);
  uint32_t weights_place = Kept(TilePlace(weights_at)), rows_place = Kept(TilePlace(rows_at));
  int32_t part = Kept(ShareBegin(plan, first_share + 1) - first_chunk);
  const uint32_t sums_from =
      Kept(weights_at + plan.sums_at + tile * 2 * shares * kSumBytes + lane * 8);
  uint16_t* const out =
      Kept(static_cast<uint16_t*>(plan.args.packed) + my_row * plan.args.ld + head * kHeadSize);
  // The warp's first page.
  int32_t positions = Kept(min(kPage, place.length - warp * kPage));
  int32_t page_at = Kept(pages.SlotAt(warp));
  uint32_t page_there = Kept(SharedAddress(shared.slots + warp));
  const bool late = early < pages.own && !pages.Done();
  // What can be done with the first page is done while the query is made, where the page is there early.
  const bool is_early =
      warp < kFinishers && (chunks == 0 || warp < plan.early_slots) && warp < pages.count;
  const int32_t parts = Kept(pages.count);
  Worker<Element> worker(lane);
  worker.selectors.Keep();
  ClusterWait();

  if (warp == kSupplyWarp) {
    if (ElectLane()) {
      if (chunks > 0 && plan.whole) {  // by itself, as in linear_rows.cu
        WaitForGrid();
        CopyTile(rows_at, plan.rows, true, first_chunk, first_row, &shared.there);
      } else {
        WaitForGrid();
#pragma unroll 1
        for (int32_t i = 0; i < chunks; ++i) {
          CopyTile(rows_at + i * kRowChunkBytes, plan.rows, false, first_chunk + i, first_row,
                   &shared.there);
        }
      }
      if (args.first) LetNextGridStart();
    }
    __syncwarp();
  }
  WaitForGrid();
  // Each of them finds out for itself what the norm does to the row.
  NormSums norm = {0.0f, 1.0f};
  if (tile >= 0 && normed) {
    norm = linear_rows::NormOf(args, plan.inverse_in, has_row ? my_row : first_row, lane);
  }
  if (warp < kSupplyWarp && chunks > 0) {
    float sums[kRows / 2];
    const uint32_t there = barriers + offsetof(InShared, sums_there);
    BarrierWait(barriers + offsetof(InShared, there), 0);
#pragma unroll 1
    for (int32_t share = first_share;;) {
      linear_rows::MultiplyChunks<Element, kRows>(&weights_place, &rows_place, part, sums);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (i >= rows_left) break;
        StoreAsync(AddressInBlock(sums_to, two_rows + i), make_float2(sums[i], sums[i + 2]),
                   AddressInBlock(there, two_rows + i));
      }
      if (++share == first_share + shares) break;
      part = ShareBegin(plan, share + 1) - ShareBegin(plan, share);
      sums_to += kSumBytes;
    }
    if (lane == 0) BarrierArrive(&shared.multiplied);
  }
  if (!has_row) return;
  if (late) {
    if (chunks > 0) BarrierWait(&shared.multiplied, 0);  // weights are not needed any more
#pragma unroll 1
    for (int32_t i = early; i < pages.own; ++i) pages.Ask(memory, shared.slots, lane);
  }

  if (tile >= 0) {
    BarrierWait(barriers + offsetof(InShared, sums_there), 0);
    float2 sum = LoadShared2(sums_from);
    const float2 second = LoadShared2(sums_from + kSumBytes);
    sum.x += second.x, sum.y += second.y;
#pragma unroll 1
    for (int32_t share = 2; share < 2 * shares; ++share) {
      const float2 more = LoadShared2(sums_from + share * kSumBytes);
      sum.x += more.x, sum.y += more.y;
    }
    float value[2] = {sum.x, sum.y};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float unit = linear_weights::UnitOf(Element());
      const float centred = fmaf(-norm.mean, norm_sums[i], __fmul_rn(value[i], unit));
      value[i] = fmaf(norm.scale, centred, bias[i]);
    }
    if (tile == 0) {
      shared.query.Set(in_head, __fmul_rn(value[0], plan.query_factor), in_head + 8,
                       __fmul_rn(value[1], plan.query_factor));
    } else {
      const uint32_t pair = RoundPairFinite<Element>(value[0], value[1]);
      shared.newest[tile - 1][in_head] = static_cast<uint16_t>(pair);
      shared.newest[tile - 1][in_head + 8] = static_cast<uint16_t>(pair >> 16);
    }
  }
  typename Worker<Element>::Keys keys;
  if (is_early) {
    BarrierWait(page_there, 0);
    const SharedPage page = PageAt(memory + page_at, positions);
    keys = Worker<Element>::ReadKeys(page, lane);
    Worker<Element>::ClearBehind(page, lane);
  }
  __syncthreads();
  // Sixteen lanes have 16 bytes each of what the row adds to the cache.
  const int32_t kind = lane / 8, piece = lane % 8;
  float* const results = reinterpret_cast<float*>(memory);
  float* const stats = results + kDecodeParts * kHeadSize;
  int32_t slot = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (int32_t number = warp; number < pages.count; number += kWarps) {
    char* const from = memory + page_at;
    const bool is_new = !is_early || number != warp;
    if (is_new) BarrierWait(page_there, parity);
    const SharedPage page = PageAt(from, positions);
    if (is_new) Worker<Element>::ClearBehind(page, lane);
    const bool is_last = number + 1 == pages.count;
    if (is_last) {
      if (lane < 16) {
        char* const to = from + kind * kPageBytes + (positions - 1) * kPositionBytes;
        reinterpret_cast<uint4*>(to)[piece ^ (positions - 1) % 8] =
            reinterpret_cast<const uint4*>(shared.newest[kind])[piece];
      }
      __syncwarp();
    }
    if (is_new || is_last) keys = Worker<Element>::ReadKeys(page, lane);
    AttendPage<Element>(worker, shared.query, keys, page, results + number * kHeadSize,
                        stats + 2 * number, lane);
    if (number + kWarps >= pages.count) break;
    __syncwarp();
    pages.Ask(memory, shared.slots, lane);
    if (++slot == pages.own) {
      slot = 0;
      parity ^= 1;
    }
    positions = min(kPage, place.length - (number + kWarps) * kPage);
    page_at = pages.SlotAt(slot * kWarps + warp);
    page_there = SharedAddress(shared.slots + slot * kWarps + warp);
  }
  __syncthreads();
  if (__builtin_expect(warp < kHeadSize / 32, 1)) {
    // Numbers of the head, one a lane.
    const auto store = [=](int d, float x) {
      const float inverse = 1.0f / linear_weights::UnitOf(Element());
      out[d] = static_cast<uint16_t>(RoundPairFinite<Element>(__fmul_rn(x, inverse), 0.0f));
    };
    const auto stats_of = [=](int p) { return reinterpret_cast<const float2*>(stats)[p]; };
    const auto sums_of = [=](int p, int d) { return results[p * kHeadSize + d]; };
    const int32_t d = warp * 32 + lane;
    if (__builtin_expect(parts <= kFewParts, 1)) {
      const FewWeights weights = WeighFewParts(stats_of, parts);
      store(d, parts > 0 ? SumFewParts(weights, sums_of, parts, d) : 0.0f);
    } else {
      CombineManyParts<8>(stats_of, sums_of, parts, kHeadSize, warp * 32, kHeadSize, lane, store);
    }
  } else if (warp == kCacheWarp && lane < 16 && place.page != nullptr) {
    char* const to = place.page + pages.head_at + (kind == 0 ? 0 : plan.values_at) +
                     place.in_page * kPositionBytes;
    reinterpret_cast<uint4*>(to)[piece ^ place.in_page % 8] =
        reinterpret_cast<const uint4*>(shared.newest[kind])[piece];
  }
#endif
}

// ---- host ---------------------------------------------------------------------------------------

// Fills the plan's sizes for a matrix; returns the bytes of shared memory, 0 where they do not suffice.
int64_t Arrange(const Matrix& w, AttendPlan* plan) {
  plan->chunks = Quotient(w.in, kChunkColumns);
  plan->whole = w.in % kChunkColumns == 0;
  plan->share_bits = linear_rows::ClusterBits(w);
  if (plan->share_bits == 0) return 0;  // columns are not cut
  plan->most_chunks = Quotient(plan->chunks, 2);
  plan->copied_at_once = plan->whole ? plan->most_chunks : 1;
  const int64_t weights = int64_t{plan->most_chunks} * kWeightBytes;
  const int64_t sums = weights + int64_t{plan->most_chunks} * kRowChunkBytes;
  const int64_t slots = sums + (int64_t{kTiles} << plan->share_bits) * kSumBytes;
  const int64_t early = (kSharedBytes - kFixedBytes - 1024 - slots) / kSlotBytes;
  const int64_t late = (weights - kResultBytes) / kSlotBytes;
  if (slots > kSharedBytes - kFixedBytes - 1024 || early + late < kWarps) return 0;
  plan->rows_at = static_cast<int32_t>(weights);
  plan->sums_at = static_cast<int32_t>(sums);
  plan->slots_at = static_cast<int32_t>(slots);
  plan->early_slots = static_cast<int32_t>(std::min<int64_t>(early, kMostSlots));
  plan->slots = static_cast<int32_t>(std::min<int64_t>(early + late, kMostSlots));
  return plan->slots_at + int64_t{plan->early_slots} * kSlotBytes + 1024;
}

template <typename Element>
cudaError_t LaunchWith(AttendPlan* plan, int64_t shared_bytes, cudaStream_t stream) {
  const LinearRowsArgs& args = plan->args.qkv;
  LaunchShape shape;
  shape.shared_bytes = static_cast<size_t>(shared_bytes);
  const cudaError_t status =
      linear_rows::MakeMaps(args, kRows, plan->copied_at_once, &plan->weights, &plan->rows);
  if (status != cudaSuccess) return status;
  shape.grid = dim3(static_cast<unsigned>(args.cache.num_heads * kBlocks),
                    static_cast<unsigned>(Quotient(args.rows, kRows)));
  shape.threads = kThreads;
  shape.cluster = kBlocks;
  shape.packed = linear_rows::PackedClusters(args.rows);
  shape.overlap = args.overlap;
  return Launch(AttendKernel<Element>, shape, stream, *plan);
}

}  // namespace qkv_attention

cudaError_t QkvAttention(const QkvAttentionArgs& args, cudaStream_t stream) {
  using namespace qkv_attention;
  const LinearRowsArgs& qkv = args.qkv;
  if (qkv.rows == 0) return cudaSuccess;
  if (qkv.first && qkv.places != nullptr) return cudaErrorInvalidValue;
  AttendPlan plan = {};
  const int64_t shared_bytes = Arrange(qkv.w, &plan);
  if (shared_bytes == 0) return cudaErrorInvalidValue;
  plan.args = args;
  plan.query_factor = 1.0f / std::sqrt(static_cast<float>(kHeadSize));
  plan.inverse_in = 1.0f / static_cast<float>(qkv.w.in);
  plan.values_at = int64_t{qkv.cache.num_heads} * kPageBytes;
  plan.layer_at = qkv.layer * 2 * plan.values_at;
  switch (qkv.w.dtype) {
    case DType::kFloat16: return LaunchWith<__half>(&plan, shared_bytes, stream);
    case DType::kBFloat16: return LaunchWith<BFloat16>(&plan, shared_bytes, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t QkvAttentionSupported(const Matrix& w, const CacheLayout& cache, bool* supported) {
  using namespace qkv_attention;
  *supported = false;
  if (cache.head_size != kHeadSize || cache.head_stride != kHeadSize) return cudaSuccess;
  if (w.dtype != cache.dtype || w.out != kTiles * cache.num_heads * kHeadSize) return cudaSuccess;
  AttendPlan plan = {};
  if (Arrange(w, &plan) == 0) return cudaSuccess;
  return LinearRowsSupported(w.dtype, w.in, supported);
}

}  // namespace cuda
}  // namespace fastgen
