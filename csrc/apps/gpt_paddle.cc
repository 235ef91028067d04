// Runs an exported model with Paddle from C++: token ids in, token ids out.
//
//   fastgen-gpt-paddle --model_dir infer_model --prompt_ids "464 2068" --max_length 20
#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <limits>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "apps/paddle_program.h"
#include "engine/config.h"
#include "io/export.h"

namespace fastgen::apps {
namespace {

constexpr char kUsage[] =
    R"(Usage: fastgen-gpt-paddle --model_dir DIR [options]

Runs a directory of `fastgen export` with Paddle. Prompts are token ids; one line of new token ids
comes out for each, up to and with the end token.

  --model_dir DIR       the export
  --prompt_ids "1 2 3"  a prompt; may be given more than once
  --prompt_file FILE    a prompt on each line; - is standard input
  --op_library FILE     libdecoding_op.so  [default: the one built with this program]
  --json                one JSON object instead of lines
  --help

For an export made with --runtime_options; the export's own values are the defaults:
  --max_length N  --topk K  --topp P  --temperature T
  --seed S              the same seed gives the same tokens; it is spread over the prompts

Exit status: 0, 1 if something failed, 2 for bad usage.
)";

#if !defined(FASTGEN_OP_LIBRARY)
#error "the build defines FASTGEN_OP_LIBRARY as the path of the op library"
#endif

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Prompt = std::vector<int32_t>;

struct Arguments {
  std::string model_dir;
  std::string op_library = FASTGEN_OP_LIBRARY;
  std::vector<std::string> prompts;
  std::vector<std::string> prompt_files;
  // As given: "" is the export's.
  std::string max_length, top_k, top_p, temperature, seed;
  bool json = false;
  bool help = false;
};

Arguments ParseArguments(int count, char** values) {
  Arguments arguments;
  for (int i = 1; i < count; ++i) {
    std::string name = values[i];
    std::string value;
    const size_t equals = name.find('=');
    const bool has_value = equals != std::string::npos;
    if (has_value) {
      value = name.substr(equals + 1);
      name.resize(equals);
    }
    const auto text = [&]() -> const std::string& {
      if (!has_value) {
        if (i + 1 == count) throw UsageError(name + " needs a value");
        value = values[++i];
      }
      return value;
    };
    if (name == "--model_dir") {
      arguments.model_dir = text();
    } else if (name == "--op_library") {
      arguments.op_library = text();
    } else if (name == "--prompt_ids") {
      arguments.prompts.push_back(text());
    } else if (name == "--prompt_file") {
      arguments.prompt_files.push_back(text());
    } else if (name == "--max_length" || name == "--max_out_len") {
      arguments.max_length = text();
    } else if (name == "--topk" || name == "--top_k") {
      arguments.top_k = text();
    } else if (name == "--topp" || name == "--top_p") {
      arguments.top_p = text();
    } else if (name == "--temperature") {
      arguments.temperature = text();
    } else if (name == "--seed") {
      arguments.seed = text();
    } else if (name == "--json" && !has_value) {
      arguments.json = true;
    } else if ((name == "--help" || name == "-h") && !has_value) {
      arguments.help = true;
    } else {
      throw UsageError(name + " is not an option");
    }
  }
  if (!arguments.help && arguments.model_dir.empty()) throw UsageError("--model_dir is missing");
  return arguments;
}

template <typename T>
T ParseNumber(const std::string& name, const std::string& text) {
  std::istringstream stream(text);
  T number{};
  stream >> number;
  // A stream reads "-1" into an unsigned number without complaint.
  const bool wraps = std::numeric_limits<T>::is_integer && !std::numeric_limits<T>::is_signed &&
                     text.find('-') != std::string::npos;
  if (text.empty() || !stream || stream.peek() != std::istringstream::traits_type::eof() || wraps) {
    throw UsageError(name + " is '" + text + "', it must be a number");
  }
  return number;
}

// Limits are the model's.
Prompt ParsePrompt(const std::string& line, const engine::ModelConfig& config) {
  Prompt prompt;
  std::istringstream stream(line);
  for (std::string word; stream >> word;) {
    const auto token = ParseNumber<int64_t>("a token id", word);
    if (token < 0 || token >= config.vocab_size) {
      throw UsageError("token id " + word + " must be from 0 to " +
                       std::to_string(config.vocab_size - 1));
    }
    prompt.push_back(static_cast<int32_t>(token));
  }
  if (prompt.size() >= static_cast<size_t>(config.max_positions)) {
    throw UsageError("a prompt has " + std::to_string(prompt.size()) +
                     " tokens, it must have fewer than the model's " +
                     std::to_string(config.max_positions) + " positions");
  }
  return prompt;
}

void ReadLines(std::istream& stream, const engine::ModelConfig& config,
               std::vector<Prompt>* prompts) {
  for (std::string line; std::getline(stream, line);) {
    Prompt prompt = ParsePrompt(line, config);
    if (!prompt.empty()) prompts->push_back(std::move(prompt));
  }
}

std::vector<Prompt> ReadPrompts(const Arguments& arguments, const engine::ModelConfig& config) {
  std::vector<Prompt> prompts;
  for (const std::string& text : arguments.prompts) {
    prompts.push_back(ParsePrompt(text, config));
    if (prompts.back().empty()) throw UsageError("--prompt_ids is empty");
  }
  for (const std::string& path : arguments.prompt_files) {
    if (path == "-") {
      ReadLines(std::cin, config, &prompts);
      continue;
    }
    std::ifstream file(path);
    if (!file) throw UsageError("--prompt_file " + path + " cannot be read");
    ReadLines(file, config, &prompts);
  }
  if (prompts.empty()) {
    // As PaddleNLP does: from the token that begins a text.
    const int32_t start = config.bos_token_id >= 0 ? config.bos_token_id : config.eos_token_id;
    if (!arguments.prompt_files.empty() || start < 0) throw UsageError("there is no prompt");
    prompts.push_back({start});
  }
  return prompts;
}

// A member of `generation` in fastgen.json, or what the command line says instead.
template <typename T>
T Option(const io::ExportManifest& manifest, const char* key, const std::string& given) {
  if (!given.empty()) return ParseNumber<T>(std::string("--") + key, given);
  const io::Json* value = manifest.generation.Find(key);
  if (value == nullptr || !value->is_number() ||
      (std::numeric_limits<T>::is_integer && !value->is_integer())) {
    throw std::runtime_error(manifest.path + ": generation has no number " + key);
  }
  return std::numeric_limits<T>::is_integer ? static_cast<T>(value->integer())
                                            : static_cast<T>(value->number());
}

uint64_t Seed(const io::ExportManifest& manifest, const std::string& given) {
  if (!given.empty()) return ParseNumber<uint64_t>("--seed", given);
  const io::Json* value = manifest.generation.Find("seed");
  if (value != nullptr && value->is_string()) {
    return ParseNumber<uint64_t>("seed of " + manifest.path, value->string());
  }
  std::random_device device;
  return static_cast<uint64_t>(device()) << 32 | device();
}

std::vector<Feed> MakeFeeds(const Arguments& arguments, const io::ExportManifest& manifest,
                            const std::vector<Prompt>& prompts) {
  const auto rows = static_cast<int64_t>(prompts.size());
  size_t longest = 0;
  for (const Prompt& prompt : prompts) longest = std::max(longest, prompt.size());
  std::vector<Feed> feeds;
  bool runtime_options = false;
  for (const std::string& name : manifest.inputs) {
    Feed feed;
    feed.name = name;
    feed.shape = {rows};
    const size_t count = prompts.size();
    if (name == "input_ids") {
      feed.shape.push_back(static_cast<int64_t>(longest));
      for (const Prompt& prompt : prompts) {
        feed.int64s.insert(feed.int64s.end(), prompt.begin(), prompt.end());
        feed.int64s.resize(feed.int64s.size() + longest - prompt.size());
      }
    } else if (name == "seq_len") {
      for (const Prompt& prompt : prompts) {
        feed.int32s.push_back(static_cast<int32_t>(prompt.size()));
      }
    } else if (name == "top_k") {
      feed.int32s.assign(count, Option<int32_t>(manifest, "top_k", arguments.top_k));
    } else if (name == "top_p") {
      feed.floats.assign(count, Option<float>(manifest, "top_p", arguments.top_p));
    } else if (name == "temperature") {
      feed.floats.assign(count, Option<float>(manifest, "temperature", arguments.temperature));
    } else if (name == "max_length") {
      feed.int32s.assign(count, Option<int32_t>(manifest, "max_length", arguments.max_length));
    } else if (name == "seed") {
      runtime_options = true;
      // One seed is spread over the rows; the input holds the bits of an unsigned number.
      feed.shape = {1};
      feed.int64s = {static_cast<int64_t>(Seed(manifest, arguments.seed))};
    } else {
      throw std::runtime_error(manifest.path + ": the program has an input '" + name +
                               "', which this program does not know");
    }
    feeds.push_back(std::move(feed));
  }
  const bool given = !(arguments.max_length + arguments.top_k + arguments.top_p +
                       arguments.temperature + arguments.seed)
                          .empty();
  if (given && !runtime_options) {
    throw UsageError(
        "this export has its options inside: --max_length, --topk, --topp, --temperature and "
        "--seed need one made with --runtime_options");
  }
  return feeds;
}

// New tokens of a row: up to and with the end token, without padding.
std::vector<int64_t> RowTokens(const ProgramOutput& output, int64_t row, int64_t eos,
                               int64_t max_length) {
  std::vector<int64_t> tokens;
  for (int64_t i = 0; i < std::min(output.columns, max_length); ++i) {
    tokens.push_back(output.ids[static_cast<size_t>(row * output.columns + i)]);
    if (tokens.back() == eos) break;
  }
  return tokens;
}

template <typename T>
void WriteList(const std::vector<T>& values, const char* separator) {
  for (size_t i = 0; i < values.size(); ++i) std::cout << (i > 0 ? separator : "") << values[i];
}

void Write(const ProgramOutput& output, int64_t eos, int64_t max_length, bool json) {
  if (json) std::cout << "{\"token_ids\": [";
  for (int64_t row = 0; row < output.rows; ++row) {
    if (json) std::cout << (row > 0 ? ", [" : "[");
    WriteList(RowTokens(output, row, eos, max_length), json ? ", " : " ");
    std::cout << (json ? "]" : "\n");
  }
  if (json) {
    std::cout.precision(std::numeric_limits<float>::max_digits10);
    std::cout << "], \"scores\": [";
    WriteList(output.scores, ", ");
    std::cout << "]}\n";
  }
  std::cout.flush();
}

int Run(int count, char** values) {
  const Arguments arguments = ParseArguments(count, values);
  if (arguments.help) {
    std::cout << kUsage;
    return 0;
  }
  const io::ExportManifest manifest = io::ReadExportManifest(arguments.model_dir);
  const engine::ModelConfig config = engine::ReadExportConfig(manifest.config, manifest.path);
  const std::vector<Feed> feeds = MakeFeeds(arguments, manifest, ReadPrompts(arguments, config));
  const auto program =
      PaddleProgram::Load(arguments.model_dir, manifest.program, arguments.op_library);
  Write(program->Run(feeds), Option<int64_t>(manifest, "eos_token_id", ""),
        Option<int64_t>(manifest, "max_length", arguments.max_length), arguments.json);
  return 0;
}

}  // namespace
}  // namespace fastgen::apps

int main(int count, char** values) {
  int status = 1;
  try {
    status = fastgen::apps::Run(count, values);
  } catch (const fastgen::apps::UsageError& error) {
    std::cerr << "fastgen-gpt-paddle: " << error.what() << '\n';
    status = 2;
  } catch (const std::exception& error) {
    std::cerr << "fastgen-gpt-paddle: " << error.what() << '\n';
  }
  std::cout.flush();
  return status;
}
