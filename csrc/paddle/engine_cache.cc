#include "engine_cache.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <system_error>
#include <thread>
#include <utility>

namespace fastgen::paddle {
namespace {

uint64_t RotateLeft(uint64_t value, int bits) { return (value << bits) | (value >> (64 - bits)); }

// One step is a bijection of the word for a given state, so a change of one word always shows; the
// rotation lets changes of high bits reach the low ones.
uint64_t Mix(uint64_t state, uint64_t word) {
  return RotateLeft((state ^ word) * 0x9E3779B97F4A7C15ull, 29);
}

// Reads memory at the speed the memory has: eight independent chains hide the multiplications.
uint64_t Checksum(const void* data, size_t bytes, uint64_t seed) {
  constexpr size_t kLanes = 8;
  constexpr size_t kBlock = kLanes * sizeof(uint64_t);
  uint64_t lanes[kLanes];
  for (size_t i = 0; i < kLanes; ++i) lanes[i] = seed + i;
  const char* at = static_cast<const char*>(data);
  size_t left = bytes;
  for (; left >= kBlock; left -= kBlock, at += kBlock) {
    uint64_t words[kLanes];
    std::memcpy(words, at, kBlock);
    for (size_t i = 0; i < kLanes; ++i) lanes[i] = Mix(lanes[i], words[i]);
  }
  uint64_t tail[kLanes] = {};
  if (left > 0) std::memcpy(tail, at, left);
  uint64_t sum = bytes;
  for (size_t i = 0; i < kLanes; ++i) sum = Mix(sum, Mix(lanes[i], tail[i]));
  return sum;
}

size_t UsableProcessors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return static_cast<size_t>(std::max(1, CPU_COUNT(&set)));
}

// Over pieces of a few megabytes, whose sums are mixed in order: the same whoever reads a piece.
// Memory is read faster by several processors, and this runs before every call.
uint64_t Checksum(const std::vector<Weight>& weights) {
  constexpr size_t kPiece = size_t{1} << 22;
  struct Piece {
    const char* data;
    size_t bytes;
    uint64_t sum;
  };
  std::vector<Piece> pieces;
  for (const Weight& weight : weights) {
    const char* data = static_cast<const char*>(weight.data);
    for (size_t at = 0; at < weight.bytes; at += kPiece) {
      pieces.push_back({data + at, std::min(kPiece, weight.bytes - at), 0});
    }
  }
  size_t total = 0;
  for (const Piece& piece : pieces) total += piece.bytes;
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < pieces.size(); i = next++) {
      pieces[i].sum = Checksum(pieces[i].data, pieces[i].bytes, i);
    }
  };
  std::vector<std::thread> helpers;
  const size_t wanted = std::min<size_t>({total / (8 * kPiece), 7, UsableProcessors() - 1});
  try {
    for (size_t i = 0; i < wanted; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // Fewer helpers do it too.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  uint64_t sum = weights.size();
  for (const Piece& piece : pieces) sum = Mix(sum, piece.sum);
  return sum;
}

bool SameMemory(const Weight& a, const Weight& b) {
  return !a.memory.owner_before(b.memory) && !b.memory.owner_before(a.memory) && a.data == b.data &&
         a.dtype == b.dtype && a.shape == b.shape && a.name == b.name;
}

bool SameVersions(const std::vector<Weight>& a, const std::vector<Weight>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const Weight& x, const Weight& y) { return x.version == y.version; });
}

// Special tokens are left out: they do not change what is computed.
bool SameConfig(const fastgen_config& a, const fastgen_config& b) {
  return a.vocab_size == b.vocab_size && a.max_positions == b.max_positions &&
         a.hidden_size == b.hidden_size && a.num_layers == b.num_layers &&
         a.num_heads == b.num_heads && a.intermediate_size == b.intermediate_size &&
         a.layer_norm_eps == b.layer_norm_eps;
}

std::shared_ptr<fastgen_model> Build(const fastgen_config& config,
                                     const std::vector<Weight>& weights) {
  std::vector<fastgen_tensor> tensors(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const Weight& weight = weights[i];
    fastgen_tensor& tensor = tensors[i];
    if (weight.shape.size() > sizeof(tensor.shape) / sizeof(tensor.shape[0])) {
      throw StatusError(FASTGEN_INVALID_ARGUMENT, "weight " + weight.name + " has " +
                                                      std::to_string(weight.shape.size()) +
                                                      " dimensions: it must have at most 4");
    }
    tensor.name = weight.name.c_str();
    tensor.data = weight.data;
    tensor.dtype = weight.dtype;
    tensor.num_dims = static_cast<int32_t>(weight.shape.size());
    std::copy(weight.shape.begin(), weight.shape.end(), tensor.shape);
  }
  fastgen_model* model = nullptr;
  CheckStatus(fastgen_model_create(&config, tensors.data(), tensors.size(), nullptr, &model));
  return std::shared_ptr<fastgen_model>(model, fastgen_model_free);
}

bool IsUnknown(const Weight& weight) {
  const std::weak_ptr<void> unknown = UnknownMemory();
  return !weight.memory.owner_before(unknown) && !unknown.owner_before(weight.memory);
}

}  // namespace

