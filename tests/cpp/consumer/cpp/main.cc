// An application in C++ that has nothing but the installed library and a model directory: four threads
// generate on one model, and each gets the tokens that it would get alone.
#include <fastgen/fastgen.hpp>

#include <atomic>
#include <iostream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int kThreads = 4;
constexpr int kRounds = 3;

fastgen::Options OptionsOf(int thread) {
  fastgen::Options options;
  options.max_length = 20 + 4 * thread;
  if (thread > 0) {
    options.decode_strategy = FASTGEN_SAMPLING;
    options.top_k = 4 * thread;
    options.top_p = 0.9f;
    options.num_return_sequences = thread;
  }
  options.has_seed = 1;
  options.seed = 7u + static_cast<unsigned>(thread);
  return options;
}

using Tokens = std::vector<std::vector<std::int32_t>>;

Tokens Generate(const fastgen::Model& model, const fastgen::Tokenizer& tokenizer, int thread) {
  static const std::vector<std::string> kPrompts[kThreads] = {
      {"Return a list of"},
      {"Open the file", "Raise"},
      {"na\xc3\xafve \xf0\x9f\x98\x80 text"},
      {"If", "Return True if the argument is a string, else"}};
  Tokens tokens;
  for (const fastgen::TextResult& result :
       model.generate(tokenizer, kPrompts[thread], OptionsOf(thread))) {
    if (result.text != tokenizer.decode(result.tokens)) throw std::runtime_error("another text");
    tokens.push_back(result.tokens);
  }
  return tokens;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  try {
    const fastgen::Model model = fastgen::Model::load(argv[1]);
    const fastgen::Tokenizer tokenizer = fastgen::Tokenizer::load(argv[1]);
    std::vector<Tokens> alone;
    for (int thread = 0; thread < kThreads; ++thread) {
      alone.push_back(Generate(model, tokenizer, thread));
    }
    std::atomic<int> equal{0};
    std::vector<std::thread> threads;
    for (int thread = 0; thread < kThreads; ++thread) {
      threads.emplace_back([&, thread] {
        try {
          for (int round = 0; round < kRounds; ++round) {
            const auto index = static_cast<std::size_t>(thread);
            if (Generate(model, tokenizer, thread) == alone[index]) ++equal;
          }
        } catch (const std::exception& error) {
          std::cerr << error.what() << "\n";
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    if (equal != kThreads * kRounds) {
      std::cerr << equal << " of " << kThreads * kRounds << " gave the tokens they give alone\n";
      return 1;
    }
    std::cout << fastgen_version() << "\n";
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
