// fastgen-gpt: continues prompts with a model directory. The start of an application of your own:
// it uses fastgen.hpp and nothing else of the library; the two headers beside it can go along.
#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fastgen/fastgen.hpp>
#include <functional>
#include <iostream>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "command_line.h"
#include "output.h"

namespace fastgen::apps {
namespace {

constexpr char kUsage[] =
    R"(Usage: fastgen-gpt --model_dir DIR [--prompt TEXT]... [OPTION]...

Continues prompts. Without any they are read from standard input, as texts.

  --model_dir DIR           directory of a model and its tokenizer, or an export
  --prompt TEXT             text to continue; may be given more than once
  --prompt_file FILE        file with one prompt a line; - is standard input
  --prompt_ids "1 2 3"      the same as token ids, which need no tokenizer: token ids come out
  --prompt_ids_file FILE
  --batch_size N            prompts decoded together [all]
  --max_length N            new tokens at most [32]
  --min_length N            new tokens before the end token may come [0]
  --decode_strategy S       sampling or greedy_search [sampling]
  --topk N                  keep the N most probable tokens; 0: off [4]
  --topp P                  keep the most probable mass P; 0 or 1: off [0]
  --temperature T           divides the logits; > 0 [1]
  --repetition_penalty R    > 1 repeats less; 1: off [1]
  --no_repeat_ngram_size N  no N tokens come twice; 0: off [0]
  --num_return_sequences N  sequences for each prompt [1]
  --eos_token_id N          token that ends a sequence; -1: none [the model's]
  --seed N                  the same seed gives the same text [drawn, reported]
  --device D                cpu, cuda or cuda:<index> [cpu]
  --weight_dtype T          type of the weights: float32, float16, bfloat16, int8 or int4 [the
                            one that the model was converted to, else float32]
  --cache_dtype T           type of keys and values: on the CPU float32, float16, bfloat16 or int8
                            [as the weights, beside integers bfloat16, on cuda float16]
  --threads N               threads of the CPU [all processors]
  --isa NAME                kernel set, as avx2 [the best of this machine]
  --stream                  print tokens as they come; of one sequence, or with --json
  --bench                   repeat the request and print how long it takes
  --json                    print JSON: one object; with --stream one for each piece before it
  --help, --version

Results go to standard output; tokens per second and the seed go to standard error.
Exit status: 0; 1 with one sentence on standard error; 2 for bad usage; 130 after Ctrl-C.
)";

constexpr int kBenchRuns = 5;

volatile std::sig_atomic_t interrupted = 0;

struct Settings {
  std::string model_dir;
  PromptOptions prompts;
  std::int32_t batch_size = 0;
  Options options;
  std::optional<std::int32_t> eos_token_id;
  ModelOptions model_options;
  bool stream = false;
  bool bench = false;
  bool json = false;
  bool help = false;
  bool version = false;
};

Settings ParseCommandLine(int argc, char** argv) {
  Settings settings;
  Options& options = settings.options;
  options.decode_strategy = FASTGEN_SAMPLING;
  options.max_length = 32;
  options.top_k = 4;
  options.top_p = 0.0f;
  std::optional<std::uint64_t> seed;

  CommandLine line;
  settings.prompts.AddTo(&line);
  line.Value("model_dir", &settings.model_dir);
  line.Value("batch_size", &settings.batch_size);
  line.Value("max_length", &options.max_length);
  line.Value("max_out_len", &options.max_length);
  line.Value("min_length", &options.min_length);
  // In the order of the library's numbers.
  static_assert(FASTGEN_GREEDY_SEARCH == 0 && FASTGEN_SAMPLING == 1, "places are numbers");
  line.Choice("decode_strategy", {"greedy_search", "sampling"}, &options.decode_strategy);
  line.Value("topk", &options.top_k);
  line.Value("top_k", &options.top_k);
  line.Value("topp", &options.top_p);
  line.Value("top_p", &options.top_p);
  line.Value("temperature", &options.temperature);
  line.Value("repetition_penalty", &options.repetition_penalty);
  line.Value("no_repeat_ngram_size", &options.no_repeat_ngram_size);
  line.Value("num_return_sequences", &options.num_return_sequences);
  line.Value("eos_token_id", &settings.eos_token_id);
  line.Value("seed", &seed);
  line.Value("device", &settings.model_options.device);
  line.Value("weight_dtype", &settings.model_options.weight_dtype);
  line.Value("cache_dtype", &settings.model_options.cache_dtype);
  line.Value("threads", &settings.model_options.num_threads);
  line.Value("isa", &settings.model_options.isa);
  line.Flag("stream", &settings.stream);
  line.Flag("bench", &settings.bench);
  line.Flag("json", &settings.json);
  line.Flag("help", &settings.help);
  line.Flag("version", &settings.version);
  line.Parse(argc, argv);

  if (settings.help || settings.version) return settings;
  if (settings.model_dir.empty()) throw UsageError("--model_dir is missing");
  settings.prompts.Check();
  if (settings.batch_size < 0) throw UsageError("--batch_size must be at least 1");
  if (settings.stream && settings.bench) {
    throw UsageError("--stream and --bench exclude each other");
  }
  if (!seed) {
    // As many bits as every reader of JSON holds exactly.
    std::random_device device;
    seed = (std::uint64_t{device()} << 21) ^ (device() >> 11);
  }
  options.seed = *seed;
  options.has_seed = 1;
  return settings;
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
  Prompts prompts;
  Model model;
  std::optional<Tokenizer> tokenizer;  // without one: token ids in, token ids out

  std::int32_t Rows() const {
    const std::int64_t rows =
        std::int64_t{settings.batch_size} * std::max(1, settings.options.num_return_sequences);
    return static_cast<std::int32_t>(std::min<std::int64_t>(rows, 4096));  // the library's most
  }

  // Pieces are of text, or token ids.
  std::vector<TextResult> Generate(const Model::OnText& on_piece) const {
    if (tokenizer) {
      return model.generate(*tokenizer, prompts.texts, settings.options, on_piece, Rows());
    }
    std::vector<TextResult> results;
    const auto on_token = [&on_piece](std::size_t index, std::int32_t token) {
      return on_piece(index, std::to_string(token));
    };
    for (Result& sequence : model.generate(prompts.ids, settings.options, on_token, Rows())) {
      const std::size_t prompt = results.size() / PerPrompt();
      results.emplace_back();
      static_cast<Result&>(results.back()) = std::move(sequence);
      results.back().prompt = prompts.ids[prompt];
    }
    return results;
  }

  std::size_t PerPrompt() const {
    return static_cast<std::size_t>(settings.options.num_return_sequences);
  }
};

double Seconds(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

std::size_t CountTokens(const std::vector<TextResult>& results) {
  std::size_t tokens = 0;
  for (const TextResult& result : results) tokens += result.tokens.size();
  return tokens;
}

std::vector<Sequence> Sequences(const std::vector<TextResult>& results) {
  std::vector<Sequence> sequences;
  for (const TextResult& result : results) {
    sequences.push_back(
        {result.tokens, result.text, ReasonName(result.finish_reason), result.score});
  }
  return sequences;
}

void PrintJson(const Application& app, const std::vector<TextResult>& results, double seconds) {
  const auto per_token = static_cast<double>(CountTokens(results)) / seconds;
  std::vector<std::vector<std::int32_t>> prompt_ids;
  std::vector<std::string> prompts;
  for (std::size_t i = 0; i < results.size(); i += app.PerPrompt()) {
    prompt_ids.push_back(results[i].prompt);
    // Bytes that are not UTF-8 would not be JSON.
    if (app.tokenizer) prompts.push_back(app.tokenizer->decode(prompt_ids.back(), false));
  }
  std::cout << "{" << SequenceMembers(prompts, prompt_ids, Sequences(results), app.PerPrompt())
            << ", \"seed\": " << app.settings.options.seed
            << ", \"num_tokens\": " << CountTokens(results) << ", \"seconds\": " << Number(seconds)
            << ", \"tokens_per_second\": " << Number(per_token)
            << ", \"interrupted\": " << (interrupted ? "true" : "false")
            << ", \"version\": " << Quote(version()) << "}\n";
}

void Run(const Application& app) {
  const Settings& settings = app.settings;
  const bool plain = !settings.json;
  const bool is_text = app.tokenizer.has_value();
  if (settings.stream && plain && is_text) std::cout << app.prompts.texts[0] << std::flush;
  const auto begin = std::chrono::steady_clock::now();
  bool first = true;
  const std::vector<TextResult> results =
      app.Generate([&](std::size_t index, const std::string& piece) {
        if (settings.stream && plain) {
          std::cout << (is_text || first ? "" : " ") << piece << std::flush;
          first = false;
        } else if (settings.stream) {
          std::cout << "{\"index\": " << index << (is_text ? ", \"text\": " : ", \"token_id\": ")
                    << (is_text ? Quote(piece) : piece) << "}" << std::endl;
        }
        return interrupted == 0;  // false: this sequence ends here
      });
  const double seconds = Seconds(begin);
  if (settings.json) {
    PrintJson(app, results, seconds);
  } else if (settings.stream) {
    std::cout << "\n";
  } else {
    PrintSequences(app.prompts.texts, Sequences(results), app.PerPrompt());
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
              << ", \"threads\": " << info.num_threads << ", \"version\": " << Quote(version())
              << "}\n";
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

Tokenizer LoadTokenizer(const std::string& directory) {
  try {
    return Tokenizer::load(directory);
  } catch (const Error& error) {
    if (error.status() != FASTGEN_NOT_FOUND) throw;
    throw std::runtime_error(error.what() + std::string(kNoTokenizer));
  }
}

int Main(int argc, char** argv) {
  Settings settings = ParseCommandLine(argc, argv);
  if (settings.help || settings.version) {
    std::cout << (settings.help ? kUsage : "fastgen-gpt " + version() + "\n");
    return 0;
  }
  Prompts prompts = ReadPrompts(settings.prompts);
  const bool one = prompts.size() == 1 && settings.options.num_return_sequences == 1;
  if (settings.stream && !settings.json && !one) {
    throw UsageError("--stream prints one sequence; with --json any number");
  }
  Model model = Model::load(settings.model_dir, settings.model_options);
  std::optional<Tokenizer> tokenizer;
  if (!settings.prompts.are_ids()) tokenizer = LoadTokenizer(settings.model_dir);
  settings.options.eos_token_id = settings.eos_token_id.value_or(model.config().eos_token_id);
  const Application app{std::move(settings), std::move(prompts), std::move(model),
                        std::move(tokenizer)};

  std::signal(SIGINT, [](int) { interrupted = 1; });
  app.settings.bench ? Bench(app) : Run(app);
  std::cout.flush();
  if (!std::cout) throw std::runtime_error("standard output cannot be written");
  return interrupted ? 130 : 0;
}

}  // namespace
}  // namespace fastgen::apps

int main(int argc, char** argv) {
  try {
    return fastgen::apps::Main(argc, argv);
  } catch (const fastgen::apps::UsageError& error) {
    std::fprintf(stderr, "fastgen-gpt: %s; see fastgen-gpt --help\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fastgen-gpt: %s\n", error.what());
    return 1;
  }
}
