// How rows of x come to the warps of linear_cluster.cu, and what a norm needs of them.
#pragma once

#include "cuda/linear_cluster.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace linear_cluster {

__device__ __forceinline__ void StoreShared(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

// Two numbers as 16 bits; what would become infinite becomes the largest, NaN stays.
template <typename Element>
__device__ uint32_t SaturatePair(float low, float high);

template <>
__device__ inline uint32_t SaturatePair<__half>(float low, float high) {
  uint32_t pair = RoundPair<__half>(low, high);
  asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(0x7bff7bffu));
  asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(0xfbfffbffu));
  return pair;
}

template <>
__device__ inline uint32_t SaturatePair<BFloat16>(float low, float high) {
  uint32_t pair = RoundPair<BFloat16>(low, high);
  asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(0x7f7f7f7fu));
  asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(0xff7fff7fu));
  return pair;
}

// The numbers that columns k to k + 7 are multiplied with on their way to 16 bits.
template <typename W>
__device__ inline void ReadFactors(const LinearTask& task, int32_t k, bool inside,
                                   float (&factor)[8]) {
  const float unit = 1.0f / UnitOf(typename W::Element());
#pragma unroll
  for (int j = 0; j < 8; ++j) factor[j] = unit;
  if (!task.normed || !inside) return;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    // The last column again where there are no more: x is zero there.
    factor[j] = unit * ReadEarly(task.norm.weight + min(k + j, task.args.w.in - 1));
  }
}

// Where 8 columns of a row lie, for the fragments of W: a step's pieces of 8 columns are stored by
// piece first, then by lane of the four.
template <typename W>
__device__ inline int32_t PlaceOfChunk(int32_t chunk) {
  constexpr int32_t kStepChunks = 4 * W::kPieces;
  const int32_t in_step = chunk % kStepChunks;
  return (chunk - in_step + in_step % W::kPieces * 4 + in_step / W::kPieces) * 8;
}

template <typename W>
__device__ __forceinline__ void StoreColumns(uint32_t to, const float (&x)[8],
                                             const float (&factor)[8]) {
  // Elements that share a register; int4 weights come in an order of their own.
  constexpr int kFirst = W::kPieces == 4 ? 1 : 2;
  constexpr int kSecond = W::kPieces == 4 ? 4 : 1;
  uint32_t pairs[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int a = j * kFirst, b = j * kFirst + kSecond;
    pairs[j] =
        SaturatePair<typename W::Element>(__fmul_rn(x[a], factor[a]), __fmul_rn(x[b], factor[b]));
  }
  StoreShared(to, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
}

// Takes a warp's rows of the block's columns of x to shared memory as 16 bits, and sends their sums
// and sums of squares to all blocks of the cluster. A lane has 8 of kStatColumns columns.
template <typename W, int kRowTiles>
class Stager {
 public:
  __device__ Stager(const ClusterPlan& plan, const Place& at, char* shared,
                    const uint64_t* stats_there, int32_t lane)
      : plan_(plan), at_(at), lane_(lane) {
    const int32_t warp = threadIdx.x / 32;
    warps_ = blockDim.x / 32;
    row_ = plan.task.args.x + (at.first_row + warp) * plan.task.args.ldx;
    row_to_ = SharedAddress(shared + plan.x_at) + warp * plan.x_stride * 2;
    rows_ = at.rows - warp;
    int32_t mine = 0;  // of a batch of rows, that whose sums the lane has in the end
#pragma unroll
    for (int half = kBatch / 2, bit = 0; half > 0; half /= 2, ++bit) {
      mine += (lane >> bit & 1) * half;
    }
    my_row_ = mine * warps_;
    stats_ = SharedAddress(shared + plan.stats_at) +
             (at.rank * plan.stat_parts * 8 * kRowTiles + warp + my_row_) * sizeof(float2);
    stats_there_ = SharedAddress(stats_there);
    Open(0);
  }

  // To be called before the kernel before is waited for.
  __device__ __forceinline__ void Prepare() {
    Pin(warps_);
    Pin(rows_);
    Pin(my_row_);
    Pin(stats_);
    Pin(stats_there_);
    Pin(from_);
    Pin(to_);
  }

  // Starts to read the first rows, before which only what no kernel writes was read.
  __device__ __forceinline__ void Read() { Read(0, from_); }

  __device__ __forceinline__ void Run() {
    int32_t row = 0;  // counted from the warp's first
    const float* from = from_;
    const int32_t last = rows_ - at_.rows + 8 * kRowTiles - 1;
#pragma unroll 1
    for (;;) {
      Write(row, last);
      row += warps_ * kBatch;
      from += warps_ * kBatch * plan_.task.args.ldx;
      if (row > last) {
        if (++part_ == plan_.stat_parts) return;
        Open(part_);
        row = 0;
        from = from_;
      }
      Read(row, from);
    }
  }

 private:
  // Rows that are read at once, a power of two.
  static constexpr int kBatch = kRowTiles == 1 ? 2 : kRowTiles;
  static constexpr int32_t kStepColumns = 32 * W::kPieces;

  __device__ __forceinline__ void Open(int32_t part) {
    const int32_t chunk = part * 32 + lane_;
    const int32_t k = at_.part_begin * kStepColumns + chunk * 8;
    const int32_t in = plan_.task.args.w.in;
    part_ = part;
    stored_ = k < at_.part_end * kStepColumns;
    columns_ = stored_ ? max(0, min(in - k, 8)) : 0;
    from_ = row_ + k;
    to_ = row_to_ + PlaceOfChunk<W>(chunk) * 2;
    ReadFactors<W>(plan_.task, k, columns_ > 0, factor_);
  }

  __device__ __forceinline__ void Read(int32_t row, const float* from) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      float4 a = make_float4(0, 0, 0, 0);
      float4 b = make_float4(0, 0, 0, 0);
      if (columns_ > 0 && row + i * warps_ < rows_) {
        const float* row_from = from + i * warps_ * plan_.task.args.ldx;
        a = __ldcg(reinterpret_cast<const float4*>(row_from));
        b = __ldcg(reinterpret_cast<const float4*>(row_from + 4));
      }
      x_[i][0] = a.x, x_[i][1] = a.y, x_[i][2] = a.z, x_[i][3] = a.w;
      x_[i][4] = b.x, x_[i][5] = b.y, x_[i][6] = b.z, x_[i][7] = b.w;
    }
  }

  __device__ __forceinline__ void Write(int32_t row, int32_t last) {
    if (columns_ > 0 && columns_ < 8) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) x_[i][j] = j < columns_ ? x_[i][j] : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int32_t to_row = row + i * warps_;
      if (stored_ && to_row <= last) {
        StoreColumns<W>(to_ + to_row * plan_.x_stride * 2, x_[i], factor_);
      }
    }
    if (plan_.task.normed) SendStats(row, last);
  }

  // Sums over the warp's lanes; what is added to what does not depend on kBatch.
  __device__ __forceinline__ void SendStats(int32_t row, int32_t last) {
    float sum[kBatch], squares[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float (&x)[8] = x_[i];
      sum[i] = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
      float even = __fmul_rn(x[0], x[0]), odd = __fmul_rn(x[1], x[1]);
#pragma unroll
      for (int j = 2; j < 8; j += 2) {
        even = fmaf(x[j], x[j], even);
        odd = fmaf(x[j + 1], x[j + 1], odd);
      }
      squares[i] = even + odd;
    }
    // Of two lanes, each goes on with one half of the rows.
    int offset = 1;
#pragma unroll
    for (int half = kBatch / 2; half > 0; half /= 2, offset *= 2) {
      const bool upper = (lane_ & offset) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float give_sum = upper ? sum[i] : sum[i + half];
        const float give_squares = upper ? squares[i] : squares[i + half];
        sum[i] = (upper ? sum[i + half] : sum[i]) + __shfl_xor_sync(0xffffffffu, give_sum, offset);
        squares[i] = (upper ? squares[i + half] : squares[i]) +
                     __shfl_xor_sync(0xffffffffu, give_squares, offset);
      }
    }
