// Keys and values of the CPU device, in blocks of cpu::kBlock positions that hold every layer.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/memory.h"
#include "engine/config.h"

namespace fastgen::engine {

// Blocks come from a free list, so that a long-running process neither grows nor fragments: memory
// is what its busiest moment needed, at most kKeptBytes of it while idle.
class BlockPool {
 public:
  explicit BlockPool(const ModelConfig& config);

  // Appends `count` blocks to `blocks`. Throws base::Error(FASTGEN_OUT_OF_MEMORY) saying how much
  // was asked for, with nothing taken.
  void Take(int64_t count, std::vector<cpu::Pages>* blocks);
  void GiveBack(std::vector<cpu::Pages>* blocks);

  int64_t block_bytes() const { return block_floats_ * static_cast<int64_t>(sizeof(float)); }
  int64_t value_stride() const { return value_stride_; }

  // Within a block: keys of a head are [head_size, kBlock], its values [kBlock, value_stride].
  int64_t KeysAt(int32_t layer, int32_t head) const {
    return (static_cast<int64_t>(layer) * num_heads_ + head) * head_floats_;
  }
  int64_t ValuesAt(int32_t layer, int32_t head) const { return KeysAt(layer, head) + key_floats_; }

 private:
  int64_t num_heads_;
  int64_t value_stride_;
  int64_t key_floats_;
  int64_t head_floats_;
  int64_t block_floats_;
  std::vector<cpu::Pages> free_;
};

}  // namespace fastgen::engine
