// The workers' side of a product: weights from the ring, inputs from the exchange, sums for the
// finishers.
#pragma once

#include <type_traits>

#include "cuda/persistent_multiply.h"
#include "cuda/persistent_norm.h"
#include "cuda/persistent_thread.h"

#if FASTGEN_ARCH_HAS_PERSISTENT

namespace fastgen {
namespace cuda {
namespace persistent {

// Chunks whose inputs are on their way at once.
template <int kRows, bool kNormed, bool kOneChunk>
__host__ __device__ constexpr int ChunksAtOnce() {
  return kOneChunk ? 1 : kRows == 4 ? (kNormed ? 1 : 2) : kNormed ? 2 : 4;
}

// Reads a product's inputs and stages them for the warp. Normed ones come in pieces of four float32
// numbers, others as they are staged.
template <typename W, int kRows, bool kNormed, bool kOneChunk>
class Inputs {
  static constexpr int kBatch = ChunksAtOnce<kRows, kNormed, kOneChunk>();
  static constexpr bool kJoins = kRows == 1 && !kNormed && kOneChunk;  // attention's output
  static constexpr int kPieces = kJoins ? kMaxJoins : kBatch * kRows;
  static constexpr float kScale = 1.0f / W::kUnit;
  static constexpr bool kBytes = TakesBytes<W, kRows>();

 public:
  __device__ __forceinline__ Inputs(const Thread<kRows>& self, const Work& work, int64_t behind,
                                    uint32_t epoch)
      : epoch_(epoch),
        column_(self.warp * kSpan + self.lane * 4),
        row_pieces_(work.row_pieces),
        in_(work.in),
        chunks_(work.chunks),
        from_(work.source),
        joins_(kJoins ? self.shared.rows[0].joins : 1),
        gamma_from_(kNormed ? Behind(work.gamma, behind) : nullptr) {}

  // Asks for a batch of chunks, row by row; or for a row's parts.
  __device__ __forceinline__ void Ask(const Thread<kRows>& self) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int column = (kJoins ? 0 : first_ + i / kRows) * kChunk + column_;
      const bool wanted = kJoins ? i < joins_ : self.Active(i % kRows);
      pieces_[i] = AskForPiece(At(i), epoch_, wanted && column < in_);
    }
  }

  // And for what the norm multiplies them by. All blocks ask for the same lines, which should not be when they ask
  // for inputs.
  __device__ __forceinline__ void AskForGamma() {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (!kNormed) continue;
      const int column = (first_ + j) * kChunk + column_;
      gamma_[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (column < in_) {
        gamma_[j] = LoadNow(reinterpret_cast<const float4*>(gamma_from_ + column));
      }
    }
  }

  // What sums of bytes are to be multiplied by: chunk i's in lane i.
  __device__ __forceinline__ float Unscale() const { return unscale_; }

  // Waits for all of them, and leaves the lane's sums for the norm.
  __device__ __forceinline__ void Stage(Thread<kRows>& self, NormSums<kRows>* norm, int phase,
                                        int layer) {
    const int place = StagedPlace<W>(self.lane);
    const auto at = [&](int i) { return At(i); };
    __syncwarp();  // what is staged has been read by all lanes
#pragma unroll 1
    for (;;) {
      WaitForPieces(pieces_, at, epoch_);
      self.StampNow(phase, layer, Stamp::kInputs, __uint_as_float(pieces_[0].x));
      if (kBytes && !kNormed) {
        StageByteChunks(self);
      } else {
        StageChunks(self, norm, place);
      }
      if (kOneChunk) break;
      first_ += kBatch;
      if (first_ >= chunks_) break;
      Ask(self);
      AskForGamma();
    }
    __syncwarp();
  }