#pragma unroll
    for (; offset < 32; offset *= 2) {
      sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], offset);
      squares[0] += __shfl_xor_sync(0xffffffffu, squares[0], offset);
    }
    if (row + my_row_ > last) return;
    const uint32_t to = stats_ + (part_ * 8 * kRowTiles + row) * sizeof(float2);
#pragma unroll 1
    for (int32_t block = lane_ / kBatch; block < 1 << plan_.cluster_bits; block += 32 / kBatch) {
      StoreAsync(AddressInBlock(to, block), make_float2(sum[0], squares[0]),
                 AddressInBlock(stats_there_, block));
    }
  }

  const ClusterPlan& plan_;
  const Place& at_;
  const int32_t lane_;
  int32_t warps_;
  const float* row_;  // of x, the warp's first
  uint32_t row_to_;   // where it goes
  int32_t rows_;      // from it to the end
  int32_t my_row_;
  uint32_t stats_, stats_there_;
  int32_t part_, columns_;
  bool stored_;
  const float* from_;  // row_ and row_to_ at the lane's columns
  uint32_t to_;
  float factor_[8];
  float x_[kBatch][8];
};

// A row's mean and scale, of the sums of all its parts, which are `stride` apart.
__device__ __forceinline__ NormSums JoinStats(const ClusterPlan& plan, const float2* stats,
                                              int32_t stride) {
  float sum = 0.0f;
  float squares = 0.0f;
#pragma unroll 4
  for (int32_t part = 0; part < plan.stat_parts << plan.cluster_bits; ++part, stats += stride) {
    sum += stats->x;
    squares += stats->y;
  }
  const float mean = __fmul_rn(sum, plan.inverse_in);
  const float variance = fmaxf(__fmul_rn(fmaf(-sum, mean, squares), plan.inverse_in), 0.0f);
  return NormSums{mean, rsqrtf(__fadd_rn(variance, plan.task.norm.eps))};
}

}  // namespace linear_cluster
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
