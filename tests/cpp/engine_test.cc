// engine/: sessions on a device that fails when told to, the KV cache, the sampler, the draws.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/half.h"
#include "cpu/dispatch.h"
#include "engine/kv_cache.h"
#include "engine/model.h"
#include "engine/rng.h"
#include "engine/sampler.h"
#include "engine/session.h"
#include "memory_limit.h"

namespace fastgen::engine {
namespace {

constexpr uint64_t kSeed = 20240607;

// ---- Session -------------------------------------------------------------------------------

constexpr int32_t kVocab = 17;

// What a sequence of the device below says at its step-th token: a function of the prompt, the seed
// and the sequence, as with a real one.
int32_t TokenOf(const std::vector<int32_t>& prompt, const SamplingParams& sampling, int32_t step) {
  uint64_t sum = sampling.seed + 7 * sampling.sequence + 31 * static_cast<uint64_t>(step);
  for (const int32_t token : prompt) sum = sum * 5 + static_cast<uint64_t>(token);
  return static_cast<int32_t>(sum * 0x9e3779b97f4a7c15u >> 40) % kVocab;
}

// Keeps account of what it is asked for, and throws where the session breaks the contract of
// device.h. Fails on purpose with probability 1 / `failure_odds`.
class StrictDevice : public Device {
 public:
  explicit StrictDevice(uint64_t seed) : random_(seed) {
    info_.prefill_tokens = static_cast<int32_t>(1 + random_() % 20);
    info_.tail_tokens = static_cast<int32_t>(1 + random_() % 6);
  }

  size_t num_open() const { return slots_.size(); }
  void set_failure_odds(uint64_t odds) { failure_odds_ = odds; }
  void set_capacity(size_t rows) { capacity_ = rows; }
  int failures() const { return failures_; }

  const DeviceInfo& info() const override { return info_; }

  int32_t Open(const SequenceSpec& spec) override {
    MaybeFail(FASTGEN_OUT_OF_MEMORY);
    if (slots_.size() >= capacity_) throw base::Error(FASTGEN_OUT_OF_MEMORY, "no more rows");
    Slot slot;
    slot.prompt.assign(spec.prompt, spec.prompt + spec.prompt_length);
    slot.sampling = spec.sampling;
    slots_.emplace(next_, std::move(slot));
    return next_++;
  }

  void Close(int32_t slot) override {
    if (slots_.erase(slot) != 1) Broken("a slot is closed that is not open");
  }

  void Prefill(const PrefillChunk* chunks, size_t count) override {
    if (count == 0) Broken("nothing is prefilled");
    MaybeFail(FASTGEN_INTERNAL);
    int32_t left = info_.prefill_tokens;
    for (size_t i = 0; i < count; ++i) {
      Slot& slot = At(chunks[i].slot);
      left -= chunks[i].count;
      if (left < 0) Broken("more is prefilled than suits the device");
      if (chunks[i].begin != slot.prefilled || chunks[i].count < 1) Broken("chunks have gaps");
      slot.prefilled += chunks[i].count;
      if (slot.prefilled >= static_cast<int32_t>(slot.prompt.size())) Broken("all is prefilled");
    }
  }

  void CopyPrefix(int32_t from, int32_t to, int32_t count) override {
    MaybeFail(FASTGEN_INTERNAL);
    const Slot& source = At(from);
    Slot& target = At(to);
    if (source.prompt != target.prompt || source.prefilled < count || target.prefilled > count) {
      Broken("a prefix is copied that is not there");
    }
    target.prefilled = count;
  }

