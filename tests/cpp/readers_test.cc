// io/: JSON, safetensors, exports and mapped files, good and damaged.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <locale>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/utf8.h"
#include "failure.h"
#include "io/export.h"
#include "io/json.h"
#include "io/mapped_file.h"
#include "io/safetensors.h"
#include "io/tensor.h"
#include "temporary.h"
#include "tiny_model.h"

namespace fastgen::io {
namespace {

using tests::ExpectContains;
using tests::Failure;
using tests::ReadFile;
using tests::SafetensorsFile;
using tests::TemporaryDirectory;
using tests::WriteFile;

constexpr uint64_t kSeed = 20240607;

// ---- JSON ----------------------------------------------------------------------------------

Json Parse(const std::string& text) {
  // Exactly as long as the text, so that AddressSanitizer sees a byte read beyond it.
  const std::vector<char> exact(text.begin(), text.end());
  return ParseJson(exact.data(), exact.size(), "test");
}

TEST(Json, ReadsEveryKindOfValue) {
  const Json json = Parse(
      " {\"null\": null, \"no\": false, \"yes\":true , \"list\": [1, -2.5e1, \"\"], \"\": {}} ");
  ASSERT_TRUE(json.is_object());
  EXPECT_EQ(json.members().size(), 5u);
  EXPECT_TRUE(json.Find("null")->is_null());
  EXPECT_FALSE(json.Find("no")->boolean());
  EXPECT_TRUE(json.Find("yes")->boolean());
  const std::vector<Json>& list = json.Find("list")->array();
  ASSERT_EQ(list.size(), 3u);
  EXPECT_EQ(list[0].integer(), 1);
  EXPECT_EQ(list[1].number(), -25.0);
  EXPECT_EQ(list[2].string(), "");
  EXPECT_TRUE(json.Find("")->is_object());
  EXPECT_EQ(json.Find("other"), nullptr);
}

TEST(Json, IntegersAreExact) {
  for (const int64_t value : {int64_t{0}, int64_t{-1}, std::numeric_limits<int64_t>::max(),
                              std::numeric_limits<int64_t>::min(), (int64_t{1} << 53) + 1}) {
    const Json json = Parse(std::to_string(value));
    ASSERT_TRUE(json.is_integer());
    EXPECT_EQ(json.integer(), value);
  }
  EXPECT_FALSE(Parse("9223372036854775808").is_integer());
  EXPECT_FALSE(Parse("1.0").is_integer());
  EXPECT_FALSE(Parse("1e2").is_integer());
}

TEST(Json, NumbersDoNotFollowTheLocale) {
  struct Comma : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  const std::locale before = std::locale::global(std::locale(std::locale(), new Comma));
  const double read = Parse("12345.5").number();
  const std::string described = Parse("12345.5").Describe();
  std::locale::global(before);
  EXPECT_EQ(read, 12345.5);
  EXPECT_EQ(described, "12345.5");
}

TEST(Json, StringsAreUnescaped) {
  EXPECT_EQ(Parse(R"("\"\\\/\b\f\n\r\t\u00e9\ud83d\ude00\u0000")").string(),
            std::string("\"\\/\b\f\n\r\t\xc3\xa9\xf0\x9f\x98\x80\0", 15));
  EXPECT_EQ(Parse("\"\xf4\x8f\xbf\xbf\"").string(), "\xf4\x8f\xbf\xbf");
}

TEST(Json, RefusesWhatIsNotJson) {
  for (const char* text : {"",
                           " ",
                           "{",
                           "[1,]",
                           "{\"a\":1,}",
                           "{\"a\" 1}",
                           "{a:1}",
                           "nul",
                           "NaN",
                           "-Infinity",
                           "01",
                           "1.",
                           ".5",
                           "+1",
                           "1e",
                           "--1",
                           "[1 2]",
                           "1 2",
                           "\"",
                           "\"\\\"",
                           "\"\\x\"",
                           "\"\\u12",
                           "\"\n\"",
                           "\"\\ud800\"",
                           "\"\\udc00\"",
                           "\"\xff\"",
                           "\"\xc0\x80\"",
                           "\"\xed\xa0\x80\"",
                           "1e999",
                           "{\"a\":1,\"a\":2}",
                           "[\"\xe2\x82\"]"}) {
    ExpectContains(Failure([text] { Parse(text); }), "test: is not valid JSON: ");
  }
}

TEST(Json, DepthAndSizeAreBounded) {
  const auto nested = [](int depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  EXPECT_TRUE(Parse(nested(Json::kMaxDepth)).is_array());
  ExpectContains(Failure([&] { Parse(nested(Json::kMaxDepth + 2)); }), "nested deeper than 64");
  ExpectContains(Failure([&] { Parse(std::string(1 << 20, '[')); }), "nested deeper than 64");
  std::string many = "[0";
  for (size_t i = 0; i < Json::kMaxValues; ++i) many += ",0";
  ExpectContains(Failure([&] { Parse(many + "]"); }), "more than 1048576 values");
}

TEST(Json, SurvivesAnyDamage) {
  const std::string good =
      R"({"a": [1, -2.5e-3, "x\u00e9\ud83d\ude00", true, null], "b": {"c": {}, "é": "\\"}})";
  Parse(good);
  for (size_t size = 0; size < good.size(); ++size) {
    ExpectContains(Failure([&] { Parse(good.substr(0, size)); }), "is not valid JSON");
  }
  std::mt19937_64 random(kSeed);
  for (int i = 0; i < 20000; ++i) {
    std::string bad = good;
    for (uint64_t edits = 1 + random() % 3; edits > 0; --edits) {
      const size_t at = random() % bad.size();
      if (random() % 2 == 0) {
        bad[at] = static_cast<char>(random());
      } else {
        bad.erase(at, 1 + random() % 4);
      }
      if (bad.empty()) bad = " ";
    }
    const std::string sentence = Failure([&] { Parse(bad); });
    EXPECT_EQ(sentence.find('\n'), std::string::npos);
  }
}

// ---- UTF-8 ---------------------------------------------------------------------------------

TEST(Utf8, EveryCodePointIsReadBack) {
  for (uint32_t code = 0; code <= 0x10ffff; ++code) {
    if (code >= 0xd800 && code <= 0xdfff) continue;
    std::string text;
    base::AppendUtf8(code, &text);
    const base::Utf8Unit unit = base::ReadUtf8(text.data(), text.data() + text.size());
    ASSERT_EQ(unit.state, base::Utf8State::kValid);
    ASSERT_EQ(unit.code, code);
    ASSERT_EQ(unit.size, text.size());
    for (size_t size = 1; size < text.size(); ++size) {
      const base::Utf8Unit cut = base::ReadUtf8(text.data(), text.data() + size);
      ASSERT_EQ(cut.state, base::Utf8State::kCut);
      ASSERT_EQ(cut.size, size);
    }
  }
}

// ---- Mapped files --------------------------------------------------------------------------

TEST(MappedFile, HoldsTheBytesBeforeAndAfterDroppingPages) {
  const TemporaryDirectory directory;
  std::mt19937_64 random(kSeed);
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (const size_t size : {size_t{1}, page - 1, page, page + 1, 5 * page + 17}) {
    std::string content(size, '\0');
    for (char& byte : content) byte = static_cast<char>(random());
    WriteFile(directory / "file", content);
    const MappedFile file(directory / "file");
    ASSERT_EQ(file.size(), size);
    for (int i = 0; i < 20; ++i) {
      // Ranges of every kind: outside, inside out, without a whole page.
      file.DropPages(random() % (2 * size), random() % (2 * size));
      ASSERT_EQ(std::memcmp(file.data(), content.data(), size), 0);
    }
    file.DropPages(0, size);
    ASSERT_EQ(std::memcmp(file.data(), content.data(), size), 0);
    EXPECT_EQ(ReadTextFile(directory / "file", size), content);
    ExpectContains(Failure([&] { ReadTextFile(directory / "file", size - 1); }), "are allowed");
  }
  WriteFile(directory / "file", "");
  EXPECT_EQ(MappedFile(directory / "file").data(), nullptr);
  EXPECT_EQ(ReadTextFile(directory / "file", 0), "");
}

TEST(MappedFile, RefusesWhatIsNoRegularFile) {
  const TemporaryDirectory directory;
  std::filesystem::create_directory(directory / "folder");
  std::filesystem::create_symlink(directory / "loop", directory / "loop");
  ASSERT_EQ(mkfifo((directory / "pipe").c_str(), 0600), 0);
  const auto open = [&](const std::string& name) {
    return [&, name] { MappedFile(directory / name); };
  };
  ExpectContains(Failure(open("folder")), "is a directory, not a file");
  ExpectContains(Failure(open("pipe")), "is not a regular file");
  ExpectContains(Failure(open("loop"), FASTGEN_NOT_FOUND), "cannot be opened: Too many levels");
  ExpectContains(Failure(open("none"), FASTGEN_NOT_FOUND), "cannot be opened: No such file");
}

TEST(MappedFile, OpensNoMoreFilesThanItCloses) {
  const TemporaryDirectory directory;
  WriteFile(directory / "file", "text");
  const auto open_files = [] {
    return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), {});
  };
  const auto before = open_files();
  for (int i = 0; i < 20; ++i) {
    const MappedFile file(directory / "file");
    ReadTextFile(directory / "file", 10);
    Failure([&] { ReadTextFile(directory / "file", 1); });
    Failure([&] { MappedFile(directory.path()); });
    Failure([&] { MappedFile(directory / "none"); }, FASTGEN_NOT_FOUND);
  }
  EXPECT_EQ(open_files(), before);
}

// ---- Types ---------------------------------------------------------------------------------

TEST(Tensor, EveryHalfIsConvertedExactly) {
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const uint32_t exponent = bits >> 10 & 31;
    const double fraction = (bits & 1023) / 1024.0;
    double expected = exponent == 31  ? (fraction == 0.0 ? INFINITY : NAN)
                      : exponent == 0 ? std::ldexp(fraction, -14)
                                      : std::ldexp(1.0 + fraction, static_cast<int>(exponent) - 15);
    if (bits >> 15) expected = -expected;
    float value = 0.0f;
    ToFloat32(DType::kFloat16, &half, 1, &value);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(value)) << bits;
    } else {
      ASSERT_EQ(static_cast<double>(value), expected) << bits;
      ASSERT_EQ(std::signbit(value), bits >> 15 != 0) << bits;
    }
    ToFloat32(DType::kBFloat16, &half, 1, &value);
    uint32_t float_bits = 0;
    std::memcpy(&float_bits, &value, sizeof value);
    ASSERT_EQ(float_bits, bits << 16);
  }
}

