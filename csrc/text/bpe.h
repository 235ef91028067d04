// Byte-pair merges: the pair of neighbours of the lowest rank is merged first, the leftmost of
// equals, until no pair is in the table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "text/vocabulary.h"

namespace fastgen::text {

class MergeTable {
 public:
  using Pair = std::pair<std::string, std::string>;

  struct Merge {
    int32_t left;
    int32_t right;
    int32_t result;
    uint32_t rank;
  };

  // Pairs in the order of their ranks, of tokens as they are written. Throws base::Error(kBadFile)
  // that begins with `where` for a token that is not in the vocabulary and a pair that is there
  // twice.
  MergeTable(const std::vector<Pair>& pairs, const Vocabulary& vocabulary,
             const std::string& where);

  // Null if the pair is not merged.
  const Merge* Find(int32_t left, int32_t right) const;

 private:
  std::vector<Merge> merges_;    // sorted by left and right
  std::vector<uint32_t> begin_;  // [ids + 1]: where the merges of a left token begin
};

// Merges pieces, one after the other, with memory that it keeps. Time for a piece of n bytes is
// O(n log n) whatever it is.
class BpeMerger {
 public:
  explicit BpeMerger(const MergeTable& merges) : merges_(merges) {}

  // Appends the tokens of a piece, which is given as one token for each byte. At most 2^31 - 1.
  void Merge(const std::vector<int32_t>& bytes, std::vector<int32_t>* tokens);

 private:
  struct Symbol {
    int32_t token;     // -1: it was merged into the one before it
    int32_t previous;  // -1: none
    int32_t next;      // -1: none
  };

  void Consider(int32_t left);

  const MergeTable& merges_;
  std::vector<Symbol> symbols_;
  std::vector<uint64_t> queue_;  // heap of (rank, position of the left symbol), smallest first
};

}  // namespace fastgen::text
