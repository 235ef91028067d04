// Keys and values of the CPU device, in blocks of cpu::kBlock positions that hold every layer.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/cache_layout.h"
#include "cpu/memory.h"
#include "engine/config.h"

namespace fastgen::engine {

// Positions that sequences have alike may lie in one block that all of them hold: whoever holds it with
// others may read it, and write to it only what is there or will be for all of them.
using Block = std::shared_ptr<cpu::Pages>;

// Blocks come from a free list, so that a long-running process neither grows nor fragments: memory
// is what its busiest moment needed, at most kKeptBytes of it while idle.
class BlockPool {
 public:
  BlockPool(const ModelConfig& config, cpu::CacheType type);

  // Appends `count` blocks to `blocks`. Throws base::Error(FASTGEN_OUT_OF_MEMORY) saying how much
  // was asked for, with nothing taken.
  void Take(int64_t count, std::vector<Block>* blocks);
  // A block is free once nobody else holds it. Sequences end also where memory has run out.
  void GiveBack(std::vector<Block>* blocks) noexcept;

  int64_t block_bytes() const { return block_bytes_; }
  // Of blocks that somebody holds, each counted once.
  int64_t bytes_in_use() const { return in_use_ * block_bytes_; }
  const cpu::HeadLayout& head() const { return head_; }

  // Where in a block a head's area begins, in bytes.
  int64_t HeadAt(int32_t layer, int32_t head) const {
    return (static_cast<int64_t>(layer) * num_heads_ + head) * head_.bytes;
  }

 private:
  const cpu::HeadLayout head_;
  const int64_t num_heads_;
  const int64_t block_bytes_;
  int64_t in_use_ = 0;
  std::vector<Block> free_;
};

}  // namespace fastgen::engine
