// How the kernel of linear_rows.cu ends. A warp finishes two rows at a time, a pair, of which the lanes
// of even numbers have one: four outputs each, two neighbours and the two that are 8 further.
#pragma once

#include "cuda/linear.h"
#include "cuda/pack_rows.h"
#include "cuda/warpgroup.h"

namespace fastgen {
namespace cuda {
namespace linear_rows {

constexpr int kTileOutputs = 64;
constexpr int kChunkColumns = 64;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;  // all of which finish
constexpr int kMultipliers = 128;      // threads that multiply: the first four warps
constexpr int kSupplyWarp = 4;         // has tiles copied; the warps after it read norms
constexpr int kNormWarps = kWarps - kSupplyWarp - 1;
constexpr int kWeightBytes = kTileOutputs * kChunkColumns * 2;  // of a stage
constexpr int kMaxStages = 24;
constexpr int kMaxRows = 64;   // of a block
constexpr int kMaxBlocks = 8;  // of a cluster
static_assert(kMaxBlocks <= kWarps, "a warp sends to each");
constexpr int kLaneOutputs = 4;
constexpr int kPairBytes =
    2 * kTileOutputs * 4;  // of a pair's sums: of two rows, a fragment after the other
// Of two kernels in sequence, blocks of both are on a multiprocessor together as long as none takes more
// than this of its shared memory, which includes what is lost before the first multiple of 1024.
constexpr int64_t kSharedBytes = 112 * 1024;
constexpr int32_t kFixedBytes = 1024;  // of it, for what has a size of its own, at most
static_assert(kTileOutputs == kPartColumns, "a tile is a part of the next norm");

// When the next kernel may start. The sooner the better where rows are few: there is a long way to go until it is ready
// for what it waits for. The weights that it asks for are in the way of many rows.
enum class NextStarts : int32_t { kAtOnce, kReady, kWithRows };

// Whether blocks of a cluster are best placed as the device sees fit (LaunchShape::packed), in kernels of
// steps of so many rows.
inline bool PackedClusters(int32_t rows) { return rows <= 8 || rows > 64; }

struct RowsPlan {
  TensorMap weights, rows;
  LinearRowsArgs args;
  NextStarts next;
  float query_factor;  // 1 / sqrt(head_size)
  float inverse_in;    // 1 / columns
  Divisor head_size;
  int32_t cluster_bits;    // log2 of the blocks that share outputs
  int32_t chunks;          // of a row
  int32_t stages;          // of weights and rows that there is room for
  bool resident;           // for all of a share
  bool whole;              // rows are whole chunks
  int32_t copied_at_once;  // chunks
  // Offsets in shared memory, where stages of weights come first.
  int32_t rows_at, sums_at, norms_at, places_at;
};

// log2 of the shares that columns are cut into, each of which is summed apart: more where there are few
// tiles of outputs, so that there are about as many blocks as multiprocessors in the devices that have
// these kernels.
int32_t ClusterBits(const Matrix& w);

// How the bulk engine finds tiles of weights, and of rows by so many, `chunks` at a time.
cudaError_t MakeMaps(const LinearRowsArgs& args, int32_t kernel_rows, int32_t chunks,
                     TensorMap* weights, TensorMap* rows);

#if FASTGEN_ARCH_HAS_WARPGROUP

// A block's rows go in pairs round the blocks of its cluster. Row `local` of the block's is this one of
// the tile's.
__device__ __forceinline__ int32_t RowOf(const RowsPlan& plan, int32_t rank, int32_t local) {
  return 2 * ((local / 2) << plan.cluster_bits | rank) + local % 2;
}

// The first output of a lane in a tile, and which of its outputs is how much further.
__device__ __forceinline__ int32_t FirstOutput(int32_t lane) {
  return lane / 8 * 16 + lane % 8 / 2 * 2;
}
__device__ __forceinline__ int32_t Further(int32_t i) { return i / 2 * 8 + i % 2; }

// A lane's outputs, the same of all rows.
struct Outputs {
  int32_t n;     // the first
  int32_t left;  // outputs from there on
  float bias[kLaneOutputs], norm_sums[kLaneOutputs], weight[kLaneOutputs];
  bool neighbours;     // two of them go to one head
  int64_t in_page[2];  // where neighbours go in a page at position 0; below 0: to y
};

// Reads what no kernel writes.
template <Epilogue kEpilogue>
__device__ __forceinline__ Outputs OutputsOf(const RowsPlan& plan, int32_t n) {
  const LinearRowsArgs& args = plan.args;
  const bool normed = args.norm_sums != nullptr;
  const float* const bias = normed ? args.norm_bias : args.w.bias;
  Outputs o;
  o.n = n;
  o.left = args.w.out - n;
#pragma unroll
  for (int i = 0; i < kLaneOutputs; ++i) {
    const int32_t at = n + Further(i);
    const bool there = Further(i) < o.left;
    o.bias[i] = there && bias != nullptr ? __ldg(bias + at) : 0.0f;
    o.norm_sums[i] = there && normed ? __ldg(args.norm_sums + at) : 0.0f;
    o.weight[i] = kEpilogue == Epilogue::kResidual && there && args.out_weight != nullptr
                      ? __ldg(args.out_weight + at)
                      : 1.0f;
  }
  o.neighbours = false;
  o.in_page[0] = o.in_page[1] = -1;
  if (kEpilogue != Epilogue::kQkv) return o;
  const CacheLayout& cache = args.cache;
  const int32_t width = cache.num_heads * cache.head_size;
  o.neighbours = cache.head_size % 2 == 0 && cache.head_stride == cache.head_size &&
                 cache.dtype != DType::kFloat32;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const int32_t at = n + 8 * pair;
    if (at < width) continue;
    const int32_t kind = at < 2 * width ? 0 : 1;
    const int32_t column = at - width * (kind + 1);
    const int32_t head = Divide(column, plan.head_size);
    o.in_page[pair] = PageIndex(cache, args.layer, kind, head, 0) + column - head * cache.head_size;
  }
  return o;
}

// Of a lane and a row: where its outputs go, how many of them there are from the first on, none where there is no such
// row, and where in shared memory lies what they are made of.
struct Target {
  float* y;
  uint16_t* packed;
  float2* part;  // of the tile, for the next norm
  int32_t row, left;
  uint32_t sums, norm, place;

