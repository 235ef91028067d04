// Prompts into the cache, and logits of every position. A pass takes its rows through all layers; few
// rows go through the kernels of decode steps, many through cuBLASLt.
#include <algorithm>
#include <cmath>
#include <string>

#include "cuda/cuda_device.h"

namespace fastgen::cuda {
namespace {

// Neighbouring positions of a slot are one run.
std::vector<PrefillRun> RunsOf(const Row* rows, size_t count) {
  std::vector<PrefillRun> runs;
  for (size_t i = 0; i < count; ++i) {
    const bool goes_on =
        i > 0 && rows[i].slot == rows[i - 1].slot && rows[i].position == rows[i - 1].position + 1;
    if (!goes_on) runs.push_back({rows[i].slot, static_cast<int32_t>(i), rows[i].position, 0});
    ++runs.back().count;
  }
  return runs;
}

}  // namespace

void CudaDevice::Prefill(const engine::PrefillChunk* chunks, size_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  Check(cudaSetDevice(index_), "choosing the device");
  uploads_.Send(device_slots_.as<Slot>(), stream_);
  size_t num_rows = 0;
  bool any_wanted = false;
  std::vector<int32_t> ends(count);  // of what is fed
  for (size_t c = 0; c < count; ++c) {
    const engine::PrefillChunk& chunk = chunks[c];
    const HostSlot& slot = At(chunk.slot);
    if (chunk.begin < 0 || chunk.count < 0 || chunk.begin + chunk.count > slot.prompt_length) {
      throw base::Error(FASTGEN_INTERNAL, "a prefill chunk lies outside its prompt");
    }
    // A long prompt's last token, which the caller leaves out, comes with those before it: its first step
    // then needs no pass over the weights of the layers.
    ends[c] = chunk.begin + chunk.count;
    if (ends[c] + 1 == slot.prompt_length && IsLong(chunk.slot)) ++ends[c];
    num_rows += static_cast<size_t>(ends[c] - chunk.begin);
    any_wanted = any_wanted || chunk.logits;
  }
  std::vector<Row> rows;
  std::vector<float*> wanted;  // where the logits of a row go, or null
  rows.reserve(num_rows);
  if (any_wanted) wanted.reserve(num_rows);
  for (size_t c = 0; c < count; ++c) {
    const engine::PrefillChunk& chunk = chunks[c];
    for (int32_t position = chunk.begin; position < ends[c]; ++position) {
      rows.push_back({chunk.slot, position});
      if (!any_wanted) continue;
      const int32_t i = position - chunk.begin;
      wanted.push_back(chunk.logits && i < chunk.count
                           ? chunk.logits + int64_t{i} * config_.vocab_size
                           : nullptr);
    }
  }
  FeedRows(rows, wanted);
  for (size_t c = 0; c < count; ++c) At(chunks[c].slot).fed = ends[c];
}

bool CudaDevice::IsLong(int32_t slot) const {
  return IsLongPrompt(slots_[static_cast<size_t>(slot)].prompt_length);
}

// `wanted` is empty where no logits are. Only logits are waited for: whatever comes after the rows is
// in the same stream.
void CudaDevice::FeedRows(const std::vector<Row>& rows, const std::vector<float*>& wanted) {
  ReadSteps();
  listed_.clear();
  const auto is_long = [this](const Row& row) { return IsLong(row.slot); };
  if (std::all_of(rows.begin(), rows.end(), is_long)) {
    FeedPart(rows, wanted, true);
  } else {
    std::vector<Row> parts[2];
    std::vector<float*> part_wanted[2];
    for (size_t i = 0; i < rows.size(); ++i) {
      const size_t part = IsLong(rows[i].slot) ? 1 : 0;
      parts[part].push_back(rows[i]);
      if (!wanted.empty()) part_wanted[part].push_back(wanted[i]);
    }
    FeedPart(parts[0], part_wanted[0], false);
    FeedPart(parts[1], part_wanted[1], true);
  }
  if (!wanted.empty()) Check(cudaStreamSynchronize(stream_), "feeding a prompt");
}

void CudaDevice::FeedPart(const std::vector<Row>& rows, const std::vector<float*>& wanted,
                          bool many) {
  // Before anything lies in the work space, which moves when it grows.
  const bool any = std::any_of(wanted.begin(), wanted.end(), [](float* to) { return to; });
  if (any) ReserveDecode(kLogitsRows);
  const auto most = static_cast<size_t>(many ? kMostManyRows : kFewRows);
  for (size_t begin = 0; begin < rows.size(); begin += most) {
    const size_t end = std::min(begin + most, rows.size());
    const auto count = static_cast<int32_t>(end - begin);
    const std::vector<PrefillRun> runs = RunsOf(rows.data() + begin, end - begin);
    int32_t longest = 0;
    for (const PrefillRun& run : runs) longest = std::max(longest, run.count);
    if (many) {
      ReservePrefill(count);
    } else {
      ReserveLayer(count);
    }
    const DeviceMemory& row_list = many ? prefill_space_.row_list : layer_space_.row_list;
    const DeviceMemory& run_list = many ? prefill_space_.runs : layer_space_.runs;
    Check(cudaMemcpyAsync(row_list.as<>(), rows.data() + begin, (end - begin) * sizeof(Row),
                          cudaMemcpyHostToDevice, stream_),
          "copying the rows of a prompt");
    Check(cudaMemcpyAsync(run_list.as<>(), runs.data(), runs.size() * sizeof(PrefillRun),
                          cudaMemcpyHostToDevice, stream_),
          "copying the rows of a prompt");
    const auto num_runs = static_cast<int32_t>(runs.size());
    if (many) {
      FeedManyRows(count, num_runs, longest);
    } else {
      FeedFewRows(count, num_runs, longest);
    }
    if (any) CopyLogits(many ? prefill_space_.x : layer_space_.x, wanted, begin, end);
    // Copies of the lists of rows are staged, but where the device reads the host's pages itself.
    if (properties_.pageableMemoryAccessUsesHostPageTables != 0) {
      Check(cudaStreamSynchronize(stream_), "feeding a prompt");
    }
  }
}

// Rows [begin, end) of `wanted` say where logits of `x`, whose first row is `begin`, go.
void CudaDevice::CopyLogits(const DeviceMemory& x, const std::vector<float*>& wanted, size_t begin,
                            size_t end) {
  for (size_t first = begin; first < end;) {
    size_t last = first;
    while (last < end && wanted[last] && last - first < kLogitsRows) ++last;
    if (last == first) {
      ++first;
      continue;
    }
    LaunchHead(x, static_cast<int32_t>(first - begin), static_cast<int32_t>(last - first));
    for (size_t row = first; row < last; ++row) {
      const float* const from =
          decode_space_.logits.as<float>() + static_cast<int64_t>(row - first) * logits_stride_;
      Check(cudaMemcpyAsync(wanted[row], from,
                            static_cast<size_t>(config_.vocab_size) * sizeof(float),
                            cudaMemcpyDeviceToHost, stream_),
            "copying logits");
    }
    first = last;
  }
}

void CudaDevice::FeedFewRows(int32_t rows, int32_t num_runs, int32_t longest_run) {
  const LayerSpace& s = layer_space_;
  Check(Embed(Embedding(s.row_list, rows, s.x), stream_), "launching the embedding");
  for (int32_t i = 0; i < config_.num_layers; ++i) {
    const LayerWeights& layer = weights_->layers()[static_cast<size_t>(i)];
    LinearArgs qkv =
        Product(layer.qkv, s.x, hidden_stride_, s.q, hidden_stride_, rows, Epilogue::kQkv);
    FoldIn(layer.norm1, layer.folded1, &qkv);
    qkv.layer = i;
    Check(Linear(qkv, stream_), "launching the attention's input");
    PrefillAttentionArgs attention;
    attention.q = s.q.as<float>();
    attention.ldq = hidden_stride_;
    attention.out = s.attended.as<float>();
    attention.ldo = hidden_stride_;
    attention.dtype = DType::kFloat32;
    attention.runs = s.runs.as<PrefillRun>();
    attention.num_runs = num_runs;
    attention.longest_run = longest_run;
    attention.slots = device_slots_.as<Slot>();
    attention.cache = layout_;
    attention.layer = i;
    Check(PrefillAttention(attention, stream_), "launching attention");
    LaunchAfterAttention(layer, rows);
  }
}

CudaDevice::LayerProducts CudaDevice::ProductsOf(const LayerWeights& layer, int32_t rows) const {
  const PrefillSpace& s = prefill_space_;
  const DType dtype = activation_dtype_;
  const bool wide_bias = dtype == DType::kFloat32;
  const auto product = [&](const Matrix& w, const void* bias, const DeviceMemory& x, int64_t ldx,
                           const DeviceMemory& y, int64_t ldy, DType out_dtype) {
    CublasLt::Product p;
    const bool converted = w.dtype != dtype;
    p.w = converted ? s.weight.as<>() : w.data;
    p.ldw = converted ? RoundUp(w.in, 32) : w.row_bytes / static_cast<int64_t>(SizeOf(dtype));
    p.x = x.as<>();
    p.ldx = ldx;
    p.y = y.as<>();
    p.ldy = ldy;
    p.rows = rows;
    p.in = w.in;
    p.out = w.out;
    p.dtype = dtype;
    p.out_dtype = out_dtype;
    p.bias = bias;
    return p;
  };
  LayerProducts p;
  p.qkv = product(layer.qkv, wide_bias ? layer.qkv.bias : layer.qkv_bias16, s.normed,
                  hidden_stride_, s.qkv, qkv_stride_, dtype);
  p.attention_out = product(layer.attention_out, layer.attention_out.bias, s.attended,
                            hidden_stride_, s.x, hidden_stride_, DType::kFloat32);
  p.attention_out.accumulate = true;
  p.feed_forward_in = product(layer.feed_forward_in,
                              wide_bias ? layer.feed_forward_in.bias : layer.feed_forward_in_bias16,
                              s.normed, hidden_stride_, s.wide, wide_stride_, dtype);
  p.feed_forward_in.gelu = true;
  p.feed_forward_out = product(layer.feed_forward_out, layer.feed_forward_out.bias, s.wide,
                               wide_stride_, s.x, hidden_stride_, DType::kFloat32);
  p.feed_forward_out.accumulate = true;
  return p;
}

void CudaDevice::PrepareMultiplier() {
  const CublasLt* const library = CublasLt::Open(nullptr);
  if (!library) return;
  std::unique_ptr<Multiplier> multiplier;
  try {
    multiplier = std::make_unique<Multiplier>(*library, stream_);
  } catch (const base::Error& error) {
    if (error.status() != FASTGEN_UNSUPPORTED) throw;
    return;
  }
  // The layers' products have the same shapes.
  const LayerProducts p = ProductsOf(weights_->layers().front(), 1);
  for (const CublasLt::Product* product :
       {&p.qkv, &p.attention_out, &p.feed_forward_in, &p.feed_forward_out}) {
    if (!multiplier->Plans(*product)) return;
  }
  multiplier_ = std::move(multiplier);
}

void CudaDevice::Multiply(const Matrix& w, const CublasLt::Product& product) {
  if (w.dtype != activation_dtype_) {
    Check(Dequantize(w, activation_dtype_, prefill_space_.weight.as<>(), product.ldw, stream_),
          "launching the conversion of weights");
  }
  multiplier_->Run(product);
}

void CudaDevice::SaturateRows(const DeviceMemory& x, int64_t stride, int32_t rows) {
  SaturateArgs args;
  args.x = x.as<>();
  args.ld = stride;
  args.rows = rows;
  Check(Saturate(args, stream_), "launching a prompt's products");
}

void CudaDevice::FeedManyRows(int32_t rows, int32_t num_runs, int32_t longest_run) {
  const PrefillSpace& s = prefill_space_;
  const DType dtype = activation_dtype_;
  const int32_t h = config_.hidden_size;
  Check(Embed(Embedding(s.row_list, rows, s.x), stream_), "launching the embedding");
  const auto norm = [&](const Norm& weights) {
    LayerNormArgs args;
    args.x = s.x.as<float>();
    args.ldx = hidden_stride_;
    args.norm = weights;
    args.size = h;
    args.rows = rows;
    args.dtype = dtype;
    args.out = s.normed.as<>();
    args.ldo = hidden_stride_;
    args.overlap = true;
    Check(LayerNorm(args, stream_), "launching a layer norm");
  };
  for (int32_t i = 0; i < config_.num_layers; ++i) {
    const LayerWeights& layer = weights_->layers()[static_cast<size_t>(i)];
    const LayerProducts products = ProductsOf(layer, rows);
    norm(layer.norm1);
    Multiply(layer.qkv, products.qkv);
    if (saturates_) SaturateRows(s.qkv, qkv_stride_, rows);
    PrefillAttentionArgs attention;
    attention.q = s.qkv.as<>();
    attention.ldq = qkv_stride_;
    if (attention_stores_) {
      const size_t width = static_cast<size_t>(h) * SizeOf(dtype);
      attention.k = s.qkv.as<>() + width;
      attention.v = s.qkv.as<>() + 2 * width;
      attention.scale = 1.0f / std::sqrt(static_cast<float>(layout_.head_size));
    } else {
      QkvArgs qkv;
      qkv.qkv = s.qkv.as<>();
      qkv.ld = qkv_stride_;
      qkv.dtype = dtype;
      qkv.row_list = s.row_list.as<Row>();
      qkv.slots = device_slots_.as<Slot>();
      qkv.rows = rows;
      qkv.cache = layout_;
      qkv.layer = i;
      Check(StoreQkv(qkv, stream_), "launching the store to the cache");
    }
    attention.out = s.attended.as<>();
    attention.ldo = hidden_stride_;
    attention.dtype = dtype;
    attention.runs = s.runs.as<PrefillRun>();
    attention.num_runs = num_runs;
    attention.longest_run = longest_run;
    attention.slots = device_slots_.as<Slot>();
    attention.cache = layout_;
    attention.layer = i;
    attention.overlap = true;
    Check(PrefillAttention(attention, stream_), "launching attention");
    Multiply(layer.attention_out, products.attention_out);
    norm(layer.norm2);
    Multiply(layer.feed_forward_in, products.feed_forward_in);
    if (saturates_) SaturateRows(s.wide, wide_stride_, rows);
    Multiply(layer.feed_forward_out, products.feed_forward_out);
  }
  LastRowsArgs last;
  last.x = s.x.as<float>();
  last.last = last_rows_.as<float>();
  last.ld = hidden_stride_;
  last.slots = device_slots_.as<Slot>();
  last.runs = s.runs.as<PrefillRun>();
  last.count = num_runs;
  Check(KeepLastRows(last, stream_), "launching a prompt's end");
}

}  // namespace fastgen::cuda
