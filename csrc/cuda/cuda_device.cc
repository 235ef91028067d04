#include "cuda/cuda_device.h"

#include <algorithm>
#include <atomic>
#include <string>

#include "cuda/foreign.h"
#include "cuda/graph.h"
#include "cuda/pack.h"

namespace fastgen::cuda {
namespace {

// Sums below this are finite as float16, whatever was rounded on their way: half of its largest number.
constexpr float kMostHalf = 32752.0f;

std::atomic<StepPolicy> step_policy{StepPolicy::kAutomatic};
std::atomic<int64_t> persistent_steps{0};
std::atomic<int64_t> choosing_steps{0};
std::atomic<int64_t> joined_steps{0};

// Whether a step as one kernel may choose the tokens: the best or one of few, of logits as they come.
bool IsChosenInStep(const engine::SamplingParams& params, int32_t vocab) {
  const bool of_few = params.top_k > 0 && params.top_k <= kPersistentTopK && params.top_k < vocab;
  return (!params.sample || of_few) && params.min_length == 0 &&
         params.repetition_penalty == 1.0f && params.no_repeat_ngram_size == 0 &&
         params.forced_bos_token_id < 0 && params.forced_eos_token_id < 0;
}

DType ActivationType(DType weights) {
  return weights == DType::kFloat32 || weights == DType::kBFloat16 ? weights : DType::kFloat16;
}

}  // namespace

void SetStepPolicy(StepPolicy policy) { step_policy = policy; }
StepCounts CountSteps() { return {persistent_steps, choosing_steps, joined_steps}; }

CudaDevice::CudaDevice(const engine::PluginConfig& config, const engine::PluginOptions& options,
                       const engine::PluginWeights& weights)
    : config_(config),
      index_(options.device_index),
      weight_dtype_(ParseWeightType(options.weight_dtype)),
      activation_dtype_(ActivationType(weight_dtype_)),
      hidden_stride_(RoundUp(config.hidden_size, 32)),
      qkv_stride_(RoundUp(int64_t{3} * config.hidden_size, 32)),
      wide_stride_(RoundUp(config.intermediate_size, 32)),
      logits_stride_(RoundUp(config.vocab_size, 32)),
      uploads_(config.max_positions) {
  if (config_.hidden_size / config_.num_heads > kMostHeadSize) {
    throw base::Error(FASTGEN_UNSUPPORTED, "hidden_size=" + std::to_string(config_.hidden_size) +
                                               ", num_heads=" + std::to_string(config_.num_heads) +
                                               ": the CUDA device takes heads of up to " +
                                               std::to_string(kMostHeadSize) + " numbers");
  }
  ChooseDevice(index_);
  Check(cudaGetDeviceProperties(&properties_, index_), "asking what the device is");
  Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
  try {
    weights_ = std::make_unique<Weights>(config_, options, weight_dtype_, activation_dtype_,
                                         weights, stream_);
    layout_ = MakeCacheLayout(activation_dtype_, config_.num_layers, config_.num_heads,
                              config_.hidden_size / config_.num_heads);
    pages_ = std::make_unique<PagePool>(layout_, stream_);
    PreparePersistent();
    Check(PrefillAttentionStores(activation_dtype_, layout_, &attention_stores_),
          "asking what attention can do");
    Check(LinearRowsSupported(weight_dtype_, config_.hidden_size, &packs_rows_),
          "asking for products of packed rows");
    if (packs_rows_) {
      Check(QkvAttentionSupported(weights_->layers().front().qkv, layout_, &joins_attention_),
            "asking what attention can do");
    }
    PrepareMultiplier();
    saturates_ = activation_dtype_ == DType::kFloat16 && !(weights_->most_normed() < kMostHalf);
  } catch (...) {
    cudaStreamDestroy(stream_);
    throw;
  }
}

CudaDevice::~CudaDevice() {
  cudaSetDevice(index_);
  cudaStreamSynchronize(stream_);
  DropGraphs();
  multiplier_.reset();
  cudaStreamDestroy(stream_);
}

void CudaDevice::GetInfo(engine::PluginInfo* info) const {
  const auto copy = [](const std::string& text, char* to, size_t size) {
    const size_t count = std::min(text.size(), size - 1);
    std::copy_n(text.data(), count, to);
    to[count] = '\0';
  };
  copy(properties_.name, info->name, sizeof info->name);
  copy("sm_" + std::to_string(properties_.major) + std::to_string(properties_.minor),
       info->architecture, sizeof info->architecture);
  copy(TypeName(weight_dtype_), info->weight_dtype, sizeof info->weight_dtype);
  info->weight_bytes = weights_->bytes();
  info->step_bytes = weights_->step_bytes();
  info->cache_bytes_per_token = pages_->page_bytes() / kPage;
  info->prefill_tokens = multiplier_ ? kManyRows : kFewRows;
}

// ---- slots ---------------------------------------------------------------------------------

CudaDevice::HostSlot& CudaDevice::At(int32_t slot) {
  if (slot < 0 || slot >= static_cast<int32_t>(slots_.size()) ||
      !slots_[static_cast<size_t>(slot)].open) {
    throw base::Error(FASTGEN_INTERNAL, "slot " + std::to_string(slot) + " is not open");
  }
  return slots_[static_cast<size_t>(slot)];
}

void CudaDevice::GrowSlots() {
  const size_t capacity = std::max<size_t>(64, 2 * slot_capacity_);
  slots_.reserve(capacity);
  const size_t row_bytes = static_cast<size_t>(hidden_stride_) * sizeof(float);
  const auto grow = [&](const DeviceMemory& old, size_t bytes) {
    DeviceMemory grown(capacity * bytes, "the state of the sequences");
    if (slot_capacity_ > 0) {
      Check(cudaMemcpyAsync(grown.as<>(), old.as<>(), slot_capacity_ * bytes,
                            cudaMemcpyDeviceToDevice, stream_),
            "copying the state of the sequences");
    }
    return grown;
  };
  DeviceMemory slots = grow(device_slots_, sizeof(Slot));
  DeviceMemory last_rows = grow(last_rows_, row_bytes);
  Check(cudaStreamSynchronize(stream_), "copying the state of the sequences");
  uploads_.Grow(capacity);
  DropGraphs();
  device_slots_ = std::move(slots);
  last_rows_ = std::move(last_rows);
  slot_capacity_ = capacity;
}

int32_t CudaDevice::Open(const engine::SequenceSpec& spec) {
  std::lock_guard<std::mutex> lock(mutex_);
  Check(cudaSetDevice(index_), "choosing the device");
  size_t at = 0;
  while (at < slots_.size() && slots_[at].open) ++at;
  if (at == slot_capacity_) GrowSlots();
  if (at == slots_.size()) slots_.emplace_back();
  ReserveFor(spec);
  HostSlot& slot = slots_[at];
  // The last sampled token is never fed back, so it needs no place.
  const int64_t positions = int64_t{spec.prompt_length} + spec.sampling.max_length - 1;
  TakePages(spec, static_cast<size_t>(RoundUp(positions, kPage)) / kPage, &slot.pages);
  try {
    Slot state = {};
    state.length = spec.prompt_length;
    state.prompt_length = spec.prompt_length;
    const engine::SamplingParams& from = spec.sampling;
    SamplingParams& to = state.sampling;
    to.sample = from.sample ? 1 : 0;
    to.max_length = from.max_length;
    to.min_length = from.min_length;
    to.top_k = from.top_k;
    to.top_p = from.top_p;
    to.temperature = from.temperature;
    to.repetition_penalty = from.repetition_penalty;
    to.no_repeat_ngram_size = from.no_repeat_ngram_size;
    to.eos_token_id = from.eos_token_id;
    to.forced_bos_token_id = from.forced_bos_token_id;
    to.forced_eos_token_id = from.forced_eos_token_id;
    to.sequence = from.sequence;
    to.seed = from.seed;
    uploads_.Write(at, state, slot.pages, spec.prompt);
  } catch (...) {
    pages_->GiveBack(&slot.pages);
    throw;
  }
  slot.keep_logits = spec.keep_logits;
  slot.prompt_length = spec.prompt_length;
  slot.fed = 0;
  slot.like = IsCopied(spec) ? spec.like : -1;
  slot.launched = 0;
  slot.chosen_in_step = IsChosenInStep(spec.sampling, config_.vocab_size);
  slot.ahead = AheadResults(spec.sampling.max_length);
  slot.open = true;
  return static_cast<int32_t>(at);
}

void CudaDevice::Close(int32_t index) {
  std::lock_guard<std::mutex> lock(mutex_);
  HostSlot& slot = At(index);
  // Steps in flight may still write to the pages, before anything else in the stream does.
  ring_.Forget(index);
  uploads_.Forget(static_cast<size_t>(index));
  pages_->GiveBack(&slot.pages);
  slot.open = false;
  for (HostSlot& other : slots_) {
    if (other.like == index) other.like = -1;
  }
}

// Between equal prompts: that other ones share what begins alike is not offered to the engine.
void CudaDevice::CopyPrefix(int32_t from, int32_t to, int32_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  Check(cudaSetDevice(index_), "choosing the device");
  const HostSlot& source = At(from);
  HostSlot& target = At(to);
  const bool whole = IsLong(to) && count + 1 == target.prompt_length &&
                     source.fed == target.prompt_length &&
                     source.prompt_length == target.prompt_length;
  const int32_t positions = whole ? count + 1 : count;
  const auto pages = static_cast<size_t>(RoundUp(positions, kPage)) / kPage;
  const auto copy = [this](void* target_data, const void* source_data, size_t bytes) {
    Check(cudaMemcpyAsync(target_data, source_data, bytes, cudaMemcpyDeviceToDevice, stream_),
          "copying the cache of a prompt");
  };
  for (size_t page = 0; page < pages; ++page) {
    copy(target.pages[page], source.pages[page], pages_->page_bytes());
  }
  if (whole) {
    copy(last_rows_.as<float>() + to * hidden_stride_,
         last_rows_.as<float>() + from * hidden_stride_,
         static_cast<size_t>(hidden_stride_) * sizeof(float));
  }
  target.fed = positions;
}

// ---- decode --------------------------------------------------------------------------------

void CudaDevice::DropGraphs() {
  for (const auto& graph : graphs_) cudaGraphExecDestroy(graph.second);
  graphs_.clear();
}

LinearArgs CudaDevice::Product(const Matrix& w, const DeviceMemory& x, int64_t ldx,
                               const DeviceMemory& y, int64_t ldy, int32_t rows,
                               Epilogue epilogue) const {
  LinearArgs args = ProductArgs<LinearArgs>(w, rows, epilogue);
  args.x = x.as<float>();
  args.ldx = ldx;
  args.y = y.as<float>();
  args.ldy = ldy;
  return args;
}

void CudaDevice::FoldIn(const Norm& norm, const FoldedNorm& folded, LinearArgs* args) {
  args->norm = &norm;
  args->norm_sums = folded.sums;
  args->norm_bias = folded.bias;
}

EmbedArgs CudaDevice::Embedding(const DeviceMemory& row_list, int32_t rows,
                                const DeviceMemory& x) const {
  EmbedArgs args;  // without `overlap`: the products after it read slots before they wait
  args.table = weights_->embedding();
  args.positions = weights_->positions();
  args.position_stride = config_.hidden_size;
  args.row_list = row_list.as<Row>();
  args.slots = device_slots_.as<Slot>();
  args.rows = rows;
  args.out = x.as<float>();
  args.ldo = hidden_stride_;
  return args;
}

int32_t CudaDevice::Splits(int32_t rows) const {
  return DecodeSplits(rows, config_.num_heads, properties_.multiProcessorCount);
}

void CudaDevice::PreparePersistent() {
  PersistentArgs& args = persistent_;
  const LayerWeights& layer = weights_->layers().front();
  const auto product = [](const Matrix& w, const float* bias) {
    PersistentProduct p;
    p.weights = w.data;
    p.scales = w.scales;
    p.bias = bias;
    return p;
  };
  const auto normed = [&](const Matrix& w, const Norm& norm, const FoldedNorm& folded) {
    PersistentProduct p = product(w, folded.bias);
    p.norm_weight = norm.weight;
    p.sums = folded.sums;
    return p;
  };
  args.dtype = weight_dtype_;
  args.hidden = config_.hidden_size;
  args.intermediate = config_.intermediate_size;
  args.vocab = config_.vocab_size;
  args.layers = config_.num_layers;
  args.heads = config_.num_heads;
  args.eps = config_.layer_norm_eps;
  args.qkv = normed(layer.qkv, layer.norm1, layer.folded1);
  args.attention_out = product(layer.attention_out, layer.attention_out.bias);
  args.feed_forward_in = normed(layer.feed_forward_in, layer.norm2, layer.folded2);
  args.feed_forward_out = product(layer.feed_forward_out, layer.feed_forward_out.bias);
  args.layer_bytes = weights_->layer_bytes();
  args.head = normed(weights_->head(), weights_->final_norm(), weights_->folded_final());
  args.embedding = weights_->embedding();
  args.positions = weights_->positions();
  args.position_stride = config_.hidden_size;
  args.cache = layout_;
  args.overlap = true;
  bool any = false;
  for (int32_t rows = 1; rows <= kPersistentRows; ++rows) {
    const SampleArgs choice;
    args.rows = rows;
    persistent_rows_[rows] = PersistentSupported(args);
    args.choice = &choice;
    persistent_chooses_[rows] = persistent_rows_[rows] && PersistentSupported(args);
    args.choice = nullptr;
    any = any || persistent_rows_[rows];
  }
  if (any) exchange_ = DeviceMemory(PersistentExchangeBytes(args), "the work space of a step");
  args.exchange = exchange_.as<>();
}

bool CudaDevice::RunsPersistent(int32_t rows) const {
  if (rows > kPersistentRows || !persistent_rows_[rows]) return false;
  const StepPolicy policy = step_policy;
  if (policy != StepPolicy::kAutomatic) return policy != StepPolicy::kKernels;
  if (rows < kSplitRows || !packs_rows_) return true;
  const bool joins = JoinsAttention(rows);
  const Tokens tokens = StepTokens();
  if (config_.hidden_size >= kWideColumns) return !joins && tokens.all < kWideTokens;
  return !joins || tokens.longest > rows * kSplitLength;
}

bool CudaDevice::ChoosesInStep() const {
  const auto rows = static_cast<int32_t>(step_slots_.size());
  return RunsPersistent(rows) && persistent_chooses_[rows] &&
         step_policy.load() != StepPolicy::kChoiceApart &&
         std::all_of(step_slots_.begin(), step_slots_.end(), [this](int32_t slot) {
           return slot < 0 || slots_[static_cast<size_t>(slot)].chosen_in_step;
         });
}

void CudaDevice::LaunchPersistent(int32_t rows, const SampleArgs* choice) {
  PersistentArgs& args = persistent_;
  // The first step, and the one in some hours whose epochs would not be new.
  if (persistent_steps_left_ == 0) {
    Check(cudaMemsetAsync(exchange_.as<>(), 0, exchange_.size(), stream_),
          "clearing device memory");
    persistent_steps_left_ = PersistentStepsBetweenZeros(args);
  }
  args.rows = rows;
  args.row_list = layer_space_.row_list.as<Row>();
  args.slots = device_slots_.as<Slot>();
  args.logits = decode_space_.logits.as<float>();
  args.ld = logits_stride_;
  args.choice = choice;
  cudaError_t status = PersistentStep(args, stream_);
  if (status != cudaSuccess && args.overlap) {
    // A driver that cannot start such a kernel early starts it when its turn has come.
    static_cast<void>(cudaGetLastError());
    args.overlap = false;
    status = PersistentStep(args, stream_);
  }
  args.choice = nullptr;
  Check(status, "launching a step");
  ++persistent_steps;
  if (choice != nullptr) ++choosing_steps;
  --persistent_steps_left_;
}

DecodeAttentionArgs CudaDevice::Attention(int32_t rows) const {
  DecodeAttentionArgs attention;
  attention.q = layer_space_.q.as<float>();
  attention.ldq = hidden_stride_;
  attention.out = layer_space_.attended.as<float>();
  attention.ldo = hidden_stride_;
  attention.row_list = layer_space_.row_list.as<Row>();
  attention.slots = device_slots_.as<Slot>();
  attention.rows = rows;
  attention.cache = layout_;
  attention.splits = Splits(rows);
  if (SharesHeads(rows)) {
    attention.partial = decode_space_.partial.as<float>();
  } else {
    attention.splits = 1;
  }
  attention.arrived = decode_space_.arrived.as<int32_t>();
  attention.plan = decode_space_.plan.as<>();
  attention.overlap = true;
  return attention;
}

void CudaDevice::LaunchForward(int32_t rows) {
  if (RunsPersistent(rows)) {
    LaunchPersistent(rows);
    return;
  }
  if (packs_rows_) {
    LaunchPackedForward(rows);
    return;
  }
  const LayerSpace& s = layer_space_;
  Check(Embed(Embedding(s.row_list, rows, s.x), stream_), "launching the embedding");
  DecodeAttentionArgs attention = Attention(rows);
  Check(PlanDecodeAttention(attention, stream_), "planning attention");
  for (int32_t i = 0; i < config_.num_layers; ++i) {
    const LayerWeights& layer = weights_->layers()[static_cast<size_t>(i)];
    LinearArgs qkv =
        Product(layer.qkv, s.x, hidden_stride_, s.q, hidden_stride_, rows, Epilogue::kQkv);
    FoldIn(layer.norm1, layer.folded1, &qkv);
    qkv.layer = i;
    Check(Linear(qkv, stream_), "launching the attention's input");
    attention.layer = i;
    // The first one waits for the plan and for all that earlier steps wrote; the others rely on it.
    attention.overlap = i > 0;
    Check(DecodeAttention(attention, stream_), "launching attention");
    LaunchAfterAttention(layer, rows);
  }
  LaunchHead(layer_space_.x, 0, rows);
}

void CudaDevice::LaunchAfterAttention(const LayerWeights& layer, int32_t rows) {
  const LayerSpace& s = layer_space_;
  Check(Linear(Product(layer.attention_out, s.attended, hidden_stride_, s.x, hidden_stride_, rows,
                       Epilogue::kResidual),
               stream_),
        "launching the attention's output");
  LinearArgs in = Product(layer.feed_forward_in, s.x, hidden_stride_, s.wide, wide_stride_, rows,
                          Epilogue::kGelu);
  FoldIn(layer.norm2, layer.folded2, &in);
  Check(Linear(in, stream_), "launching the feed-forward block");
  Check(Linear(Product(layer.feed_forward_out, s.wide, wide_stride_, s.x, hidden_stride_, rows,
                       Epilogue::kResidual),
               stream_),
        "launching the feed-forward block");
}

void CudaDevice::LaunchHead(const DeviceMemory& x, int32_t first_row, int32_t rows) {
  LinearArgs head = Product(weights_->head(), x, hidden_stride_, decode_space_.logits,
                            logits_stride_, rows, Epilogue::kStore);
  head.x += first_row * hidden_stride_;
  FoldIn(weights_->final_norm(), weights_->folded_final(), &head);
  Check(Linear(head, stream_), "launching the head");
}

void CudaDevice::LaunchFirst(int32_t rows) {
  LastRowsArgs args;
  args.x = layer_space_.x.as<float>();
  args.last = last_rows_.as<float>();
  args.ld = hidden_stride_;
  args.row_list = layer_space_.row_list.as<Row>();
  args.count = rows;
  Check(TakeLastRows(args, stream_), "launching a step");
  LaunchHead(layer_space_.x, 0, rows);
}

SampleArgs CudaDevice::Choice(int32_t rows) const {
  SampleArgs args;
  args.logits = decode_space_.logits.as<float>();
  args.ld = logits_stride_;
  args.vocab = config_.vocab_size;
  args.row_list = layer_space_.row_list.as<Row>();
  args.slots = device_slots_.as<Slot>();
  args.rows = rows;
  args.results = ring_.results();
  args.result_steps = DecodeRing::kSteps;
  args.result_rows = ring_.rows();
  args.step = ring_.count();
  args.workspace = decode_space_.sample.as<>();
  args.overlap = true;
  return args;
}

void CudaDevice::LaunchSample(int32_t rows) {
  Check(Sample(Choice(rows), stream_), "launching the choice of tokens");
}

void CudaDevice::LaunchStep(int32_t rows) {
  if (RunsPersistent(rows)) {
    if (ChoosesInStep()) {
      const SampleArgs choice = Choice(rows);
      LaunchPersistent(rows, &choice);
    } else {
      LaunchPersistent(rows);
      LaunchSample(rows);
    }
    return;
  }
  const auto key = std::make_pair(rows, JoinsAttention(rows));
  if (key.second) ++joined_steps;
  auto found = graphs_.find(key);
  if (found == graphs_.end()) {
    cudaGraph_t graph = nullptr;
    Check(cudaGraphCreate(&graph, 0), "making a graph of a step");
    try {
      const GraphRecorder recorder(graph);
      LaunchForward(rows);
      LaunchSample(rows);
    } catch (...) {
      cudaGraphDestroy(graph);
      throw;
    }
    cudaGraphExec_t exec = nullptr;
#if CUDART_VERSION >= 12000
    const cudaError_t status = cudaGraphInstantiate(&exec, graph, 0);
#else
    const cudaError_t status = cudaGraphInstantiate(&exec, graph, nullptr, nullptr, 0);
#endif
    cudaGraphDestroy(graph);
    Check(status, "making a graph of a step");
    found = graphs_.emplace(key, exec).first;
  }
  Check(cudaGraphLaunch(found->second, stream_), "launching a step");
}

void CudaDevice::ReadMemory(const engine::PluginBuffer& from, void* stream, void* to) const {
  Check(cudaSetDevice(index_), "choosing the device");
  ReadForeign(from, index_, static_cast<cudaStream_t>(stream), to);
}

void CudaDevice::WriteMemory(const void* from, void* stream, const engine::PluginBuffer& to) const {
  Check(cudaSetDevice(index_), "choosing the device");
  WriteForeign(from, static_cast<cudaStream_t>(stream), to, index_);
}

double CudaDevice::MeasureReadBandwidth(uint64_t bytes, int32_t passes) {
  std::lock_guard<std::mutex> lock(mutex_);
  Check(cudaSetDevice(index_), "choosing the device");
  bytes = bytes / kAlign * kAlign;
  if (bytes < (uint64_t{1} << 20) || passes < 1) {
    throw base::Error(FASTGEN_INVALID_ARGUMENT,
                      "bytes=" + std::to_string(bytes) + ", passes=" + std::to_string(passes) +
                          ": measuring bandwidth takes at least 1048576 bytes and one pass");
  }
  const DeviceMemory buffer(static_cast<size_t>(bytes), "the buffer for measuring bandwidth");
  const int32_t blocks = 4 * properties_.multiProcessorCount;
  const DeviceMemory sums(static_cast<size_t>(blocks) * sizeof(float), "the sums of a measurement");
  Check(cudaMemsetAsync(buffer.as<>(), 1, buffer.size(), stream_), "clearing device memory");
  struct Events {
    cudaEvent_t begin = nullptr, end = nullptr;
    Events() {
      Check(cudaEventCreate(&begin), "creating an event");
      Check(cudaEventCreate(&end), "creating an event");
    }
    ~Events() {
      if (begin) cudaEventDestroy(begin);
      if (end) cudaEventDestroy(end);
    }
  } events;
  double best = 0.0;
  for (int32_t pass = 0; pass <= passes; ++pass) {  // one warms up
    Check(cudaEventRecord(events.begin, stream_), "recording an event");
    Check(cuda::ReadMemory(buffer.as<>(), buffer.size(), blocks, sums.as<float>(), stream_),
          "reading memory");
    Check(cudaEventRecord(events.end, stream_), "recording an event");
    Check(cudaEventSynchronize(events.end), "reading memory");
    float ms = 0.0f;
    Check(cudaEventElapsedTime(&ms, events.begin, events.end), "timing");
    if (pass > 0) best = std::max(best, static_cast<double>(bytes) / (ms * 1e-3));
  }
  return best;
}

}  // namespace fastgen::cuda
