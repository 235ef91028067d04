// The weights of one network by their role, read out of named tensors.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "engine/config.h"
#include "io/tensor.h"

namespace fastgen::engine {

// done and total in bytes of packed weights.
using Progress = std::function<void(uint64_t done, uint64_t total)>;

// One matrix of the network, y = x W + b, however the checkpoint stores it.
enum class Matrix { kQuery, kKey, kValue, kAttentionOut, kFeedForwardIn, kFeedForwardOut };
enum class Vector {
  kNorm1Weight,
  kNorm1Bias,
  kNorm2Weight,
  kNorm2Bias,
  kQueryBias,
  kKeyBias,
  kValueBias,
  kAttentionOutBias,
  kFeedForwardInBias,
  kFeedForwardOutBias,
};
// What does not belong to a layer.
enum class End { kEmbedding, kPositions, kHead, kFinalNormWeight, kFinalNormBias };
constexpr int kNumMatrices = 6;
constexpr int kNumVectors = 10;

// The weights of one network by their role, whatever the checkpoint's names and fusions are: those
// of HuggingFace GPT-2 (with or without `transformer.`) and those of PaddleNLP GPT (with or without
// `gpt.`, q, k and v apart or fused). The values are the checkpoint's: nothing is scaled here.
//
// The constructor checks that every tensor is there, has the shape that the configuration asks for
// and a type that can be read, and that none is left over; it throws Error(kBadFile) naming the
// tensor. `where` is the file or directory, for messages. `config` has passed CheckConfig().
//
// Matrices and tables may be whole numbers with scales (io/quantized.h), if the configuration says so:
// then they are read as float32 too, and their scales are there for who packs the same type.
//
// Reading and releasing are safe from several threads at once. What is released may still be read.
class WeightSource {
 public:
  // Where one role lies in a stored tensor [in, stored columns] (or [stored columns]), which q, k
  // and v may share. Its columns come in groups of `group_size` that lie `group_stride` apart:
  //   stored column = offset + column / group_size * group_stride + column % group_size
  // One group unless a head's q, k and v lie side by side.
  struct Part {
    const io::TensorView* tensor = nullptr;
    int64_t size = 0;  // columns of this role
    int64_t offset = 0;
    int64_t group_size = 0;
    int64_t group_stride = 0;
    int64_t rows = 1;                        // inputs, of a matrix
    const io::TensorView* scales = nullptr;  // of whole numbers, which lie in `tensor`
  };

  WeightSource(const ModelConfig& config, io::TensorSource& source, const std::string& where);

  // Columns [begin, end) of the [in, out] matrix as float32: out[row * ld + (column - begin)].
  void ReadColumns(int32_t layer, Matrix which, int64_t begin, int64_t end, float* out,
                   int64_t ld) const;
  // Whole vector as float32.
  void ReadVector(int32_t layer, Vector which, float* out) const;
  void ReadFinalNorm(float* weight, float* bias) const;
  // Rows [begin, end) of the [vocab, hidden] word embedding, of the [positions, hidden] position
  // table, and of the head (the embedding when tied), as float32, contiguous.
  void ReadEmbeddingRows(int64_t begin, int64_t end, float* out) const;
  void ReadPositionRows(int64_t begin, int64_t end, float* out) const;
  void ReadHeadRows(int64_t begin, int64_t end, float* out) const;
  // What the matrices of the layers, and embedding and head, are stored as where they have scales: "int8"
  // or "int4"; else "". Only then may scales be read.
  const char* matrix_scales() const;
  const char* table_scales() const;
  // Whether all of those have one scale for every io::kScaleRun inputs; reads them.
  bool matrix_scales_in_runs() const;
  bool table_scales_in_runs() const;
  // The float16 scales of columns [begin, end) of a matrix: out[group * ld + (column - begin)]; and of
  // rows [begin, end) of the embedding and the head, [end - begin, io::ScaleGroups(hidden)].
  void ReadColumnScales(int32_t layer, Matrix which, int64_t begin, int64_t end, uint16_t* out,
                        int64_t ld) const;
  void ReadEmbeddingScales(int64_t begin, int64_t end, uint16_t* out) const;
  void ReadHeadScales(int64_t begin, int64_t end, uint16_t* out) const;
  // The head is the word embedding, or equal to it byte for byte.
  bool head_is_tied() const { return head_.tensor == nullptr; }

  // Where the roles lie, for who reads tensors that are not in memory of the host. The rows of a matrix
  // and of a table are those of its tensor, a vector is one row.
  const Part& matrix(int32_t layer, Matrix which) const;
  const Part& vector(int32_t layer, Vector which) const;
  Part end(End which) const;

  // Everything that belongs to a layer / to the ends of the network has been packed.
  void ReleaseLayer(int32_t layer);
  void ReleaseEnds();

 private:
  struct Layer {
    Part matrices[kNumMatrices];
    Part vectors[kNumVectors];
  };
  // A tensor, and that of its scales if it has them.
  struct Table {
    const io::TensorView* tensor = nullptr;
    const io::TensorView* scales = nullptr;
  };
  class Binder;

  static void ReadPart(const Part& part, int64_t begin, int64_t end, float* out, int64_t ld);
  static void ReadRows(const Table& table, int64_t begin, int64_t end, float* out);
  static void ReadRowScales(const Table& table, int64_t begin, int64_t end, uint16_t* out);
  const Table& head() const { return head_is_tied() ? embedding_ : head_; }
  bool HeadEqualsEmbedding();

  io::TensorSource& source_;
  std::vector<Layer> layers_;
  Table embedding_;
  const io::TensorView* positions_ = nullptr;
  Table head_;
  const io::TensorView* final_norm_weight_ = nullptr;
  const io::TensorView* final_norm_bias_ = nullptr;
};

}  // namespace fastgen::engine
