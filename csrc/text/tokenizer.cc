#include "text/tokenizer.h"

#include <limits>
#include <utility>

#include "base/error.h"
#include "base/utf8.h"
#include "text/pre_tokenizer.h"

namespace fastgen::text {

// One call of Encode(): its memory is its own.
class Tokenizer::Encoder {
 public:
  Encoder(const Tokenizer& tokenizer, const char* text, std::vector<int32_t>* tokens)
      : tokenizer_(tokenizer), text_(text), tokens_(tokens), merger_(tokenizer.merges_) {}

  void Text(const char* begin, const char* end) {
    Split(tokenizer_.verbatim_, begin, end, [this](const char* first, const char* last) {
      Split(tokenizer_.normalized_, first, last,
            [this](const char* p, const char* stop) { Pieces(p, stop); });
    });
  }

 private:
  // What is between added tokens goes on to `use`.
  template <typename Use>
  void Split(const AddedTokens& added, const char* begin, const char* end, const Use& use) {
    while (begin != end) {
      const AddedTokens::Match match = added.Find(begin, end);
      if (match.begin != begin) use(begin, match.begin);
      if (match.id >= 0) tokens_->push_back(match.id);
      begin = match.end;
    }
  }

  void Pieces(const char* begin, const char* end) {
    while (begin != end) {
      const char* next = PieceEnd(begin, end);
      bytes_.clear();
      for (const char* p = begin; p != next; ++p) bytes_.push_back(ByteToken(p));
      merger_.Merge(bytes_, tokens_);
      begin = next;
    }
  }

  int32_t ByteToken(const char* p) const {
    const unsigned char byte = static_cast<unsigned char>(*p);
    const int32_t token = tokenizer_.vocabulary_.ByteToken(byte);
    if (token < 0) {
      throw base::Error(FASTGEN_INVALID_ARGUMENT,
                        "text has the byte " + base::Quote(std::string(1, *p)) + " at " +
                            std::to_string(p - text_) +
                            ", for which the tokenizer's vocabulary has no token");
    }
    return token;
  }

  const Tokenizer& tokenizer_;
  const char* text_;
  std::vector<int32_t>* tokens_;
  BpeMerger merger_;
  std::vector<int32_t> bytes_;
};

Tokenizer::Tokenizer(TokenizerFiles files)
    : vocabulary_(std::move(files.vocabulary), files.where),
      merges_(files.merges, vocabulary_, files.merges_where),
      special_(static_cast<size_t>(vocabulary_.id_end()), false) {
  verbatim_ = MakeAdded(files.added, false);
  normalized_ = MakeAdded(files.added, true);
}

AddedTokens Tokenizer::MakeAdded(const std::vector<AddedToken>& added, bool normalized) {
  std::vector<Token> tokens;
  for (const AddedToken& token : added) {
    if (token.normalized != normalized) continue;
    const int32_t id = vocabulary_.Find(token.text);
    tokens.push_back({token.text, id});
    if (token.special) special_[static_cast<size_t>(id)] = true;
  }
  return AddedTokens(std::move(tokens));
}

std::shared_ptr<const Tokenizer> Tokenizer::Load(const std::string& directory) {
  return std::make_shared<const Tokenizer>(ReadTokenizerFiles(directory));
}

std::vector<int32_t> Tokenizer::Encode(const char* text, size_t size) const {
  constexpr size_t kMaxBytes = std::numeric_limits<int32_t>::max();
  if (size > kMaxBytes) {
    throw base::Error(FASTGEN_INVALID_ARGUMENT, "text has " + std::to_string(size) +
                                                    " bytes, it must have at most " +
                                                    std::to_string(kMaxBytes));
  }
  std::vector<int32_t> tokens;
  if (size > 0) Encoder(*this, text, &tokens).Text(text, text + size);
  return tokens;
}

void Tokenizer::AppendBytes(int32_t id, bool keep_special, std::string* bytes) const {
  if (id < 0) {
    throw base::Error(FASTGEN_INVALID_ARGUMENT,
                      "tokens has " + std::to_string(id) + ", a token id must be at least 0");
  }
  if (!vocabulary_.Has(id) || (special_[static_cast<size_t>(id)] && !keep_special)) return;
  *bytes += vocabulary_.Bytes(id);
}

std::string Tokenizer::Decode(const int32_t* ids, size_t count, bool skip_special) const {
  std::string bytes;
  for (size_t i = 0; i < count; ++i) AppendBytes(ids[i], !skip_special, &bytes);
  std::string text;
  text.reserve(bytes.size());
  base::AppendLossy(bytes.data(), bytes.data() + bytes.size(), false, &text);
  return text;
}

std::string TextStream::Push(const int32_t* ids, size_t count) {
  std::string bytes = pending_;
  for (size_t i = 0; i < count; ++i) tokenizer_->AppendBytes(ids[i], !skip_special_, &bytes);
  std::string text;
  const size_t done = base::AppendLossy(bytes.data(), bytes.data() + bytes.size(), true, &text);
  pending_ = bytes.substr(done);
  return text;
}

std::string TextStream::Flush() {
  std::string text;
  base::AppendLossy(pending_.data(), pending_.data() + pending_.size(), false, &text);
  pending_.clear();
  return text;
}

}  // namespace fastgen::text
