// The C API from several threads, and what it promises after a fork and after a failure.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fastgen/fastgen.hpp"
#include "temporary.h"
#include "tiny_model.h"

namespace fastgen {
namespace {

constexpr uint64_t kSeed = 20240607;
constexpr int32_t kVocab = 300;

Model MakeModel(int32_t num_threads) {
  const tests::TinyModel tiny = tests::MakeTinyModel(5, kVocab);
  Config config;
  static_cast<fastgen_config&>(config) = tiny.config;
  ModelOptions options;
  options.num_threads = num_threads;
  return Model::create(config, tests::TensorsOf(tiny), options);
}

struct Request {
  std::vector<int32_t> prompt;
  Options options;
};

Request RandomRequest(std::mt19937_64* random) {
  Request request;
  request.prompt.resize(1 + (*random)() % 12);
  for (int32_t& token : request.prompt) token = static_cast<int32_t>((*random)() % kVocab);
  request.options.decode_strategy = (*random)() % 3 == 0 ? FASTGEN_GREEDY_SEARCH : FASTGEN_SAMPLING;
  request.options.max_length = static_cast<int32_t>(1 + (*random)() % 20);
  request.options.top_k = static_cast<int32_t>((*random)() % 10);
  request.options.top_p = static_cast<float>((*random)() % 11) / 10.0f;
  request.options.has_seed = 1;
  request.options.seed = (*random)();
  return request;
}

// Each in a session of its own.
std::vector<std::vector<int32_t>> TokensAlone(const Model& model,
                                              const std::vector<Request>& requests) {
  std::vector<std::vector<int32_t>> tokens;
  for (const Request& request : requests) {
    tokens.push_back(model.generate({request.prompt}, request.options)[0].tokens);
  }
  return tokens;
}

// Runs `body(thread)` on `count` threads at once.
void OnThreads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

class SharedModel : public ::testing::TestWithParam<int> {};

TEST_P(SharedModel, SessionsOfManyThreadsGiveTheTokensOfOne) {
  const Model model = MakeModel(GetParam());
  std::mt19937_64 random(kSeed);
  std::vector<Request> requests;
  for (int i = 0; i < 24; ++i) requests.push_back(RandomRequest(&random));
  const std::vector<std::vector<int32_t>> alone = TokensAlone(model, requests);
  std::atomic<int> wrong{0};
  OnThreads(5, [&](int thread) {
    // All requests in one session, in this thread's order, joining while others run.
    std::mt19937_64 order(kSeed + static_cast<uint64_t>(thread));
    Session session(model, 1 + thread);
    std::map<uint64_t, size_t> request_of;
    for (size_t i = 0; i < requests.size(); ++i) {
      const size_t which = (i * 7 + static_cast<size_t>(thread)) % requests.size();
      request_of[session.submit(requests[which].prompt, requests[which].options)] = which;
      if (order() % 2 == 0) session.step(static_cast<int32_t>(order() % 4));
    }
    while (session.step(8) > 0) {
    }
    for (const auto& [id, which] : request_of) {
      if (session.get(id).tokens != alone[which]) ++wrong;
    }
  });
  EXPECT_EQ(wrong, 0);
}

TEST_P(SharedModel, IsUsedInEveryWayAtOnce) {
  const Model model = MakeModel(GetParam());
  const std::vector<int32_t> tokens = {1, 2, 3, 4, 5, 6, 7};
  const std::vector<float> logits = model.logits(tokens);
  std::mt19937_64 random(kSeed);
  const std::vector<Request> requests = {RandomRequest(&random), RandomRequest(&random)};
  const std::vector<std::vector<int32_t>> alone = TokensAlone(model, requests);
  std::atomic<int> wrong{0};
  OnThreads(6, [&](int thread) {
    for (int i = 0; i < 6; ++i) {
      switch (thread) {
        case 0:
          if (model.logits(tokens) != logits) ++wrong;
          break;
        case 1: {  // ends in the middle
          Session session(model);
          const uint64_t id = session.submit(requests[0].prompt, requests[0].options);
          session.step(1);
          session.cancel(id);
          session.submit(requests[1].prompt, requests[1].options);
          break;
        }
        case 2:
          if (model.config().vocab_size != kVocab) ++wrong;
          break;
        case 3: {  // failures of one thread are no other's
          try {
            model.logits({kVocab + i});
            ++wrong;
          } catch (const Error& error) {
            const std::string sentence = error.what();
            if (sentence.find(std::to_string(kVocab + i)) == std::string::npos) ++wrong;
          }
          break;
        }
        default:
          if (TokensAlone(model, requests) != alone) ++wrong;
      }
    }
  });
  EXPECT_EQ(wrong, 0);
}

// 1: no workers. 3: more than many a machine has.
INSTANTIATE_TEST_SUITE_P(Threads, SharedModel, ::testing::Values(1, 3));

TEST(Model, EveryKernelSetGivesTheLogits) {
  const tests::TinyModel tiny = tests::MakeTinyModel(5, kVocab);
  Config config;
  static_cast<fastgen_config&>(config) = tiny.config;
  std::mt19937_64 random(kSeed);
  std::vector<int32_t> tokens(static_cast<size_t>(config.max_positions));
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % kVocab);
  std::vector<float> expected;
  for (size_t i = 0; i < fastgen_isa_count(); ++i) {
    if (!fastgen_isa_supported(i)) continue;
    ModelOptions options;
    options.isa = fastgen_isa_name(i);
    options.num_threads = 2;
    const Model model = Model::create(config, tests::TensorsOf(tiny), options);
    // Of every length: the sizes of tiles and the blocks of the cache are met and missed.
    for (size_t length = 1; length <= tokens.size(); ++length) {
      const std::vector<int32_t> prefix(tokens.begin(),
                                        tokens.begin() + static_cast<std::ptrdiff_t>(length));
      const std::vector<float> logits = model.logits(prefix);
      ASSERT_EQ(logits.size(), length * kVocab);
      if (i == 0 && length == tokens.size()) expected = logits;
      for (size_t at = 0; i > 0 && at < logits.size(); ++at) {
        ASSERT_NEAR(logits[at], expected[at], 1e-3) << options.isa << " " << length << " " << at;
      }
    }
  }
  EXPECT_EQ(expected.size(), tokens.size() * kVocab);
}

TEST(Model, IsLoadedByManyThreadsAtOnce) {
  const tests::TemporaryDirectory exported;
  const tests::TemporaryDirectory hugging_face;
  const tests::TinyModel tiny = tests::MakeTinyModel(5, kVocab);
  tests::WriteExport(tiny, exported.path());
  tests::WriteHuggingFace(tiny, hugging_face.path());
  const std::vector<int32_t> prompt = {4, 5, 6};
  const std::vector<float> logits = MakeModel(1).logits(prompt);
  std::atomic<int> wrong{0};
  OnThreads(4, [&](int thread) {
    for (int i = 0; i < 3; ++i) {
      ModelOptions options;
      options.num_threads = 1 + i;
      const std::string& path = (thread % 2 == 0 ? exported : hugging_face).path();
      if (Model::load(path, options).logits(prompt) != logits) ++wrong;
    }
  });
  EXPECT_EQ(wrong, 0);
}

TEST(Model, OutlivesItsHandleInSessions) {
  auto model = std::make_unique<Model>(MakeModel(2));
  std::mt19937_64 random(kSeed);
  const Request request = RandomRequest(&random);
  const auto tokens = TokensAlone(*model, {request})[0];
  Session session(*model);
  const uint64_t id = session.submit(request.prompt, request.options);
  model.reset();
  while (session.step(3) > 0) {
  }
  EXPECT_EQ(session.get(id).tokens, tokens);
}

TEST(LastError, BelongsToItsThread) {
  fastgen_model* model = nullptr;
  EXPECT_EQ(fastgen_model_load("/no/such/place/main", nullptr, &model), FASTGEN_NOT_FOUND);
  const std::string mine = fastgen_last_error();
  OnThreads(4, [](int thread) {
    EXPECT_STREQ(fastgen_last_error(), "");
    const std::string path = "/no/such/place/" + std::to_string(thread);
    for (int i = 0; i < 50; ++i) {
      fastgen_model* none = nullptr;
      EXPECT_EQ(fastgen_model_load(path.c_str(), nullptr, &none), FASTGEN_NOT_FOUND);
      EXPECT_NE(std::string(fastgen_last_error()).find(path), std::string::npos);
    }
  });
  EXPECT_EQ(fastgen_last_error(), mine);
  EXPECT_EQ(model, nullptr);
}

// Memory of the exact size, so that a sanitizer sees what is read or written beyond it.
TEST(Session, TakesAndGivesABatch) {
  const Model model = MakeModel(2);
  std::mt19937_64 random(kSeed);
  std::vector<Request> requests;
  for (int i = 0; i < 5; ++i) requests.push_back(RandomRequest(&random));
  const std::vector<std::vector<int32_t>> alone = TokensAlone(model, requests);
  size_t width = 0, longest = 0;
  std::vector<int64_t> lengths;
  std::vector<const fastgen_options*> options;
  for (size_t i = 0; i < requests.size(); ++i) {
    width = std::max(width, requests[i].prompt.size());
    longest = std::max(longest, alone[i].size());
    lengths.push_back(static_cast<int64_t>(requests[i].prompt.size()));
    options.push_back(&requests[i].options);
  }
  std::vector<int64_t> tokens(requests.size() * width, -1);
  for (size_t i = 0; i < requests.size(); ++i) {
    const std::vector<int32_t>& prompt = requests[i].prompt;
    std::copy(prompt.begin(), prompt.end(), tokens.data() + i * width);
  }
  fastgen_batch batch;
  fastgen_batch_init(&batch);
  batch.tokens = tokens.data();
  batch.dtype = FASTGEN_INT64;
  batch.rows = requests.size();
  batch.width = width;
  batch.lengths = lengths.data();
  batch.options = options.data();
  Session session(model);
  std::vector<uint64_t> ids(requests.size());
  ASSERT_EQ(fastgen_session_submit_batch(session.handle(), &batch, ids.data()), FASTGEN_OK)
      << fastgen_last_error();
  while (session.step(8) > 0) {
  }
  std::vector<int32_t> out(requests.size() * longest);
  std::vector<float> scores(requests.size());
  fastgen_batch_output output;
  fastgen_batch_output_init(&output);
  output.tokens = out.data();
  output.width = longest;
  output.pad_token_id = 7;
  output.scores = scores.data();
  ASSERT_EQ(fastgen_session_get_batch(session.handle(), ids.data(), ids.size(), &output),
            FASTGEN_OK)
      << fastgen_last_error();
  for (size_t i = 0; i < requests.size(); ++i) {
    std::vector<int32_t> expected = alone[i];
    expected.resize(longest, 7);
    EXPECT_EQ(std::vector<int32_t>(out.data() + i * longest, out.data() + (i + 1) * longest),
              expected);
    EXPECT_EQ(scores[i], session.get(ids[i]).score);
  }
}

// Numbers that are somebody's -1, and areas whose products are more than a number holds.
TEST(Sizes, ThatNoMemoryHoldsAreRefused) {
  const Model model = MakeModel(1);
  Session session(model);
  std::vector<int32_t> prompt(1);  // of this size, so that a sanitizer sees what is read beyond
  uint64_t id = 0;
  for (size_t length = SIZE_MAX; length > SIZE_MAX - 40; --length) {
    ASSERT_EQ(fastgen_session_submit(session.handle(), prompt.data(), length, nullptr, &id),
              FASTGEN_INVALID_ARGUMENT);
    EXPECT_NE(std::string(fastgen_last_error()).find(std::to_string(length)), std::string::npos);
  }
  Options options;
  options.max_length = 2;
  const uint64_t ids[] = {session.submit({1, 2}, options), session.submit({3}, options)};
  while (session.step(8) > 0) {
  }
  std::vector<int32_t> out(4);
  fastgen_batch_output output;
  fastgen_batch_output_init(&output);
  output.tokens = out.data();
  output.pad_token_id = 0;
  for (const size_t width : {size_t{1} << 61, size_t{1} << 62, (size_t{1} << 61) + 1, SIZE_MAX}) {
    output.width = width;
    EXPECT_EQ(fastgen_session_get_batch(session.handle(), ids, 2, &output),
              FASTGEN_INVALID_ARGUMENT);
  }
  output.width = 2;
  EXPECT_EQ(fastgen_session_get_batch(session.handle(), ids, SIZE_MAX, &output),
            FASTGEN_INVALID_ARGUMENT);
  EXPECT_EQ(fastgen_session_get_batch(session.handle(), ids, 2, &output), FASTGEN_OK);
  fastgen_batch batch;
  fastgen_batch_init(&batch);
  batch.tokens = out.data();
  for (const size_t many : {SIZE_MAX / 4, SIZE_MAX}) {
    batch.rows = many, batch.width = 1;
    EXPECT_EQ(fastgen_session_submit_batch(session.handle(), &batch, &id),
              FASTGEN_INVALID_ARGUMENT);
    batch.rows = 1, batch.width = many;
    EXPECT_EQ(fastgen_session_submit_batch(session.handle(), &batch, &id),
              FASTGEN_INVALID_ARGUMENT);
  }
  float value = 1.0f;
  uint64_t sum = 0;
  const fastgen_tensor tensor = {"x", &value, FASTGEN_FLOAT32, 2, {int64_t{1} << 62, 4}};
  EXPECT_EQ(fastgen_checksum(&tensor, 1, nullptr, nullptr, &sum), FASTGEN_INVALID_ARGUMENT);
  EXPECT_EQ(fastgen_checksum(&tensor, SIZE_MAX, nullptr, nullptr, &sum), FASTGEN_INVALID_ARGUMENT);
}

TEST(Model, CountsSequencesThroughOrRefuses) {
  const Model model = MakeModel(1);
  Options options;
  options.max_length = 1;
  options.first_sequence = UINT32_MAX;
  EXPECT_EQ(model.generate({{1}}, options).size(), 1u);
  try {
    model.generate({{1}, {2}}, options);
    FAIL() << "the second would be sequence 0";
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), FASTGEN_INVALID_ARGUMENT);
    EXPECT_STREQ(error.what(),
                 "first_sequence is 4294967295, with 2 sequences it must be at most "
                 "4294967294");
  }
}