  // Of two neighbouring lanes, even and odd, for rows 2 * pair and 1 more of the block's.
  template <Epilogue kEpilogue>
  __device__ __forceinline__ void Set(const RowsPlan& plan, const Outputs& o, int32_t tile,
                                      int32_t rank, int32_t first_row, int32_t rows, int32_t pair,
                                      uint32_t shared, int32_t lane) {
    const LinearRowsArgs& args = plan.args;
    const int32_t local = 2 * pair + lane % 2;
    const int32_t in_tile = RowOf(plan, rank, local);
    left = in_tile < rows ? o.left : 0;
    row = first_row + min(in_tile, rows - 1);
    sums = shared + plan.sums_at + (pair << plan.cluster_bits) * kPairBytes + lane * 16;
    norm = shared + plan.norms_at + local * static_cast<int32_t>(sizeof(NormSums));
    place = shared + plan.places_at + local * static_cast<int32_t>(sizeof(CachePlace));
    y = kEpilogue == Epilogue::kGelu ? nullptr : args.y + row * args.ldy + o.n;
    packed = nullptr, part = nullptr;
    if (kEpilogue != Epilogue::kGelu && kEpilogue != Epilogue::kResidual) return;
    if (args.out.data == nullptr) return;
    packed = static_cast<uint16_t*>(args.out.data) + row * args.out.stride + o.n;
    if (kEpilogue == Epilogue::kResidual) part = args.out.parts + row * args.out.part_stride + tile;
  }

