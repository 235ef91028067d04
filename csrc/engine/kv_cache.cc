#include "engine/kv_cache.h"

#include <algorithm>
#include <new>
#include <string>

#include "base/error.h"

namespace fastgen::engine {

namespace {
constexpr int64_t kKeptBytes = int64_t{1} << 28;
}

BlockPool::BlockPool(const ModelConfig& config, cpu::CacheType type)
    : head_(cpu::MakeHeadLayout(type, config.head_size())),
      num_heads_(config.num_heads),
      block_bytes_(head_.bytes * config.num_heads * config.num_layers) {}

void BlockPool::Take(int64_t count, std::vector<Block>* blocks) {
  std::vector<Block> taken;
  taken.reserve(count);
  blocks->reserve(blocks->size() + count);
  try {
    while (static_cast<int64_t>(taken.size()) < count) {
      if (free_.empty()) {
        taken.push_back(std::make_shared<cpu::Pages>());
      } else {
        taken.push_back(std::move(free_.back()));
        free_.pop_back();
      }
    }
    // Small memory first: where large memory ends, nothing else is asked for.
    for (Block& block : taken) {
      if (!block->data()) *block = cpu::Pages(block_bytes(), "a block of the KV cache");
    }
  } catch (...) {
    taken.erase(std::remove_if(taken.begin(), taken.end(),
                               [](const Block& block) { return !block->data(); }),
                taken.end());
    const auto had = static_cast<int64_t>(taken.size());
    in_use_ += had;
    GiveBack(&taken);
    throw base::Error(FASTGEN_OUT_OF_MEMORY,
                      "the KV cache of this sequence needs " +
                          std::to_string(count * block_bytes()) + " bytes, of which " +
                          std::to_string((count - had) * block_bytes()) +
                          " are missing; ask for a smaller max_length or fewer sequences at once");
  }
  in_use_ += count;
  for (Block& block : taken) blocks->push_back(std::move(block));
}

void BlockPool::GiveBack(std::vector<Block>* blocks) noexcept {
  const int64_t most = kKeptBytes / block_bytes();
  for (Block& block : *blocks) {
    if (block.use_count() > 1) continue;
    --in_use_;
    if (static_cast<int64_t>(free_.size()) >= most) continue;
    try {
      free_.push_back(std::move(block));
    } catch (const std::bad_alloc&) {
      // The list cannot grow: the block goes back to the system.
    }
  }
  blocks->clear();
}

}  // namespace fastgen::engine
