// Damages an export, and a directory of rounded weights, in every way that comes to mind and loads model
// and tokenizer: an error with a
// sentence, or one that works, and never a crash, a leak or a large allocation. Of most use when built
// with sanitizers.
//
//   corrupt_export <scratch directory> <flips per file> [<export>]
//
// Without an export it makes a small one. Each of the two loaders is given every file that it reads:
// every truncation, random changes of the header, a byte more, nothing, a symbolic link to itself.
#include <fastgen/fastgen.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "memory_limit.h"
#include "temporary.h"
#include "tiny_model.h"

namespace {

using fastgen::tests::ByteRange;
using fastgen::tests::ReadFile;
using fastgen::tests::WriteFile;

// For everything that loading a damaged export asks for, whether or not it is touched.
constexpr uint64_t kMaxGrowth = uint64_t{256} << 20;

struct Counts {
  int refused = 0;
  int loaded = 0;
};

[[noreturn]] void Fail(const std::string& damage, const std::string& what) {
  std::fprintf(stderr, "%s: %s\n", damage.c_str(), what.c_str());
  std::exit(1);
}

// A failed call has one of the statuses that a file can be at fault for, and one readable sentence.
void CheckRefusal(fastgen_status status, const std::string& damage, Counts* counts) {
  ++counts->refused;
  const std::string sentence = fastgen_last_error();
  const bool expected =
      status == FASTGEN_BAD_FILE || status == FASTGEN_NOT_FOUND || status == FASTGEN_UNSUPPORTED;
  if (!expected || sentence.empty() || sentence.size() > 1000 ||
      sentence.find('\n') != std::string::npos) {
    Fail(damage, "status " + std::to_string(status) + ", \"" + sentence + "\"");
  }
}

// ---- the two loaders -----------------------------------------------------------------------

// Loads the model and asks it for something.
void TryModel(const std::string& directory, const std::string& damage, Counts* counts) {
  fastgen_model_options options;
  fastgen_model_options_init(&options);
  options.num_threads = 1;
  fastgen_model* model = nullptr;
  const fastgen_status status = fastgen_model_load(directory.c_str(), &options, &model);
  if (status != FASTGEN_OK) {
    if (model != nullptr) Fail(damage, "a failed call gave a model");
    return CheckRefusal(status, damage, counts);
  }
  ++counts->loaded;
  fastgen_config config;
  fastgen_config_init(&config);
  fastgen_model_get_config(model, &config);
  std::vector<float> logits(static_cast<size_t>(config.vocab_size));
  const int32_t token = 0;
  if (fastgen_model_logits(model, &token, 1, logits.data()) != FASTGEN_OK) {
    Fail(damage, fastgen_last_error());
  }
  fastgen_model_free(model);
}

// Loads the tokenizer and takes a text there and back.
void TryTokenizer(const std::string& directory, const std::string& damage, Counts* counts) {
  fastgen_tokenizer* tokenizer = nullptr;
  const fastgen_status status = fastgen_tokenizer_load(directory.c_str(), &tokenizer);
  if (status != FASTGEN_OK) {
    if (tokenizer != nullptr) Fail(damage, "a failed call gave a tokenizer");
    return CheckRefusal(status, damage, counts);
  }
  ++counts->loaded;
  const std::string text = "return a <|endoftext|>\n\xc3\xa9\xff";
  std::vector<int32_t> tokens(text.size());
  size_t length = 0;
  const fastgen_status encoded = fastgen_tokenizer_encode(tokenizer, text.data(), text.size(),
                                                          tokens.data(), tokens.size(), &length);
  // The damage may have taken the token of a byte away.
  if (encoded != FASTGEN_OK && encoded != FASTGEN_INVALID_ARGUMENT) {
    Fail(damage, fastgen_last_error());
  }
  if (encoded == FASTGEN_OK) {
    if (length > tokens.size()) Fail(damage, "a text has more tokens than bytes");
    std::vector<char> decoded(1 << 16);
    size_t size = 0;
    if (fastgen_tokenizer_decode(tokenizer, tokens.data(), length, 0, decoded.data(),
                                 decoded.size(), &size) != FASTGEN_OK) {
      Fail(damage, fastgen_last_error());
    }
  }
  fastgen_tokenizer_free(tokenizer);
}

struct Loader {
  const char* name;
  void (*load)(const std::string& directory, const std::string& damage, Counts* counts);
};
constexpr Loader kModel = {"model", TryModel};
constexpr Loader kTokenizer = {"tokenizer", TryTokenizer};

// ---- the damage ----------------------------------------------------------------------------

struct File {
  const char* name;
  Loader loader;
  // Truncations that may leave a whole file: the last bytes of JSON are white space, and a list of
  // lines is one at any length.
  enum { kNone, kLastByte, kAny } harmless;
  bool may_be_missing;
  bool may_have_more;  // a NUL at its end
  bool of_an_export;   // else it is read where there is no fastgen.json
};

constexpr File kFiles[] = {
    {"fastgen.json", kModel, File::kLastByte, false, false, true},
    {"fastgen.json", kTokenizer, File::kLastByte, true, false, true},
    {"gpt.pdiparams", kModel, File::kNone, false, false, true},
    {"vocab.txt", kTokenizer, File::kAny, false, true, true},
    {"merges.txt", kTokenizer, File::kAny, false, false, true},
    {"special_tokens_map.json", kTokenizer, File::kLastByte, true, false, false},
    {"tokenizer_config.json", kTokenizer, File::kLastByte, true, false, false},
    {"config.json", kModel, File::kNone, false, false, false},
    {"model.safetensors", kModel, File::kNone, false, false, false},
};

// Bytes whose change matters: of gpt.pdiparams the records' headers and the first byte after each
// (what fastgen.json calls "offset" is where a header ends); of the other files all.
std::vector<size_t> HeaderBytes(const File& file, const std::string& content,
                                const std::string& manifest) {
  std::vector<size_t> bytes;
  if (std::string(file.name) != "gpt.pdiparams") {
    for (size_t at = 0; at < content.size(); ++at) bytes.push_back(at);
    return bytes;
  }
  const std::string key = "\"offset\": ";
  for (size_t at = manifest.find(key); at != std::string::npos; at = manifest.find(key, at + 1)) {
    const size_t offset = std::strtoull(manifest.c_str() + at + key.size(), nullptr, 10);
    const size_t last = std::min(offset, content.size() - 1);
    for (size_t byte = offset < 26 ? 0 : offset - 26; byte <= last; ++byte) bytes.push_back(byte);
  }
  return bytes;
}

class Damager {
 public:
  Damager(std::string scratch, int flips) : scratch_(std::move(scratch)), flips_(flips) {}

