#include "apps/paddle_program.h"

#include <algorithm>

namespace fastgen::apps {

std::string PaddleSentence(const std::string& message) {
  // What the op itself said.
  const char kOp[] = "fusion_gpt: ";
  size_t begin = message.rfind(kOp);
  if (begin != std::string::npos) {
    begin += sizeof kOp - 1;
    const size_t end = std::min(message.find('\n', begin), message.find(" (at ", begin));
    return message.substr(begin, end == std::string::npos ? end : end - begin);
  }
  // Else the first line of Paddle's summary, or of a message without one.
  const char kSummary[] = "Error Message Summary:";
  size_t at = message.find(kSummary);
  at = at == std::string::npos ? 0 : at + sizeof kSummary - 1;
  std::string sentence;
  while (sentence.empty() && at < message.size()) {
    const size_t end = std::min(message.find('\n', at), message.size());
    const std::string line = message.substr(at, end - at);
    const size_t text = line.find_first_not_of(" \t\r-");
    if (text != std::string::npos) sentence = line.substr(text);
    at = end + 1;
  }
  return sentence.empty() ? "Paddle failed and did not say why" : sentence;
}

}  // namespace fastgen::apps
