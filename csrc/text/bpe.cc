#include "text/bpe.h"

#include <algorithm>
#include <functional>

#include "base/error.h"

namespace fastgen::text {

MergeTable::MergeTable(const std::vector<Pair>& pairs, const Vocabulary& vocabulary,
                       const std::string& where) {
  const auto id_of = [&](size_t rank, const std::string& token) {
    const int32_t id = vocabulary.Find(token);
    if (id < 0) {
      const Pair& pair = pairs[rank];
      throw base::Error(FASTGEN_BAD_FILE, where + ": merge " + std::to_string(rank + 1) + ", " +
                                              base::Quote(pair.first + " " + pair.second) +
                                              ", needs the token " + base::Quote(token) +
                                              ", which is not in the vocabulary");
    }
    return id;
  };
  merges_.reserve(pairs.size());
  for (size_t rank = 0; rank < pairs.size(); ++rank) {
    const Pair& pair = pairs[rank];
    merges_.push_back({id_of(rank, pair.first), id_of(rank, pair.second),
                       id_of(rank, pair.first + pair.second), static_cast<uint32_t>(rank)});
  }
  std::sort(merges_.begin(), merges_.end(), [](const Merge& a, const Merge& b) {
    return a.left != b.left ? a.left < b.left : a.right < b.right;
  });
  for (size_t i = 1; i < merges_.size(); ++i) {
    if (merges_[i].left == merges_[i - 1].left && merges_[i].right == merges_[i - 1].right) {
      const Pair& pair = pairs[merges_[i].rank];
      throw base::Error(
          FASTGEN_BAD_FILE,
          where + ": merge " + base::Quote(pair.first + " " + pair.second) + " is there twice");
    }
  }
  begin_.assign(static_cast<size_t>(vocabulary.id_end()) + 1, 0);
  for (const Merge& merge : merges_) ++begin_[static_cast<size_t>(merge.left) + 1];
  for (size_t id = 1; id < begin_.size(); ++id) begin_[id] += begin_[id - 1];
}

const MergeTable::Merge* MergeTable::Find(int32_t left, int32_t right) const {
  const Merge* begin = merges_.data() + begin_[static_cast<size_t>(left)];
  const Merge* end = merges_.data() + begin_[static_cast<size_t>(left) + 1];
  const Merge* found = std::lower_bound(
      begin, end, right, [](const Merge& merge, int32_t wanted) { return merge.right < wanted; });
  return found != end && found->right == right ? found : nullptr;
}

void BpeMerger::Consider(int32_t left) {
  const Symbol& symbol = symbols_[static_cast<size_t>(left)];
  if (symbol.next < 0) return;
  const MergeTable::Merge* merge =
      merges_.Find(symbol.token, symbols_[static_cast<size_t>(symbol.next)].token);
  if (merge == nullptr) return;
  queue_.push_back(uint64_t{merge->rank} << 32 | static_cast<uint32_t>(left));
  std::push_heap(queue_.begin(), queue_.end(), std::greater<uint64_t>());
}

void BpeMerger::Merge(const std::vector<int32_t>& bytes, std::vector<int32_t>* tokens) {
  const int32_t size = static_cast<int32_t>(bytes.size());
  symbols_.clear();
  queue_.clear();
  for (int32_t i = 0; i < size; ++i) {
    symbols_.push_back({bytes[static_cast<size_t>(i)], i - 1, i + 1 < size ? i + 1 : -1});
  }
  for (int32_t i = 0; i + 1 < size; ++i) Consider(i);
  while (!queue_.empty()) {
    std::pop_heap(queue_.begin(), queue_.end(), std::greater<uint64_t>());
    const uint32_t rank = static_cast<uint32_t>(queue_.back() >> 32);
    const int32_t left = static_cast<int32_t>(queue_.back() & 0xffffffff);
    queue_.pop_back();
    Symbol& symbol = symbols_[static_cast<size_t>(left)];
    // The pair may have changed since it was put there.
    if (symbol.token < 0 || symbol.next < 0) continue;
    Symbol& right = symbols_[static_cast<size_t>(symbol.next)];
    const MergeTable::Merge* merge = merges_.Find(symbol.token, right.token);
    if (merge == nullptr || merge->rank != rank) continue;
    symbol.token = merge->result;
    symbol.next = right.next;
    right.token = -1;
    if (symbol.next >= 0) symbols_[static_cast<size_t>(symbol.next)].previous = left;
    if (symbol.previous >= 0) Consider(symbol.previous);
    Consider(left);
  }
  for (int32_t i = size > 0 ? 0 : -1; i >= 0; i = symbols_[static_cast<size_t>(i)].next) {
    tokens->push_back(symbols_[static_cast<size_t>(i)].token);
  }
}

}  // namespace fastgen::text
