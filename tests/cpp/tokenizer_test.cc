// text/: byte-level BPE, its files, and text as it comes.
#include "text/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/utf8.h"
#include "failure.h"
#include "temporary.h"
#include "text/pre_tokenizer.h"
#include "tiny_model.h"

namespace fastgen::text {
namespace {

using tests::ExpectContains;
using tests::Failure;
using tests::TemporaryDirectory;
using tests::WriteFile;

constexpr uint64_t kSeed = 20240607;

// The tiny tokenizer: all bytes, and merges up to "return" and " a".
std::shared_ptr<const Tokenizer> Tiny() {
  const TemporaryDirectory directory;
  tests::WriteExport(tests::MakeTinyModel(1), directory.path());
  return Tokenizer::Load(directory.path());
}

std::vector<int32_t> Encode(const Tokenizer& tokenizer, const std::string& text) {
  // Exactly as long as the text, so that AddressSanitizer sees a byte read beyond it.
  const std::vector<char> exact(text.begin(), text.end());
  return tokenizer.Encode(exact.data(), exact.size());
}

std::string Lossy(const std::string& bytes) {
  std::string text;
  base::AppendLossy(bytes.data(), bytes.data() + bytes.size(), false, &text);
  return text;
}

// Letters, numbers, white space, combining marks, all planes, and bytes that are no UTF-8.
std::string RandomText(std::mt19937_64* random) {
  static const char* const kPieces[] = {"return",   "re",           " a",
                                        " ",        "  ",           "\n",
                                        "\t",       "'s",           "'ll",
                                        "12",       "\xc3\xa9",     "e\xcc\x81",
                                        "!?",       "\xe4\xb8\xad", "\xf0\x9f\x98\x80",
                                        "\xc2\xa0", "\xe2\x80\xa8", "<|endoftext|>",
                                        "<|endof",  "\xff",         "\xf0\x9f"};
  std::string text;
  for (uint64_t count = (*random)() % 12; count > 0; --count) {
    switch ((*random)() % 4) {
      case 0: {
        uint32_t code = static_cast<uint32_t>((*random)() % 0x110000);
        if (code >= 0xd800 && code <= 0xdfff) code = 0xfffd;
        base::AppendUtf8(code, &text);
        break;
      }
      case 1: text.push_back(static_cast<char>((*random)())); break;
      default: text += kPieces[(*random)() % std::size(kPieces)];
    }
  }
  return text;
}

TEST(Tokenizer, MergesInTheOrderOfRanks) {
  const auto tokenizer = Tiny();
  const auto id = [&](const char* token) { return tokenizer->vocabulary().Find(token); };
  EXPECT_EQ(Encode(*tokenizer, "return"), std::vector<int32_t>{id("return")});
  EXPECT_EQ(Encode(*tokenizer, "retur"), (std::vector<int32_t>{id("retu"), id("r")}));
  EXPECT_EQ(Encode(*tokenizer, " a  a"), (std::vector<int32_t>{id("\xc4\xa0"
                                                                  "a"),
                                                               id("\xc4\xa0"),
                                                               id("\xc4\xa0"
                                                                  "a")}));
  EXPECT_EQ(Encode(*tokenizer, "<|endoftext|>"), std::vector<int32_t>{0});
  EXPECT_TRUE(Encode(*tokenizer, "").empty());
}

TEST(Tokenizer, GivesTheTextBack) {
  const auto tokenizer = Tiny();
  std::mt19937_64 random(kSeed);
  for (int i = 0; i < 5000; ++i) {
    const std::string text = RandomText(&random);
    const std::vector<int32_t> ids = Encode(*tokenizer, text);
    ASSERT_LE(ids.size(), text.size());
    ASSERT_EQ(tokenizer->Decode(ids.data(), ids.size(), false), Lossy(text));
  }
}

TEST(Tokenizer, StreamsNeverGiveHalfACharacter) {
  const auto tokenizer = Tiny();
  std::mt19937_64 random(kSeed);
  for (int i = 0; i < 3000; ++i) {
    std::vector<int32_t> ids = Encode(*tokenizer, RandomText(&random));
    // Any ids: those of half characters, special ones, and some beyond the vocabulary.
    for (uint64_t more = random() % 6; more > 0; --more) {
      ids.push_back(static_cast<int32_t>(random() % 300));
    }
    const bool skip = random() % 2 == 0;
    TextStream stream(tokenizer, skip);
    std::string pieces;
    for (size_t at = 0; at < ids.size();) {
      const size_t count = std::min<size_t>(ids.size() - at, random() % 3);
      const std::string piece = stream.Push(ids.data() + at, count);
      ASSERT_EQ(Lossy(piece), piece);
      pieces += piece;
      at += count;
    }
    pieces += stream.Flush();
    ASSERT_EQ(pieces, tokenizer->Decode(ids.data(), ids.size(), skip));
    ASSERT_EQ(stream.Flush(), "");
  }
  const int32_t negative = -1;
  TextStream stream(tokenizer, true);
  ExpectContains(Failure([&] { stream.Push(&negative, 1); }, FASTGEN_INVALID_ARGUMENT), "-1");
}

TEST(Tokenizer, PiecesCoverTheText) {
  std::mt19937_64 random(kSeed);
  for (int i = 0; i < 5000; ++i) {
    const std::string text = RandomText(&random);
    const std::vector<char> exact(text.begin(), text.end());
    const char* const end = exact.data() + exact.size();
    for (const char* p = exact.data(); p != end;) {
      const char* next = PieceEnd(p, end);
      ASSERT_GT(next, p);
      ASSERT_LE(next, end);
      p = next;
    }
  }
}

// The definition, step by step: the lowest rank, and of equals the leftmost.
std::vector<std::string> MergeSlowly(std::vector<std::string> symbols,
                                     const std::map<MergeTable::Pair, size_t>& ranks) {
  while (true) {
    size_t best = ranks.size();
    size_t at = 0;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      const auto found = ranks.find({symbols[i], symbols[i + 1]});
      if (found == ranks.end() || found->second >= best) continue;
      best = found->second;
      at = i;
    }
    if (best == ranks.size()) return symbols;
    symbols[at] += symbols[at + 1];
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
}

TEST(Bpe, IsTheDefinition) {
  std::mt19937_64 random(kSeed);
  for (int round = 0; round < 60; ++round) {
    // A random table over three letters: merges of merges, and runs of one letter.
    std::vector<std::string> known = {"a", "b", "c"};
    std::vector<Token> tokens = {{"a", 0}, {"b", 1}, {"c", 2}};
    std::vector<MergeTable::Pair> pairs;
    std::map<MergeTable::Pair, size_t> ranks;
    for (int i = 0; i < 12; ++i) {
      const MergeTable::Pair pair = {known[random() % known.size()],
                                     known[random() % known.size()]};
      const std::string merged = pair.first + pair.second;
      if (!ranks.emplace(pair, pairs.size()).second) continue;
      pairs.push_back(pair);
      if (std::find(known.begin(), known.end(), merged) != known.end()) continue;
      tokens.push_back({merged, static_cast<int32_t>(known.size())});
      known.push_back(merged);
    }
    const Vocabulary vocabulary(tokens, "test");
    const MergeTable table(pairs, vocabulary, "test");
    BpeMerger merger(table);  // keeps its memory from piece to piece
    for (int piece = 0; piece < 60; ++piece) {
      std::vector<int32_t> bytes;
      std::vector<std::string> symbols;
      for (uint64_t size = random() % 40; size > 0; --size) {
        bytes.push_back(static_cast<int32_t>(random() % (1 + piece % 3)));
        symbols.push_back(known[static_cast<size_t>(bytes.back())]);
      }
      std::vector<int32_t> merged;
      merger.Merge(bytes, &merged);
      std::vector<std::string> texts;
      for (const int32_t id : merged) texts.push_back(known[static_cast<size_t>(id)]);
      ASSERT_EQ(texts, MergeSlowly(symbols, ranks));
    }
  }
}

TEST(AddedTokens, FindsTheLeftmostAndOfThoseTheLongest) {
  std::mt19937_64 random(kSeed);
  for (int round = 0; round < 300; ++round) {
    std::vector<Token> tokens;
    for (int i = 0; i < 6; ++i) {
      std::string text;
      for (uint64_t size = 1 + random() % 4; size > 0; --size) text += "ab\xff"[random() % 3];
      const bool is_new = std::none_of(tokens.begin(), tokens.end(),
                                       [&](const Token& token) { return token.text == text; });
      if (is_new) tokens.push_back({text, i});
    }
    const AddedTokens added(tokens);
    std::string text;
    for (int i = 0; i < 12; ++i) text += "abc\xff"[random() % 4];
    size_t begin = std::string::npos;
    size_t size = 0;
    int32_t id = -1;
    for (const Token& token : tokens) {
      const size_t at = text.find(token.text);
      if (at == std::string::npos || at > begin) continue;
      if (at == begin && token.text.size() < size) continue;
      begin = at;
      size = token.text.size();
      id = token.id;
    }
    const AddedTokens::Match match = added.Find(text.data(), text.data() + text.size());
    ASSERT_EQ(match.id, id);
    ASSERT_EQ(match.begin - text.data(), id < 0 ? 12 : static_cast<std::ptrdiff_t>(begin));
    ASSERT_EQ(match.end - match.begin, static_cast<std::ptrdiff_t>(size));
  }
}

TEST(Tokenizer, ThreadsShareOne) {
  const auto tokenizer = Tiny();
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (uint64_t thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      std::mt19937_64 random(kSeed + thread);
      for (int i = 0; i < 300; ++i) {
        const std::string text = RandomText(&random);
        const std::vector<int32_t> ids = Encode(*tokenizer, text);
        if (tokenizer->Decode(ids.data(), ids.size(), false) != Lossy(text)) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

// ---- Files ---------------------------------------------------------------------------------

TEST(TokenizerFiles, VocabularyAndMergesMustAgree) {
  const TemporaryDirectory directory;
  const auto failure = [&](const std::string& vocab, const std::string& merges) {
    WriteFile(directory / "vocab.txt", vocab);
    WriteFile(directory / "merges.txt", merges);
    return Failure([&] { Tokenizer::Load(directory.path()); });
  };
  EXPECT_EQ(failure("a\n\nb\r\nab", "#version: 0.2\r\na b\r\n"), "");
  ExpectContains(failure("a\nb\n", "a b\n"), "'ab', which is not in the vocabulary");
  ExpectContains(failure("a\nb\nab\n", "a b\na b\n"), "is there twice");
  ExpectContains(failure("a\na\n", ""), "'a' is there twice");
  ExpectContains(failure("", ""), "has no tokens");
  ExpectContains(failure("a\xff\n", ""), "is not UTF-8");
  ExpectContains(failure("a\nb\nab\n", "a  b\n"), "two tokens with a space between");
  ExpectContains(failure("a\nb\nab\n", "\na b\n"), "line 1 is empty");
  ExpectContains(failure(std::string((1 << 20) + 1, '\n') + "a", ""), "more than 1048576 lines");
}

TEST(TokenizerFiles, SurviveAnyDamage) {
  const std::string good = R"({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3},
      "merges": ["a b"]}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false},
      "decoder": {"type": "ByteLevel"}, "added_tokens": [{"id": 4, "content": "<s>", "special": true}]})";
  const auto load = [](const std::string& text) {
    const Tokenizer tokenizer(ParseTokenizerJson(text, "tokenizer.json"));
    const std::string input = "ab <s>";
    try {
      const std::vector<int32_t> ids = tokenizer.Encode(input.data(), input.size());
      tokenizer.Decode(ids.data(), ids.size(), false);
    } catch (const base::Error& error) {
      // A byte whose token the damage took away.
      if (error.status() != FASTGEN_INVALID_ARGUMENT) throw;
    }
  };
  load(good);
  for (size_t size = 0; size < good.size(); ++size) {
    ExpectContains(Failure([&] { load(good.substr(0, size)); }), "tokenizer.json: ");
  }
  std::mt19937_64 random(kSeed);
  for (int i = 0; i < 10000; ++i) {
    std::string bad = good;
    bad[random() % bad.size()] ^= static_cast<char>(1 + random() % 255);
    try {
      load(bad);
    } catch (const base::Error& error) {
      ASSERT_TRUE(error.status() == FASTGEN_BAD_FILE || error.status() == FASTGEN_UNSUPPORTED);
      ASSERT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    }
  }
}

}  // namespace
}  // namespace fastgen::text