 private:
  // A batch of one row's chunks that are not normed, as bytes: those of a warp share a scale.
  __device__ __forceinline__ void StageByteChunks(Thread<kRows>& self) {
    float x[kBatch][4];
    uint32_t largest = 0;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (kJoins && joins_ > 1) {
        JoinParts(x[j]);
      } else {
        Vector<typename W::Element>::UnpackPair(pieces_[j].x, x[j]);
        Vector<typename W::Element>::UnpackPair(SecondPair(pieces_[j]), x[j] + 2);
      }
      largest = max(largest, LargestBits(x[j]));
    }
    const ByteScale scale(largest);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      StageBytes<W>(self, first_ + j, x[j], scale, kOneChunk || first_ + j < chunks_);
    }
    const uint32_t chunk = static_cast<uint32_t>(self.lane - first_);
    if (kOneChunk || chunk < kBatch) unscale_ = scale.down;
  }

  // Others.
  __device__ __forceinline__ void StageChunks(Thread<kRows>& self, NormSums<kRows>* norm,
                                              int place) {
    if (kJoins && joins_ > 1) {
      float x[4];
      JoinParts(x);
      pieces_[0] = make_uint4(RoundPairFinite<typename W::Element>(x[0], x[1]),
                              RoundPairFinite<typename W::Element>(x[2], x[3]), 0, 0);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const bool there = kOneChunk || first_ + j < chunks_;
      const bool own = (first_ + j) * kChunk + column_ < in_;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint4& piece = pieces_[j * kRows + r];
        if (!kNormed) {
          if (there) StageTwoPairs<W>(self, first_ + j, r, place, piece.x, SecondPair(piece));
          continue;
        }
        float x[4];
        UnpackPiece(piece, x);
        if (j == 0 && (kOneChunk || first_ == 0)) norm->Begin(r, x);
        norm->Add(r, x, own);
        x[0] *= gamma_[j].x * kScale;
        x[1] *= gamma_[j].y * kScale;
        x[2] *= gamma_[j].z * kScale;
        x[3] *= gamma_[j].w * kScale;
        if (kBytes) {
          const ByteScale scale(LargestBits(x));
          StageBytes<W>(self, 2 * (first_ + j), x, scale, there);
          if (kOneChunk || self.lane == first_ + j) unscale_ = scale.down;
        } else if (there) {
          StageFour<W>(self, first_ + j, r, place, x);
        }
      }
    }
  }

  // Puts the parts of an attended row together: AttendedPiece().
  __device__ __forceinline__ void JoinParts(float (&x)[4]) const {
    using T = typename W::Element;
    float mass[kPieces], total = 0.0f;
    float most = __uint_as_float(pieces_[0].z);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      mass[i] = i < joins_ ? __uint_as_float(pieces_[i].z) : -Infinity();
      most = fmaxf(most, mass[i]);
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const float weight = Exp2(mass[i] - most);
      float part[4];
      Vector<T>::UnpackPair(pieces_[i].x, part);
      Vector<T>::UnpackPair(pieces_[i].y, part + 2);
      total += weight;
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = i == 0 ? weight * part[e] : fmaf(weight, part[e], x[e]);
    }
    const float each = Reciprocal(total);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] *= each;
  }

  __device__ __forceinline__ const uint4* At(int i) const {
    if (kJoins) return from_ + i * row_pieces_ + column_ / 4;
    const int column = column_ + (first_ + i / kRows) * kChunk;
    return from_ + i % kRows * row_pieces_ + (kNormed ? ResidualPiece(column) : column / 4);
  }

  const uint32_t epoch_;
  const int column_;  // the lane's, of a chunk
  const int row_pieces_, in_, chunks_;
  const uint4* const from_;
  const int joins_;
  const float* const gamma_from_;
  int first_ = 0;  // chunk of the batch
  uint4 pieces_[kPieces];
  float4 gamma_[kBatch];
  float unscale_ = 1.0f;
};

// A worker's way through the tiles of a product: which stage comes next, and where its sums go.
template <typename W, int kRows, bool kNormed, bool kOneChunk>
class Multiplication {
  static constexpr int kNext = kRows * kTile * Partial<kRows>::kStride;  // floats from tile to tile

 public:
  static constexpr int kHeld = StagesAtOnce(kRows, kNormed, kOneChunk);
  static constexpr bool kBytes = TakesBytes<W, kRows>();
  using Weights = typename std::conditional<kBytes, HeldBytes, Held>::type;