// ---- safetensors ---------------------------------------------------------------------------

class Safetensors : public ::testing::Test {
 protected:
  std::string FailureOf(const std::string& content) {
    WriteFile(path_, content);
    return Failure([this] { OpenSafetensors(path_); });
  }
  std::string FailureOf(const std::string& header, size_t data_size) {
    return FailureOf(SafetensorsFile(header, std::string(data_size, '\0')));
  }

  const TemporaryDirectory directory_;
  const std::string path_ = directory_ / "model.safetensors";
};

TEST_F(Safetensors, GivesTensorsInTheOrderOfTheirBytes) {
  WriteFile(path_, SafetensorsFile(R"({"__metadata__": {"format": "pt"},
      "b": {"dtype": "F32", "shape": [2, 1], "data_offsets": [2, 10]},
      "mask": {"dtype": "BOOL", "shape": [], "data_offsets": [10, 11]},
      "a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}})",
                                   std::string("\x80\x3f\0\0\x80\x3f\0\0\0\xc0\1", 11)));
  const auto source = OpenSafetensors(path_);
  const std::vector<TensorView>& tensors = source->tensors();
  ASSERT_EQ(tensors.size(), 3u);
  EXPECT_EQ(tensors[0].name, "a");
  EXPECT_EQ(tensors[1].name, "b");
  EXPECT_EQ(tensors[1].ShapeText(), "[2, 1]");
  EXPECT_EQ(tensors[2].dtype, DType::kOther);
  EXPECT_EQ(tensors[2].TypeText(), "BOOL");
  float values[2];
  ToFloat32(tensors[0].dtype, tensors[0].data, 1, values);
  EXPECT_EQ(values[0], 1.0f);
  source->Release(tensors[1]);
  ToFloat32(tensors[1].dtype, tensors[1].data, 2, values);
  EXPECT_EQ(values[0], 1.0f);
  EXPECT_EQ(values[1], -2.0f);
}

