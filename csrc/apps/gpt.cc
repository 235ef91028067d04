// fastgen-gpt: continues prompts with a model directory. The start of an application of your own:
// it uses fastgen.hpp and nothing else of the library.
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fastgen/fastgen.hpp>
#include <fstream>
#include <iostream>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace {

constexpr char kUsage[] =
    R"(Usage: fastgen-gpt --model_dir DIR [--prompt TEXT]... [OPTION]...

Continues prompts. Without --prompt and --prompt_file they are read from standard input.

  --model_dir DIR           directory of a model and its tokenizer
  --prompt TEXT             text to continue; may be given more than once
  --prompt_file FILE        file with one prompt a line; - is standard input
  --batch_size N            prompts decoded together [all]
  --max_length N            new tokens at most [32]
  --decode_strategy S       sampling or greedy_search [sampling]
  --topk N                  keep the N most probable tokens; 0: off [4]
  --topp P                  keep the most probable mass P; 0 or 1: off [0]
  --temperature T           divides the logits; > 0 [1]
  --repetition_penalty R    > 1 repeats less; 1: off [1]
  --num_return_sequences N  sequences for each prompt [1]
  --seed N                  the same seed gives the same text [drawn, reported]
  --threads N               threads [all processors]
  --isa NAME                kernel set: generic, avx2 or avx512 [the best]
  --stream                  print text as it comes; of one sequence, or with --json
  --bench                   repeat the request and print how long it takes
  --json                    print JSON: one object; with --stream one for each piece before it
  --help, --version

Text goes to standard output; tokens per second and the seed go to standard error.
Exit status: 0; 1 with one sentence on standard error; 2 for bad usage; 130 after Ctrl-C.
)";

constexpr int kBenchRuns = 5;

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Settings {
  std::string model_dir;
  std::vector<std::string> prompts;
  std::string prompt_file;
  std::int32_t batch_size = 0;
  fastgen::Options options;
  fastgen::ModelOptions model_options;
  bool stream = false;
  bool bench = false;
  bool json = false;
  bool help = false;
  bool version = false;
};

volatile std::sig_atomic_t interrupted = 0;

// ---- Command line ---------------------------------------------------------------------------

template <typename Integer>
Integer ToInteger(const std::string& option, const std::string& text) {
  Integer value = 0;
  const char* end = text.data() + text.size();
  const std::from_chars_result result = std::from_chars(text.data(), end, value);
  if (text.empty() || result.ec != std::errc() || result.ptr != end) {
    throw UsageError("--" + option + " is '" + text + "', it must be an integer in range");
  }
  return value;
}

float ToFloat(const std::string& option, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0') {
    throw UsageError("--" + option + " is '" + text + "', it must be a number");
  }
  return static_cast<float>(value);
}