  template <Epilogue kEpilogue>
  __device__ __forceinline__ void Keep() {
    left = Kept(left), sums = Kept(sums), norm = Kept(norm);
    if (kEpilogue != Epilogue::kGelu) y = Kept(y);
    if (kEpilogue == Epilogue::kGelu || kEpilogue == Epilogue::kResidual) packed = Kept(packed);
    if (kEpilogue == Epilogue::kResidual) part = Kept(part);
    if (kEpilogue == Epilogue::kQkv) place = Kept(place);
  }
};

// The tanh form of GELU, x * sigmoid(2 u), to the precision of 16 bits.
__device__ __forceinline__ float RoundedGelu(float x) {
  constexpr float kFactor = -2.0f * 0.7978845608028654f * kLog2e;
  const float inner = fmaf(__fmul_rn(0.044715f, x), __fmul_rn(x, x), x);
  return __fdividef(x, 1.0f + Exp2(__fmul_rn(kFactor, inner)));
}

__device__ __forceinline__ void StoreFloats(float* to, int32_t left,
                                            const float (&value)[kLaneOutputs]) {
#pragma unroll
  for (int i = 0; i < kLaneOutputs; i += 2) {
    if (Further(i) + 1 < left) {
      *reinterpret_cast<float2*>(to + Further(i)) = make_float2(value[i], value[i + 1]);
    } else if (Further(i) < left) {
      to[Further(i)] = value[i];
    }
  }
}

// What is behind the last output of a row is written too, up to an even number.
template <typename Element>
__device__ __forceinline__ void StorePacked(uint16_t* to, int32_t left,
                                            const float (&value)[kLaneOutputs],
                                            const float (&weight)[kLaneOutputs]) {
  uint32_t packed[kLaneOutputs / 2];
#pragma unroll
  for (int i = 0; i < kLaneOutputs; i += 2) {
    packed[i / 2] = PackTwo<Element>(value[i], value[i + 1], weight[i], weight[i + 1]);
    // Here, not where it is stored: one after the other would take twice as long.
    asm volatile("" : "+r"(packed[i / 2]));
  }
#pragma unroll
  for (int i = 0; i < kLaneOutputs; i += 2) {
    if (Further(i) < left) *reinterpret_cast<uint32_t*>(to + Further(i)) = packed[i / 2];
  }
}

// Of a product before attention, output by output: heads may begin anywhere.
__device__ __forceinline__ void StoreQkvOneByOne(const RowsPlan& plan, int32_t first, int32_t left,
                                                 int32_t row, const CachePlace& place,
                                                 float4 value) {
  const LinearRowsArgs& args = plan.args;
  const CacheLayout& cache = args.cache;
  const int32_t width = cache.num_heads * cache.head_size;
#pragma unroll 1
  for (int32_t i = 0; i < kLaneOutputs && Further(i) < left; ++i) {
    const int32_t n = first + Further(i);
    const float x = i == 0 ? value.x : i == 1 ? value.y : i == 2 ? value.z : value.w;
    if (n < width) {
      args.y[row * args.ldy + n] = __fmul_rn(x, plan.query_factor);
      continue;
    }
    if (place.page == nullptr) continue;
    const int32_t kind = n < 2 * width ? 0 : 1;
    const int32_t column = n - width * (kind + 1);
    const int32_t head = Divide(column, plan.head_size);
    const int32_t d = column - head * cache.head_size;
    const int64_t index = TurnedIndex(
        cache, PageIndex(cache, args.layer, kind, head, place.in_page) + d, place.in_page);
    StoreElement(cache.dtype, place.page, index, x);
    if (d + 1 < cache.head_size) continue;
    for (int32_t pad = 1; pad <= cache.head_stride - cache.head_size; ++pad) {
      StoreElement(cache.dtype, place.page, index + pad, 0.0f);
    }
  }
}

__device__ __forceinline__ CachePlace LoadPlace(uint32_t from) {
  static_assert(sizeof(CachePlace) == 16, "as it is read");
  const float4 bits = LoadShared4(from);
  const uint64_t high = __float_as_uint(bits.y);
  return CachePlace{reinterpret_cast<char*>(high << 32 | __float_as_uint(bits.x)),
                    __float_as_int(bits.z)};
}

__device__ __forceinline__ void StoreQkv(const RowsPlan& plan, const Outputs& o,
                                         const Target& target, const CachePlace& place,
                                         const float (&value)[kLaneOutputs]) {
  const LinearRowsArgs& args = plan.args;
  if (!o.neighbours) {
    StoreQkvOneByOne(plan, o.n, target.left, target.row, place,
                     make_float4(value[0], value[1], value[2], value[3]));
    return;
  }
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const float first = value[2 * pair], second = value[2 * pair + 1];
    if (8 * pair >= target.left) return;
    if (o.in_page[pair] < 0) {
      *reinterpret_cast<float2*>(target.y + 8 * pair) =
          make_float2(__fmul_rn(first, plan.query_factor), __fmul_rn(second, plan.query_factor));
    } else if (place.page != nullptr) {
      const CacheLayout& cache = args.cache;
      const int64_t index =
          TurnedIndex(cache, o.in_page[pair] + place.in_page * cache.head_stride, place.in_page);
      *reinterpret_cast<uint32_t*>(reinterpret_cast<uint16_t*>(place.page) + index) =
          args.cache.dtype == DType::kFloat16 ? RoundPairFinite<__half>(first, second)
                                              : RoundPairFinite<BFloat16>(first, second);
    }
  }
}

// What the next norm needs of the row's outputs in a tile, of which the first `count` are there.
// Differences to the first one are summed: see PartOf.
__device__ __forceinline__ float2 PartOfTile(const float (&value)[kLaneOutputs], int32_t left,
                                             int32_t count, int32_t lane) {
  const float pivot = __shfl_sync(0xffffffffu, value[0], lane % 2);
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kLaneOutputs; ++i) {
    const float d = Further(i) < left ? value[i] - pivot : 0.0f;
    sum += d;
    squares = fmaf(d, d, squares);
  }
#pragma unroll
  for (int offset = 2; offset < 32; offset *= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  }
  return JoinedPart(pivot, sum, squares, count);
}

