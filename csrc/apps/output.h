// What the programs in this folder print. Needs nothing of the library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

namespace fastgen::apps {

// ---- JSON -----------------------------------------------------------------------------------

// Of valid UTF-8, which is what a tokenizer decodes to.
inline std::string Quote(const std::string& text) {
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

inline std::string Number(double value) {
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

inline std::string Tokens(const std::vector<std::int32_t>& tokens) {
  return List(tokens, [](std::int32_t token) { return std::to_string(token); });
}

// ---- Text -----------------------------------------------------------------------------------

// A generated sequence.
struct Sequence {
  std::vector<std::int32_t> tokens;
  std::string text;
  std::string finish_reason;
  double score;
};

// Token ids of each sequence on a line; or its text after the prompt, under a line that says whose it
// is if there are several. `prompts` is empty if they were token ids.
inline void PrintSequences(const std::vector<std::string>& prompts,
                           const std::vector<Sequence>& sequences, std::size_t per_prompt) {
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const Sequence& sequence = sequences[i];
    if (prompts.empty()) {
      const char* separator = "";
      for (const std::int32_t token : sequence.tokens) {
        std::cout << separator << token;
        separator = " ";
      }
      std::cout << "\n";
      continue;
    }
    const bool several = sequences.size() > 1;
    if (several) {
      std::cout << "==> prompt " << i / per_prompt << ", sequence " << i % per_prompt << " ("
                << sequence.finish_reason << ")\n";
    }
    std::cout << prompts[i / per_prompt] << sequence.text << (several ? "\n\n" : "\n");
  }
}

// The members of a JSON object that are the same for every program; `prompts` as the tokenizer reads
// them, empty if they were token ids.
inline std::string SequenceMembers(const std::vector<std::string>& prompts,
                                   const std::vector<std::vector<std::int32_t>>& prompt_ids,
                                   const std::vector<Sequence>& sequences, std::size_t per_prompt) {
  const auto each = [&](const auto& to_text) { return List(sequences, to_text); };
  const bool texts = !prompts.empty();
  return "\"prompts\": " + (texts ? List(prompts, Quote) : "null") +
         ", \"prompt_ids\": " + List(prompt_ids, Tokens) +
         ", \"num_return_sequences\": " + std::to_string(per_prompt) + ", \"texts\": " +
         (texts ? each([](const Sequence& s) { return Quote(s.text); }) : "null") +
         ", \"token_ids\": " + each([](const Sequence& s) { return Tokens(s.tokens); }) +
         ", \"scores\": " + each([](const Sequence& s) { return Number(s.score); }) +
         ", \"finish_reasons\": " + each([](const Sequence& s) { return Quote(s.finish_reason); });
}

}  // namespace fastgen::apps
