// libFuzzer target: the files of a tokenizer, and text through whatever they make.
//
// An input is parts with "\n====\n" between them: a letter for the kind of vocabulary (j: tokenizer.json,
// v: vocab.json, t: vocab.txt), the vocabulary, merges.txt, special_tokens_map.json, text.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/utf8.h"
#include "fuzzing.h"
#include "text/tokenizer.h"

namespace {

using namespace fastgen;  // NOLINT: a program, not a header

text::TokenizerFiles Parse(std::string* rest) {
  const std::string kind = fuzz::NextPart(rest);
  const std::string vocabulary = fuzz::NextPart(rest);
  const std::string merges = fuzz::NextPart(rest);
  const std::string special = fuzz::NextPart(rest);
  if (kind == "j") return text::ParseTokenizerJson(vocabulary, "tokenizer.json");
  text::TokenizerFiles files;
  files.where = "vocab";
  files.merges_where = "merges.txt";
  files.vocabulary = kind == "v" ? text::ParseVocabJson(vocabulary, "vocab.json")
                                 : text::ParseVocabText(vocabulary, "vocab.txt");
  files.merges = text::ParseMerges(merges, "merges.txt");
  const std::vector<std::string> tokens =
      text::ParseSpecialTokens(special, "special_tokens_map.json");
  for (const text::Token& token : files.vocabulary) {
    for (const std::string& wanted : tokens) {
      if (token.text != wanted) continue;
      text::AddedToken added;
      added.text = wanted;
      files.added.push_back(added);
      break;
    }
  }
  return files;
}

void UseText(const std::shared_ptr<const text::Tokenizer>& tokenizer, const std::string& input,
             bool has_added) {
  const std::vector<int32_t> ids = tokenizer->Encode(input.data(), input.size());
  fuzz::Require(ids.size() <= input.size());
  for (const bool skip : {false, true}) {
    const std::string whole = tokenizer->Decode(ids.data(), ids.size(), skip);
    text::TextStream stream(tokenizer, skip);
    std::string pieces;
    for (const int32_t id : ids) {
      pieces += stream.Push(&id, 1);
      // Never half a character: what is out is valid UTF-8.
      std::string valid;
      fuzz::Require(base::AppendLossy(pieces.data(), pieces.data() + pieces.size(), true, &valid) ==
                    pieces.size());
      fuzz::Require(valid == pieces);
    }
    pieces += stream.Flush();
    fuzz::Require(pieces == whole);
    if (has_added || skip) continue;
    std::string lossy;
    base::AppendLossy(input.data(), input.data() + input.size(), false, &lossy);
    fuzz::Require(whole == lossy);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string rest(reinterpret_cast<const char*>(data), size);
  try {
    text::TokenizerFiles files = Parse(&rest);
    const bool has_added = !files.added.empty();
    const auto tokenizer = std::make_shared<const text::Tokenizer>(std::move(files));
    UseText(tokenizer, rest.substr(0, 256), has_added);
    fuzz::refusal.clear();
  } catch (const base::Error& error) {
    fuzz::Refused(error);
  }
  return 0;
}