  int32_t Decode(const int32_t* slots, size_t count, int32_t max_steps, DecodeResult* results,
                 float* logits) override {
    if (count == 0 || max_steps < 1) Broken("nothing is decoded");
    MaybeFail(FASTGEN_INTERNAL);
    const auto steps = static_cast<int32_t>(1 + random_() % static_cast<uint64_t>(max_steps));
    for (int32_t step = 0; step < steps; ++step) {
      for (size_t i = 0; i < count; ++i, ++results) {
        Slot& slot = At(slots[i]);
        *results = DecodeResult();
        const int32_t unfed = static_cast<int32_t>(slot.prompt.size()) - slot.prefilled;
        if (unfed < 1 || unfed > info_.tail_tokens) {
          Broken("a sequence decodes before its prompt is there");
        }
        slot.prefilled += unfed - 1;
        if (step == 0 && slot.finished) Broken("a finished sequence decodes");
        if (slot.finished) continue;
        results->token = TokenOf(slot.prompt, slot.sampling, slot.generated++);
        results->finished = results->token == slot.sampling.eos_token_id ||
                            slot.generated == slot.sampling.max_length;
        slot.finished = results->finished;
        if (logits) {
          std::fill_n(logits + (static_cast<size_t>(step) * count + i) * kVocab, kVocab,
                      static_cast<float>(results->token));
        }
      }
    }
    return steps;
  }

  double MeasureReadBandwidth(uint64_t, int32_t) override { return 1.0; }

 private:
  struct Slot {
    std::vector<int32_t> prompt;
    SamplingParams sampling;
    int32_t prefilled = 0;
    int32_t generated = 0;
    bool finished = false;
  };

  [[noreturn]] static void Broken(const char* what) { throw std::logic_error(what); }

  void MaybeFail(fastgen_status status) {
    if (failure_odds_ == 0 || random_() % failure_odds_ != 0) return;
    ++failures_;
    throw base::Error(status, "failed on purpose");
  }

  Slot& At(int32_t slot) {
    const auto found = slots_.find(slot);
    if (found == slots_.end()) Broken("a slot is used that is not open");
    return found->second;
  }

