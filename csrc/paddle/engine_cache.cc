#include "engine_cache.h"

#include <algorithm>
#include <utility>

namespace fastgen::paddle {
namespace {

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

std::vector<fastgen_tensor> TensorsOf(const std::vector<Weight>& weights) {
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
  return tensors;
}

uint64_t Checksum(const std::vector<Weight>& weights, const Placement& placement) {
  const std::vector<fastgen_tensor> tensors = TensorsOf(weights);
  uint64_t sum = 0;
  CheckStatus(fastgen_checksum(tensors.data(), tensors.size(), placement.device.c_str(),
                               placement.stream, &sum));
  return sum;
}

std::shared_ptr<fastgen_model> Build(const fastgen_config& config,
                                     const std::vector<Weight>& weights,
                                     const Placement& placement) {
  const std::vector<fastgen_tensor> tensors = TensorsOf(weights);
  fastgen_model_options options;
  fastgen_model_options_init(&options);
  options.device = placement.device.c_str();
  options.weight_dtype = placement.weight_dtype.c_str();
  if (!placement.cache_dtype.empty()) options.cache_dtype = placement.cache_dtype.c_str();
  options.tensor_device = placement.device.c_str();
  options.stream = placement.stream;
  fastgen_model* model = nullptr;
  CheckStatus(fastgen_model_create(&config, tensors.data(), tensors.size(), &options, &model));
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
                                                const Placement& placement, WeightCheck check,
                                                int64_t owner) {
  // Taken before anything is packed: a change made meanwhile shows in the next call.
  uint64_t checksum = check == WeightCheck::kContent ? Checksum(weights, placement) : 0;
  const auto reuse = [&](Garbage* garbage) -> std::shared_ptr<fastgen_model> {
    Sweep(garbage);
    Entry* entry = Find(config, weights, placement);
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
    if (Entry* stale = Find(config, weights, placement)) Erase(stale, &garbage);
    if (owner != 0) Disown(owner, nullptr, &garbage);
    lock.unlock();
    garbage.clear();
  }
  if (check == WeightCheck::kIdentity) checksum = Checksum(weights, placement);
  auto entry = std::make_unique<Entry>();
  entry->config = config;
  entry->weights = weights;
  entry->device = placement.device;
  entry->weight_dtype = placement.weight_dtype;
  entry->cache_dtype = placement.cache_dtype;
  entry->checksum = checksum;
  entry->owners.insert(owner);
  entry->model = Build(config, weights, placement);
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
                                      const std::vector<Weight>& weights,
                                      const Placement& placement) {
  for (const auto& entry : entries_) {
    if (SameConfig(entry->config, config) && entry->device == placement.device &&
        entry->weight_dtype == placement.weight_dtype &&
        entry->cache_dtype == placement.cache_dtype &&
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
