#include "text/pre_tokenizer.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <iterator>

#include "base/utf8.h"
#include "text/unicode_tables.h"

namespace fastgen::text {
namespace {

// Latin, Greek and Cyrillic are looked up, the rest is searched for.
constexpr uint32_t kTableSize = 0x530;

constexpr std::array<CharClass, kTableSize> MakeTable() {
  std::array<CharClass, kTableSize> table = {};
  size_t run = 0;
  for (uint32_t code = 0; code < kTableSize; ++code) {
    while (kClassChanges[run + 1] >> 2 <= code) ++run;
    table[code] = static_cast<CharClass>(kClassChanges[run] & 3);
  }
  return table;
}

constexpr std::array<CharClass, kTableSize> kTable = MakeTable();

struct Char {
  CharClass kind;
  size_t size;
};

Char CharAt(const char* p, const char* end) {
  const unsigned char byte = static_cast<unsigned char>(*p);
  if (byte < 0x80) return {kTable[byte], 1};
  const base::Utf8Unit unit = base::ReadUtf8(p, end);
  if (unit.state != base::Utf8State::kValid) return {CharClass::kOther, unit.size};
  return {ClassOf(unit.code), unit.size};
}

// The end of the run of characters of class `kind` that begins at `p`; `p` if there is none.
const char* RunEnd(const char* p, const char* end, CharClass kind) {
  while (p != end) {
    const Char next = CharAt(p, end);
    if (next.kind != kind) break;
    p += next.size;
  }
  return p;
}

// Length of the contraction after an apostrophe at `p`, the apostrophe included; 0: there is none.
size_t Contraction(const char* p, const char* end) {
  const ptrdiff_t size = end - p;
  if (size < 2) return 0;
  switch (p[1]) {
    case 's':
    case 't':
    case 'm':
    case 'd': return 2;
    case 'r':
    case 'v': return size > 2 && p[2] == 'e' ? 3 : 0;
    case 'l': return size > 2 && p[2] == 'l' ? 3 : 0;
    default: return 0;
  }
}

}  // namespace

CharClass ClassOf(uint32_t code) {
  if (code < kTableSize) return kTable[code];
  // The last run that does not begin after it.
  const uint32_t* run =
      std::upper_bound(std::begin(kClassChanges), std::end(kClassChanges), code << 2 | 3) - 1;
  return static_cast<CharClass>(*run & 3);
}

const char* PieceEnd(const char* begin, const char* end) {
  if (*begin == '\'') {
    const size_t size = Contraction(begin, end);
    if (size > 0) return begin + size;
  }
  if (*begin == ' ' && begin + 1 != end) {
    const CharClass kind = CharAt(begin + 1, end).kind;
    if (kind != CharClass::kSpace) return RunEnd(begin + 1, end, kind);
  }
  const Char first = CharAt(begin, end);
  if (first.kind != CharClass::kSpace) return RunEnd(begin, end, first.kind);
  // White space: all of it at the text's end; else all but the last, which the next piece may take.
  const char* last = begin;
  const char* p = begin + first.size;
  while (p != end) {
    const Char next = CharAt(p, end);
    if (next.kind != CharClass::kSpace) return last == begin ? p : last;
    last = p;
    p += next.size;
  }
  return end;
}

}  // namespace fastgen::text
