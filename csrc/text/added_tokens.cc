#include "text/added_tokens.h"

#include <algorithm>
#include <utility>

namespace fastgen::text {

AddedTokens::AddedTokens(std::vector<Token> tokens) : tokens_(std::move(tokens)) {
  std::sort(tokens_.begin(), tokens_.end(),
            [](const Token& a, const Token& b) { return a.text < b.text; });
  for (const Token& token : tokens_) may_begin_[static_cast<unsigned char>(token.text[0])] = true;
}

// Narrows the sorted tokens down to those that agree with the text, byte by byte.
int32_t AddedTokens::LongestAt(const char* p, const char* end, size_t* size) const {
  int32_t id = -1;
  auto first = tokens_.begin();
  auto last = tokens_.end();
  const size_t available = static_cast<size_t>(end - p);
  for (size_t depth = 0; depth < available && first != last; ++depth) {
    const unsigned char wanted = static_cast<unsigned char>(p[depth]);
    // Every token left has at least `depth` bytes, and one of just as many comes first.
    const auto byte = [depth](const Token& token) {
      return token.text.size() == depth
                 ? -1
                 : static_cast<int>(static_cast<unsigned char>(token.text[depth]));
    };
    first =
        std::partition_point(first, last, [&](const Token& token) { return byte(token) < wanted; });
    last = std::partition_point(first, last,
                                [&](const Token& token) { return byte(token) <= wanted; });
    if (first != last && first->text.size() == depth + 1) {
      id = first->id;
      *size = depth + 1;
    }
  }
  return id;
}

AddedTokens::Match AddedTokens::Find(const char* begin, const char* end) const {
  if (!tokens_.empty()) {
    for (const char* p = begin; p != end; ++p) {
      if (!may_begin_[static_cast<unsigned char>(*p)]) continue;
      size_t size = 0;
      const int32_t id = LongestAt(p, end, &size);
      if (id >= 0) return {p, p + size, id};
    }
  }
  return {end, end, -1};
}

}  // namespace fastgen::text
