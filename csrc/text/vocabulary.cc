#include "text/vocabulary.h"

#include <algorithm>
#include <array>
#include <utility>

#include "base/error.h"
#include "base/utf8.h"

namespace fastgen::text {
namespace {

// The alphabet of byte-level BPE: a byte that is a visible character of Latin-1 stands for itself,
// the others for the code points from 256 on, in order.
class Alphabet {
 public:
  Alphabet() {
    bytes_.fill(-1);
    uint32_t next = 256;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const bool visible = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad);
      codes_[byte] = visible ? byte : next++;
      bytes_[codes_[byte]] = static_cast<int>(byte);
    }
  }

  uint32_t code(size_t byte) const { return codes_[byte]; }

  // What `text` stands for. A token with a character outside of the alphabet stands for itself.
  std::string Bytes(const std::string& text) const {
    std::string result;
    const char* end = text.data() + text.size();
    for (const char* p = text.data(); p != end;) {
      const base::Utf8Unit unit = base::ReadUtf8(p, end);
      if (unit.state != base::Utf8State::kValid || unit.code >= bytes_.size() ||
          bytes_[unit.code] < 0) {
        return text;
      }
      result.push_back(static_cast<char>(bytes_[unit.code]));
      p += unit.size;
    }
    return result;
  }

 private:
  std::array<uint32_t, 256> codes_;
  std::array<int, 256 + 68> bytes_;  // 68 bytes are not visible characters
};

const Alphabet& ByteAlphabet() {
  static const Alphabet alphabet;
  return alphabet;
}

}  // namespace

Vocabulary::Vocabulary(std::vector<Token> tokens, const std::string& where)
    : by_text_(std::move(tokens)) {
  const auto bad = [&where](const std::string& what) {
    throw base::Error(FASTGEN_BAD_FILE, where + ": " + what);
  };
  if (by_text_.empty()) bad("has no tokens");
  int32_t last = 0;
  for (const Token& token : by_text_) {
    if (token.text.empty()) bad("token " + std::to_string(token.id) + " is empty");
    if (token.id < 0 || token.id >= kMaxTokens) {
      bad("token " + base::Quote(token.text) + " has id " + std::to_string(token.id) +
          ", it must be from 0 to " + std::to_string(kMaxTokens - 1));
    }
    last = std::max(last, token.id);
  }
  std::sort(by_text_.begin(), by_text_.end(),
            [](const Token& a, const Token& b) { return a.text < b.text; });
  bytes_.resize(static_cast<size_t>(last) + 1);
  for (size_t i = 0; i < by_text_.size(); ++i) {
    const Token& token = by_text_[i];
    if (i > 0 && token.text == by_text_[i - 1].text) {
      bad("token " + base::Quote(token.text) + " is there twice");
    }
    std::string& bytes = bytes_[Index(token.id)];
    if (!bytes.empty()) {
      bad("id " + std::to_string(token.id) + " is there twice, for " + base::Quote(token.text) +
          " and for another token");
    }
    bytes = ByteAlphabet().Bytes(token.text);
  }
  for (size_t byte = 0; byte < 256; ++byte) {
    std::string text;
    base::AppendUtf8(ByteAlphabet().code(byte), &text);
    byte_tokens_[byte] = Find(text);
  }
}

int32_t Vocabulary::Find(const std::string& text) const {
  const auto found = std::lower_bound(
      by_text_.begin(), by_text_.end(), text,
      [](const Token& token, const std::string& wanted) { return token.text < wanted; });
  return found != by_text_.end() && found->text == text ? found->id : -1;
}

}  // namespace fastgen::text