TEST(Config, IsReadAsModelDirectoriesAre) {
  fastgen_config config;
  fastgen_config_init(&config);
  const std::string text =
      R"({"model_type": "gpt2", "vocab_size": 90, "n_ctx": 16, "n_embd": 24, "n_layer": 2,
          "n_head": 3, "eos_token_id": [4], "bos_token_id": 50256})";
  ASSERT_EQ(fastgen_config_parse(text.data(), text.size(), nullptr, &config), FASTGEN_OK);
  EXPECT_EQ(config.vocab_size, 90);
  EXPECT_EQ(config.max_positions, 16);
  EXPECT_EQ(config.intermediate_size, 96);
  EXPECT_EQ(config.eos_token_id, 4);
  EXPECT_EQ(config.bos_token_id, -1);
  EXPECT_EQ(fastgen_config_parse(text.data(), 40, "cut.json", &config), FASTGEN_BAD_FILE);
  EXPECT_EQ(std::string(fastgen_last_error()).rfind("cut.json", 0), 0u) << fastgen_last_error();
  EXPECT_EQ(fastgen_config_parse(nullptr, 0, nullptr, &config), FASTGEN_INVALID_ARGUMENT);
  EXPECT_EQ(fastgen_config_parse(text.data(), text.size(), nullptr, nullptr),
            FASTGEN_INVALID_ARGUMENT);
  config.struct_size = 3;
  EXPECT_EQ(fastgen_config_parse(text.data(), text.size(), nullptr, &config),
            FASTGEN_INVALID_ARGUMENT);
}