  // A group of tiles begins.
  __device__ __forceinline__ void Begin(const Thread<kRows>& self, const Work& work, int tiles) {
    in_ = work.in;
    chunks_ = work.chunks;
    left_ = kOneChunk ? tiles : tiles * chunks_;
    chunk_ = 0;
    total_ = 0.0f;
    const int row = RowOf(self) % kRows;
    const int part = kRows <= 2 ? self.warp * 2 + self.lane % 4 / 2 : self.warp;
    to_ = self.shared.partial[self.buffer][row * kTile + self.lane / 4] + part;
  }
  __device__ __forceinline__ int Count() const { return min(kHeld, left_); }
  __device__ __forceinline__ bool Done() const { return left_ <= 0; }
  __device__ __forceinline__ void SetUnscale(float unscale) { unscale_ = unscale; }

  // Without branches, so that the products of all stages are under way at once; what belongs to stages
  // or columns that are not there is not kept.
  __device__ __forceinline__ void Multiply(const Thread<kRows>& self,
                                           const Weights (&held)[kHeld]) {
    float sums[kHeld];
    if (kOneChunk) {
      MultiplyChunk(self, held, sums);
      // A warp without columns has zeros to give.
      const bool own = self.warp * kSpan < in_;
#pragma unroll
      for (int j = 0; j < kHeld; ++j) Store(self, j, own ? sums[j] : 0.0f, j < left_);
      to_ += kHeld * kNext;
    } else {
      MultiplyChunks(self, held, sums);
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        total_ += sums[j];
        const bool last = chunk_ + 1 == chunks_;
        Store(self, 0, total_, last && j < left_);
        if (last) to_ += kNext;
        total_ = last ? 0.0f : total_;
        chunk_ = last ? 0 : chunk_ + 1;
      }
    }
    left_ -= kHeld;
  }

 private:
  // Sums of stages of the same columns.
  __device__ __forceinline__ void MultiplyChunk(const Thread<kRows>& self,
                                                const HeldBytes (&held)[kHeld],
                                                float (&sums)[kHeld]) const {
    uint4 x[2];
    ReadBytes<W>(self, 0, x);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) sums[j] = MultiplyBytes<W>(held[j], x, self.lane) * unscale_;
  }
  __device__ __forceinline__ void MultiplyChunk(const Thread<kRows>& self,
                                                const Held (&held)[kHeld],
                                                float (&sums)[kHeld]) const {
    uint4 x[4];
    ReadStaged<kNormed>(self, 0, x);
    if (kRows <= 2) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) sums[j] = MultiplyOne<W, kRows>(held[j], x, self.lane);
    } else {
#pragma unroll
      for (int j = 0; j + 1 < kHeld; j += 2) {
        const float2 two = MultiplyTwo<W>(held[j], held[j + 1], x);
        sums[j] = two.x;
        sums[j + 1] = two.y;
      }
      if (kHeld % 2 != 0) sums[kHeld - 1] = MultiplyOne<W, kRows>(held[kHeld - 1], x, self.lane);
    }
  }

  // Of stages that are chunk after chunk.
  __device__ __forceinline__ void MultiplyChunks(const Thread<kRows>& self,
                                                 const Weights (&held)[kHeld],
                                                 float (&sums)[kHeld]) const {
    int chunk = chunk_;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      sums[j] = MultiplyOneOf(self, held[j], chunk);
      if (chunk * kChunk + self.warp * kSpan >= in_) sums[j] = 0.0f;
      chunk = chunk + 1 == chunks_ ? 0 : chunk + 1;
    }
  }
  __device__ __forceinline__ float MultiplyOneOf(const Thread<kRows>& self, const HeldBytes& held,
                                                 int chunk) const {
    uint4 x[2];
    ReadBytes<W>(self, kNormed ? 2 * chunk : chunk, x);
    return MultiplyBytes<W>(held, x, self.lane) * __shfl_sync(0xffffffffu, unscale_, chunk);
  }
  __device__ __forceinline__ float MultiplyOneOf(const Thread<kRows>& self, const Held& held,
                                                 int chunk) const {
    uint4 x[4];
    ReadStaged<kNormed>(self, chunk, x);
    return MultiplyOne<W, kRows>(held, x, self.lane);
  }

  static __device__ __forceinline__ int RowOf(const Thread<kRows>& self) {
    return kRows <= 2 ? self.lane % 2 : self.lane % 4;
  }
  __device__ __forceinline__ void Store(const Thread<kRows>& self, int tile, float sum,
                                        bool shall) {
    if (shall && RowOf(self) < kRows) to_[tile * kNext] = sum * W::kUnit;
  }

  int in_, chunks_;
  int left_;   // stages of the group
  int chunk_;  // of the next one
  float total_, unscale_;
  float* to_;
};

