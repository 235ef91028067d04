// Work spaces: activations and what else steps and prompts need beside weights and cache. They grow when
// a sequence is opened, before it has pages, so that what is let in can run.
#include <algorithm>
#include <string>

#include "cuda/cuda_device.h"

namespace fastgen::cuda {
namespace {

// Heads of a step up to which blocks share them: with more there is enough for every multiprocessor.
constexpr size_t kSharedHeads = 2048;
// Rows grow by powers of two from these on: the spaces, and with them the graphs, are seldom made anew.
constexpr int32_t kLeastStep = 8, kLeastFew = 64, kLeastPrefill = 256;

int32_t PowerOfTwo(int64_t least, int64_t rows) {
  while (least < rows) least *= 2;
  return static_cast<int32_t>(least);
}

}  // namespace

// Rows of a step come in few sizes, each of which has its graphs.
int32_t CudaDevice::StepRows(size_t sequences) {
  const auto n = static_cast<int32_t>(sequences);
  if (n <= 8) return n;
  int32_t unit = 4;
  while (n > 4 * unit) unit *= 2;
  return static_cast<int32_t>(RoundUp(n, unit));
}

bool CudaDevice::SharesHeads(int32_t rows) const {
  return static_cast<size_t>(rows) * static_cast<size_t>(config_.num_heads) <= kSharedHeads;
}

std::vector<CudaDevice::Buffer> CudaDevice::Buffers(int32_t rows, LayerSpace* space) const {
  const char* const what = "the work space of a step";
  const auto n = static_cast<size_t>(rows);
  std::vector<Buffer> buffers;
  // What lies behind the columns of a row is multiplied by zeros, so it must be finite.
  const auto add = [&](DeviceMemory* to, int64_t stride, size_t element = sizeof(float)) {
    buffers.push_back({to, n * static_cast<size_t>(stride) * element, true, what});
  };
  add(&space->x, hidden_stride_);
  add(&space->q, hidden_stride_);
  add(&space->attended, hidden_stride_);
  add(&space->wide, wide_stride_);
  if (packs_rows_) {
    add(&space->packed_x, hidden_stride_, 2);
    add(&space->packed_attended, hidden_stride_, 2);
    add(&space->packed_wide, wide_stride_, 2);
    add(&space->parts, RoundUp(config_.hidden_size, kPartColumns) / kPartColumns, sizeof(float2));
  }
  const char* const lists = "the rows of a step";
  buffers.push_back({&space->row_list, n * sizeof(Row), false, lists});
  buffers.push_back({&space->places, n * sizeof(RowPlace), false, lists});
  buffers.push_back({&space->runs, n * sizeof(PrefillRun), false, lists});
  return buffers;
}

std::vector<CudaDevice::Buffer> CudaDevice::Buffers(int32_t rows, DecodeSpace* space) const {
  const auto n = static_cast<size_t>(rows);
  const auto heads = static_cast<size_t>(config_.num_heads);
  const char* const attention = "the work space of attention";
  size_t plan_bytes = 0;
  Check(DecodePlanBytes(rows, layout_, &plan_bytes), "planning attention");
  return {
      {&space->logits, n * static_cast<size_t>(logits_stride_) * sizeof(float), false,
       "the logits of a step"},
      {&space->partial,
       std::min(n * heads, kSharedHeads) * kDecodeParts *
           static_cast<size_t>(layout_.head_size + 2) * sizeof(float),
       false, attention},
      {&space->plan, plan_bytes, false, attention},
      {&space->arrived, n * heads * sizeof(int32_t), true, attention},
      {&space->sample, SampleWorkspaceBytes(rows, config_.vocab_size), true,
       "the work space of sampling"},
  };
}

std::vector<CudaDevice::Buffer> CudaDevice::Buffers(int32_t rows, PrefillSpace* space) const {
  const auto n = static_cast<size_t>(rows);
  const DType dtype = activation_dtype_;
  const char* const what = "the work space of a prompt";
  const char* const lists = "the rows of a prompt";
  std::vector<Buffer> buffers = {
      {&space->x, n * static_cast<size_t>(hidden_stride_) * SizeOf(DType::kFloat32), true, what},
      {&space->normed, n * static_cast<size_t>(hidden_stride_) * SizeOf(dtype), true, what},
      {&space->qkv, n * static_cast<size_t>(qkv_stride_) * SizeOf(dtype), true, what},
      {&space->attended, n * static_cast<size_t>(hidden_stride_) * SizeOf(dtype), true, what},
      {&space->wide, n * static_cast<size_t>(wide_stride_) * SizeOf(dtype), true, what},
      {&space->row_list, n * sizeof(Row), false, lists},
      {&space->runs, n * sizeof(PrefillRun), false, lists},
  };
  if (weight_dtype_ != dtype) {
    const int64_t widest = std::max(
        3 * int64_t{config_.hidden_size} * hidden_stride_,
        std::max(config_.intermediate_size * hidden_stride_, config_.hidden_size * wide_stride_));
    buffers.push_back({&space->weight, static_cast<size_t>(widest) * SizeOf(dtype), true, what});
  }
  return buffers;
}

void CudaDevice::TakeBuffers(const std::vector<Buffer>& buffers) {
  for (const Buffer& buffer : buffers) {
    try {
      *buffer.to = DeviceMemory(buffer.bytes, buffer.what);
    } catch (const base::Error& error) {
      // Pages that no sequence has can go.
      if (error.status() != FASTGEN_OUT_OF_MEMORY || !pages_->Release()) throw;
      *buffer.to = DeviceMemory(buffer.bytes, buffer.what);
    }
    if (!buffer.zeroed || buffer.bytes == 0) continue;
    Check(cudaMemsetAsync(buffer.to->as<>(), 0, buffer.bytes, stream_), "clearing device memory");
  }
}

// The old space goes before the new one is taken: the two need not fit beside each other.
template <typename Space>
void CudaDevice::Empty(Space* space) {
  Check(cudaStreamSynchronize(stream_), "a decode step");
  *space = Space();
}

template <typename Space>
void CudaDevice::Fill(int32_t rows, Space* space) {
  Space filled;
  TakeBuffers(Buffers(rows, &filled));
  filled.rows = rows;
  *space = std::move(filled);
}

void CudaDevice::ReserveLayer(int32_t rows) {
  if (rows <= layer_space_.rows) return;
  Empty(&layer_space_);
  DropGraphs();
  Fill(rows, &layer_space_);
}

void CudaDevice::ReserveDecode(int32_t rows) {
  ReserveLayer(rows);
  if (rows <= decode_space_.rows) return;
  Empty(&decode_space_);
  DropGraphs();
  ring_.Reserve(rows, stream_);
  Fill(rows, &decode_space_);
}

void CudaDevice::ReservePrefill(int32_t rows) {
  if (rows <= prefill_space_.rows) return;
  Empty(&prefill_space_);
  Fill(rows, &prefill_space_);
}

size_t CudaDevice::BytesMore(const SpaceRows& wanted) const {
  const auto bytes = [this](int32_t rows, auto space) {
    size_t sum = 0;
    if (rows == 0) return sum;
    for (const Buffer& buffer : Buffers(rows, &space)) sum += buffer.bytes;
    return sum;
  };
  const auto more = [&](int32_t rows, int32_t held, auto space) {
    return rows > held ? bytes(rows, std::move(space)) - bytes(held, decltype(space)()) : 0;
  };
  return more(wanted.layer, layer_space_.rows, LayerSpace()) +
         more(wanted.decode, decode_space_.rows, DecodeSpace()) +
         more(wanted.prefill, prefill_space_.rows, PrefillSpace());
}

void CudaDevice::Reserve(const SpaceRows& rows) {
  // Steps in flight use what is about to move.
  ReadSteps();
  listed_.clear();
  ReserveLayer(rows.layer);
  ReserveDecode(rows.decode);
  ReservePrefill(rows.prefill);
}

CudaDevice::SpaceRows CudaDevice::RowsFor(const engine::SequenceSpec& spec) const {
  size_t open = 1;
  int64_t many = 0, few = 0;
  const auto feed = [&](int32_t tokens, int32_t prompt_length) {
    (IsLongPrompt(prompt_length) ? many : few) += tokens;
  };
  if (!IsCopied(spec)) feed(spec.prompt_length, spec.prompt_length);
  for (const HostSlot& slot : slots_) {
    if (!slot.open) continue;
    ++open;
    if (slot.like < 0) feed(slot.prompt_length - slot.fed, slot.prompt_length);
  }
  SpaceRows rows;
  rows.decode = StepRows(open);
  rows.layer = std::max(rows.decode, static_cast<int32_t>(std::min<int64_t>(few, kFewRows)));
  rows.prefill = static_cast<int32_t>(std::min<int64_t>(many, kMostManyRows));
  return rows;
}

void CudaDevice::ReserveFor(const engine::SequenceSpec& spec) {
  SpaceRows rows = RowsFor(spec);
  if (BytesMore(rows) == 0) return;
  SpaceRows generous = rows;
  generous.decode = PowerOfTwo(kLeastStep, rows.decode);
  generous.layer = std::max(generous.decode, PowerOfTwo(kLeastFew, rows.layer));
  if (rows.prefill > 0) {
    generous.prefill = std::min(PowerOfTwo(kLeastPrefill, rows.prefill), kMostManyRows);
  }
  // Whether they fit is asked before the old ones go, which open sequences need.
  const auto fits = [this](const SpaceRows& wanted) {
    return BytesMore(wanted) + kSpareBytes <= FreeMemory().bytes;
  };
  if (fits(generous)) {
    rows = generous;
  } else if (!fits(rows) && !(pages_->Release() && fits(rows))) {
    ThrowMissing(
        "the work space of steps, beside " + std::to_string(kSpareBytes) + " bytes to spare,",
        BytesMore(rows), FreeMemory());
  }
  Reserve(rows);
}

void CudaDevice::TakePages(const engine::SequenceSpec& spec, size_t count,
                           std::vector<char*>* pages) {
  try {
    pages_->Take(count, pages);
    return;
  } catch (const base::Error& error) {
    const auto is_open = [](const HostSlot& slot) { return slot.open; };
    if (error.status() != FASTGEN_OUT_OF_MEMORY ||
        std::any_of(slots_.begin(), slots_.end(), is_open)) {
      throw;
    }
  }
  // Of a sequence alone, the spaces of those before it may be what is missing.
  ReadSteps();
  listed_.clear();
  Empty(&layer_space_);
  Empty(&decode_space_);
  Empty(&prefill_space_);
  DropGraphs();
  Reserve(RowsFor(spec));
  pages_->Take(count, pages);
}

}  // namespace fastgen::cuda