TEST_F(Safetensors, RefusesSizesThatDoNotFit) {
  const auto entry = [](const std::string& dtype, const std::string& shape,
                        const std::string& offsets) {
    return "{\"t\": {\"dtype\": \"" + dtype + "\", \"shape\": " + shape +
           ", \"data_offsets\": " + offsets + "}}";
  };
  ExpectContains(FailureOf(entry("F32", "[2]", "[0, 8]"), 7), "the file is truncated");
  ExpectContains(FailureOf(entry("F32", "[2]", "[0, 8]"), 9), "the last 1 bytes");
  ExpectContains(FailureOf(entry("F32", "[3]", "[0, 8]"), 8), "does not fill its bytes");
  ExpectContains(FailureOf(entry("F32", "[2]", "[8, 0]"), 8), "impossible bytes");
  ExpectContains(FailureOf(entry("F32", "[1]", "[4, 8]"), 8), "belong to no tensor");
  ExpectContains(FailureOf(entry("F32", "[-1]", "[0, 8]"), 8), "the size -1");
  ExpectContains(FailureOf(entry("F32", "[1.5]", "[0, 8]"), 8), "the size 1.5");
  ExpectContains(FailureOf(entry("F32", "[4294967296, 4294967296]", "[0, 0]"), 0), "too many");
  ExpectContains(FailureOf(entry("F32", "[4611686018427387904]", "[0, 0]"), 0), "does not fill");
  ExpectContains(FailureOf(entry("F32", "[1]", "[0, 9223372036854775807]"), 4), "truncated");
  ExpectContains(FailureOf(entry("F32", "[1]", "[-4, 0]"), 4), "the offset -4");
  ExpectContains(FailureOf(R"({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
                               "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}})",
                           3),
                 "'b' overlaps tensor 'a'");
  ExpectContains(FailureOf(std::string(8, '\xff') + "{}"), "claims a header of");
  ExpectContains(FailureOf(std::string("\x03\0\0\0\0\0\0\0{}", 10)), "claims a header of 3 bytes");
  ExpectContains(FailureOf("1234567"), "too few");
  ExpectContains(FailureOf("[]", 0), "not a JSON object");
}