std::weak_ptr<void> UnknownMemory() {
  static const auto* const never_freed = new std::shared_ptr<void>(std::make_shared<char>());
  return *never_freed;
}

void CheckStatus(fastgen_status status) {
  if (status != FASTGEN_OK) throw StatusError(status, fastgen_last_error());
}

EngineCache& EngineCache::Instance() {
  static EngineCache* const cache = new EngineCache;
  return *cache;
}

std::shared_ptr<fastgen_model> EngineCache::Get(const fastgen_config& config,
                                                const std::vector<Weight>& weights,
                                                WeightCheck check, int64_t owner) {
  // Taken before anything is packed: a change made meanwhile shows in the next call.
  uint64_t checksum = check == WeightCheck::kContent ? Checksum(weights) : 0;
  const auto reuse = [&](Garbage* garbage) -> std::shared_ptr<fastgen_model> {
    Sweep(garbage);
    Entry* entry = Find(config, weights);
    if (entry == nullptr) return nullptr;
    const bool current = check == WeightCheck::kContent ? entry->checksum == checksum
                                                        : SameVersions(entry->weights, weights);
    if (!current) return nullptr;
    entry->used = ++calls_;
    entry->weights = weights;
    entry->owners.insert(owner);
    if (owner != 0) Disown(owner, entry, garbage);
    return entry->model;
  };
  {
    Garbage garbage;
    std::lock_guard<std::mutex> lock(mutex_);
    if (auto model = reuse(&garbage)) return model;
  }

  std::lock_guard<std::mutex> build_lock(build_mutex_);
  {
    // What is about to be replaced is freed first, so that memory holds one packed copy.
    Garbage garbage;
    std::unique_lock<std::mutex> lock(mutex_);
    if (auto model = reuse(&garbage)) return model;
    if (Entry* stale = Find(config, weights)) Erase(stale, &garbage);
    if (owner != 0) Disown(owner, nullptr, &garbage);
    lock.unlock();
    garbage.clear();
  }
  if (check == WeightCheck::kIdentity) checksum = Checksum(weights);
  auto entry = std::make_unique<Entry>();
  entry->config = config;
  entry->weights = weights;
  entry->checksum = checksum;
  entry->owners.insert(owner);
  entry->model = Build(config, weights);
  auto model = entry->model;
  Garbage garbage;
  std::lock_guard<std::mutex> lock(mutex_);
  entry->used = ++calls_;
  entries_.push_back(std::move(entry));
  ++built_;
  EraseOldestUnknown(&garbage);
  return model;
}

void EngineCache::Release(int64_t owner) {
  Garbage garbage;
  std::lock_guard<std::mutex> lock(mutex_);
  Disown(owner, nullptr, &garbage);
  Sweep(&garbage);
}

size_t EngineCache::Count() {
  Garbage garbage;
  std::lock_guard<std::mutex> lock(mutex_);
  Sweep(&garbage);
  return entries_.size();
}

uint64_t EngineCache::Built() {
  std::lock_guard<std::mutex> lock(mutex_);
  return built_;
}

void EngineCache::Sweep(Garbage* garbage) {
  for (size_t i = entries_.size(); i-- > 0;) {
    const Entry& entry = *entries_[i];
    const bool gone = std::any_of(entry.weights.begin(), entry.weights.end(),
                                  [](const Weight& weight) { return weight.memory.expired(); });
    if (gone || entry.owners.empty()) Erase(&entry, garbage);
  }
}

void EngineCache::Disown(int64_t owner, const Entry* except, Garbage* garbage) {
  for (size_t i = entries_.size(); i-- > 0;) {
    Entry& entry = *entries_[i];
    if (&entry == except) continue;
    entry.owners.erase(owner);
    if (entry.owners.empty()) Erase(&entry, garbage);
  }
}

EngineCache::Entry* EngineCache::Find(const fastgen_config& config,
                                      const std::vector<Weight>& weights) {
  for (const auto& entry : entries_) {
    if (SameConfig(entry->config, config) &&
        std::equal(entry->weights.begin(), entry->weights.end(), weights.begin(), weights.end(),
                   SameMemory)) {
      return entry.get();
    }
  }
  return nullptr;
}

void EngineCache::EraseOldestUnknown(Garbage* garbage) {
  const Entry* oldest = nullptr;
  size_t count = 0;
  for (const auto& entry : entries_) {
    if (!std::any_of(entry->weights.begin(), entry->weights.end(), IsUnknown)) continue;
    ++count;
    if (oldest == nullptr || entry->used < oldest->used) oldest = entry.get();
  }
  if (count > kMaxUnknown) Erase(oldest, garbage);
}

void EngineCache::Erase(const Entry* entry, Garbage* garbage) {
  const auto at = std::find_if(entries_.begin(), entries_.end(),
                               [&](const auto& candidate) { return candidate.get() == entry; });
  garbage->push_back(std::move((*at)->model));
  entries_.erase(at);
}

}  // namespace fastgen::paddle
