// Decode steps from the host's side: which sequences a step takes, what runs ahead of the caller, and
// what becomes of the results.
#include <algorithm>
#include <exception>

#include "cuda/cuda_device.h"

namespace fastgen::cuda {

int32_t CudaDevice::Decode(const int32_t* slots, size_t count, int32_t max_steps,
                           engine::DecodeResult* results, float* logits) {
  std::lock_guard<std::mutex> lock(mutex_);
  Check(cudaSetDevice(index_), "choosing the device");
  uploads_.Send(device_slots_.as<Slot>(), stream_);
  std::vector<Row> unfed;
  size_t running = 0;
  for (size_t i = 0; i < count; ++i) {
    const HostSlot& slot = At(slots[i]);
    const int32_t end = IsLong(slots[i]) ? slot.prompt_length : slot.prompt_length - 1;
    for (int32_t p = slot.fed; p < end; ++p) unfed.push_back({slots[i], p});
    running += slot.ahead.is_over() ? 0 : 1;
  }
  if (!unfed.empty()) FeedRows(unfed, {});
  for (const Row& row : unfed) {  // now that they are
    HostSlot& slot = slots_[static_cast<size_t>(row.slot)];
    slot.fed = std::max(slot.fed, row.position + 1);
  }

  const auto waits = [this](int32_t index) {
    const AheadResults& ahead = slots_[static_cast<size_t>(index)].ahead;
    return !ahead.is_over() && !ahead.has_result();
  };
  int32_t done = 0;
  for (; done < max_steps && running > 0; ++done) {
    // Logits are copied between a step and the next.
    RunAhead(slots, count, logits ? 1 : kAhead, logits);
    while (std::any_of(slots, slots + count, waits)) ReadStep();
    for (size_t i = 0; i < count; ++i) {
      AheadResults& ahead = slots_[static_cast<size_t>(slots[i])].ahead;
      const engine::DecodeResult result = ahead.Take();
      results[static_cast<size_t>(done) * count + i] = result;
      running -= result.finished ? 1 : 0;
    }
    if (logits) logits += count * static_cast<size_t>(config_.vocab_size);
  }
  if (logits) {
    Check(cudaStreamSynchronize(stream_), "copying logits");
    return done;
  }
  try {
    RunAhead(slots, count, kAhead, nullptr);
  } catch (const std::exception&) {
    // What there is counts. The next call tries again, and then it needs the step.
  }
  return done;
}

void CudaDevice::RunAhead(const int32_t* slots, size_t count, int32_t pending, float* logits) {
  for (;;) {
    step_slots_.clear();
    step_logits_.clear();
    bool waits = false;
    const bool first =
        std::any_of(slots, slots + count, [this](int32_t slot) { return IsFirst(slot); });
    for (size_t i = 0; i < count; ++i) {
      const HostSlot& slot = slots_[static_cast<size_t>(slots[i])];
      if (!slot.ahead.goes_on() || slot.ahead.pending() >= pending) continue;
      if (IsFirst(slots[i]) != first) continue;
      waits = waits || slot.ahead.pending() == 0;
      step_slots_.push_back(slots[i]);
      const bool wanted = logits && slot.keep_logits;
      step_logits_.push_back(wanted ? logits + i * static_cast<size_t>(config_.vocab_size)
                                    : nullptr);
    }
    if (step_slots_.empty()) return;
    if (!ring_.full()) {
      LaunchStepOfSlots(first);
    } else if (waits) {
      ReadStep();
    } else {
      return;
    }
  }
}

bool CudaDevice::IsFirst(int32_t index) const {
  const HostSlot& slot = slots_[static_cast<size_t>(index)];
  return slot.launched == 0 && slot.fed == slot.prompt_length && IsLong(index);
}

void CudaDevice::LaunchStepOfSlots(bool first) {
  const int32_t rows = StepRows(step_slots_.size());
  if (rows > decode_space_.rows || rows > layer_space_.rows) {
    ReadSteps();
    listed_.clear();
    ReserveDecode(rows);
  }
  if (ring_.must_restart()) {
    ReadSteps();
    ring_.Restart(stream_);
  }
  step_slots_.resize(static_cast<size_t>(rows), -1);
  if (step_slots_ != listed_) {
    listed_.clear();
    Row* const list = ring_.row_list();
    for (size_t row = 0; row < step_slots_.size(); ++row) list[row] = {step_slots_[row], -1};
    Check(cudaMemcpyAsync(layer_space_.row_list.as<>(), list, step_slots_.size() * sizeof(Row),
                          cudaMemcpyHostToDevice, stream_),
          "copying the rows of a step");
    listed_ = step_slots_;
  }
  const bool any_logits =
      std::any_of(step_logits_.begin(), step_logits_.end(), [](const float* to) { return to; });
  if (any_logits || first) {
    if (first) {
      LaunchFirst(rows);
    } else {
      LaunchForward(rows);
    }
    for (size_t row = 0; row < step_logits_.size(); ++row) {
      if (!step_logits_[row]) continue;
      const float* const from =
          decode_space_.logits.as<float>() + static_cast<int64_t>(row) * logits_stride_;
      Check(cudaMemcpyAsync(step_logits_[row], from,
                            static_cast<size_t>(config_.vocab_size) * sizeof(float),
                            cudaMemcpyDeviceToHost, stream_),
            "copying logits");
    }
    LaunchSample(rows);
  } else {
    LaunchStep(rows);
  }
  ring_.Push(step_slots_);
  for (const int32_t slot : step_slots_) {
    if (slot < 0) continue;
    slots_[static_cast<size_t>(slot)].ahead.Launched();
    slots_[static_cast<size_t>(slot)].launched += 1;
  }
}

void CudaDevice::ReadStep() {
  ring_.Pop(stream_, [this](int32_t slot, const StepResult& result) {
    slots_[static_cast<size_t>(slot)].ahead.Read(result);
  });
}

void CudaDevice::ReadSteps() {
  while (!ring_.empty()) ReadStep();
}

}  // namespace fastgen::cuda
