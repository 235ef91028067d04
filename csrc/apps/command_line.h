// Options and prompts of the programs in this folder. Needs nothing of the library.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace fastgen::apps {

// The command line itself is wrong.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// `what` is put before the message: "--seed", "a token id".
template <typename T>
T ToNumber(const std::string& what, const std::string& text) {
  if constexpr (std::is_integral_v<T>) {
    T value = 0;
    const char* end = text.data() + text.size();
    const std::from_chars_result result = std::from_chars(text.data(), end, value);
    if (!text.empty() && result.ec == std::errc() && result.ptr == end) return value;
    throw UsageError(what + " is '" + text + "', it must be an integer in range");
  } else {
    char* end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    if (!text.empty() && *end == '\0') return static_cast<T>(value);
    throw UsageError(what + " is '" + text + "', it must be a number");
  }
}

// `--name value`, `--name=value` and `--flag`; dashes inside a name are underscores too.
class CommandLine {
 public:
  void Flag(const std::string& name, bool* value) { flags_[name] = value; }

  // A text, a number, either of them optional, or a list: then the option may be given repeatedly.
  template <typename T>
  void Value(const std::string& name, T* value) {
    values_[name] = [name, value](const std::string& text) { Set("--" + name, text, value); };
  }

  // One of `words`; what is stored is its place among them.
  template <typename T>
  void Choice(const std::string& name, const std::vector<std::string>& words, T* value) {
    values_[name] = [name, words, value](const std::string& text) {
      const auto word = std::find(words.begin(), words.end(), text);
      if (word == words.end()) {
        std::string allowed;
        for (const std::string& each : words) allowed += (allowed.empty() ? "" : " or ") + each;
        throw UsageError("--" + name + " is '" + text + "', it must be " + allowed);
      }
      *value = static_cast<T>(word - words.begin());
    };
  }

  void Parse(int argc, char** argv) const {
    for (int i = 1; i < argc; ++i) {
      const std::string argument = argv[i] == std::string("-h") ? "--help" : argv[i];
      const std::size_t equals = argument.find('=');
      std::string name = argument.substr(0, equals);
      if (name.compare(0, 2, "--") != 0) throw UsageError("'" + argument + "' is not an option");
      name.erase(0, 2);
      std::replace(name.begin(), name.end(), '-', '_');
      if (flags_.count(name) != 0 && equals == std::string::npos) {
        *flags_.at(name) = true;
        continue;
      }
      const auto found = values_.find(name);
      if (found == values_.end()) throw UsageError("'" + argument + "' is not an option");
      if (equals != std::string::npos) {
        found->second(argument.substr(equals + 1));
      } else if (i + 1 < argc) {
        found->second(argv[++i]);
      } else {
        throw UsageError("--" + name + " needs a value");
      }
    }
  }

 private:
  static void Set(const std::string&, const std::string& text, std::string* value) {
    *value = text;
  }
  template <typename T>
  static void Set(const std::string& option, const std::string& text, T* value) {
    *value = ToNumber<T>(option, text);
  }
  template <typename T>
  static void Set(const std::string& option, const std::string& text, std::optional<T>* value) {
    T given{};
    Set(option, text, &given);
    *value = given;
  }
  static void Set(const std::string&, const std::string& text, std::vector<std::string>* values) {
    values->push_back(text);
  }

  std::map<std::string, bool*> flags_;
  std::map<std::string, std::function<void(const std::string&)>> values_;
};

// ---- Prompts --------------------------------------------------------------------------------

// What follows a tokenizer's own complaint that it is not there.
constexpr char kNoTokenizer[] = "; without one prompts are token ids (--prompt_ids)";

// Texts or token ids, as given.
struct PromptOptions {
  std::vector<std::string> prompts, prompt_files;
  std::vector<std::string> prompt_ids, prompt_ids_files;

  void AddTo(CommandLine* line) {
    line->Value("prompt", &prompts);
    line->Value("prompt_file", &prompt_files);
    line->Value("prompt_ids", &prompt_ids);
    line->Value("prompt_ids_file", &prompt_ids_files);
  }

  bool are_ids() const { return !prompt_ids.empty() || !prompt_ids_files.empty(); }
  bool are_texts() const { return !prompts.empty() || !prompt_files.empty(); }

  void Check() const {
    if (are_ids() && are_texts()) {
      throw UsageError(
          "prompts are texts or token ids: --prompt and --prompt_file, or --prompt_ids "
          "and --prompt_ids_file");
    }
  }
};

// One of the two is filled.
struct Prompts {
  std::vector<std::string> texts;
  std::vector<std::vector<std::int32_t>> ids;

  std::size_t size() const { return texts.size() + ids.size(); }
};

// The lines of a file, or of standard input for "-", that are not blank.
inline std::vector<std::string> ReadLines(const std::string& option, const std::string& path) {
  std::ifstream file;
  if (path != "-") {
    file.open(path, std::ios::binary);
    if (!file) throw std::runtime_error(option + " " + path + " cannot be read");
  }
  std::istream& input = path == "-" ? std::cin : file;
  std::vector<std::string> lines;
  bool first = true;
  for (std::string line; std::getline(input, line); first = false) {
    // Some editors begin a file with a mark that is no part of its text.
    if (first && line.compare(0, 3, "\xef\xbb\xbf") == 0) line.erase(0, 3);
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.find_first_not_of(" \t\v\f\r") != std::string::npos) lines.push_back(line);
  }
  if (input.bad()) throw std::runtime_error(option + " " + path + " cannot be read");
  if (lines.empty()) throw std::runtime_error(option + " " + path + " holds no prompt");
  return lines;
}

// "464 2068": what the ids may be is the model's to say.
inline std::vector<std::int32_t> ToTokens(const std::string& text) {
  std::vector<std::int32_t> tokens;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) {
    tokens.push_back(ToNumber<std::int32_t>("a token id", word));
  }
  return tokens;
}

// Texts come from standard input if there is no prompt at all.
inline Prompts ReadPrompts(const PromptOptions& options) {
  Prompts prompts;
  prompts.texts = options.prompts;
  for (const std::string& text : options.prompt_ids) prompts.ids.push_back(ToTokens(text));
  for (const std::string& path : options.prompt_ids_files) {
    for (const std::string& line : ReadLines("prompt_ids_file", path)) {
      prompts.ids.push_back(ToTokens(line));
    }
  }
  std::vector<std::string> files = options.prompt_files;
  if (!options.are_ids() && !options.are_texts()) files = {"-"};
  for (const std::string& path : files) {
    for (std::string& line : ReadLines("prompt_file", path)) {
      prompts.texts.push_back(std::move(line));
    }
  }
  return prompts;
}

}  // namespace fastgen::apps
