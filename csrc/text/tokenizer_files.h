// What the files of a tokenizer say, before anything is made of it.
//
// Read are `tokenizer.json`, or else `vocab.json` or `vocab.txt` (one token a line, the line's
// number, from 0, is its id) with `merges.txt`. Special tokens of the latter are named by an export's
// `fastgen.json`, or by the files beside them. Files are not trusted: sizes and counts are bounded,
// and everything that does not make sense throws base::Error(kBadFile).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "text/bpe.h"
#include "text/vocabulary.h"

namespace fastgen::text {

// A token that is looked for in the text before anything else is done to it.
struct AddedToken {
  std::string text;
  bool special = true;      // left out of decoded text
  bool normalized = false;  // looked for after those that are not
};

struct TokenizerFiles {
  std::string where;              // the vocabulary's path, for messages
  std::vector<Token> vocabulary;  // added tokens included
  std::string merges_where;
  std::vector<MergeTable::Pair> merges;
  std::vector<AddedToken> added;  // every one of them is in the vocabulary
};

// The parsers take a file's text, and its path for messages.
TokenizerFiles ParseTokenizerJson(const std::string& text, const std::string& path);
std::vector<Token> ParseVocabJson(const std::string& text, const std::string& path);
std::vector<Token> ParseVocabText(const std::string& text, const std::string& path);
std::vector<MergeTable::Pair> ParseMerges(const std::string& text, const std::string& path);
// Values of bos_token, eos_token, pad_token and unk_token in a special_tokens_map.json or a
// tokenizer_config.json.
std::vector<std::string> ParseSpecialTokens(const std::string& text, const std::string& path);

// Throws base::Error(kNotFound) if a directory has no tokenizer.
TokenizerFiles ReadTokenizerFiles(const std::string& directory);

}  // namespace fastgen::text
