// Runs an exported model with Paddle from C++: text in and text out, or token ids.
//
//   fastgen-gpt-paddle --model_dir infer_model --prompt "The quick brown" --max_length 20
#include <algorithm>
#include <cstdint>
#include <iostream>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "apps/command_line.h"
#include "apps/output.h"
#include "apps/paddle_program.h"
#include "base/error.h"
#include "engine/config.h"
#include "io/export.h"
#include "text/tokenizer.h"

namespace fastgen::apps {
namespace {

constexpr char kUsage[] =
    R"(Usage: fastgen-gpt-paddle --model_dir DIR [--prompt TEXT]... [OPTION]...

Runs a directory of `fastgen export` with Paddle. Without prompts they are read from standard input,
as texts.

  --model_dir DIR         the export
  --prompt TEXT           text to continue; may be given more than once
  --prompt_file FILE      file with one prompt a line; - is standard input
  --prompt_ids "1 2 3"    the same as token ids, which need no tokenizer: token ids come out,
  --prompt_ids_file FILE  up to and with the end token
  --op_library FILE       libdecoding_op.so [the one built with this program]
  --json                  print one JSON object
  --help

For an export made with --runtime_options; the export's own values are the defaults:
  --max_length N  --topk K  --topp P  --temperature T
  --seed S                the same seed gives the same tokens; it is spread over the prompts

Exit status: 0; 1 with one sentence on standard error; 2 for bad usage.
)";

#if !defined(FASTGEN_OP_LIBRARY)
#error "the build defines FASTGEN_OP_LIBRARY as the path of the op library"
#endif

struct Settings {
  std::string model_dir;
  std::string op_library = FASTGEN_OP_LIBRARY;
  PromptOptions prompts;
  // Not given: the export's.
  std::optional<std::int32_t> max_length, top_k;
  std::optional<float> top_p, temperature;
  std::optional<std::uint64_t> seed;
  bool json = false;
  bool help = false;