  std::mt19937_64 random_;
  std::map<int32_t, Slot> slots_;
  int32_t next_ = 0;
  uint64_t failure_odds_ = 0;
  size_t capacity_ = 1000;
  int failures_ = 0;
  DeviceInfo info_;
};

struct Bench {
  explicit Bench(uint64_t seed) {
    ModelConfig config;
    config.vocab_size = kVocab;
    config.max_positions = 2000;
    config.hidden_size = config.num_heads = config.num_layers = config.intermediate_size = 1;
    auto owned = std::make_unique<StrictDevice>(seed);
    device = owned.get();
    model = std::make_shared<const Model>(config, std::move(owned));
  }
  StrictDevice* device;
  std::shared_ptr<const Model> model;
};

struct Wanted {
  std::vector<int32_t> prompt;
  SamplingParams sampling;
  bool keep_logits;
};

void CheckTokens(const Wanted& wanted, const Sequence& sequence) {
  ASSERT_LE(sequence.tokens.size(), static_cast<size_t>(wanted.sampling.max_length));
  for (size_t i = 0; i < sequence.tokens.size(); ++i) {
    ASSERT_EQ(sequence.tokens[i], TokenOf(wanted.prompt, wanted.sampling, static_cast<int32_t>(i)));
    if (i + 1 < sequence.tokens.size()) {
      ASSERT_NE(sequence.tokens[i], wanted.sampling.eos_token_id) << "it went on after eos";
    }
  }
  ASSERT_EQ(sequence.logits.size(), wanted.keep_logits ? sequence.tokens.size() * kVocab : 0);
  const bool is_eos =
      !sequence.tokens.empty() && sequence.tokens.back() == wanted.sampling.eos_token_id;
  if (sequence.finish_reason == FASTGEN_FINISH_EOS) {
    ASSERT_TRUE(is_eos);
  }
  if (sequence.finish_reason == FASTGEN_FINISH_LENGTH) {
    ASSERT_EQ(sequence.tokens.size(), static_cast<size_t>(wanted.sampling.max_length));
  }
}

// Requests that come, run, are cancelled and forgotten in any order.
void RunRandomSession(uint64_t seed, uint64_t failure_odds) {
  std::mt19937_64 random(seed);
  Bench bench(seed);
  bench.device->set_failure_odds(failure_odds);
  bench.device->set_capacity(2 + random() % 6);
  std::map<uint64_t, Wanted> wanted;
  std::vector<int32_t> prompt = {1};
  {
    Session session(bench.model, static_cast<int32_t>(1 + random() % 8));
    const auto any = [&] {
      auto at = wanted.begin();
      std::advance(at, static_cast<std::ptrdiff_t>(random() % wanted.size()));
      return at;
    };
    for (int action = 0; action < 200; ++action) {
      const uint64_t dice = random() % 10;
      if (dice < 3) {
        if (random() % 2 == 0) {  // else the prompt of the request before
          prompt.assign(1 + (random() % 3 == 0 ? random() % 1200 : random() % 6), 0);
          for (int32_t& token : prompt) token = static_cast<int32_t>(random() % kVocab);
        }
        RequestOptions options;
        options.sampling.sample = true;
        options.sampling.max_length = static_cast<int32_t>(1 + random() % 80);
        options.sampling.eos_token_id = static_cast<int32_t>(random() % (2 * kVocab)) - kVocab;
        options.sampling.eos_token_id = std::max(-1, options.sampling.eos_token_id);
        options.sampling.seed = random() % 100;
        options.has_seed = true;
        options.num_return_sequences = static_cast<int32_t>(1 + random() % 3);
        options.keep_logits = random() % 4 == 0;
        const uint64_t id = session.Submit(prompt.data(), prompt.size(), options);
        for (int32_t i = 0; i < options.num_return_sequences; ++i) {
          Wanted one{prompt, options.sampling, options.keep_logits};
          one.sampling.sequence = static_cast<uint32_t>(i);
          wanted.emplace(id + static_cast<uint64_t>(i), one);
        }
      } else if (dice < 8) {
        try {
          session.Step(static_cast<int32_t>(random() % 20));
        } catch (const base::Error& error) {
          ASSERT_NE(failure_odds, 0u) << error.what();
        }
      } else if (dice == 8 && !wanted.empty()) {
        session.Cancel(any()->first);
      } else if (dice == 9 && !wanted.empty()) {
        const auto gone = any();
        session.Release(gone->first);
        wanted.erase(gone);
      }
      if (!wanted.empty()) {
        const auto& [id, request] = *any();
        ASSERT_NO_FATAL_FAILURE(CheckTokens(request, session.Get(id)));
      }
    }
    bench.device->set_failure_odds(0);
    size_t unfinished = 1;
    for (int step = 0; unfinished > 0; ++step) {
      ASSERT_LT(step, 10000) << "the session does not end";
      unfinished = session.Step(7);
    }
    for (const auto& [id, request] : wanted) {
      ASSERT_NO_FATAL_FAILURE(CheckTokens(request, session.Get(id)));
      ASSERT_NE(session.Get(id).finish_reason, FASTGEN_RUNNING);
      if (failure_odds == 0) {
        ASSERT_NE(session.Get(id).finish_reason, FASTGEN_FINISH_FAILED);
      }
    }
    ASSERT_EQ(bench.device->num_open(), 0u);
    // Something that runs when the session ends.
    session.Submit(prompt.data(), prompt.size(), RequestOptions());
    session.Step(1);
  }
  ASSERT_EQ(bench.device->num_open(), 0u);
}

TEST(Session, KeepsItsContractWithTheDevice) {
  for (uint64_t seed = 0; seed < 100; ++seed) {
    SCOPED_TRACE(seed);
    ASSERT_NO_FATAL_FAILURE(RunRandomSession(kSeed + seed, 0));
  }
}

TEST(Session, SurvivesADeviceThatFails) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE(seed);
    ASSERT_NO_FATAL_FAILURE(RunRandomSession(kSeed + seed, 2 + seed % 9));
  }
}

TEST(Session, AFailureEndsTheSequencesItConcerns) {
  Bench bench(kSeed);
  Session session(bench.model, 4);
  const int32_t prompt[] = {1, 2};
  RequestOptions options;
  const uint64_t first = session.Submit(prompt, 2, options);
  session.Step(2);
  const size_t had = session.Get(first).tokens.size();
  bench.device->set_failure_odds(1);
  EXPECT_THROW(session.Step(1), base::Error);
  EXPECT_EQ(session.Get(first).finish_reason, FASTGEN_FINISH_FAILED);
  EXPECT_EQ(session.Get(first).tokens.size(), had);
  EXPECT_EQ(bench.device->num_open(), 0u);
  bench.device->set_failure_odds(0);
  const uint64_t second = session.Submit(prompt, 2, options);
  EXPECT_EQ(session.Step(100), 0u);
  EXPECT_EQ(session.Get(second).finish_reason, FASTGEN_FINISH_LENGTH);
}

