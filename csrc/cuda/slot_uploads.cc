#include "cuda/slot_uploads.h"

#include <algorithm>

namespace fastgen::cuda {
namespace {

size_t RoundUpTo(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

size_t TableBytes(int32_t max_positions) {
  return RoundUpTo(static_cast<size_t>(max_positions), kPage) / kPage * sizeof(char*);
}

}  // namespace

SlotUploads::SlotUploads(int32_t max_positions)
    : table_bytes_(TableBytes(max_positions)),
      slot_bytes_(RoundUpTo(
          table_bytes_ + (static_cast<size_t>(max_positions) + 1) * sizeof(int32_t), kAlign)) {}

SlotUploads::~SlotUploads() {
  if (sent_) cudaEventDestroy(sent_);
}

void SlotUploads::Grow(size_t capacity) {
  if (!sent_) {
    Check(cudaEventCreateWithFlags(&sent_, cudaEventDisableTiming), "creating an event");
  }
  Piece piece;
  piece.begin = unsent_.size();
  piece.end = capacity;
  const size_t count = piece.end - piece.begin;
  piece.device = DeviceMemory(count * slot_bytes_, "the tokens of sequences");
  piece.host = PinnedMemory(count * slot_bytes_, "taking page-locked memory for sequences");
  piece.states = PinnedMemory(count * sizeof(Slot), "taking page-locked memory for sequences");
  pieces_.reserve(pieces_.size() + 1);
  unsent_.resize(capacity);
  pieces_.push_back(std::move(piece));
}

SlotUploads::Piece& SlotUploads::PieceOf(size_t at) {
  return *std::find_if(pieces_.begin(), pieces_.end(),
                       [at](const Piece& piece) { return at < piece.end; });
}

void SlotUploads::Write(size_t at, Slot state, const std::vector<char*>& pages,
                        const int32_t* prompt) {
  // The slot's last sequence may have been sent only just now.
  Check(cudaEventSynchronize(sent_), "sending a sequence to the device");
  Piece& piece = PieceOf(at);
  const size_t offset = (at - piece.begin) * slot_bytes_;
  char* const host = piece.host.as<>() + offset;
  char* const device = piece.device.as<>() + offset;
  state.pages = reinterpret_cast<char* const*>(device);
  state.tokens = reinterpret_cast<int32_t*>(device + table_bytes_);
  std::copy(pages.begin(), pages.end(), reinterpret_cast<char**>(host));
  std::copy_n(prompt, state.prompt_length, reinterpret_cast<int32_t*>(host + table_bytes_));
  piece.states.as<Slot>()[at - piece.begin] = state;
  unsent_[at] = true;
  any_unsent_ = true;
}

void SlotUploads::Send(Slot* slots, cudaStream_t stream) {
  if (!any_unsent_) return;
  const auto copy = [stream](void* to, const void* from, size_t bytes) {
    Check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream),
          "sending a sequence to the device");
  };
  try {
    for (const Piece& piece : pieces_) {
      for (size_t first = piece.begin; first < piece.end;) {
        size_t last = first;
        while (last < piece.end && unsent_[last]) ++last;
        if (last == first) {
          ++first;
          continue;
        }
        const size_t at = first - piece.begin, count = last - first;
        copy(piece.device.as<>() + at * slot_bytes_, piece.host.as<>() + at * slot_bytes_,
             count * slot_bytes_);
        copy(slots + first, piece.states.as<Slot>() + at, count * sizeof(Slot));
        first = last;
      }
    }
  } catch (...) {
    // What was copied so far may not be written over before it has been.
    cudaEventRecord(sent_, stream);
    throw;
  }
  Check(cudaEventRecord(sent_, stream), "sending a sequence to the device");
  std::fill(unsent_.begin(), unsent_.end(), false);
  any_unsent_ = false;
}

}  // namespace fastgen::cuda
