// Finds added tokens (`<|endoftext|>`) in a text: the leftmost, of those that begin there the longest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "text/vocabulary.h"

namespace fastgen::text {

class AddedTokens {
 public:
  struct Match {
    const char* begin;  // the text's end if there is none
    const char* end;
    int32_t id;
  };

  AddedTokens() = default;
  // Distinct texts, none of them empty.
  explicit AddedTokens(std::vector<Token> tokens);

  // The first match in a text. Each byte of it costs no more than the longest token is long.
  Match Find(const char* begin, const char* end) const;

 private:
  int32_t LongestAt(const char* p, const char* end, size_t* size) const;

  std::vector<Token> tokens_;  // sorted by text
  bool may_begin_[256] = {};
};

}  // namespace fastgen::text
