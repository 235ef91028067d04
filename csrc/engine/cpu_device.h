// The CPU device: a step is a loop over layers of five fused parallel regions.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"
#include "engine/device.h"
#include "engine/kv_cache.h"
#include "engine/packed_weights.h"
#include "engine/sampler.h"

namespace fastgen::engine {

// What a step is made of, in its order; the five in the middle once per layer.
enum class Region {
  kEmbed,
  kQkv,
  kAttention,
  kAttentionOut,
  kFeedForwardIn,
  kFeedForwardOut,
  kHead,
  kSample,
};
constexpr int kNumRegions = 8;

struct RegionTimes {
  double seconds[kNumRegions] = {};
};

class CpuDevice : public Device {
 public:
  CpuDevice(const ModelConfig& config, WeightSource& weights, const DeviceOptions& options);

  const DeviceInfo& info() const override { return info_; }
  int32_t Open(const SequenceSpec& spec) override;
  void Close(int32_t slot) override;
  void Prefill(const PrefillChunk* chunks, size_t count) override;
  void CopyPrefix(int32_t from, int32_t to, int32_t count) override;
  int32_t Decode(const int32_t* slots, size_t count, int32_t max_steps, DecodeResult* results,
                 float* logits) override;
  double MeasureReadBandwidth(uint64_t bytes, int32_t passes) override;

  // For tests: tokens that have gone through the layers so far, and the cache of the open slots.
  uint64_t rows_done() const { return rows_done_; }
  int64_t cache_bytes_in_use() const { return cache_.bytes_in_use(); }
  // Adds the time of every region to `times` from now on, or of none if null. `times` must live as long.
  void Measure(RegionTimes* times) { times_ = times; }

 private:
  class Timed;
  struct Slot {
    bool open = false;
    bool finished = false;
    SamplingParams sampling;
    std::vector<int32_t> tokens;  // prompt, then what was sampled
    int32_t prompt_length = 0;
    int32_t fed = 0;  // positions in the cache
    std::vector<Block> blocks;
  };
  // One token on its way through the network.
  struct Row {
    const Slot* slot;
    int32_t token;
    int32_t position;
  };

  // Rows [row, row + count) of a step, of one sequence at consecutive positions, for attention.
  struct Tile {
    int64_t row, count;
    int64_t length;  // positions that the first of them attends
    int64_t spans;   // of cpu::kSpan positions, that the last of them reaches into
    int64_t first_span,
        first_part;             // how many the tiles before it have: spans, and rows' parts of them
    int64_t first_tile, tiles;  // of its sequence
  };

  Slot& At(int32_t slot);
  void Grow(int64_t rows);
  // Runs rows through all layers; hidden_ then holds the residual stream before the final norm.
  void Forward(const std::vector<Row>& rows);
  void RunLayer(int32_t index, const std::vector<Row>& rows);
  struct Product;
  template <typename Done>
  void Multiply(const Product& product, int64_t rows, const Done& done);
  void Multiply(const Product& product, int64_t rows);
  // Before the product whose columns, of that many rows, WriteCache() is told of.
  void ExpectCache(int64_t rows);
  // Takes columns [first, last) of rows [row, next) of the fused product to where attention wants them:
  // queries are scaled in place; a head's keys and values of all rows go to the cache once all of them are
  // there, because some types of it have a scale for the whole.
  void WriteCache(int32_t layer, const std::vector<Row>& rows, int64_t first, int64_t last,
                  int64_t row, int64_t next);
  // Shares attention of these rows out: into tiles, and into spans where tiles are too few.
  void PlanAttention(const std::vector<Row>& rows);
  void Attend(int32_t layer, const std::vector<Row>& rows);
  void AttendSpans(int32_t layer, const std::vector<Row>& rows, int32_t head, const Tile& tile,
                   int64_t first, int64_t last, float* parts, int32_t thread);
  void FinishAttention(int32_t head, const Tile& tile, float* parts) const;
  // logits_[i] = head(final norm(hidden_[first_row + i])).
  void ComputeLogits(int64_t first_row, int64_t count);
  void PrefillRows(const std::vector<Row>& rows, const std::vector<float*>& wanted);
  int64_t MadeBytes() const;
  void AddUnfedPrompt(const int32_t* slots, size_t count, std::vector<Row>* rows);
  void SampleRows(const int32_t* slots, const std::vector<size_t>& results_at,
                  DecodeResult* results);

  const ModelConfig config_;
  const cpu::Kernels& kernels_;
  cpu::ThreadPool pool_;
  BlockPool cache_;
  const PackedWeights weights_;
  uint64_t rows_done_ = 0;
  DeviceInfo info_;
  RegionTimes* times_ = nullptr;
  std::vector<Slot> slots_;

  // Row strides of the work space, in floats; see RowStride() for why they are odd in cache lines.
  const int64_t hidden_stride_, qkv_stride_, wide_stride_, logits_stride_;
  const int64_t made_bytes_;
  int64_t capacity_ = 0;  // rows that the work space holds
  cpu::Pages hidden_, qkv_, attended_, wide_, logits_;
  int64_t logits_capacity_ = 0;

  std::vector<Tile> tiles_;
  std::vector<int32_t> tile_of_span_;  // empty: a tile is one thread's with all its spans
  std::vector<float> parts_;           // [heads, parts] of the tiles that several threads work on
  struct Pending {
    std::atomic<int64_t> count{0};
  };
  std::vector<Pending> pending_spans_;    // [heads, tiles] that are still to be done
  std::vector<Pending> pending_columns_;  // [heads] of keys and values, of all rows

  struct Scratch {
    std::vector<float> normed;  // [hidden_stride], of the row that is being prepared
    std::vector<char> made;     // rows as the product `made_of` takes them
    uint64_t made_of = 0;
    std::vector<float> scores, parts;
    std::vector<const char*> blocks;
    std::unique_ptr<Sampler> sampler;
  };
  std::vector<Scratch> scratch_;
  uint64_t products_ = 0;
  cpu::Pages made_;  // the same for all threads, when rows are too many to be made once per thread
};

}  // namespace fastgen::engine
