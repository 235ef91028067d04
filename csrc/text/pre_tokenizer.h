// Splits text into the pieces that byte-level BPE merges inside of, by GPT-2's pattern:
//
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//
// Bytes that are not UTF-8 count as characters that are neither letter nor number nor space.
#pragma once

#include <cstdint>

namespace fastgen::text {

enum class CharClass : uint8_t { kOther, kLetter, kNumber, kSpace };

// Class of a code point, in the Unicode version of unicode_tables.h.
CharClass ClassOf(uint32_t code);

// The end of the first piece of a text that is not empty. Going on from there takes time linear in
// the whole text.
const char* PieceEnd(const char* begin, const char* end);

}  // namespace fastgen::text
