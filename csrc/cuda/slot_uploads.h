// What the host tells the device of its sequences: their state, tables of pages and prompts. Written to
// page-locked memory when a sequence is opened, and sent before the next kernels run, neighbouring
// slots in one copy: nobody waits for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/check.h"
#include "cuda/types.h"

namespace fastgen::cuda {

class SlotUploads {
 public:
  // Sequences have up to so many positions.
  explicit SlotUploads(int32_t max_positions);
  ~SlotUploads();
  SlotUploads(const SlotUploads&) = delete;
  SlotUploads& operator=(const SlotUploads&) = delete;

  // Makes room for so many slots of the current device; what is known of those before stays where it
  // is. To be called before anything else.
  void Grow(size_t capacity);

  // Writes down slot `at`, to be sent; `tokens` and `pages` of the state are filled in.
  void Write(size_t at, Slot state, const std::vector<char*>& pages, const int32_t* prompt);
  // The slot is closed; what is not sent of it need not be.
  void Forget(size_t at) { unsent_[at] = false; }
  // Sends what was written; `slots` are all of the device.
  void Send(Slot* slots, cudaStream_t stream);

 private:
  // Slots [begin, end): on the device, table of pages then tokens of each; here the same, and states.
  struct Piece {
    size_t begin = 0, end = 0;
    DeviceMemory device;
    PinnedMemory host, states;
  };
  Piece& PieceOf(size_t at);

  const size_t table_bytes_;
  const size_t slot_bytes_;
  std::vector<Piece> pieces_;
  std::vector<bool> unsent_;
  bool any_unsent_ = false;
  cudaEvent_t sent_ = nullptr;  // nothing of what is here is being copied any more
};

}  // namespace fastgen::cuda
