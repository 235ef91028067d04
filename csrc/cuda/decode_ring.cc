#include "cuda/decode_ring.h"

#include <algorithm>
#include <utility>

namespace fastgen::cuda {

void AheadResults::Read(const StepResult& from) {
  --in_flight_;
  if (from.token < 0) return;
  engine::DecodeResult& result = results_[static_cast<size_t>(count_++)];
  result.token = from.token;
  result.score = from.score;
  result.finished = from.finished != 0;
  ended_ = result.finished;
}

engine::DecodeResult AheadResults::Take() {
  if (count_ == 0) return engine::DecodeResult();
  const engine::DecodeResult oldest = results_[0];
  std::move(results_.begin() + 1, results_.begin() + count_, results_.begin());
  --count_;
  over_ = oldest.finished;
  return oldest;
}

void DecodeRing::Reserve(int32_t rows, cudaStream_t stream) {
  if (rows <= rows_) return;
  const auto places = static_cast<size_t>(kSteps) * static_cast<size_t>(rows);
  PinnedMemory results(places * sizeof(StepResult), "taking page-locked memory for results");
  PinnedMemory row_lists(places * sizeof(Row), "taking page-locked memory for rows");
  if (count_.size() == 0) count_ = DeviceMemory(sizeof(int32_t), "the number of the step");
  device_results_ = results.on_device<StepResult>();
  results_ = std::move(results);
  row_lists_ = std::move(row_lists);
  rows_ = rows;
  Restart(stream);
}

void DecodeRing::Restart(cudaStream_t stream) {
  is_lost_ = true;  // should anything fail here
  Check(cudaMemsetAsync(count_.as<>(), 0, sizeof(int32_t), stream), "clearing device memory");
  Check(cudaStreamSynchronize(stream), "a decode step");
  std::fill_n(results_.as<>(), results_.size(), '\0');
  oldest_ = next_ = 0;
  is_lost_ = false;
}

void DecodeRing::Push(const std::vector<int32_t>& slots) {
  slots_[static_cast<size_t>(next_ % kSteps)] = slots;
  ++next_;
}

void DecodeRing::Forget(int32_t slot) {
  for (int32_t count = oldest_; count < next_; ++count) {
    std::vector<int32_t>& slots = slots_[static_cast<size_t>(count % kSteps)];
    std::replace(slots.begin(), slots.end(), slot, -1);
  }
}

const StepResult& DecodeRing::WaitFor(int32_t count, size_t row, cudaStream_t stream) {
  const StepResult& result = results_.as<StepResult>()[PlaceOf(count) + row];
  const volatile int32_t* const ready = &result.ready;
  try {
    for (uint32_t spins = 1; *ready != count + 1; ++spins) {
      if (spins % 4096 != 0) continue;
      const cudaError_t status = cudaStreamQuery(stream);
      if (status == cudaErrorNotReady) continue;
      Check(status, "a decode step");
      if (*ready != count + 1) {
        throw base::Error(FASTGEN_INTERNAL, "a decode step gave no result");
      }
    }
  } catch (...) {
    is_lost_ = true;
    throw;
  }
  __atomic_thread_fence(__ATOMIC_ACQUIRE);
  return result;
}

}  // namespace fastgen::cuda
