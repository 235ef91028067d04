// What the kernel of linear_mma.cu is made of; how it works is told there.
#pragma once

#include "cuda/linear.h"
#include "cuda/linear_weights.h"
#include "cuda/mma.h"

namespace fastgen {
namespace cuda {
namespace linear_mma {

using namespace linear_weights;

constexpr int kSlices = 16;
constexpr int kTiles = 4;  // of 8 outputs, per warp and pass
constexpr int kMaxRowTiles = 8;
constexpr int kMaxClusterBits = 3;

// Warps of a block and places of a warp's ring, by tiles of 8 rows: accumulators take registers.
template <int kRowTiles>
struct Shape {
  static constexpr int kWarps = kRowTiles <= 2 ? 16 : 8;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kDepth = 128 / kWarps;
  static constexpr int kBlocks = kRowTiles == 1 ? 2 : 1;  // per multiprocessor
  static constexpr bool kOneSlice = kWarps == kSlices;    // or less, for every warp
};

struct MmaPlan {
  LinearTask task;
  int32_t rows;          // per block
  int32_t cluster_bits;  // log2 of the blocks that share outputs, each with its part of the slices
  Parts outputs;         // of the clusters of the grid
  int32_t steps;         // of a row of weights
  int32_t passes;        // over the range
  int32_t tiles;         // per warp and pass
  Divisor pass_outputs;
  Divisor x_chunks;  // pieces of 8 columns, at most
  int32_t x_stride;  // of a row of x in shared memory, in elements
  int32_t partial_stride;
  int32_t buffers;  // of partial sums
  // Offsets in shared memory.
  int32_t x_at;
  int32_t partial_at;
  int32_t norm_at;
  int32_t sums_at;
  int32_t places_at;
};

#ifdef __CUDACC__

__device__ inline int32_t SliceBegin(int32_t steps, int32_t slice) {
  return static_cast<int32_t>(static_cast<uint32_t>(steps) * slice / kSlices);
}

// x as the sum of two numbers of 16 bits.
__device__ inline void Split(__half, float x, uint32_t* lead, uint32_t* trail) {
  x *= 1.0f / kUnit;
  *lead = FloatToHalf(x);
  *trail = FloatToHalf(x - HalfToFloat(static_cast<uint16_t>(*lead)));
}
__device__ inline void Split(BFloat16, float x, uint32_t* lead, uint32_t* trail) {
  *lead = FloatToBrain(x);
  *trail = FloatToBrain(x - BrainToFloat(static_cast<uint16_t>(*lead)));
}

// Waits for the oldest `tiles` of kDepth copies.
template <int kDepth>
__device__ inline void WaitOldest(int32_t tiles) {
  switch (tiles) {
    case 1: WaitCopies<kDepth - 1>(); break;
    case 2: WaitCopies<kDepth - 2>(); break;
    case 3: WaitCopies<kDepth - 3>(); break;
    default: WaitCopies<kDepth - 4>(); break;
  }
}

// What is the same for a warp all along.
struct Place {
  int32_t outputs_begin, outputs_end;  // of the cluster
  int32_t first_row, rows;
  int32_t rank;          // of the block in its cluster
  int32_t local_slices;  // of the block
  int32_t slice_warps;   // warps that share them; the others have other outputs
  int32_t pass_outputs;
  int32_t first_output;   // of the warp, in a pass
  int32_t first_slice;    // of the warp, of the block's
  int32_t group, member;  // of the lane: lane / 4 and lane % 4
};

// Copies a warp's weights to its ring, in the order in which they are used. A lane reads back what
// it copied itself: nobody else has to be waited for.
template <typename W, int kDepth, bool kOneSlice>
class Stream {
 public:
  __device__ Stream(const MmaPlan& plan, const Place& at, char* ring, int32_t lane)
      : plan_(plan), at_(at), ring_(ring), lane_(lane), slice_(at.first_slice) {
    Open();
  }

  // Starts the next copy, to a place of the ring.
  __device__ void Next(uint32_t place) {
    char* slot = ring_ + place % kDepth * W::kSlotBytes;
    if (pass_ < plan_.passes) {
      const Matrix& w = plan_.task.args.w;
      const int32_t n =
          at_.outputs_begin + pass_ * at_.pass_outputs + at_.first_output + tile_ * 8 + at_.group;
      const int64_t offset = static_cast<int64_t>(step_) * kStepBytes + at_.member * 16;
      const bool valid = n < at_.outputs_end && offset < w.row_bytes;
      const char* data = static_cast<const char*>(w.data);
      StreamCopy16(slot + lane_ * 16, valid ? data + n * w.row_bytes + offset : data, valid);
      if (W::kScaled) CopyScale<W>(slot + 512 + lane_ * 4, w, n, step_, at_.member, valid);
      Advance();
    }
    CommitCopies();
  }