TEST(Session, WaitsForMemoryWhileOthersRun) {
  Bench bench(kSeed);
  bench.device->set_capacity(1);
  Session session(bench.model, 8);
  const int32_t prompt[] = {3};
  for (int i = 0; i < 5; ++i) session.Submit(prompt, 1, RequestOptions());
  size_t unfinished = 5;
  for (int step = 0; step < 1000 && unfinished > 0; ++step) unfinished = session.Step(5);
  EXPECT_EQ(unfinished, 0u);
  // Nobody runs whom it could wait for.
  bench.device->set_capacity(0);
  const uint64_t id = session.Submit(prompt, 1, RequestOptions());
  EXPECT_THROW(session.Step(1), base::Error);
  EXPECT_EQ(session.Get(id).finish_reason, FASTGEN_FINISH_FAILED);
}

// ---- KV cache ------------------------------------------------------------------------------

ModelConfig CacheConfig(int32_t hidden, int32_t layers, int32_t heads) {
  ModelConfig config;
  config.hidden_size = hidden;
  config.num_layers = layers;
  config.num_heads = heads;
  return config;
}

constexpr cpu::CacheType kCacheTypes[] = {cpu::CacheType::kFloat32, cpu::CacheType::kFloat16,
                                          cpu::CacheType::kBFloat16, cpu::CacheType::kInt8};

// Every kernel set writes what it should where it should and nothing else, and a block has room for it.
TEST(BlockPool, PlacesOfABlockDoNotOverlap) {
  for (const cpu::Kernels* kernels : cpu::AllKernels()) {
    if (!kernels->supported()) continue;
    for (const cpu::CacheType type : kCacheTypes) {
      for (const int32_t head_size : {1, 3, 8, 17, 64}) {
        constexpr int32_t kLayers = 3;
        constexpr int32_t kHeads = 2;
        const BlockPool pool(CacheConfig(kHeads * head_size, kLayers, kHeads), type);
        const cpu::HeadLayout& head = pool.head();
        ASSERT_GE(head.value_stride, head_size);
        const int64_t element = type == cpu::CacheType::kFloat32 ? 4 : 2;
        const int64_t bytes = type == cpu::CacheType::kInt8 ? 1 : element;
        const int64_t scales = type == cpu::CacheType::kInt8 ? 2 * cpu::kBlock * 4 : 0;
        const int64_t elements = cpu::kBlock * (head_size + head.value_stride);
        ASSERT_EQ(pool.block_bytes(), kLayers * kHeads * (elements * bytes + scales));
        std::vector<char> block(static_cast<size_t>(pool.block_bytes()), 0);
        std::vector<float> row(static_cast<size_t>(head_size), 1.0f);
        for (int32_t layer = 0; layer < kLayers; ++layer) {
          for (int32_t h = 0; h < kHeads; ++h) {
            const std::vector<char> before = block;
            char* const area = block.data() + pool.HeadAt(layer, h);
            for (int64_t at = 0; at < cpu::kBlock; ++at) {
              kernels->write_cache(head, row.data(), row.data(), area, at);
            }
            for (size_t i = 0; i < block.size(); ++i) {
              if (block[i] != before[i]) {
                ASSERT_EQ(before[i], 0) << i;
              }
            }
            for (int64_t at = 0; at < cpu::kBlock; ++at) {  // what is behind a row stays zero
              const char* const values = area + head.values_at + at * head.value_stride * bytes;
              for (int64_t i = head_size * bytes; i < head.value_stride * bytes; ++i) {
                ASSERT_EQ(values[i], 0);
              }
            }
          }
        }
      }
    }
  }
}