Settings ParseCommandLine(int argc, char** argv) {
  Settings settings;
  fastgen::Options& options = settings.options;
  options.decode_strategy = FASTGEN_SAMPLING;
  options.max_length = 32;
  options.top_k = 4;
  options.top_p = 0.0f;

  const std::map<std::string, bool*> flags = {{"stream", &settings.stream},
                                              {"bench", &settings.bench},
                                              {"json", &settings.json},
                                              {"help", &settings.help},
                                              {"version", &settings.version}};
  const std::map<std::string, std::string*> texts = {{"model_dir", &settings.model_dir},
                                                     {"prompt_file", &settings.prompt_file},
                                                     {"isa", &settings.model_options.isa}};
  const std::map<std::string, std::int32_t*> integers = {
      {"batch_size", &settings.batch_size},
      {"max_length", &options.max_length},
      {"topk", &options.top_k},
      {"top_k", &options.top_k},
      {"num_return_sequences", &options.num_return_sequences},
      {"threads", &settings.model_options.num_threads}};
  const std::map<std::string, float*> numbers = {
      {"topp", &options.top_p},
      {"top_p", &options.top_p},
      {"temperature", &options.temperature},
      {"repetition_penalty", &options.repetition_penalty}};

  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.compare(0, 2, "--") != 0) {
      throw UsageError("'" + argument + "' is not an option");
    }
    const std::size_t equals = argument.find('=');
    std::string name = argument.substr(2, equals == std::string::npos ? equals : equals - 2);
    std::replace(name.begin(), name.end(), '-', '_');
    if (flags.count(name) && equals == std::string::npos) {
      *flags.at(name) = true;
      continue;
    }
    const auto value = [&]() -> std::string {
      if (equals != std::string::npos) return argument.substr(equals + 1);
      if (i + 1 == argc) throw UsageError("--" + name + " needs a value");
      return argv[++i];
    };
    if (name == "prompt") {
      settings.prompts.push_back(value());
    } else if (name == "seed") {
      options.seed = ToInteger<std::uint64_t>(name, value());
      options.has_seed = 1;
    } else if (name == "decode_strategy") {
      const std::string strategy = value();
      if (strategy != "sampling" && strategy != "greedy_search") {
        throw UsageError("--decode_strategy is '" + strategy +
                         "', it must be sampling or greedy_search");
      }
      options.decode_strategy = strategy == "sampling" ? FASTGEN_SAMPLING : FASTGEN_GREEDY_SEARCH;
    } else if (texts.count(name)) {
      *texts.at(name) = value();
    } else if (integers.count(name)) {
      *integers.at(name) = ToInteger<std::int32_t>(name, value());
    } else if (numbers.count(name)) {
      *numbers.at(name) = ToFloat(name, value());
    } else {
      throw UsageError("'" + argument + "' is not an option");
    }
  }
  if (settings.help || settings.version) return settings;
  if (settings.model_dir.empty()) throw UsageError("--model_dir is missing");
  if (settings.batch_size < 0) throw UsageError("--batch_size must be at least 1");
  if (settings.stream && settings.bench)
    throw UsageError("--stream and --bench exclude each other");
  return settings;
}

// The lines that are not blank.
std::vector<std::string> ReadPrompts(const std::string& path) {
  std::ifstream file;
  if (path != "-") {
    file.open(path, std::ios::binary);
    if (!file) throw std::runtime_error("prompt_file " + path + " cannot be read");
  }
  std::istream& input = path == "-" ? std::cin : file;
  std::vector<std::string> prompts;
  for (std::string line; std::getline(input, line);) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.find_first_not_of(" \t\v\f\r") != std::string::npos) prompts.push_back(line);
  }
  if (input.bad()) throw std::runtime_error("prompt_file " + path + " cannot be read");
  if (prompts.empty()) throw std::runtime_error("prompt_file " + path + " holds no prompt");
  return prompts;
}

// ---- JSON -----------------------------------------------------------------------------------

// Of valid UTF-8, which is what Tokenizer::decode() gives.
std::string Quote(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      quoted += '\\';
      quoted += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", static_cast<unsigned>(c));
      quoted += escape;
    } else {
      quoted += c;
    }
  }
  return quoted + '"';
}

std::string Number(double value) {
  if (!std::isfinite(value)) return "null";
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", value);
  return text;
}

template <typename Items, typename ToText>
std::string List(const Items& items, const ToText& to_text) {
  std::string list = "[";
  for (const auto& item : items) {
    if (list.size() > 1) list += ", ";
    list += to_text(item);
  }
  return list + "]";
}

std::string Tokens(const std::vector<std::int32_t>& tokens) {
  return List(tokens, [](std::int32_t token) { return std::to_string(token); });
}

const char* ReasonName(fastgen_finish_reason reason) {
  switch (reason) {
    case FASTGEN_FINISH_EOS: return "eos";
    case FASTGEN_FINISH_LENGTH: return "length";
    case FASTGEN_FINISH_CANCELLED: return "cancelled";
    default: return "failed";
  }
}

// ---- Requests -------------------------------------------------------------------------------

struct Application {
  Settings settings;
  fastgen::Model model;
  fastgen::Tokenizer tokenizer;