TEST_F(Safetensors, SurvivesAnyDamage) {
  tests::WriteHuggingFace(tests::MakeTinyModel(1), directory_.path());
  const std::string good = ReadFile(path_);
  ASSERT_EQ(FailureOf(good), "");
  const size_t header_end = good.rfind("]}}") + 3;
  for (size_t size = 0; size < good.size(); size += size < header_end ? 1 : 97) {
    EXPECT_NE(FailureOf(good.substr(0, size)), "") << size;
  }
  std::mt19937_64 random(kSeed);
  for (int i = 0; i < 5000; ++i) {
    std::string bad = good;
    bad[random() % header_end] ^= static_cast<char>(1 + random() % 255);
    FailureOf(bad);
  }
}

TEST_F(Safetensors, ShardsLieInTheDirectoryOnly) {
  const std::string index = path_ + ".index.json";
  const auto open = [&] { OpenCheckpoint(directory_.path()); };
  ExpectContains(Failure(open, FASTGEN_NOT_FOUND), "has neither model.safetensors nor");
  for (const char* shard : {"../model", "/etc/passwd", "", ".", "..", "a\\\\b", "a\\u0000b"}) {
    WriteFile(index, std::string(R"({"weight_map": {"t": ")") + shard + "\"}}");
    ExpectContains(Failure(open), "is not a plain file name");
  }
  const std::string entry = R"(": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})";
  WriteFile(directory_ / "1", SafetensorsFile("{\"t" + entry, "x"));
  WriteFile(directory_ / "2", SafetensorsFile("{\"u" + entry, "x"));
  WriteFile(index, R"({"weight_map": {"t": "1", "u": "2"}})");
  EXPECT_EQ(OpenCheckpoint(directory_.path())->tensors().size(), 2u);
  WriteFile(index, R"({"weight_map": {"t": "1", "v": "2"}})");
  ExpectContains(Failure(open), "'v' is not in its shard '2'");
  WriteFile(directory_ / "2", SafetensorsFile("{\"t" + entry, "x"));
  ExpectContains(Failure(open), "tensor 't' is also in");
}