// What a row of values looks like in the cache: as base/half.h rounds, by every kernel set.
TEST(BlockPool, RoundsAsItSays) {
  std::mt19937_64 random(kSeed);
  std::vector<float> row = {0.0f,   -0.0f,   1e-9f,      -3e-7f,      65504.0f, 65519.9f, 65520.0f,
                            -1e30f, 3.4e38f, 1.0009766f, 1.00048828f, 5.96e-8f, 6.1e-5f};
  while (row.size() < 77) {
    const auto bits = static_cast<uint32_t>(random());
    const float value = base::BitsToFloat(bits);
    if (std::isfinite(value)) row.push_back(value);
  }
  const auto n = static_cast<int64_t>(row.size());
  for (const cpu::Kernels* kernels : cpu::AllKernels()) {
    if (!kernels->supported()) continue;
    for (const bool brain : {false, true}) {
      const cpu::HeadLayout head =
          cpu::MakeHeadLayout(brain ? cpu::CacheType::kBFloat16 : cpu::CacheType::kFloat16, n);
      std::vector<char> area(static_cast<size_t>(head.bytes), 0);
      kernels->write_cache(head, row.data(), row.data(), area.data(), 5);
      const auto* keys = reinterpret_cast<const uint16_t*>(area.data());
      const auto* values = reinterpret_cast<const uint16_t*>(area.data() + head.values_at);
      for (int64_t i = 0; i < n; ++i) {
        const uint16_t expected = brain ? base::FloatToBrain(row[i]) : base::FloatToHalf(row[i]);
        const float as_float = brain ? base::BrainToFloat(expected) : base::HalfToFloat(expected);
        for (const uint16_t got : {keys[i * cpu::kBlock + 5], values[5 * head.value_stride + i]}) {
          const float actual = brain ? base::BrainToFloat(got) : base::HalfToFloat(got);
          EXPECT_EQ(actual, as_float) << kernels->name << " " << row[i];
        }
      }
    }
    for (const float largest : {1.0f, 3e-39f, 1e-36f, 3e38f, 0.0f}) {
      const cpu::HeadLayout head = cpu::MakeHeadLayout(cpu::CacheType::kInt8, n);
      std::vector<float> values(row.size());
      for (float& value : values) {
        value = largest * (static_cast<float>(random() % 2001) / 1000.0f - 1.0f);
      }
      values[70] = -largest;
      std::vector<char> area(static_cast<size_t>(head.bytes), 0);
      kernels->write_cache(head, values.data(), values.data(), area.data(), 31);
      const auto* keys = reinterpret_cast<const int8_t*>(area.data());
      const auto* scales = reinterpret_cast<const float*>(area.data() + head.scales_at);
      const float step = std::max(largest / 127.0f, 0x1p-120f);
      EXPECT_EQ(scales[31], step) << kernels->name;
      EXPECT_EQ(scales[cpu::kBlock + 31], step);
      for (int64_t i = 0; i < n; ++i) {
        const float got = scales[31] * keys[i * cpu::kBlock + 31];
        EXPECT_LE(std::fabs(got - values[i]), 0.501f * step) << kernels->name << " " << values[i];
      }
    }
    for (const float bad : {HUGE_VALF, -HUGE_VALF, std::nanf("")}) {
      for (const cpu::CacheType type : kCacheTypes) {
        if (type == cpu::CacheType::kFloat32) continue;
        const cpu::HeadLayout head = cpu::MakeHeadLayout(type, 3);
        const float values[] = {1.0f, bad, 2.0f};
        std::vector<char> area(static_cast<size_t>(head.bytes), 0);
        kernels->write_cache(head, values, values, area.data(), 0);
        float got;
        if (type == cpu::CacheType::kInt8) {
          std::memcpy(&got, area.data() + head.scales_at, sizeof got);
        } else {
          uint16_t bits;
          std::memcpy(&bits, area.data() + cpu::kBlock * 2, sizeof bits);
          got =
              type == cpu::CacheType::kFloat16 ? base::HalfToFloat(bits) : base::BrainToFloat(bits);
        }
        EXPECT_TRUE(std::isnan(got)) << kernels->name << cpu::CacheTypeName(type);
      }
    }
  }
}

