// Tokens of a byte-level vocabulary: as they are written, as bytes, and their ids.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastgen::text {

struct Token {
  std::string text;  // UTF-8, in the byte-level alphabet
  int32_t id;
};

class Vocabulary {
 public:
  // Bounds memory whatever a file says; several times the largest vocabulary of this kind.
  static constexpr int32_t kMaxTokens = 1 << 20;

  // Ids need not be contiguous. Throws base::Error(kBadFile) that begins with `where` for a token or
  // an id that is there twice, an empty token and an id that is not in [0, kMaxTokens).
  Vocabulary(std::vector<Token> tokens, const std::string& where);

  size_t size() const { return by_text_.size(); }
  bool Has(int32_t id) const { return id >= 0 && id < id_end() && !bytes_[Index(id)].empty(); }
  int32_t id_end() const { return static_cast<int32_t>(bytes_.size()); }  // above every id

  // Id of a token as it is written, -1 if there is none.
  int32_t Find(const std::string& text) const;
  // The bytes that a token stands for, never none. Only for an id that it has.
  const std::string& Bytes(int32_t id) const { return bytes_[Index(id)]; }
  // Id of the token of a single byte, -1 if there is none.
  int32_t ByteToken(unsigned char byte) const { return byte_tokens_[byte]; }

 private:
  static size_t Index(int32_t id) { return static_cast<size_t>(id); }

  std::vector<Token> by_text_;  // sorted: no file can make looking up slow
  std::vector<std::string> bytes_;
  int32_t byte_tokens_[256];
};

}  // namespace fastgen::text