// The sums of a lane's two rows and two outputs over the shares of columns, in their order. Up to kUsual shares
// without a jump.
template <int kUsual>
__device__ __forceinline__ float4 SumOfShares(uint32_t from, int32_t shares) {
  float4 part[kUsual];
  part[0] = LoadShared4(from);
#pragma unroll
  for (int i = 1; i < kUsual; ++i) part[i] = LoadShared4If(from + i * kPairBytes, i < shares);
  float4 sum = part[0];
  const auto add = [&](const float4& more, bool shall) {
    sum.x = shall ? sum.x + more.x : sum.x;
    sum.y = shall ? sum.y + more.y : sum.y;
    sum.z = shall ? sum.z + more.z : sum.z;
    sum.w = shall ? sum.w + more.w : sum.w;
  };
#pragma unroll
  for (int i = 1; i < kUsual; ++i) add(part[i], i < shares);
#pragma unroll 1
  for (int i = kUsual; kUsual < kMaxBlocks && i < shares; ++i) {
    add(LoadShared4(from + i * kPairBytes), true);
  }
  return sum;
}

// Finishes a lane's outputs of a row; all lanes of the warp take part, whether they have one or not.
template <typename Element, Epilogue kEpilogue>
__device__ __forceinline__ void FinishRow(const RowsPlan& plan, const Outputs& o,
                                          const Target& target, int32_t shares, int32_t count,
                                          const float (&residual)[kLaneOutputs], int32_t lane) {
  // As ClusterBits() cuts the columns of GPT-2's matrices.
  constexpr int kUsual = kEpilogue == Epilogue::kResidual ? 8
                         : kEpilogue == Epilogue::kStore  ? 1
                                                          : 2;
  NormSums norm = {0.0f, 1.0f};
  if (plan.args.norm_sums != nullptr) {
    const float2 read = LoadShared2(target.norm);
    norm = NormSums{read.x, read.y};
  }
  const float4 sum = SumOfShares<kUsual>(target.sums, shares);
  // Of the lane's row: what it has itself, and what the lane beside it has.
  const bool odd = lane % 2 != 0;
  const float low = __shfl_xor_sync(0xffffffffu, odd ? sum.x : sum.y, 1);
  const float high = __shfl_xor_sync(0xffffffffu, odd ? sum.z : sum.w, 1);
  float value[kLaneOutputs] = {odd ? low : sum.x, odd ? sum.y : low, odd ? high : sum.z,
                               odd ? sum.w : high};
  const float unit = linear_weights::UnitOf(Element());
#pragma unroll
  for (int i = 0; i < kLaneOutputs; ++i) {
    const float centred = fmaf(-norm.mean, o.norm_sums[i], __fmul_rn(value[i], unit));
    value[i] = fmaf(norm.scale, centred, o.bias[i]);
  }
  if (kEpilogue == Epilogue::kStore) {
    StoreFloats(target.y, target.left, value);
  } else if (kEpilogue == Epilogue::kGelu) {
#pragma unroll
    for (int i = 0; i < kLaneOutputs; ++i) value[i] = RoundedGelu(value[i]);
    StorePacked<Element>(target.packed, target.left, value, o.weight);
  } else if (kEpilogue == Epilogue::kResidual) {
#pragma unroll
    for (int i = 0; i < kLaneOutputs; ++i) value[i] += residual[i];
    StoreFloats(target.y, target.left, value);
    if (target.packed == nullptr) return;
    StorePacked<Element>(target.packed, target.left, value, o.weight);
    const float2 part = PartOfTile(value, o.left, count, lane);
    if (target.left > 0 && lane < 2) *target.part = part;
  } else if (target.left > 0) {
    StoreQkv(plan, o, target, LoadPlace(target.place), value);
  }
}