// QKV, the feed-forward block's input and the head where kNormed; else attention's output and that of
// the feed-forward block. `epoch` is that of the inputs.
template <typename W, int kRows, bool kNormed, bool kOneChunk>
__device__ __forceinline__ void WorkOnProduct(Thread<kRows>& self, int phase, int layer,
                                              uint32_t epoch) {
  using Multiplying = Multiplication<W, kRows, kNormed, kOneChunk>;
  self.Forget();
  const Work& work = self.shared.work[phase];
  if (work.tiles == 0) return;
  self.StampNow(phase, layer, Stamp::kBegin);
  Multiplying multiplication;
  {
    typename Multiplying::Weights held[Multiplying::kHeld];
    NormSums<kRows> norm;
    Inputs<W, kRows, kNormed, kOneChunk> inputs(
        self, work, phase == kHead ? 0 : layer * self.plan.layer_bytes, epoch);
    const int tiles = min(kRound, work.tiles);
    // Four numbers more that live while weights are read are too many for several rows.
    if (kRows == 1) inputs.AskForGamma();
    const auto ask = [&] {
      inputs.Ask(self);
      if (kRows > 1) inputs.AskForGamma();
    };
    const auto prepare = [&] {
      if (kNormed) norm.Prepare(self.shared, self.warp);
      self.WaitForBuffer();
      multiplication.Begin(self, work, tiles);
    };
    // Inputs are not asked for before: what is asked for too early, most of the time, takes the weights' way
    // for nothing.
    if (W::kScales > 0) {
      const int stages = min(Multiplying::kHeld, kOneChunk ? tiles : tiles * work.chunks);
      TakeWeights<W, kOneChunk>(self, work, stages, held, [&] {
        prepare();
        ask();
      });
      ReleaseWeights(self);
    } else {
      prepare();
      TakeWeights<W, kOneChunk>(self, work, multiplication.Count(), held, [] {});
      // With one row the next copy is worth more than asking at once; with several it is not.
      if (kRows == 1) ReleaseWeights(self);
      ask();
      if (kRows > 1) ReleaseWeights(self);
    }
    self.StampNow(phase, layer, Stamp::kWeights);
    // From here on all others wait.
    inputs.Stage(self, &norm, phase, layer);
    self.Forget();
    multiplication.SetUnscale(inputs.Unscale());
    multiplication.Multiply(self, held);
    self.StampNow(phase, layer, Stamp::kProducts);
    // While the products are under way.
    if (kNormed) StoreNorm(self, norm);
    // Here where they are all, not behind the loop: that would be a jump, and all others wait.
    if (kOneChunk && multiplication.Done()) self.PassBuffer();
  }
  bool passed = kOneChunk && multiplication.Done();
#pragma unroll 1
  for (int group = 0;;) {
    while (!multiplication.Done()) {
      typename Multiplying::Weights held[Multiplying::kHeld];
      TakeWeights<W, kOneChunk>(self, work, multiplication.Count(), held, [] {});
      ReleaseWeights(self);
      multiplication.Multiply(self, held);
    }
    if (!passed) self.PassBuffer();
    passed = false;
    group += kRound;
    if (group >= work.tiles) break;
    self.WaitForBuffer();
    multiplication.Begin(self, work, min(kRound, work.tiles - group));
  }
}

}  // namespace persistent
}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_PERSISTENT