TEST(BlockPool, GivesBlocksThatNobodyElseHas) {
  BlockPool pool(CacheConfig(16, 2, 2), cpu::CacheType::kFloat32);
  std::mt19937_64 random(kSeed);
  std::vector<std::pair<std::vector<cpu::Pages>, float>> holders;
  for (int i = 0; i < 400; ++i) {
    if (holders.empty() || random() % 2 == 0) {
      std::vector<cpu::Pages> blocks;
      pool.Take(static_cast<int64_t>(random() % 6), &blocks);
      for (const cpu::Pages& block : blocks) {
        ASSERT_GE(static_cast<int64_t>(block.size()), pool.block_bytes());
        std::fill_n(block.floats(), pool.block_bytes() / sizeof(float), static_cast<float>(i));
      }
      holders.emplace_back(std::move(blocks), static_cast<float>(i));
    } else {
      auto& holder = holders[random() % holders.size()];
      for (const cpu::Pages& block : holder.first) {
        const auto count = pool.block_bytes() / static_cast<int64_t>(sizeof(float));
        for (int64_t at = 0; at < count; ++at) ASSERT_EQ(block.floats()[at], holder.second);
      }
      pool.GiveBack(&holder.first);
      ASSERT_TRUE(holder.first.empty());
      std::swap(holder, holders.back());
      holders.pop_back();
    }
  }
}

TEST(BlockPool, TakesNothingWhenMemoryIsShort) {
  BlockPool pool(CacheConfig(1024, 8, 8), cpu::CacheType::kFloat32);  // 2 MiB a block
  std::vector<cpu::Pages> blocks;
  std::string message;
  {
    const tests::MemoryLimit limit(uint64_t{64} << 20);
    try {
      pool.Take(1000, &blocks);
    } catch (const base::Error& error) {
      EXPECT_EQ(error.status(), FASTGEN_OUT_OF_MEMORY);
      message = error.what();
    }
    EXPECT_TRUE(blocks.empty());
    // What was had meanwhile is there for smaller wishes.
    pool.Take(8, &blocks);
    EXPECT_EQ(blocks.size(), 8u);
  }
  EXPECT_NE(message.find(std::to_string(1000 * pool.block_bytes()) + " bytes"), std::string::npos)
      << message;
}

// ---- Draws ---------------------------------------------------------------------------------

TEST(Philox, GivesThePublishedVectors) {
  struct Vector {
    uint32_t counter[4];
    uint32_t key[2];
    uint32_t out[4];
  };
  // From the known-answer tests of Random123.
  const Vector vectors[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Vector& vector : vectors) {
    uint32_t out[4];
    Philox4x32_10(vector.counter, vector.key, out);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(out[i], vector.out[i]);
  }
  EXPECT_EQ(UniformDraw(0, 0, 0), 0x6627e8d5 * 0x1p-32);
}

// ---- Sampler -------------------------------------------------------------------------------

// The definition: sorted by probability, ascending id among equals.
std::vector<float> FilterSlowly(const SamplingParams& params, std::vector<float> probs) {
  const size_t vocab = probs.size();
  if (params.top_k > 0 && static_cast<size_t>(params.top_k) < vocab) {
    std::vector<float> sorted = probs;
    std::sort(sorted.begin(), sorted.end(), std::greater<float>());
    const float bound = sorted[static_cast<size_t>(params.top_k) - 1];
    for (float& prob : probs) prob = prob >= bound ? prob : 0.0f;
  }
  if (params.top_p > 0.0f && params.top_p < 1.0f) {
    std::vector<size_t> order(vocab);
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return probs[a] > probs[b]; });
    double before = 0.0;
    for (const size_t token : order) {
      const auto prob = static_cast<double>(probs[token]);
      if (before > static_cast<double>(params.top_p)) probs[token] = 0.0f;
      before += prob;
    }
  }
  return probs;
}

// Multiples of 2^-12, whose sums are exact in any order, with many equal ones.
std::vector<float> RandomProbs(int32_t vocab, std::mt19937_64* random) {
  std::vector<float> probs(static_cast<size_t>(vocab), 0.0f);
  const uint64_t tokens = 1 + (*random)() % probs.size();
  for (int i = 0; i < 4096; ++i) probs[(*random)() % tokens] += 0x1p-12f;
  std::shuffle(probs.begin(), probs.end(), *random);
  return probs;
}