TEST(Checksum, ReadsItsTensorsAndNoMore) {
  for (const int64_t size : {1, 15, 16, 17, 2097152, 2097153}) {
    std::vector<float> values(static_cast<size_t>(size), 1.5f);
    fastgen_tensor tensor = {"values", values.data(), FASTGEN_FLOAT32, 1, {size}};
    uint64_t before = 0, after = 0;
    ASSERT_EQ(fastgen_checksum(&tensor, 1, nullptr, nullptr, &before), FASTGEN_OK);
    values.back() = 1.25f;
    ASSERT_EQ(fastgen_checksum(&tensor, 1, "cpu", nullptr, &after), FASTGEN_OK);
    EXPECT_NE(before, after);
  }
}

TEST(Session, GoesOnInAForkedChild) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "ThreadSanitizer does not follow threads started after a fork";
#endif
  const Model model = MakeModel(3);
  std::mt19937_64 random(kSeed);
  const std::vector<Request> requests = {RandomRequest(&random), RandomRequest(&random)};
  const auto tokens = TokensAlone(model, requests);
  Session session(model);
  const uint64_t id = session.submit(requests[0].prompt, requests[0].options);
  session.step(1);
  const pid_t child = fork();
  if (child == 0) {
    while (session.step(2) > 0) {
    }
    const bool same = session.get(id).tokens == tokens[0] && TokensAlone(model, requests) == tokens;
    _exit(same ? 0 : 1);
  }
  ASSERT_GT(child, 0);
  while (session.step(2) > 0) {
  }
  EXPECT_EQ(session.get(id).tokens, tokens[0]);
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

}  // namespace
}  // namespace fastgen