  std::int32_t Rows() const {
    const std::int64_t rows =
        std::int64_t{settings.batch_size} * std::max(1, settings.options.num_return_sequences);
    return static_cast<std::int32_t>(std::min<std::int64_t>(rows, 4096));  // the library's most
  }

  std::vector<fastgen::TextResult> Generate(const fastgen::Model::OnText& on_text) const {
    return model.generate(tokenizer, settings.prompts, settings.options, on_text, Rows());
  }
};

double Seconds(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

std::size_t CountTokens(const std::vector<fastgen::TextResult>& results) {
  std::size_t tokens = 0;
  for (const fastgen::TextResult& result : results) tokens += result.tokens.size();
  return tokens;
}

void PrintJson(const Application& app, const std::vector<fastgen::TextResult>& results,
               double seconds) {
  const auto per_token = static_cast<double>(CountTokens(results)) / seconds;
  const auto each = [&results](const auto& to_text) { return List(results, to_text); };
  std::vector<std::vector<std::int32_t>> prompts;
  for (std::size_t i = 0; i < results.size();
       i += static_cast<std::size_t>(app.settings.options.num_return_sequences)) {
    prompts.push_back(results[i].prompt);
  }
  using Result = fastgen::TextResult;
  std::cout << "{\"model\": "
            << Quote(app.tokenizer.decode(app.tokenizer.encode(app.settings.model_dir), false))
            << ", \"prompts\": "
            << List(prompts,
                    [&app](const auto& ids) { return Quote(app.tokenizer.decode(ids, false)); })
            << ", \"prompt_ids\": " << List(prompts, Tokens)
            << ", \"num_return_sequences\": " << app.settings.options.num_return_sequences
            << ", \"texts\": " << each([](const Result& r) { return Quote(r.text); })
            << ", \"token_ids\": " << each([](const Result& r) { return Tokens(r.tokens); })
            << ", \"scores\": " << each([](const Result& r) { return Number(r.score); })
            << ", \"finish_reasons\": "
            << each([](const Result& r) { return Quote(ReasonName(r.finish_reason)); })
            << ", \"seed\": " << app.settings.options.seed
            << ", \"num_tokens\": " << CountTokens(results) << ", \"seconds\": " << Number(seconds)
            << ", \"tokens_per_second\": " << Number(per_token)
            << ", \"interrupted\": " << (interrupted ? "true" : "false")
            << ", \"version\": " << Quote(fastgen::version()) << "}\n";
}

void PrintText(const Application& app, const std::vector<fastgen::TextResult>& results) {
  const auto sequences = static_cast<std::size_t>(app.settings.options.num_return_sequences);
  for (std::size_t i = 0; i < results.size(); ++i) {
    if (results.size() > 1) {
      std::cout << "==> prompt " << i / sequences << ", sequence " << i % sequences << " ("
                << ReasonName(results[i].finish_reason) << ")\n";
    }
    std::cout << app.settings.prompts[i / sequences] << results[i].text << "\n";
    if (results.size() > 1) std::cout << "\n";
  }
}

void Run(const Application& app) {
  const Settings& settings = app.settings;
  const bool plain = !settings.json;
  if (settings.stream && plain) std::cout << settings.prompts[0] << std::flush;
  const auto begin = std::chrono::steady_clock::now();
  const std::vector<fastgen::TextResult> results =
      app.Generate([&](std::size_t index, const std::string& piece) {
        if (settings.stream && plain) {
          std::cout << piece << std::flush;
        } else if (settings.stream) {
          std::cout << "{\"index\": " << index << ", \"text\": " << Quote(piece) << "}"
                    << std::endl;
        }
        return interrupted == 0;  // false: this sequence ends here
      });
  const double seconds = Seconds(begin);
  if (settings.json) {
    PrintJson(app, results, seconds);
  } else if (settings.stream) {
    std::cout << "\n";
  } else {
    PrintText(app, results);
  }
  std::cout.flush();
  const std::size_t tokens = CountTokens(results);
  std::fprintf(stderr, "%zu tokens in %.3f s, %.1f tokens/s, seed %llu\n", tokens, seconds,
               static_cast<double>(tokens) / seconds,
               static_cast<unsigned long long>(settings.options.seed));
}

void Bench(const Application& app) {
  std::vector<double> seconds;
  std::vector<double> first;
  std::size_t tokens = 0;
  for (int run = 0; run <= kBenchRuns && !interrupted; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    double first_piece = 0.0;
    const auto results = app.Generate([&](std::size_t, const std::string&) {
      if (first_piece == 0.0) first_piece = Seconds(begin);
      return interrupted == 0;
    });
    if (run == 0) continue;  // memory and caches are warm from here on
    seconds.push_back(Seconds(begin));
    first.push_back(first_piece);
    tokens = CountTokens(results);
  }
  if (interrupted) return;
  std::sort(seconds.begin(), seconds.end());
  std::sort(first.begin(), first.end());
  const double median = seconds[kBenchRuns / 2];
  const double rate = static_cast<double>(tokens) / median;
  const fastgen_model_info info = app.model.info();
  if (app.settings.json) {
    std::cout << "{\"runs\": " << kBenchRuns << ", \"num_tokens\": " << tokens
              << ", \"seconds\": " << Number(median) << ", \"best_seconds\": " << Number(seconds[0])
              << ", \"tokens_per_second\": " << Number(rate)
              << ", \"first_text_seconds\": " << Number(first[kBenchRuns / 2])
              << ", \"step_bytes\": " << info.step_bytes << ", \"isa\": " << Quote(info.isa)
              << ", \"threads\": " << info.num_threads
              << ", \"version\": " << Quote(fastgen::version()) << "}\n";
  } else {
    char line[256];
    std::snprintf(line, sizeof line,
                  "%zu tokens, median of %d runs: %.3f s (best %.3f s), %.1f tokens/s, first text "
                  "after %.1f ms; %s, %d threads\n",
                  tokens, kBenchRuns, median, seconds[0], rate, 1e3 * first[kBenchRuns / 2],
                  info.isa, static_cast<int>(info.num_threads));
    std::cout << line;
  }
}

int Main(int argc, char** argv) {
  Settings settings = ParseCommandLine(argc, argv);
  if (settings.help || settings.version) {
    std::cout << (settings.help ? kUsage : "fastgen-gpt " + fastgen::version() + "\n");
    return 0;
  }
  if (settings.prompts.empty() || !settings.prompt_file.empty()) {
    const std::string path = settings.prompt_file.empty() ? "-" : settings.prompt_file;
    for (const std::string& prompt : ReadPrompts(path)) settings.prompts.push_back(prompt);
  }
  const bool one = settings.prompts.size() == 1 && settings.options.num_return_sequences == 1;
  if (settings.stream && !settings.json && !one) {
    throw UsageError("--stream prints one sequence; with --json any number");
  }
  if (!settings.options.has_seed) {
    // As many bits as every reader of JSON holds exactly.
    std::random_device device;
    settings.options.seed = (std::uint64_t{device()} << 21) ^ (device() >> 11);
    settings.options.has_seed = 1;
  }
  fastgen::Model model = fastgen::Model::load(settings.model_dir, settings.model_options);
  fastgen::Tokenizer tokenizer = fastgen::Tokenizer::load(settings.model_dir);
  settings.options.eos_token_id = model.config().eos_token_id;
  const Application app{std::move(settings), std::move(model), std::move(tokenizer)};

  std::signal(SIGINT, [](int) { interrupted = 1; });
  app.settings.bench ? Bench(app) : Run(app);
  std::cout.flush();
  if (!std::cout) throw std::runtime_error("standard output cannot be written");
  return interrupted ? 130 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return Main(argc, argv);
  } catch (const UsageError& error) {
    std::fprintf(stderr, "fastgen-gpt: %s; see fastgen-gpt --help\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fastgen-gpt: %s\n", error.what());
    return 1;
  }
}
