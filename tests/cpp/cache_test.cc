// The KV cache of the CPU: where things lie, how they are rounded, who holds which block.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "api/convert.h"
#include "base/error.h"
#include "base/half.h"
#include "cpu/dispatch.h"
#include "engine/cpu_device.h"
#include "engine/kv_cache.h"
#include "engine/model.h"
#include "engine/session.h"
#include "memory_limit.h"
#include "tiny_model.h"

namespace fastgen::engine {
namespace {

constexpr uint64_t kSeed = 20240607;

ModelConfig CacheConfig(int32_t hidden, int32_t layers, int32_t heads) {
  ModelConfig config;
  config.hidden_size = hidden;
  config.num_layers = layers;
  config.num_heads = heads;
  return config;
}

constexpr cpu::CacheType kCacheTypes[] = {cpu::CacheType::kFloat32, cpu::CacheType::kFloat16,
                                          cpu::CacheType::kBFloat16, cpu::CacheType::kInt8};

// Where element i of a head's key, and of its value, at a position of the block is, in elements from the
// beginning of the keys and of the values: what cpu/cache_layout.h says.
int64_t KeyAt(const cpu::HeadLayout& head, int64_t i, int64_t position) {
  if (head.type == cpu::CacheType::kBFloat16) return (i / 2 * cpu::kBlock + position) * 2 + i % 2;
  return i * cpu::kBlock + position;
}

int64_t ValueAt(const cpu::HeadLayout& head, int64_t i, int64_t position) {
  if (head.type == cpu::CacheType::kBFloat16) {
    return (position / 2 * head.value_stride + i) * 2 + position % 2;
  }
  return position * head.value_stride + i;
}

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
        const int64_t padded =
            type == cpu::CacheType::kBFloat16 ? (head_size + 1) / 2 * 2 : head_size;
        const int64_t elements = cpu::kBlock * (padded + head.value_stride);
        ASSERT_EQ(pool.block_bytes(), kLayers * kHeads * (elements * bytes + scales));
        std::vector<char> block(static_cast<size_t>(pool.block_bytes()), 0);
        std::vector<float> row(static_cast<size_t>(head_size), 1.0f);
        for (int32_t layer = 0; layer < kLayers; ++layer) {
          for (int32_t h = 0; h < kHeads; ++h) {
            const std::vector<char> before = block;
            char* const area = block.data() + pool.HeadAt(layer, h);
            for (int64_t at = 0; at < cpu::kBlock; ++at) {
              kernels->write_cache(head, row.data(), row.data(), 0, 1, area, at);
            }
            for (size_t i = 0; i < block.size(); ++i) {
              if (block[i] != before[i]) {
                ASSERT_EQ(before[i], 0) << i;
              }
            }
            for (int64_t at = 0; at < cpu::kBlock; ++at) {  // what is behind a row stays zero
              for (int64_t i = head_size; i < head.value_stride; ++i) {
                const char* const value = area + head.values_at + ValueAt(head, i, at) * bytes;
                ASSERT_TRUE(std::all_of(value, value + bytes, [](char c) { return c == 0; }));
              }
              for (int64_t i = head_size; i < padded; ++i) {
                const char* const key = area + KeyAt(head, i, at) * bytes;
                ASSERT_TRUE(std::all_of(key, key + bytes, [](char c) { return c == 0; }));
              }
            }
          }
        }
      }
    }
  }
}