  void DamageFile(const File& file, const std::string& good, const std::string& manifest) {
    const std::string path = scratch_ + "/" + file.name;
    const std::string name = file.name;
    const auto load = [&](const std::string& damage, Counts* counts) {
      file.loader.load(scratch_, damage, counts);
    };

    Counts truncated;
    for (size_t size = 0; size < good.size(); ++size) {
      const int loaded = truncated.loaded;
      WriteFile(path, good.substr(0, size));
      load(name + " cut to " + std::to_string(size), &truncated);
      const bool harmless = file.harmless == File::kAny ||
                            (file.harmless == File::kLastByte && size + 1 == good.size());
      if (truncated.loaded > loaded && !harmless) {
        Fail(name + " cut to " + std::to_string(size), "was loaded");
      }
    }

    Counts flipped;
    const std::vector<size_t> headers = HeaderBytes(file, good, manifest);
    for (int flip = 0; flip < flips_; ++flip) {
      std::string bad = good;
      const size_t at = headers[random_() % headers.size()];
      bad[at] = static_cast<char>(bad[at] ^ static_cast<char>(1 + random_() % 255));
      WriteFile(path, bad);
      load(name + " changed at " + std::to_string(at), &flipped);
    }

    WriteFile(path, good + '\0');
    Expect(file.may_have_more, file, name + " with a byte more");
    std::filesystem::remove(path);
    Expect(file.may_be_missing, file, name + " missing");
    std::filesystem::create_symlink(path, path);
    Expect(false, file, name + " a symbolic link to itself");
    std::filesystem::remove(path);
    std::filesystem::create_directory(path);
    Expect(false, file, name + " a directory");
    std::filesystem::remove(path);
    WriteFile(path, good);
    Expect(true, file, name + " restored");
    std::printf("%-23s %-9s %5d truncations refused, %4d loaded; %4d flips refused, %4d loaded\n",
                file.name, file.loader.name, truncated.refused, truncated.loaded, flipped.refused,
                flipped.loaded);
  }