// ---- Exports -------------------------------------------------------------------------------

class Export : public ::testing::Test {
 protected:
  Export() : headers_(tests::WriteExport(model_, directory_.path())) {}

  std::unique_ptr<TensorSource> Open() {
    return OpenExport(directory_.path(), ReadExportManifest(directory_.path()));
  }
  std::string FailureOfParameters(const std::string& content) {
    WriteFile(directory_ / "gpt.pdiparams", content);
    return Failure([this] { Open(); });
  }

  const TemporaryDirectory directory_;
  const tests::TinyModel model_ = tests::MakeTinyModel(3);
  const std::vector<tests::ByteRange> headers_;
};

TEST_F(Export, GivesTheTensorsThatWereWritten) {
  const auto source = Open();
  ASSERT_EQ(source->tensors().size(), model_.tensors.size());
  for (size_t i = 0; i < model_.tensors.size(); ++i) {
    const TensorView& view = source->tensors()[i];
    EXPECT_EQ(view.name, model_.tensors[i].name);
    EXPECT_EQ(view.shape, model_.tensors[i].shape);
    std::vector<float> values(model_.tensors[i].values.size());
    ToFloat32(view.dtype, view.data, view.num_elements(), values.data());
    EXPECT_EQ(values, model_.tensors[i].values);
    source->Release(view);
  }
  const ExportManifest manifest = ReadExportManifest(directory_.path());
  EXPECT_EQ(manifest.program, "gpt.pdmodel");
  EXPECT_EQ(manifest.inputs, (std::vector<std::string>{"input_ids", "seq_len"}));
  EXPECT_EQ(manifest.generation.Find("top_k")->integer(), 4);
}

TEST_F(Export, EveryHeaderByteCounts) {
  const std::string good = ReadFile(directory_ / "gpt.pdiparams");
  for (const tests::ByteRange& header : headers_) {
    for (uint64_t at = header.begin; at < header.end; ++at) {
      for (const int mask : {1, 0x80, 0xff}) {
        std::string bad = good;
        bad[at] = static_cast<char>(bad[at] ^ mask);
        EXPECT_NE(FailureOfParameters(bad), "") << "byte " << at;
      }
    }
  }
}

TEST_F(Export, DimensionsMayBePacked) {
  // The other form that the message's format allows: one field that holds all sizes.
  std::string content = ReadFile(directory_ / "gpt.pdiparams");
  const std::string repeated = content.substr(20, 6);
  ASSERT_EQ(repeated, std::string("\x08\x05\x10\x17\x10\x0c", 6));
  content.replace(20, 6, std::string("\x08\x05\x12\x02\x17\x0c", 6));
  EXPECT_EQ(FailureOfParameters(content), "");
  for (const char* desc : {"\x08\x05\x12\x03\x17\x0c", "\x08\x05\x12\x01\x17\x0c",
                           "\x08\x05\x12\xff\x17\x0c", "\x08\x05\x08\x05\x17\x0c"}) {
    content.replace(20, 6, desc, 6);
    EXPECT_NE(FailureOfParameters(content), "");
  }
}

TEST_F(Export, TensorsMayNotShareBytes) {
  ExportManifest manifest = ReadExportManifest(directory_.path());
  manifest.tensors.push_back(manifest.tensors[3]);
  EXPECT_NE(Failure([&] { OpenExport(directory_.path(), manifest); }), "");
  manifest.tensors = {};
  ExpectContains(Failure([&] { OpenExport(directory_.path(), manifest); }), "belong to no tensor");
}

}  // namespace
}  // namespace fastgen::io