// Dealt out over lanes and blocks; by one warp of each.
__device__ __forceinline__ void PrefetchPieces(const PiecesAhead& ahead, int32_t lane) {
  const int32_t blocks = gridDim.x * gridDim.y;
  const int32_t block = blockIdx.y * gridDim.x + blockIdx.x;
#pragma unroll 1
  for (int32_t i = lane * blocks + block; i < ahead.count; i += 32 * blocks) {
    const uint64_t piece = __ldcg(ahead.pieces + i);
    if (piece == 0) continue;
    BulkPrefetch(reinterpret_cast<const char*>(piece) + ahead.behind, ahead.bytes);
  }
}

// What the norm does to a row, by four lanes; they are alike in what they return.
__device__ __forceinline__ NormSums NormOf(const LinearRowsArgs& args, float inverse_in,
                                           int32_t row, int32_t lane) {
  constexpr int kPartsAtOnce = 4;  // that a lane reads
  const int32_t size = args.w.in;
  const int32_t parts = (size + kPartColumns - 1) / kPartColumns;
  const float2* const from = args.x.parts + row * args.x.part_stride;
  PartSums sums;
  sums.pivot = __ldcg(&from->x);
#pragma unroll 1
  for (int32_t part = lane % 4; part < parts; part += 4 * kPartsAtOnce) {
    float2 read[kPartsAtOnce];
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) read[i] = __ldcg(from + min(part + 4 * i, parts - 1));
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
      const int32_t left = size - (part + 4 * i) * kPartColumns;
      if (left > 0) sums.Add(read[i], static_cast<float>(min(left, kPartColumns)));
    }
  }
#pragma unroll
  for (int offset = 1; offset < 4; offset *= 2) {
    sums.sum += __shfl_xor_sync(0xffffffffu, sums.sum, offset);
    sums.squares += __shfl_xor_sync(0xffffffffu, sums.squares, offset);
  }
  return sums.Norm(inverse_in, args.eps);
}

// That of a block's rows, to `norms`; by the warps from kSupplyWarp + 1 on. `row_of(local)` is the row in `args.x` of
// the block's row `local`, or any other where there is none.
template <typename RowOfLocal>
__device__ __forceinline__ void ReadNorms(const LinearRowsArgs& args, float inverse_in,
                                          const RowOfLocal& row_of, int32_t locals, int32_t warp,
                                          int32_t lane, NormSums* norms) {
#pragma unroll 1
  for (int32_t first = (warp - kSupplyWarp - 1) * 8; first < locals; first += 8 * kNormWarps) {
    const int32_t local = first + lane / 4;
    const NormSums norm = NormOf(args, inverse_in, row_of(local), lane);
    if (local < locals && lane % 4 == 0) norms[local] = norm;
  }
}

// The products of a chunk, whose tiles are at descriptors a and b.
template <typename Element, int kRows>
__device__ __forceinline__ void MultiplyChunk(uint64_t a, uint64_t b, float (&sums)[kRows / 2]) {
#pragma unroll
  for (int k = 0; k < kChunkColumns / 16; ++k) {
    WarpgroupProduct<Element, kRows>::Add(sums, a + 2 * k, b + 2 * k);
  }
}

// Waits for products, and has the compiler know that it did.
template <int kSums>
__device__ __forceinline__ void EndProducts(float (&sums)[kSums]) {
  WarpgroupWait<0>();
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// The products of so many chunks whose tiles lie at these places and behind, which go on.
template <typename Element, int kRows>
__device__ __forceinline__ void MultiplyChunks(uint32_t* weights, uint32_t* rows, int32_t chunks,
                                               float (&sums)[kRows / 2]) {
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) sums[i] = 0.0f;
#pragma unroll 1
  for (int32_t i = chunks; i > 0; --i) {
    WarpgroupFence();
    MultiplyChunk<Element, kRows>(DescriptorOf(*weights), DescriptorOf(*rows), sums);
    WarpgroupCommit();
    *weights += kWeightBytes / 16, *rows += kRows * kChunkColumns * 2 / 16;
  }
  EndProducts(sums);
}

#endif  // FASTGEN_ARCH_HAS_WARPGROUP

}  // namespace linear_rows
}  // namespace cuda
}  // namespace fastgen
