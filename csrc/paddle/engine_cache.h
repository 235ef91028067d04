// Engines of the fusion_gpt op: one for each set of weights, built once and reused.
//
// Knows nothing of Paddle: a weight is a pointer, and a weak reference to whatever owns the memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "fastgen/fastgen.h"

namespace fastgen::paddle {

// A failed call of the C API, or an input that the op itself refuses.
class StatusError : public std::runtime_error {
 public:
  StatusError(fastgen_status status, const std::string& message)
      : std::runtime_error(message), status_(status) {}
  fastgen_status status() const { return status_; }

 private:
  fastgen_status status_;
};

// Throws StatusError with fastgen_last_error() unless `status` is FASTGEN_OK.
void CheckStatus(fastgen_status status);

// A dense tensor of the framework.
struct Weight {
  std::string name;
  const void* data = nullptr;
  fastgen_dtype dtype = FASTGEN_FLOAT32;
  std::vector<int64_t> shape;
  std::weak_ptr<void> memory;  // expires when the framework gives the memory back
  uint32_t version = 0;        // the framework's count of in-place changes
};

// Where the weights of a call lie and how they are to be packed.
struct Placement {
  std::string device = "cpu";  // "cuda:<index>": memory of that GPU, on which the engine runs too
  void* stream = nullptr;      // what the framework does with that memory is put on it
  std::string weight_dtype;
  std::string cache_dtype;  // empty: the device's own
};

// The memory of a weight whose end cannot be observed.
std::weak_ptr<void> UnknownMemory();

// How a call finds out that weights were changed in place.
enum class WeightCheck {
  kContent,  // by a checksum over all bytes, made where they lie: optimizers and Tensor.set_value()
             // count nothing
  kIdentity,  // by memory and version only: for weights that nobody writes to
};

// Thread-safe. Locks are never held while the interpreter's lock is being acquired.
class EngineCache {
 public:
  static constexpr size_t kMaxUnknown = 4;

  // The process's cache. Never destroyed: calls may come until the very end of a process.
  static EngineCache& Instance();

  // The engine for these weights, built if there is none or if the weights have changed. `owner`
  // names the caller's object, whose engine lives until Release(); 0 is nobody, then the engine
  // lives as long as its weights. An owner has one engine at a time. Of engines whose weights'
  // memory is unknown, the kMaxUnknown used last are kept.
  std::shared_ptr<fastgen_model> Get(const fastgen_config& config,
                                     const std::vector<Weight>& weights, const Placement& placement,
                                     WeightCheck check, int64_t owner);

  // `owner` needs its engine no longer.
  void Release(int64_t owner);

  // Engines held now; those whose weights are gone are dropped first.
  size_t Count();
  // Engines built since the library was loaded.
  uint64_t Built();

 private:
  struct Entry {
    fastgen_config config;
    std::vector<Weight> weights;
    std::string device, weight_dtype, cache_dtype;
    uint64_t checksum = 0;
    std::set<int64_t> owners;
    std::shared_ptr<fastgen_model> model;
    uint64_t used = 0;  // the call that used it last
  };

  // All of these need mutex_ and move what is to be freed to `garbage`, to be freed without it.
  using Garbage = std::vector<std::shared_ptr<fastgen_model>>;
  void Sweep(Garbage* garbage);
  void Disown(int64_t owner, const Entry* except, Garbage* garbage);
  Entry* Find(const fastgen_config& config, const std::vector<Weight>& weights,
              const Placement& placement);
  void Erase(const Entry* entry, Garbage* garbage);
  void EraseOldestUnknown(Garbage* garbage);

  std::mutex mutex_;        // guards what follows; held for moments only
  std::mutex build_mutex_;  // one engine is built at a time; taken before mutex_
  std::vector<std::unique_ptr<Entry>> entries_;
  uint64_t built_ = 0;
  uint64_t calls_ = 0;
};

}  // namespace fastgen::paddle
