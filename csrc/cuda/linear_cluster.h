// What the kernel of linear_cluster.cu is made of; how it works is told there.
#pragma once

#include "cuda/hopper.h"
#include "cuda/linear.h"
#include "cuda/linear_weights.h"
#include "cuda/mma.h"

namespace fastgen {
namespace cuda {
namespace linear_cluster {

using namespace linear_weights;

constexpr int kMaxWarps = 8;
constexpr int kMaxThreads = 32 * kMaxWarps;
constexpr int kDepth = 8;  // steps of a warp's weights under way
constexpr int kMaxRowTiles = 8;
constexpr int kSharesAtOnce = 4;  // there are a multiple of it
constexpr int kBarriers = 3;
constexpr int kTileOutputs = 16;        // of a warp
constexpr int kUnitBytes = 16 * 8 * 4;  // sums of a warp for 8 rows
constexpr int kStatColumns = 8 * 32;    // of a row, that a warp reads at a time

struct ClusterPlan {
  LinearTask task;
  int32_t cluster_bits;  // log2 of the blocks that share outputs
  int32_t share_bits;    // log2 of the warps of a block that share outputs
  int32_t output_warps;  // warps of a block with outputs of their own
  int32_t clusters;      // of the grid
  int32_t tiles;         // of the outputs of a cluster, over all clusters
  int32_t steps;         // of a row of weights
  int32_t ring_steps;    // that a warp's ring has room for
  bool resident;         // it has for all
  int32_t x_stride;      // of a row of x in shared memory, in elements
  float inverse_in;      // 1 / columns
  int32_t stat_parts;    // pieces of kStatColumns of a block's columns, at most
  int32_t block_units;   // of a tile, that a block finishes, at most
  int32_t buffers;       // of sums; 0: they take the place of the weights
  // Offsets in shared memory.
  int32_t x_at;
  int32_t stats_at;
  int32_t norms_at;
  int32_t places_at;
  int32_t columns_at;
  int32_t sums_at;
  int32_t barriers_at;
};

#if FASTGEN_ARCH_HAS_PERSISTENT

__device__ inline int32_t ShareBegin(int32_t steps, int32_t bits, int32_t share) {
  return static_cast<int32_t>(static_cast<uint32_t>(steps) * share >> bits);
}

// What is the same for a warp all along.
struct Place {
  int32_t first_row, rows;
  int32_t cluster;                 // of the grid
  int32_t rank;                    // of the block in its cluster
  int32_t share_bits;              // log2 of the shares of the columns
  int32_t share;                   // of the warp
  int32_t first_output;            // of the warp, in a tile
  int32_t tile_outputs;            // of the cluster
  int32_t part_begin, part_end;    // steps of the block
  int32_t share_begin, share_end;  // steps of the warp
  int32_t group, member;           // of the lane: lane / 4 and lane % 4
};

// Has a number computed here, which is where there is time, and not where it is needed.
__device__ __forceinline__ void Pin(int32_t& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void Pin(uint32_t& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void Pin(float& x) { asm volatile("" : "+f"(x)); }
template <typename T>
__device__ __forceinline__ void Pin(T*& x) {
  asm volatile("" : "+l"(x));
}

// Reads what no kernel writes, here and not where it is needed.
__device__ __forceinline__ float ReadEarly(const float* from) {
  float x;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(from));
  return x;
}

// A lane's weights of a step: of outputs `group` and `group` + 8, with their scales.
struct StepWeights {
  uint4 low, high;
  uint32_t scales;
};

template <typename W>
__device__ inline StepWeights ReadStep(const Matrix& w, const char* slot, uint32_t output,
                                       int32_t step, int32_t lane) {
  StepWeights result;
  result.low = *reinterpret_cast<const uint4*>(slot + lane * 16);
  result.high = *reinterpret_cast<const uint4*>(slot + W::kSlotBytes + lane * 16);
  result.scales = 0;
  if (W::kScaled) {
    const char* scales = slot + 512 + lane * 4;
    result.scales = ScaleIn<W>(scales, w, output, step, lane % 4) |
                    ScaleIn<W>(scales + W::kSlotBytes, w, output + 8, step, lane % 4) << 16;
  }
  return result;
}

// The products of a step with kRowTiles tiles of rows of x.
template <typename W, int kRowTiles>
__device__ __forceinline__ void Multiply(const StepWeights& weights, const uint16_t* x,
                                         int32_t x_stride, float (&sum)[2][kRowTiles][4]) {
  using Element = typename W::Element;
#pragma unroll
  for (int j = 0; j < W::kPieces; ++j) {
    uint32_t low[4], high[4];
    Unpack(W(), weights.low, j, weights.scales & 0xffffu, low);
    Unpack(W(), weights.high, j, weights.scales >> 16, high);
    const uint32_t a[2][4] = {{low[0], high[0], low[1], high[1]},
                              {low[2], high[2], low[3], high[3]}};
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
      const uint4 b = *reinterpret_cast<const uint4*>(x + t * 8 * x_stride + j * 32);
      Mma<Element>(sum[0][t], a[0], b.x, b.y);
      Mma<Element>(sum[1][t], a[1], b.z, b.w);
    }
  }
}

// Copies a warp's weights to its ring, in the order in which they are used: of a step, outputs
// `group` and `group` + 8. A lane reads back what it copied itself: nobody else has to be waited for.
template <typename W>
class Stream {
 public:
  __device__ Stream(const ClusterPlan& plan, const Place& at, char* ring, int32_t lane)
      : plan_(plan),
        at_(at),
        to_(ring + lane * 16),
        scales_(ring + 512 + lane * 4),
        tile_(at.cluster),
        step_(at.share_begin) {
    if (at.share_begin == at.share_end) tile_ = plan.tiles;
    Open();
  }

  // Starts the next copy, to a place of the ring.
  __device__ void Next(uint32_t place) {
    if (tile_ < plan_.tiles) {
      const Matrix& w = plan_.task.args.w;
      const uint32_t slot = place % kDepth * (2 * W::kSlotBytes);
      char* to = to_ + slot;
      const bool inside = step_ * kStepBytes + at_.member * 16 < row_bytes_;
      const bool first = inside && output_ < w.out;
      const bool second = inside && output_ + 8 < w.out;
      StreamCopy16(to, first ? from_ : w.data, first);
      StreamCopy16(to + W::kSlotBytes, second ? from_ + 8 * row_bytes_ : w.data, second);
      if (W::kScaled) {
        char* scales = scales_ + slot;
        CopyScale<W>(scales, w, output_, step_, at_.member, first);
        CopyScale<W>(scales + W::kSlotBytes, w, output_ + 8, step_, at_.member, second);
      }
      from_ += kStepBytes;
      if (++step_ == at_.share_end) {
        step_ = at_.share_begin;
        tile_ += plan_.clusters;
        Open();
      }
    }
    CommitCopies();
  }

 private:
  __device__ void Open() {
    const Matrix& w = plan_.task.args.w;
    row_bytes_ = static_cast<int32_t>(w.row_bytes);
    output_ = tile_ * at_.tile_outputs + at_.first_output + at_.group;
    from_ = static_cast<const char*>(w.data) + output_ * w.row_bytes + step_ * kStepBytes +
            at_.member * 16;
  }

  const ClusterPlan& plan_;
  const Place& at_;
  char* to_;
  char* scales_;
  const char* from_;
  int32_t tile_, step_, output_, row_bytes_;
};

#endif  // FASTGEN_ARCH_HAS_PERSISTENT

}  // namespace linear_cluster
}  // namespace cuda
}  // namespace fastgen
