// Damages an export in every way that comes to mind and loads it: an error with a sentence, or a
// model that works, and never a crash, a leak or a large allocation. Built with sanitizers.
//
//   ASAN_OPTIONS=quarantine_size_mb=8 corrupt_export <export> <scratch directory> <flips per file>
#include <fastgen/fastgen.h>
#include <sys/resource.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

namespace {

const char* const kFiles[] = {"fastgen.json", "gpt.pdiparams"};
// Beyond what the good model needed.
constexpr long kMaxGrowthKiB = 256 << 10;

long PeakKiB() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss;
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

void WriteFile(const std::string& path, const std::string& content) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(content.data(), static_cast<std::streamsize>(content.size()));
  if (!file.flush()) {
    std::perror(path.c_str());
    std::exit(2);
  }
}

// Every byte of the records' headers and the first of their data: what fastgen.json calls "offset"
// is where a header ends.
std::vector<size_t> HeaderBytes(const std::string& json) {
  const std::string key = "\"offset\": ";
  std::vector<size_t> bytes;
  for (size_t at = json.find(key); at != std::string::npos; at = json.find(key, at + 1)) {
    const size_t offset = std::strtoull(json.c_str() + at + key.size(), nullptr, 10);
    for (size_t byte = offset < 26 ? 0 : offset - 26; byte <= offset; ++byte) bytes.push_back(byte);
  }
  return bytes;
}

struct Counts {
  int refused = 0;
  int loaded = 0;
};

// Loads `directory` and asks the model for something. `must_fail`: no damage can be overlooked.
void Try(const std::string& directory, const std::string& damage, bool must_fail, Counts* counts) {
  fastgen_model_options options;
  fastgen_model_options_init(&options);
  options.num_threads = 1;
  fastgen_model* model = nullptr;
  const fastgen_status status = fastgen_model_load(directory.c_str(), &options, &model);
  if (status == FASTGEN_OK) {
    ++counts->loaded;
    if (must_fail) {
      std::fprintf(stderr, "%s was loaded\n", damage.c_str());
      std::exit(1);
    }
    fastgen_config config;
    fastgen_config_init(&config);
    fastgen_model_get_config(model, &config);
    std::vector<float> logits(static_cast<size_t>(config.vocab_size));
    const int32_t token = 0;
    if (fastgen_model_logits(model, &token, 1, logits.data()) != FASTGEN_OK) std::exit(1);
    fastgen_model_free(model);
    return;
  }
  ++counts->refused;
  const std::string sentence = fastgen_last_error();
  const bool expected =
      status == FASTGEN_BAD_FILE || status == FASTGEN_NOT_FOUND || status == FASTGEN_UNSUPPORTED;
  if (!expected || model != nullptr || sentence.empty() || sentence.size() > 1000 ||
      sentence.find('\n') != std::string::npos) {
    std::fprintf(stderr, "%s: status %d, \"%s\"\n", damage.c_str(), static_cast<int>(status),
                 sentence.c_str());
    std::exit(1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: corrupt_export <export> <scratch directory> <flips per file>\n");
    return 2;
  }
  const std::string scratch = argv[2];
  const int flips = std::atoi(argv[3]);
  std::vector<std::string> good;
  for (const char* name : kFiles) {
    good.push_back(ReadFile(std::string(argv[1]) + "/" + name));
    WriteFile(scratch + "/" + name, good.back());
  }
  Counts whole;
  Try(scratch, "the good export", false, &whole);
  if (whole.loaded != 1) {
    std::fprintf(stderr, "the good export: %s\n", fastgen_last_error());
    return 1;
  }
  const long before = PeakKiB();

  std::mt19937_64 random(20240607);
  for (size_t i = 0; i < good.size(); ++i) {
    const std::string path = scratch + "/" + kFiles[i];
    const std::string name = kFiles[i];
    const bool is_json = i == 0;
    Counts truncated;
    for (size_t size = 0; size < good[i].size(); ++size) {
      WriteFile(path, good[i].substr(0, size));
      // Only the line break after the JSON can be missed by nobody.
      const bool harmless = is_json && size + 1 == good[i].size();
      Try(scratch, name + " cut to " + std::to_string(size), !harmless, &truncated);
    }
    Counts flipped;
    const std::vector<size_t> headers = is_json ? std::vector<size_t>() : HeaderBytes(good[0]);
    for (int flip = 0; flip < flips; ++flip) {
      std::string bad = good[i];
      const size_t at = is_json ? random() % bad.size() : headers[random() % headers.size()];
      bad[at] = static_cast<char>(bad[at] ^ static_cast<char>(1 + random() % 255));
      WriteFile(path, bad);
      Try(scratch, name + " changed at " + std::to_string(at), false, &flipped);
    }
    Counts added;
    WriteFile(path, good[i] + '\0');
    Try(scratch, name + " with a byte more", true, &added);
    std::remove(path.c_str());
    Try(scratch, name + " missing", true, &added);
    WriteFile(path, good[i]);
    std::printf("%s: %d truncations refused, %d loaded; %d flips refused, %d loaded\n",
                name.c_str(), truncated.refused, truncated.loaded, flipped.refused, flipped.loaded);
  }
  const long growth = PeakKiB() - before;
  std::printf("peak memory grew by %ld KiB\n", growth);
  return growth <= kMaxGrowthKiB ? 0 : 1;
}