// Positions written together are the bytes of positions written one by one, infinities and NaN included.
TEST(BlockPool, RowsTogetherAreTheSameBytes) {
  std::mt19937_64 random(kSeed);
  std::normal_distribution<float> normal;
  for (const cpu::Kernels* kernels : cpu::AllKernels()) {
    if (!kernels->supported()) continue;
    for (const cpu::CacheType type : kCacheTypes) {
      for (const int64_t head_size : {1, 3, 16, 17, 64, 77}) {
        const cpu::HeadLayout head = cpu::MakeHeadLayout(type, head_size);
        const int64_t stride = 2 * head_size + 5;
        std::vector<float> rows(static_cast<size_t>(cpu::kBlock * stride));
        for (float& value : rows) value = normal(random);
        rows[static_cast<size_t>(3 * stride)] = HUGE_VALF;
        rows[static_cast<size_t>(20 * stride)] = std::nanf("");
        for (const int64_t at : {0, 1, 13}) {
          for (const int64_t count : {1, 4, 15, 16, 17, 19}) {
            std::vector<char> together(static_cast<size_t>(head.bytes), 1), single = together;
            const float* const values = rows.data() + head_size;
            kernels->write_cache(head, rows.data(), values, stride, count, together.data(), at);
            for (int64_t r = 0; r < count; ++r) {
              kernels->write_cache(head, rows.data() + r * stride, values + r * stride, stride, 1,
                                   single.data(), at + r);
            }
            ASSERT_EQ(together, single) << kernels->name << " " << cpu::CacheTypeName(type) << " "
                                        << head_size << " at " << at << " " << count;
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
      kernels->write_cache(head, row.data(), row.data(), 0, 1, area.data(), 5);
      const auto* keys = reinterpret_cast<const uint16_t*>(area.data());
      const auto* values = reinterpret_cast<const uint16_t*>(area.data() + head.values_at);
      for (int64_t i = 0; i < n; ++i) {
        const uint16_t expected = brain ? base::FloatToBrain(row[i]) : base::FloatToHalf(row[i]);
        const float as_float = brain ? base::BrainToFloat(expected) : base::HalfToFloat(expected);
        for (const uint16_t got : {keys[KeyAt(head, i, 5)], values[ValueAt(head, i, 5)]}) {
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
      kernels->write_cache(head, values.data(), values.data(), 0, 1, area.data(), 31);
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
        kernels->write_cache(head, values, values, 0, 1, area.data(), 0);
        float got;
        if (type == cpu::CacheType::kInt8) {
          std::memcpy(&got, area.data() + head.scales_at, sizeof got);
        } else {
          uint16_t bits;
          std::memcpy(&bits, area.data() + KeyAt(head, 1, 0) * 2, sizeof bits);
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
  std::vector<std::pair<std::vector<Block>, float>> holders;
  for (int i = 0; i < 400; ++i) {
    if (holders.empty() || random() % 2 == 0) {
      std::vector<Block> blocks;
      pool.Take(static_cast<int64_t>(random() % 6), &blocks);
      for (const Block& block : blocks) {
        ASSERT_GE(static_cast<int64_t>(block->size()), pool.block_bytes());
        std::fill_n(block->floats(), pool.block_bytes() / sizeof(float), static_cast<float>(i));
      }
      holders.emplace_back(std::move(blocks), static_cast<float>(i));
    } else {
      auto& holder = holders[random() % holders.size()];
      for (const Block& block : holder.first) {
        const auto count = pool.block_bytes() / static_cast<int64_t>(sizeof(float));
        for (int64_t at = 0; at < count; ++at) ASSERT_EQ(block->floats()[at], holder.second);
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
  std::vector<Block> blocks;
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

// ---- sharing -------------------------------------------------------------------------------

constexpr int32_t kPositions = 1300;

struct Bench {
  explicit Bench(const std::string& cache_dtype) {
    const tests::TinyModel tiny = tests::MakeTinyModel(kSeed, 23, kPositions);
    const std::vector<fastgen_tensor> tensors = tests::TensorsOf(tiny);
    DeviceOptions options;
    options.cache_dtype = cache_dtype;
    options.num_threads = 2;
    const auto source = MakeTensorSource(api::ToTensors(tensors.data(), tensors.size()), options);
    model = Model::Create(api::ToConfig(&tiny.config), *source, options);
    device = dynamic_cast<const CpuDevice*>(&model->device());
  }

  int64_t blocks_in_use() const {
    return device->cache_bytes_in_use() /
           static_cast<int64_t>(device->info().cache_bytes_per_token) / cpu::kBlock;
  }

  std::shared_ptr<const Model> model;
  const CpuDevice* device;
};

std::vector<int32_t> Tokens(std::mt19937_64& random, size_t count) {
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 23);
  return tokens;
}

RequestOptions Sampling(int32_t max_length, int32_t returned = 1, uint32_t first = 0) {
  RequestOptions options;
  options.sampling.sample = true;
  options.sampling.max_length = max_length;
  options.sampling.eos_token_id = -1;
  options.sampling.seed = 5;
  options.sampling.sequence = first;
  options.has_seed = true;
  options.keep_logits = true;
  options.num_return_sequences = returned;
  return options;
}

struct Outcome {
  std::vector<int32_t> tokens;
  std::vector<float> logits;
};

Outcome Alone(const Bench& bench, const std::vector<int32_t>& prompt, RequestOptions options) {
  Session session(bench.model, 1);
  options.num_return_sequences = 1;
  const uint64_t id = session.Submit(prompt.data(), prompt.size(), options);
  while (session.Step(64) > 0) {
  }
  return {session.Get(id).tokens, session.Get(id).logits};
}

void ExpectSame(const Sequence& sequence, const Outcome& alone) {
  ASSERT_EQ(sequence.tokens, alone.tokens);
  ASSERT_EQ(sequence.logits.size(), alone.logits.size());
  ASSERT_EQ(
      std::memcmp(sequence.logits.data(), alone.logits.data(), alone.logits.size() * sizeof(float)),
      0);
}

TEST(Sharing, CopiesOfAPromptAreFedOnce) {
  const Bench bench("");
  std::mt19937_64 random(kSeed);
  const std::vector<int32_t> prompt = Tokens(random, 600);
  std::vector<Outcome> alone;
  for (uint32_t i = 0; i < 8; ++i) alone.push_back(Alone(bench, prompt, Sampling(40, 1, i)));
  const uint64_t before = bench.device->rows_done();
  Session session(bench.model, 100);
  const uint64_t id = session.Submit(prompt.data(), prompt.size(), Sampling(40, 8));
  size_t unfinished = session.Step(1);
  // 599 positions are alike, 18 blocks and a part of one; 639 positions take 20 blocks.
  EXPECT_EQ(bench.blocks_in_use(), 18 + 8 * 2);
  while (unfinished > 0) unfinished = session.Step(3);
  EXPECT_EQ(bench.device->rows_done() - before, 599u + 8 * 40);
  for (uint64_t i = 0; i < 8; ++i) {
    ASSERT_NO_FATAL_FAILURE(ExpectSame(session.Get(id + i), alone[i]));
  }
  EXPECT_EQ(bench.blocks_in_use(), 0);
}

TEST(Sharing, PromptsThatBeginAlikeAreFedOnce) {
  const Bench bench("");
  std::mt19937_64 random(kSeed);
  const std::vector<int32_t> start = Tokens(random, 100);
  std::vector<std::vector<int32_t>> prompts;
  for (int32_t i = 0; i < 4; ++i) {
    prompts.push_back(start);
    prompts.back().push_back(i);  // where they part
    for (int32_t token : Tokens(random, 70)) prompts.back().push_back(token);
  }
  std::vector<Outcome> alone;
  for (const auto& prompt : prompts) alone.push_back(Alone(bench, prompt, Sampling(5)));
  const uint64_t before = bench.device->rows_done();
  Session session(bench.model, 100);
  std::vector<uint64_t> ids;
  for (const auto& prompt : prompts) {
    ids.push_back(session.Submit(prompt.data(), prompt.size(), Sampling(5)));
  }
  size_t unfinished = session.Step(1);
  EXPECT_EQ(bench.blocks_in_use(), 3 + 4 * 3);  // 175 positions take 6 blocks
  while (unfinished > 0) unfinished = session.Step(3);
  EXPECT_EQ(bench.device->rows_done() - before, 100u + 4 * 71 + 4 * 4);
  for (size_t i = 0; i < 4; ++i) {
    ASSERT_NO_FATAL_FAILURE(ExpectSame(session.Get(ids[i]), alone[i]));
  }
}

TEST(Sharing, FollowersOfOneThatEndsFollowAnother) {
  const Bench bench("");
  std::mt19937_64 random(kSeed);
  const std::vector<int32_t> prompt = Tokens(random, 600);
  const Outcome alone = Alone(bench, prompt, Sampling(4));
  const uint64_t before = bench.device->rows_done();
  Session session(bench.model, 100);
  std::vector<uint64_t> ids;
  for (int i = 0; i < 4; ++i) {
    ids.push_back(session.Submit(prompt.data(), prompt.size(), Sampling(4)));
  }
  session.Step(1);
  EXPECT_EQ(bench.device->rows_done() - before, 512u);
  session.Release(ids[0]);
  while (session.Step(3) > 0) {
  }
  EXPECT_EQ(bench.device->rows_done() - before, 512u + 599 + 3 * 4);
  for (size_t i = 1; i < 4; ++i) ASSERT_NO_FATAL_FAILURE(ExpectSame(session.Get(ids[i]), alone));
}

// What the device promises whatever a session does: a slot that takes less over than it was opened for
// leaves those alone that share the rest with it.
TEST(Sharing, ACopyTouchesNobodyElse) {
  const Bench bench("");
  Device& device = bench.model->device();
  std::mt19937_64 random(kSeed);
  const std::vector<int32_t> prompt = Tokens(random, 101);
  std::vector<int32_t> other = Tokens(random, 101);
  std::copy_n(prompt.begin(), 40, other.begin());
  const Outcome alone = Alone(bench, prompt, Sampling(1));
  SequenceSpec spec;
  spec.prompt = prompt.data();
  spec.prompt_length = 101;
  spec.sampling = Sampling(1).sampling;
  const int32_t first = device.Open(spec);
  spec.like = first;
  spec.alike = 100;
  const int32_t second = device.Open(spec), third = device.Open(spec);
  spec.prompt = other.data();
  spec.alike = 40;
  const int32_t fourth = device.Open(spec);
  for (const int32_t slot : {first, fourth}) {
    PrefillChunk chunk;
    chunk.slot = slot;
    chunk.count = 100;
    device.Prefill(&chunk, 1);
  }
  device.CopyPrefix(first, third, 100);
  device.Close(first);
  device.CopyPrefix(fourth, second, 40);
  device.Close(fourth);
  DecodeResult result;
  std::vector<float> logits(23);
  for (const int32_t slot : {third, second}) {  // `second` feeds its other 60 first
    device.Decode(&slot, 1, 1, &result, logits.data());
    EXPECT_EQ(result.token, alone.tokens[0]);
    EXPECT_EQ(std::memcmp(logits.data(), alone.logits.data(), sizeof(float) * 23), 0) << slot;
    device.Close(slot);
  }
  EXPECT_EQ(bench.blocks_in_use(), 0);
}

// Prompts that grow out of one another come and go in any order: nobody is disturbed.
void RunRandomSharing(const Bench& bench, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::vector<int32_t>> prompts = {Tokens(random, 30 + random() % 700)};
  for (int i = 0; i < 5; ++i) {
    std::vector<int32_t> prompt = prompts[random() % prompts.size()];
    prompt.resize(1 + random() % prompt.size());
    for (int32_t token : Tokens(random, random() % 400)) prompt.push_back(token);
    prompt.resize(std::min<size_t>(prompt.size(), 1100));
    prompts.push_back(prompt);
  }
  std::vector<Outcome> alone;
  for (const auto& prompt : prompts) alone.push_back(Alone(bench, prompt, Sampling(12)));
  {
    Session session(bench.model, static_cast<int32_t>(2 + random() % 12));
    std::map<uint64_t, size_t> ids;
    const auto any = [&] {
      auto at = ids.begin();
      std::advance(at, static_cast<std::ptrdiff_t>(random() % ids.size()));
      return at;
    };
    for (int action = 0; action < 30; ++action) {
      const uint64_t dice = random() % 10;
      if (dice < 5) {
        const size_t which = random() % prompts.size();
        ids[session.Submit(prompts[which].data(), prompts[which].size(), Sampling(12))] = which;
      } else if (dice < 8) {
        session.Step(static_cast<int32_t>(1 + random() % 3));
      } else if (dice == 8 && !ids.empty()) {
        session.Cancel(any()->first);
      } else if (!ids.empty()) {
        const auto gone = any();
        session.Release(gone->first);
        ids.erase(gone);
      }
    }
    while (session.Step(5) > 0) {
    }
    for (const auto& [id, which] : ids) {
      const Sequence& sequence = session.Get(id);
      if (sequence.finish_reason == FASTGEN_FINISH_CANCELLED) continue;
      ASSERT_EQ(sequence.finish_reason, FASTGEN_FINISH_LENGTH);
      ASSERT_NO_FATAL_FAILURE(ExpectSame(sequence, alone[which])) << id;
    }
  }
  ASSERT_EQ(bench.blocks_in_use(), 0);
}

TEST(Sharing, WhoComesAndGoesDisturbsNobody) {
  for (const char* type : {"float32", "float16", "bfloat16", "int8"}) {
    const Bench bench(type);
    for (uint64_t seed = 0; seed < 12; ++seed) {
      SCOPED_TRACE(std::string(type) + " " + std::to_string(seed));
      ASSERT_NO_FATAL_FAILURE(RunRandomSharing(bench, kSeed + seed));
    }
  }
}

}  // namespace
}  // namespace fastgen::engine