TEST(Sampler, FiltersAsDefined) {
  std::mt19937_64 random(kSeed);
  Sampler sampler(cpu::ChooseKernels(""));  // one for all: it must remember nothing
  for (int i = 0; i < 2000; ++i) {
    const auto vocab = static_cast<int32_t>(1 + random() % (i % 5 == 0 ? 3000 : 60));
    const std::vector<float> probs = RandomProbs(vocab, &random);
    SamplingParams params;
    if (random() % 3 != 0) params.top_k = static_cast<int32_t>(random() % (vocab + 2));
    if (random() % 3 != 0) params.top_p = static_cast<float>(random() % 65) / 64.0f;
    std::vector<float> filtered = probs;
    sampler.Filter(params, filtered.data(), vocab);
    ASSERT_EQ(filtered, FilterSlowly(params, probs))
        << "vocab=" << vocab << " top_k=" << params.top_k << " top_p=" << params.top_p;
  }
}

TEST(Sampler, OneServesAllSequences) {
  std::mt19937_64 random(kSeed);
  const cpu::Kernels& kernels = cpu::ChooseKernels("");
  Sampler shared(kernels);
  for (int i = 0; i < 1000; ++i) {
    const auto vocab = static_cast<int32_t>(1 + random() % 500);
    std::vector<float> logits(static_cast<size_t>(vocab));
    for (float& logit : logits) logit = static_cast<float>(random() % 4096) / 256.0f - 8.0f;
    // What no model should give, and damaged weights do.
    if (i % 7 == 0) logits[random() % logits.size()] = std::numeric_limits<float>::quiet_NaN();
    if (i % 11 == 0) logits[random() % logits.size()] = INFINITY;
    if (i % 13 == 0) std::fill(logits.begin(), logits.end(), -INFINITY);
    SamplingParams params;
    params.sample = random() % 5 != 0;
    params.top_k = static_cast<int32_t>(random() % 600);
    params.top_p = static_cast<float>(random() % 101) / 100.0f;
    params.temperature = static_cast<float>(1 + random() % 30) / 10.0f;
    params.seed = random();
    params.sequence = static_cast<uint32_t>(random());
    const auto step = static_cast<uint32_t>(random() % 1000);
    const Choice choice = shared.Choose(params, step, logits.data(), vocab);
    ASSERT_GE(choice.token, 0);
    ASSERT_LT(choice.token, vocab);
    Sampler fresh(kernels);
    ASSERT_EQ(fresh.Choose(params, step, logits.data(), vocab).token, choice.token);
  }
}

// The definition, over one window of ids or several (they are 2^16 wide).
TEST(LogitsProcessing, PenalizesAndBansAsDefined) {
  std::mt19937_64 random(kSeed);
  for (int i = 0; i < 2000; ++i) {
    const int32_t vocabs[] = {1, 2, 7, (1 << 16) - 1, 1 << 16, (1 << 16) + 1};
    const int32_t vocab = vocabs[i % 20 < 18 ? i % 3 : 3 + i / 20 % 3];
    const int32_t ids[] = {0, vocab - 1, vocab / 2};
    std::vector<int32_t> tokens(1 + random() % 12);
    for (int32_t& token : tokens) token = ids[random() % 3];
    const auto length = static_cast<int32_t>(tokens.size());
    SamplingParams params;
    params.repetition_penalty = 2.0f;
    params.no_repeat_ngram_size = static_cast<int32_t>(random() % 5);
    std::vector<float> expected(static_cast<size_t>(vocab), 2.0f);
    for (const int32_t token : tokens) expected[static_cast<size_t>(token)] = 1.0f;
    const int32_t prefix = params.no_repeat_ngram_size - 1;
    for (int32_t at = 0; prefix >= 0 && at + prefix < length; ++at) {
      bool same = true;
      for (int32_t k = 0; k < prefix; ++k) same &= tokens[at + k] == tokens[length - prefix + k];
      if (same) expected[tokens[at + prefix]] = -std::numeric_limits<float>::max();
    }
    std::vector<float> logits(static_cast<size_t>(vocab), 2.0f);
    ProcessLogits(params, {tokens.data(), 1, length}, logits.data(), vocab);
    ASSERT_EQ(logits, expected) << "n-gram " << params.no_repeat_ngram_size;
  }
}

}  // namespace
}  // namespace fastgen::engine
