#include "io/checksum.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <system_error>
#include <thread>

namespace fastgen::io {
namespace {

uint64_t RotateLeft(uint64_t value, int bits) { return (value << bits) | (value >> (64 - bits)); }

// One step is a bijection of the word for a given state, so a change of one word always shows; the
// rotation lets changes of high bits reach the low ones.
uint64_t Mix(uint64_t state, uint64_t word) {
  return RotateLeft((state ^ word) * 0x9E3779B97F4A7C15ull, 29);
}

// Reads memory at the speed the memory has: eight independent chains hide the multiplications.
uint64_t ChecksumOf(const void* data, size_t bytes, uint64_t seed) {
  constexpr size_t kLanes = 8;
  constexpr size_t kBlock = kLanes * sizeof(uint64_t);
  uint64_t lanes[kLanes];
  for (size_t i = 0; i < kLanes; ++i) lanes[i] = seed + i;
  const char* at = static_cast<const char*>(data);
  size_t left = bytes;
  for (; left >= kBlock; left -= kBlock, at += kBlock) {
    uint64_t words[kLanes];
    std::memcpy(words, at, kBlock);
    for (size_t i = 0; i < kLanes; ++i) lanes[i] = Mix(lanes[i], words[i]);
  }
  uint64_t tail[kLanes] = {};
  if (left > 0) std::memcpy(tail, at, left);
  uint64_t sum = bytes;
  for (size_t i = 0; i < kLanes; ++i) sum = Mix(sum, Mix(lanes[i], tail[i]));
  return sum;
}

size_t UsableProcessors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return static_cast<size_t>(std::max(1, CPU_COUNT(&set)));
}

}  // namespace

// Over pieces of a few megabytes, whose sums are mixed in order: the same whoever reads a piece.
// Memory is read faster by several processors, and callers do this before every call.
uint64_t Checksum(const std::vector<TensorView>& tensors) {
  constexpr size_t kPiece = size_t{1} << 22;
  struct Piece {
    const char* data;
    size_t bytes;
    uint64_t sum;
  };
  std::vector<Piece> pieces;
  for (const TensorView& tensor : tensors) {
    const char* data = static_cast<const char*>(tensor.data);
    const size_t bytes = tensor.num_bytes();
    for (size_t at = 0; at < bytes; at += kPiece) {
      pieces.push_back({data + at, std::min(kPiece, bytes - at), 0});
    }
  }
  size_t total = 0;
  for (const Piece& piece : pieces) total += piece.bytes;
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < pieces.size(); i = next++) {
      pieces[i].sum = ChecksumOf(pieces[i].data, pieces[i].bytes, i);
    }
  };
  std::vector<std::thread> helpers;
  const size_t wanted = std::min<size_t>({total / (8 * kPiece), 7, UsableProcessors() - 1});
  try {
    for (size_t i = 0; i < wanted; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // Fewer helpers do it too.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  uint64_t sum = tensors.size();
  for (const Piece& piece : pieces) sum = Mix(sum, piece.sum);
  return sum;
}

}  // namespace fastgen::io