  // Directories that lead nowhere.
  void DamageDirectory() {
    const std::string loop = scratch_ + "/loop";
    std::filesystem::create_symlink(loop, loop);
    const std::string other = scratch_ + "/other";
    std::filesystem::create_symlink(scratch_ + "/another", other);
    std::filesystem::create_symlink(other, scratch_ + "/another");
    for (const std::string& directory :
         {loop, loop + "/inside", other, scratch_ + "/nothing", scratch_ + "/vocab.txt"}) {
      for (const Loader& loader : {kModel, kTokenizer}) {
        Counts counts;
        const std::string damage = std::string(loader.name) + " of " + directory;
        loader.load(directory, damage, &counts);
        if (counts.loaded != 0) Fail(damage, "was loaded");
      }
    }
    for (const char* name : {"loop", "other", "another"}) {
      std::filesystem::remove(scratch_ + "/" + name);
    }
  }

 private:
  void Expect(bool loads, const File& file, const std::string& damage) {
    Counts counts;
    file.loader.load(scratch_, damage, &counts);
    if (loads && counts.loaded == 0) Fail(damage, fastgen_last_error());
    if (!loads && counts.loaded != 0) Fail(damage, "was loaded");
  }

  const std::string scratch_;
  const int flips_;
  std::mt19937_64 random_{20240607};
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 && argc != 4) {
    std::fprintf(stderr, "usage: corrupt_export <scratch directory> <flips per file> [<export>]\n");
    return 2;
  }
  try {
    const std::string scratch = argv[1];
    std::filesystem::remove_all(scratch);
    std::filesystem::create_directories(scratch);
    if (argc == 4) {
      for (const File& file : kFiles) {
        const std::string path = std::string(argv[3]) + "/" + file.name;
        if (std::filesystem::exists(path)) WriteFile(scratch + "/" + file.name, ReadFile(path));
      }
    } else {
      fastgen::tests::WriteExport(fastgen::tests::MakeTinyModel(3), scratch);
    }
    // A good one first, so that what is made once and kept does not count.
    for (const Loader& loader : {kModel, kTokenizer}) {
      Counts counts;
      loader.load(scratch, "the good export", &counts);
      if (counts.loaded != 1) Fail("the good export", fastgen_last_error());
    }
    const fastgen::tests::MemoryLimit limit(kMaxGrowth);
    Damager damager(scratch, std::atoi(argv[2]));
    const std::string manifest = ReadFile(scratch + "/fastgen.json");
    damager.DamageDirectory();
    for (const bool of_an_export : {true, false}) {
      if (!of_an_export) std::filesystem::remove(scratch + "/fastgen.json");
      for (const File& file : kFiles) {
        const std::string path = scratch + "/" + file.name;
        if (file.of_an_export == of_an_export && std::filesystem::exists(path)) {
          damager.DamageFile(file, ReadFile(path), manifest);
        }
      }
    }
    for (const char* type : {"int4", "int8", "bfloat16"}) {
      std::filesystem::remove_all(scratch);
      std::filesystem::create_directories(scratch);
      fastgen::tests::WriteRounded(fastgen::tests::MakeTinyModel(3), type, scratch);
      std::printf("%s:\n", type);
      for (const File& file : kFiles) {
        const std::string path = scratch + "/" + file.name;
        if (std::filesystem::exists(path)) damager.DamageFile(file, ReadFile(path), "");
      }
    }
    std::filesystem::remove_all(scratch);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "corrupt_export: %s\n", error.what());
    return 2;
  }
  return 0;
}