  bool has_options() const { return max_length || top_k || top_p || temperature || seed; }
};

Settings ParseCommandLine(int argc, char** argv) {
  Settings settings;
  CommandLine line;
  settings.prompts.AddTo(&line);
  line.Value("model_dir", &settings.model_dir);
  line.Value("op_library", &settings.op_library);
  line.Value("max_length", &settings.max_length);
  line.Value("max_out_len", &settings.max_length);
  line.Value("topk", &settings.top_k);
  line.Value("top_k", &settings.top_k);
  line.Value("topp", &settings.top_p);
  line.Value("top_p", &settings.top_p);
  line.Value("temperature", &settings.temperature);
  line.Value("seed", &settings.seed);
  line.Flag("json", &settings.json);
  line.Flag("help", &settings.help);
  line.Parse(argc, argv);
  if (settings.help) return settings;
  if (settings.model_dir.empty()) throw UsageError("--model_dir is missing");
  settings.prompts.Check();
  return settings;
}

std::shared_ptr<const text::Tokenizer> LoadTokenizer(const std::string& directory) {
  try {
    return text::Tokenizer::Load(directory);
  } catch (const base::Error& error) {
    if (error.status() != FASTGEN_NOT_FOUND) throw;
    throw std::runtime_error(error.what() + std::string(kNoTokenizer));
  }
}

// Limits are the model's: Paddle would read beyond its tables.
void CheckPrompt(const std::vector<std::int32_t>& prompt, const engine::ModelConfig& config) {
  if (prompt.empty()) throw std::runtime_error("a prompt is empty, it must have a token");
  if (prompt.size() >= static_cast<size_t>(config.max_positions)) {
    throw std::runtime_error("a prompt has " + std::to_string(prompt.size()) +
                             " tokens, it must have fewer than the model's " +
                             std::to_string(config.max_positions) + " positions");
  }
  for (const std::int32_t token : prompt) {
    if (token < 0 || token >= config.vocab_size) {
      throw std::runtime_error("a prompt has the token id " + std::to_string(token) +
                               ", it must be from 0 to " + std::to_string(config.vocab_size - 1));
    }
  }
}

// ---- The program's inputs -------------------------------------------------------------------

// A member of `generation` in fastgen.json, or what the command line says instead.
template <typename T>
T Option(const io::ExportManifest& manifest, const char* key,
         const std::optional<T>& given = std::nullopt) {
  if (given) return *given;
  constexpr bool kIsInteger = std::numeric_limits<T>::is_integer;
  const io::Json* value = manifest.generation.Find(key);
  if (value == nullptr || !value->is_number() || (kIsInteger && !value->is_integer())) {
    throw std::runtime_error(manifest.path + ": generation has no number " + key);
  }
  return kIsInteger ? static_cast<T>(value->integer()) : static_cast<T>(value->number());
}

std::uint64_t Seed(const io::ExportManifest& manifest, const std::optional<std::uint64_t>& given) {
  if (given) return *given;
  const io::Json* value = manifest.generation.Find("seed");
  if (value != nullptr && value->is_string()) {
    return ToNumber<std::uint64_t>("seed of " + manifest.path, value->string());
  }
  std::random_device device;
  return static_cast<std::uint64_t>(device()) << 32 | device();
}

std::vector<Feed> MakeFeeds(const Settings& settings, const io::ExportManifest& manifest,
                            const std::vector<std::vector<std::int32_t>>& prompts) {
  const size_t rows = prompts.size();
  size_t longest = 0;
  for (const auto& prompt : prompts) longest = std::max(longest, prompt.size());
  std::vector<Feed> feeds;
  bool runtime_options = false;
  for (const std::string& name : manifest.inputs) {
    Feed feed;
    feed.name = name;
    feed.shape = {static_cast<int64_t>(rows)};
    if (name == "input_ids") {
      feed.shape.push_back(static_cast<int64_t>(longest));
      for (const auto& prompt : prompts) {
        feed.int64s.insert(feed.int64s.end(), prompt.begin(), prompt.end());
        feed.int64s.resize(feed.int64s.size() + longest - prompt.size());
      }
    } else if (name == "seq_len") {
      for (const auto& prompt : prompts) {
        feed.int32s.push_back(static_cast<std::int32_t>(prompt.size()));
      }
    } else if (name == "top_k") {
      feed.int32s.assign(rows, Option(manifest, "top_k", settings.top_k));
    } else if (name == "top_p") {
      feed.floats.assign(rows, Option(manifest, "top_p", settings.top_p));
    } else if (name == "temperature") {
      feed.floats.assign(rows, Option(manifest, "temperature", settings.temperature));
    } else if (name == "max_length") {
      feed.int32s.assign(rows, Option(manifest, "max_length", settings.max_length));
    } else if (name == "seed") {
      runtime_options = true;
      // One seed is spread over the rows; the input holds the bits of an unsigned number.
      feed.shape = {1};
      feed.int64s = {static_cast<int64_t>(Seed(manifest, settings.seed))};
    } else {
      throw std::runtime_error(manifest.path + ": the program has an input '" + name +
                               "', which this program does not know");
    }
    feeds.push_back(std::move(feed));
  }
  if (settings.has_options() && !runtime_options) {
    throw UsageError(
        "this export has its options inside: --max_length, --topk, --topp, --temperature and "
        "--seed need one made with --runtime_options");
  }
  return feeds;
}

// ---- The program's outputs ------------------------------------------------------------------

// Rows up to and with the end token, without padding.
std::vector<Sequence> ReadOutput(const ProgramOutput& output, int64_t eos, int64_t max_length,
                                 const text::Tokenizer* tokenizer) {
  std::vector<Sequence> sequences;
  for (int64_t row = 0; row < output.rows; ++row) {
    Sequence sequence;
    sequence.score = static_cast<double>(output.scores[static_cast<size_t>(row)]);
    sequence.finish_reason = "length";
    for (int64_t i = 0; i < std::min(output.columns, max_length); ++i) {
      const int64_t token = output.ids[static_cast<size_t>(row * output.columns + i)];
      sequence.tokens.push_back(static_cast<std::int32_t>(token));
      if (token != eos) continue;
      sequence.finish_reason = "eos";
      break;
    }
    if (tokenizer != nullptr) {
      const bool ended = sequence.finish_reason == "eos";
      sequence.text =
          tokenizer->Decode(sequence.tokens.data(), sequence.tokens.size() - (ended ? 1 : 0), true);
    }
    sequences.push_back(std::move(sequence));
  }
  return sequences;
}

int Main(int argc, char** argv) {
  const Settings settings = ParseCommandLine(argc, argv);
  if (settings.help) {
    std::cout << kUsage;
    return 0;
  }
  Prompts prompts = ReadPrompts(settings.prompts);
  const io::ExportManifest manifest = io::ReadExportManifest(settings.model_dir);
  const engine::ModelConfig config = engine::ReadExportConfig(manifest.config, manifest.path);
  std::shared_ptr<const text::Tokenizer> tokenizer;
  if (!settings.prompts.are_ids()) tokenizer = LoadTokenizer(settings.model_dir);
  for (const std::string& prompt : prompts.texts) {
    prompts.ids.push_back(tokenizer->Encode(prompt.data(), prompt.size()));
  }
  for (const auto& prompt : prompts.ids) CheckPrompt(prompt, config);

  const std::vector<Feed> feeds = MakeFeeds(settings, manifest, prompts.ids);
  const auto program =
      PaddleProgram::Load(settings.model_dir, manifest.program, settings.op_library);
  const std::vector<Sequence> sequences =
      ReadOutput(program->Run(feeds), Option<int64_t>(manifest, "eos_token_id"),
                 Option(manifest, "max_length", settings.max_length), tokenizer.get());
  const size_t per_prompt = sequences.size() / prompts.ids.size();
  if (settings.json) {
    // Bytes that are not UTF-8 would not be JSON.
    std::vector<std::string> texts;
    for (const auto& ids : prompts.ids) {
      if (tokenizer) texts.push_back(tokenizer->Decode(ids.data(), ids.size(), false));
    }
    std::cout << "{" << SequenceMembers(texts, prompts.ids, sequences, per_prompt) << "}\n";
  } else {
    PrintSequences(prompts.texts, sequences, per_prompt);
  }
  std::cout.flush();
  if (!std::cout) throw std::runtime_error("standard output cannot be written");
  return 0;
}

}  // namespace
}  // namespace fastgen::apps

int main(int argc, char** argv) {
  try {
    return fastgen::apps::Main(argc, argv);
  } catch (const fastgen::apps::UsageError& error) {
    std::cerr << "fastgen-gpt-paddle: " << error.what() << "; see fastgen-gpt-paddle --help\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "fastgen-gpt-paddle: " << error.what() << '\n';
    return 1;
  }
}