 private:
  // Steps of the slice; slices without any are passed over.
  __device__ void Open() {
    while (pass_ < plan_.passes) {
      if (slice_ >= at_.local_slices) {
        slice_ = at_.first_slice;
        ++pass_;
        continue;
      }
      const int32_t slice = at_.rank * at_.local_slices + slice_;
      step_ = SliceBegin(plan_.steps, slice);
      if (kOneSlice) begin_ = step_;
      end_ = SliceBegin(plan_.steps, slice + 1);
      if (step_ < end_) return;
      slice_ += at_.slice_warps;
      if (kOneSlice) pass_ = plan_.passes;
    }
  }

  __device__ void Advance() {
    if (++tile_ < plan_.tiles) return;
    tile_ = 0;
    if (++step_ < end_) return;
    if (kOneSlice) {
      ++pass_;
      step_ = begin_;
    } else {
      slice_ += at_.slice_warps;
      Open();
    }
  }

  const MmaPlan& plan_;
  const Place& at_;
  char* ring_;
  int32_t lane_;
  int32_t pass_ = 0, slice_, begin_ = 0, step_ = 0, end_ = 0, tile_ = 0;
};

// Lays the block's columns of x out in shared memory: [2 parts][rows][x_stride]. A step's pieces of
// 8 columns are stored by piece first, then by lane of the four.
template <typename W>
__device__ void StageX(const MmaPlan& plan, const Place& at, char* shared, int32_t first_column,
                       int32_t columns) {
  const LinearTask& task = plan.task;
  uint16_t* to = reinterpret_cast<uint16_t*>(shared + plan.x_at);
  const float* weight = reinterpret_cast<const float*>(shared + plan.norm_at);
  const float* bias = weight + plan.x_stride;
  const NormSums* sums = reinterpret_cast<const NormSums*>(shared + plan.sums_at);
  const int32_t trail_at = plan.rows * plan.x_stride;
  const int32_t row_chunks = plan.x_chunks.value;
  constexpr int32_t kStepChunks = 4 * W::kPieces;
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < at.rows * row_chunks; i += blockDim.x) {
    const int32_t row = Divide(i, plan.x_chunks);
    const int32_t chunk = i - row * row_chunks;
    const int32_t column = chunk * 8;
    if (column >= columns) continue;
    const int32_t k = first_column + column;
    float x[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = 0.0f;
    if (k < task.args.w.in) {
      const float* from = task.args.x + (at.first_row + row) * task.args.ldx + k;
      const float4 a = *reinterpret_cast<const float4*>(from);
      const float4 b = *reinterpret_cast<const float4*>(from + 4);
      x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
      x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (k + j >= task.args.w.in) {
          x[j] = 0.0f;
        } else if (task.normed) {
          x[j] = Normed(x[j], sums[row], weight[column + j], bias[column + j]);
        }
      }
    }
    uint32_t lead[8], trail[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) Split(typename W::Element(), x[j], &lead[j], &trail[j]);
    const int32_t in_step = chunk % kStepChunks;
    const int32_t place = chunk - in_step + in_step % W::kPieces * 4 + in_step / W::kPieces;
    uint16_t* slot = to + row * plan.x_stride + place * 8;
    // Elements that share a register; int4 weights come in an order of their own.
    constexpr int kFirst = W::kPieces == 4 ? 1 : 2;
    constexpr int kSecond = W::kPieces == 4 ? 4 : 1;
    uint32_t pairs[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      pairs[j] = lead[j * kFirst] | lead[j * kFirst + kSecond] << 16;
      pairs[4 + j] = trail[j * kFirst] | trail[j * kFirst + kSecond] << 16;
    }
    *reinterpret_cast<uint4*>(slot) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    *reinterpret_cast<uint4*>(slot + trail_at) = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
  }
}

// Adds an output's slices, in order.
__device__ inline float SumInBlock(const float* from, int32_t slice_floats) {
  float part[kSlices];
#pragma unroll
  for (int s = 0; s < kSlices; ++s) part[s] = from[s * slice_floats];
  float total = part[0];
#pragma unroll
  for (int s = 1; s < kSlices; ++s) total += part[s];
  return total;
}

__device__ inline float SumInCluster(const float* from, int32_t slice_floats, int32_t local_bits) {
  float part[kSlices];
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    part[s] = ReadInBlock(from + (s & ((1 << local_bits) - 1)) * slice_floats, s >> local_bits);
  }
  float total = part[0];
#pragma unroll
  for (int s = 1; s < kSlices; ++s) total += part[s];
  return total;
}

#endif  // __CUDACC__

}  // namespace linear_mma
}  // namespace cuda
}  // namespace fastgen
