#include "engine/kv_cache.h"

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

void BlockPool::Take(int64_t count, std::vector<cpu::Pages>* blocks) {
  std::vector<cpu::Pages> taken;
  taken.reserve(count);
  blocks->reserve(blocks->size() + count);
  try {
    while (static_cast<int64_t>(taken.size()) < count) {
      if (free_.empty()) {
        taken.emplace_back(block_bytes(), "a block of the KV cache");
      } else {
        taken.push_back(std::move(free_.back()));
        free_.pop_back();
      }
    }
  } catch (const base::Error&) {
    const auto had = static_cast<int64_t>(taken.size());
    GiveBack(&taken);
    throw base::Error(FASTGEN_OUT_OF_MEMORY,
                      "the KV cache of this sequence needs " +
                          std::to_string(count * block_bytes()) + " bytes, of which " +
                          std::to_string((count - had) * block_bytes()) +
                          " are missing; ask for a smaller max_length or fewer sequences at once");
  }
  for (cpu::Pages& block : taken) blocks->push_back(std::move(block));
}

void BlockPool::GiveBack(std::vector<cpu::Pages>* blocks) {
  const int64_t most = kKeptBytes / block_bytes();
  for (cpu::Pages& block : *blocks) {
    if (static_cast<int64_t>(free_.size()) < most) free_.push_back(std::move(block));
  }
  blocks->clear();
}

}  // namespace fastgen::engine
