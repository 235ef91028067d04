// What is left when memory for the library's own bookkeeping cannot be had, wherever that happens.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "fastgen/fastgen.hpp"
#include "tiny_model.h"

namespace {

// Allocations until one fails; below 0: none does.
std::atomic<int64_t> left{-1};

void* Allocate(std::size_t size) {
  if (left.load() >= 0 && left.fetch_sub(1) == 0) throw std::bad_alloc();
  void* const memory = std::malloc(size > 0 ? size : 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

// All of the program's, the library's among them, which is linked statically.
void* operator new(std::size_t size) { return Allocate(size); }
void* operator new[](std::size_t size) { return Allocate(size); }
// Who asks this way can go on without; of one family with the others, as sanitizers want it.
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return std::malloc(size); }
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return std::malloc(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { std::free(memory); }

namespace fastgen {
namespace {

constexpr int32_t kVocab = 60;
constexpr int64_t kMostAllocations = 5000;

Model MakeModel() {
  const tests::TinyModel tiny = tests::MakeTinyModel(5, kVocab);
  Config config;
  static_cast<fastgen_config&>(config) = tiny.config;
  ModelOptions options;
  options.num_threads = 2;
  return Model::create(config, tests::TensorsOf(tiny), options);
}

std::vector<int32_t> Prompt(int32_t length) {
  std::vector<int32_t> prompt;
  for (int32_t i = 0; i < length; ++i) prompt.push_back(7 * i % kVocab);
  return prompt;
}

// Calls body with the first, the second, ... allocation failing, until none does.
template <typename Body>
void FailEverywhere(const Body& body) {
  for (int64_t at = 0;; ++at) {
    ASSERT_LT(at, kMostAllocations);
    bool failed = false;
    body(at, &failed);
    if (!failed || ::testing::Test::HasFatalFailure()) return;
  }
}

TEST(Allocations, LogitsFailOrDoNot) {
  const std::vector<int32_t> prompt = Prompt(20);
  std::vector<float> logits(prompt.size() * kVocab);
  FailEverywhere([&](int64_t at, bool* failed) {
    const Model model = MakeModel();  // whose lists are empty
    left = at;
    const fastgen_status status =
        fastgen_model_logits(model.handle(), prompt.data(), prompt.size(), logits.data());
    *failed = left.exchange(-1) < 0;
    ASSERT_TRUE(status == FASTGEN_OK || status == FASTGEN_OUT_OF_MEMORY) << fastgen_last_error();
    ASSERT_EQ(fastgen_model_logits(model.handle(), prompt.data(), prompt.size(), logits.data()),
              FASTGEN_OK);
  });
}

TEST(Allocations, SessionsGoOn) {
  const std::vector<int32_t> prompt = Prompt(20), other = Prompt(18);
  FailEverywhere([&](int64_t at, bool* failed) {
    const Model model = MakeModel();
    Session session(model);
    fastgen_options options;
    fastgen_options_init(&options);
    options.max_length = 6;
    options.keep_logits = 1;
    uint64_t first = 0, second = 0;
    size_t unfinished = 1;
    left = at;
    fastgen_session_submit(session.handle(), prompt.data(), prompt.size(), &options, &first);
    fastgen_session_submit(session.handle(), other.data(), other.size(), &options, &second);
    for (int i = 0; i < 50 && unfinished > 0; ++i) {
      fastgen_session_step(session.handle(), 1, &unfinished);
    }
    *failed = left.exchange(-1) < 0;
    ASSERT_EQ(unfinished, 0u) << at;
    // Others run as if nothing had been.
    const uint64_t third = session.submit(prompt, Options());
    while (session.step(8) > 0) {
    }
    ASSERT_EQ(session.get(third).finish_reason, FASTGEN_FINISH_LENGTH) << at;
  });
}

}  // namespace
}  // namespace fastgen
