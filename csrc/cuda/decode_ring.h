// Decode steps on their way: what was launched and not yet read by the host, and what was read of a
// sequence before anybody asked for it.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/check.h"
#include "cuda/types.h"
#include "engine/device.h"

namespace fastgen::cuda {

// Steps of a sequence that are launched ahead of the one it was asked for: one that runs and one that
// waits keep the device busy while the host reads a result and the caller looks at it.
constexpr int32_t kAhead = 2;

// What is known of a sequence's steps. A step that ran ahead gives the token that it would have given
// later, because a sequence's tokens do not depend on what runs beside it.
class AheadResults {
 public:
  AheadResults() = default;
  explicit AheadResults(int32_t max_length) : left_(max_length) {}

  // Steps launched, or read, that were not taken.
  int32_t pending() const { return in_flight_ + count_; }
  bool has_result() const { return count_ > 0; }
  // Whether one more step may give a token.
  bool goes_on() const { return left_ > 0 && !ended_; }
  // Whether its last token was taken.
  bool is_over() const { return over_; }

  void Launched() {
    ++in_flight_;
    --left_;
  }
  // Reads the oldest step that was launched. It gave nothing if the sequence had ended before it.
  void Read(const StepResult& from);
  // Takes the oldest result; an empty one once the sequence is over.
  engine::DecodeResult Take();

 private:
  std::array<engine::DecodeResult, kAhead> results_;
  int32_t count_ = 0;
  int32_t in_flight_ = 0;
  int32_t left_ = 0;  // steps that may still be launched
  bool ended_ = false;
  bool over_ = false;
};

// Steps in flight, oldest first, with the page-locked memory that the device reports to. The device
// counts the steps as the host does, and the count of a step is what makes its results known as its
// own, whatever was in their place before.
class DecodeRing {
 public:
  static constexpr int32_t kSteps = 8;  // more than a few sessions have in flight

  bool empty() const { return oldest_ == next_; }
  bool full() const { return next_ - oldest_ == kSteps; }

  // Sequences of a step at most.
  int32_t rows() const { return rows_; }
  // Makes room for steps of so many rows. No step may be in flight.
  void Reserve(int32_t rows, cudaStream_t stream);
  // Once it says that it must, before the next step: the count has become long, or was lost. No step
  // may be in flight.
  bool must_restart() const { return next_ == kLastCount || is_lost_; }
  void Restart(cudaStream_t stream);

  // For the kernel that chooses tokens.
  StepResult* results() const { return device_results_; }
  int32_t* count() const { return count_.as<int32_t>(); }

  // Place for the row list of the next step; the device may copy it until that step is read.
  Row* row_list() const { return row_lists_.as<Row>() + PlaceOf(next_); }
  // Notes that the next step was launched, for these slots. The ring must not be full.
  void Push(const std::vector<int32_t>& slots);
  // Waits for the oldest step and calls read(slot, result) for each of its rows but forgotten ones.
  template <typename Reader>
  void Pop(cudaStream_t stream, const Reader& read);
  // Results of steps in flight are not for this slot any more.
  void Forget(int32_t slot);

 private:
  // The count starts again before it is long, so that every long run shows that it can.
  static constexpr int32_t kLastCount = 1 << 16;

  size_t PlaceOf(int32_t count) const {
    return static_cast<size_t>(count % kSteps) * static_cast<size_t>(rows_);
  }
  // Waits for whatever the stream has to do; what goes wrong there, the next call finds too.
  static void WaitForAll(cudaStream_t stream) {
    if (cudaStreamSynchronize(stream) != cudaSuccess) static_cast<void>(cudaGetLastError());
  }
  // Polls until the device has written the result.
  const StepResult& WaitFor(int32_t count, size_t row, cudaStream_t stream);

  int32_t rows_ = 0;
  // Steps [oldest_, next_) are in flight.
  int32_t oldest_ = 0;
  int32_t next_ = 0;
  bool is_lost_ = false;
  std::array<std::vector<int32_t>, kSteps> slots_;  // of a step, by row; -1: forgotten
  PinnedMemory results_, row_lists_;
  StepResult* device_results_ = nullptr;
  DeviceMemory count_;
};

template <typename Reader>
void DecodeRing::Pop(cudaStream_t stream, const Reader& read) {
  if (empty()) throw base::Error(FASTGEN_INTERNAL, "there is no decode step to wait for");
  std::vector<int32_t>& slots = slots_[static_cast<size_t>(oldest_ % kSteps)];
  // Where nobody waits for the step, nothing else says that its row list has been copied.
  if (std::all_of(slots.begin(), slots.end(), [](int32_t slot) { return slot < 0; })) {
    WaitForAll(stream);
  }
  for (size_t row = 0; row < slots.size(); ++row) {
    if (slots[row] >= 0) read(slots[row], WaitFor(oldest_, row, stream));
    slots[row] = -1;  // read once, should a later row fail
  }
  ++oldest_;
}

}  // namespace fastgen::cuda
