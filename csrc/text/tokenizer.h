// Byte-level BPE: text to token ids and back, as HuggingFace's `tokenizers` does it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/tokenizer_files.h"
#include "text/vocabulary.h"

namespace fastgen::text {

// Never changes once it is made, so any number of threads may use one.
class Tokenizer {
 public:
  explicit Tokenizer(TokenizerFiles files);

  // Throws base::Error: see ReadTokenizerFiles() and the constructors of what it is made of.
  static std::shared_ptr<const Tokenizer> Load(const std::string& directory);

  const Vocabulary& vocabulary() const { return vocabulary_; }

  // Token ids of [text, text + size), with nothing put before or after. Added tokens that are
  // written out in it become their one id. A byte that is not UTF-8 is encoded as itself. Throws
  // base::Error(kInvalidArgument) for a byte that the vocabulary has no token for, and above 2^31 - 1
  // bytes. Time is O(n log n) whatever the text.
  std::vector<int32_t> Encode(const char* text, size_t size) const;

  // Appends the bytes of one token; those of a special one only if `keep_special`. Ids that the
  // vocabulary does not have add nothing: a model's may be padded. Throws for a negative one.
  void AppendBytes(int32_t id, bool keep_special, std::string* bytes) const;

  // Text of [ids, ids + count), UTF-8: what is not becomes U+FFFD.
  std::string Decode(const int32_t* ids, size_t count, bool skip_special) const;

 private:
  class Encoder;

  AddedTokens MakeAdded(const std::vector<AddedToken>& added, bool normalized);

  Vocabulary vocabulary_;
  MergeTable merges_;
  AddedTokens verbatim_;       // looked for first
  AddedTokens normalized_;     // then these, between those
  std::vector<bool> special_;  // [ids]
};

// Turns tokens into pieces of text as they come, never half a character. The pieces joined are
// Tokenizer::Decode() of all tokens.
class TextStream {
 public:
  TextStream(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special)
      : tokenizer_(std::move(tokenizer)), skip_special_(skip_special) {}

  // The text that is certain with these tokens, often none. A failed call changes nothing.
  std::string Push(const int32_t* ids, size_t count);
  // The rest, at the end: a character that is not complete as U+FFFD. Afterwards as new.
  std::string Flush();

 private:
  std::shared_ptr<const Tokenizer> tokenizer_;
  bool skip_special_;
  std::string pending_;  // at most three bytes: the beginning of a character
};

}  // namespace fastgen::text
