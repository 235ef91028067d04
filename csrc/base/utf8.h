// UTF-8 (RFC 3629): no overlong forms, no surrogates, nothing above U+10FFFF.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fastgen::base {

enum class Utf8State {
  kValid,    // a code point
  kInvalid,  // bytes that no continuation could make valid
  kCut       // the beginning of a code point, which the text's end cuts off
};

// What stands at the beginning of a text.
struct Utf8Unit {
  Utf8State state;
  uint32_t code;  // kValid only
  size_t size;    // bytes it takes; kInvalid and kCut: a maximal subpart, as Unicode defines it
};

// Reads from a text that is not empty.
Utf8Unit ReadUtf8(const char* begin, const char* end);

void AppendUtf8(uint32_t code, std::string* out);

// Appends [begin, end) to `out`, with one U+FFFD for each maximal subpart that is not UTF-8 (what
// HuggingFace's byte-level decoder and web browsers do). Stops before a code point that the end
// cuts off if `hold_cut`. Returns how many bytes of the text it has dealt with.
size_t AppendLossy(const char* begin, const char* end, bool hold_cut, std::string* out);

}  // namespace fastgen::base
