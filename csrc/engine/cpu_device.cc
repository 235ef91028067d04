#include "engine/cpu_device.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <string>
#include <utility>

#include "base/error.h"

namespace fastgen::engine {

using cpu::kBlock;
using cpu::kPanel;

namespace {

// Up to this many rows every thread norms and prepares all of them itself, which is cheaper than a
// region.
constexpr int64_t kMadeByEveryThread = 16;
constexpr size_t kLogitsRows = 12;  // rows of logits at a time where the caller wants them all
constexpr int64_t kMostRows = 512;  // rows of a prefill pass: bounds the work space
// Rows of a task of a product, about: few enough that a core's second-level cache keeps them while panels
// pass, and that the last tasks of a region are short.
constexpr int64_t kTaskRows = 128;

// A row is padded to whole panels, and by one more cache line: rows whose distance is a multiple
// of 4096 bytes would share the same few sets of the first-level cache.
int64_t RowStride(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel + cpu::kRowAlign; }

cpu::WeightType WeightTypeOf(const std::string& name) {
  cpu::WeightType type;
  if (cpu::ParseWeightType(name.c_str(), &type)) return type;
  throw base::Error(FASTGEN_UNSUPPORTED, "weight_dtype=" + name +
                                             " is not one that device=cpu has: float32, float16, "
                                             "bfloat16, int8, int4");
}

// Unless it is named: as exact as the weights. Where those are whole numbers, bfloat16 loses far less
// than they do, and sets that multiply pairs take it as it is.
cpu::CacheType CacheTypeOf(const std::string& name, const std::string& weight_dtype) {
  if (name.empty()) {
    switch (WeightTypeOf(weight_dtype)) {
      case cpu::WeightType::kFloat32: return cpu::CacheType::kFloat32;
      case cpu::WeightType::kFloat16: return cpu::CacheType::kFloat16;
      case cpu::WeightType::kBFloat16:
      case cpu::WeightType::kInt8:
      case cpu::WeightType::kInt4:
      case cpu::WeightType::kInt8Groups: return cpu::CacheType::kBFloat16;
    }
  }
  cpu::CacheType type = cpu::CacheType::kFloat32;
  if (cpu::ParseCacheType(name.c_str(), &type)) return type;
  throw base::Error(FASTGEN_UNSUPPORTED, "cache_dtype=" + name +
                                             " is not one that device=cpu has: float32, float16, "
                                             "bfloat16, int8");
}

}  // namespace

CpuDevice::CpuDevice(const ModelConfig& config, WeightSource& weights, const DeviceOptions& options)
    : config_(config),
      kernels_(cpu::ChooseKernels(options.isa)),
      pool_(cpu::ResolveThreads(options.num_threads)),
      cache_(config, CacheTypeOf(options.cache_dtype, options.weight_dtype)),
      weights_(config, weights, WeightTypeOf(options.weight_dtype), pool_, options.progress),
      hidden_stride_(RowStride(config.hidden_size)),
      qkv_stride_(RowStride(3 * static_cast<int64_t>(config.hidden_size))),
      wide_stride_(RowStride(config.intermediate_size)),
      logits_stride_(RowStride(config.vocab_size)),
      made_bytes_(MadeBytes()),
      pending_columns_(config.num_heads),
      scratch_(pool_.threads()) {
  for (Scratch& scratch : scratch_) {
    scratch.normed.resize(hidden_stride_);
    scratch.made.resize(kMadeByEveryThread * made_bytes_);
    const size_t blocks = static_cast<size_t>((config.max_positions + kBlock - 1) / kBlock);
    scratch.scores.resize(cpu::kAttentionRows * cpu::kSpan);
    scratch.blocks.resize(blocks);
    scratch.sampler = std::make_unique<Sampler>(kernels_);
  }
  info_.device = "cpu";
  info_.isa = kernels_.name;
  info_.weight_dtype = options.weight_dtype;
  info_.cache_dtype = cpu::CacheTypeName(cache_.head().type);
  info_.num_threads = pool_.threads();
  info_.weight_bytes = weights_.bytes();
  info_.step_bytes = weights_.step_bytes();
  info_.least_shared = kBlock;
  info_.cache_bytes_per_token = static_cast<uint64_t>(cache_.block_bytes() / kBlock);
}

// The most that a row takes as a product wants it: normed, or prepared for any of the types in use.
int64_t CpuDevice::MadeBytes() const {
  int64_t most = hidden_stride_ * static_cast<int64_t>(sizeof(float));
  const PackedLayer& layer = weights_.layers().front();
  for (const PackedMatrix* matrix : {&weights_.head(), &layer.qkv, &layer.feed_forward_out}) {
    most = std::max(most, kernels_.prepared_bytes(matrix->type, matrix->in));
  }
  return most;
}

// ---- slots ---------------------------------------------------------------------------------

CpuDevice::Slot& CpuDevice::At(int32_t slot) {
  if (slot < 0 || slot >= static_cast<int32_t>(slots_.size()) || !slots_[slot].open) {
    throw base::Error(FASTGEN_INTERNAL, "slot " + std::to_string(slot) + " is not open");
  }
  return slots_[slot];
}

int32_t CpuDevice::Open(const SequenceSpec& spec) {
  const cpu::ThreadPool::Turn turn(&pool_);
  size_t at = 0;
  while (at < slots_.size() && slots_[at].open) ++at;
  if (at == slots_.size()) slots_.emplace_back();
  Slot& slot = slots_[at];
  slot.tokens.clear();
  // The last sampled token is never fed back, so it needs no place.
  const int64_t positions = static_cast<int64_t>(spec.prompt_length) + spec.sampling.max_length - 1;
  slot.tokens.reserve(positions + 1);
  slot.tokens.assign(spec.prompt, spec.prompt + spec.prompt_length);
  if (spec.like >= 0) {
    // What is about to be copied is already there, or will be when it is.
    const std::vector<Block>& theirs = At(spec.like).blocks;
    slot.blocks.assign(theirs.begin(), theirs.begin() + spec.alike / kBlock);
  }
  try {
    cache_.Take((positions + kBlock - 1) / kBlock - static_cast<int64_t>(slot.blocks.size()),
                &slot.blocks);
  } catch (...) {
    cache_.GiveBack(&slot.blocks);
    throw;
  }
  slot.prompt_length = spec.prompt_length;
  slot.fed = 0;
  slot.sampling = spec.sampling;
  slot.finished = false;
  slot.open = true;
  return static_cast<int32_t>(at);
}

void CpuDevice::Close(int32_t index) {
  const cpu::ThreadPool::Turn turn(&pool_);
  Slot& slot = At(index);
  cache_.GiveBack(&slot.blocks);
  slot.open = false;
}

void CpuDevice::CopyPrefix(int32_t from, int32_t to, int32_t count) {
  const cpu::ThreadPool::Turn turn(&pool_);
  const Slot& source = At(from);
  Slot& target = At(to);
  // Whole blocks are shared: both go on behind them. Of the next one each has its own.
  const int64_t whole = count / kBlock;
  const int64_t blocks = (static_cast<int64_t>(count) + kBlock - 1) / kBlock;
  std::vector<Block> own, replaced;
  replaced.reserve(blocks);
  if (whole < blocks && target.blocks[whole].use_count() > 1) cache_.Take(1, &own);
  for (int64_t b = 0; b < whole; ++b) {
    if (target.blocks[b] == source.blocks[b]) continue;
    replaced.push_back(std::exchange(target.blocks[b], source.blocks[b]));
  }
  if (!own.empty()) replaced.push_back(std::exchange(target.blocks[whole], own[0]));
  own.clear();
  if (whole < blocks) {
    std::memcpy(target.blocks[whole]->data(), source.blocks[whole]->data(),
                static_cast<size_t>(cache_.block_bytes()));
  }
  cache_.GiveBack(&replaced);
  target.fed = count;
}

// Adds the time of a scope to its region, where somebody measures.
class CpuDevice::Timed {
 public:
  Timed(RegionTimes* times, Region region) : times_(times), region_(region) {
    if (times_) begin_ = std::chrono::steady_clock::now();
  }
  ~Timed() {
    if (!times_) return;
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin_;
    times_->seconds[static_cast<int>(region_)] += seconds.count();
  }
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  RegionTimes* times_;
  Region region_;
  std::chrono::steady_clock::time_point begin_;
};

// ---- the step ------------------------------------------------------------------------------

void CpuDevice::Grow(int64_t rows) {
  if (rows <= capacity_) return;
  auto make = [&](int64_t stride) {
    return cpu::Pages(static_cast<size_t>(rows * stride) * sizeof(float),
                      "the work space of a step");
  };
  // All or nothing: a failure leaves the smaller work space in place.
  cpu::Pages hidden = make(hidden_stride_), qkv = make(qkv_stride_),
             attended = make(hidden_stride_);
  cpu::Pages wide = make(wide_stride_);
  cpu::Pages made(static_cast<size_t>(rows * made_bytes_), "the work space of a step");
  hidden_ = std::move(hidden);
  qkv_ = std::move(qkv);
  attended_ = std::move(attended);
  wide_ = std::move(wide);
  made_ = std::move(made);
  capacity_ = rows;
}

struct CpuDevice::Product {
  Region region;
  const PackedMatrix& matrix;
  const float* x;
  int64_t ldx;
  float* y;
  int64_t ldy;
  cpu::Epilogue epilogue = cpu::Epilogue::kStore;
  const float* norm_weight = nullptr;  // x is normed first when given; it has hidden_stride_ then
  const float* norm_bias = nullptr;
};

// y = epilogue(x W + b); `done(first, last, row, next)` runs after the columns [first, last) of the rows
// [row, next), on their thread.
template <typename Done>
void CpuDevice::Multiply(const Product& product, int64_t rows, const Done& done) {
  const Timed timed(times_, product.region);
  const PackedMatrix& matrix = product.matrix;
  cpu::MatmulArgs args;
  args.x = product.x;
  args.x_stride = product.ldx * static_cast<int64_t>(sizeof(float));
  args.rows = rows;
  args.in = matrix.in;
  args.panels = matrix.panels;
  args.panel_bytes = matrix.panel_bytes;
  args.type = matrix.type;
  args.bias = matrix.bias;
  args.out = matrix.out;
  args.y = product.y;
  args.ldy = product.ldy;
  args.epilogue = product.epilogue;

  // A row is normed, or made what the kernel multiplies, or both, or taken as it is.
  const int64_t prepared_bytes = kernels_.prepared_bytes(matrix.type, matrix.in);
  const auto make = [&](int64_t row, char* out, float* normed) {
    const float* x = product.x + row * product.ldx;
    if (product.norm_weight) {
      float* const to = prepared_bytes ? normed : reinterpret_cast<float*>(out);
      kernels_.layer_norm(x, product.norm_weight, product.norm_bias, config_.layer_norm_eps,
                          matrix.in, to);
      x = to;
    }
    if (prepared_bytes) kernels_.prepare(matrix.type, x, matrix.in, out);
  };
  const bool make_rows = product.norm_weight || prepared_bytes;
  if (make_rows) {
    args.x_stride =
        prepared_bytes ? prepared_bytes : hidden_stride_ * static_cast<int64_t>(sizeof(float));
  }
  const bool make_here = make_rows && rows <= kMadeByEveryThread;
  if (make_rows && !make_here) {
    pool_.Run(rows, 4, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t row = begin; row < end; ++row) {
        make(row, made_.data() + row * args.x_stride, scratch_[thread].normed.data());
      }
    });
    args.x = made_.data();
  }
  const uint64_t id = ++products_;
  const int64_t panels = matrix.num_panels();
  const int64_t blocks = (rows + kTaskRows - 1) / kTaskRows;
  pool_.RunClaims(panels * blocks, [&](int64_t begin, int64_t end, int thread) {
    cpu::MatmulArgs mine = args;
    if (make_here) {
      Scratch& scratch = scratch_[thread];
      if (scratch.made_of != id) {
        for (int64_t row = 0; row < rows; ++row) {
          make(row, scratch.made.data() + row * args.x_stride, scratch.normed.data());
        }
        scratch.made_of = id;
      }
      mine.x = scratch.made.data();
    }
    const char* const x = static_cast<const char*>(mine.x);
    // Panels of a block of rows, then those of the next.
    while (begin < end) {
      const int64_t block = begin / panels;
      const int64_t last = std::min(end, (block + 1) * panels);
      const int64_t row = rows * block / blocks, next = rows * (block + 1) / blocks;
      mine.x = x + row * mine.x_stride;
      mine.y = args.y + row * mine.ldy;
      mine.rows = next - row;
      kernels_.matmul(mine, begin - block * panels, last - block * panels);
      done((begin - block * panels) * kPanel,
           std::min((last - block * panels) * kPanel, matrix.out), row, next);
      begin = last;
    }
  });
}

void CpuDevice::Multiply(const Product& product, int64_t rows) {
  Multiply(product, rows, [](int64_t, int64_t, int64_t, int64_t) {});
}

void CpuDevice::RunLayer(int32_t index, const std::vector<Row>& rows) {
  const auto count = static_cast<int64_t>(rows.size());
  const PackedLayer& layer = weights_.layers()[index];
  float* hidden = hidden_.floats();
  using cpu::Epilogue;
  ExpectCache(count);
  Multiply({Region::kQkv, layer.qkv, hidden, hidden_stride_, qkv_.floats(), qkv_stride_,
            Epilogue::kStore, layer.norm1_weight, layer.norm1_bias},
           count, [&](int64_t first, int64_t last, int64_t row, int64_t next) {
             WriteCache(index, rows, first, last, row, next);
           });
  {
    const Timed timed(times_, Region::kAttention);
    Attend(index, rows);
  }
  Multiply({Region::kAttentionOut, layer.attention_out, attended_.floats(), hidden_stride_, hidden,
            hidden_stride_, Epilogue::kResidual},
           count);
  Multiply({Region::kFeedForwardIn, layer.feed_forward_in, hidden, hidden_stride_, wide_.floats(),
            wide_stride_, Epilogue::kGelu, layer.norm2_weight, layer.norm2_bias},
           count);
  Multiply({Region::kFeedForwardOut, layer.feed_forward_out, wide_.floats(), wide_stride_, hidden,
            hidden_stride_, Epilogue::kResidual},
           count);
}

void CpuDevice::Forward(const std::vector<Row>& rows) {
  const auto count = static_cast<int64_t>(rows.size());
  Grow(count);
  PlanAttention(rows);
  {
    const Timed timed(times_, Region::kEmbed);
    pool_.Run(count, 8, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) {
        weights_.Embed(rows[r].token, rows[r].position, hidden_.floats() + r * hidden_stride_);
      }
    });
  }
  for (int32_t i = 0; i < config_.num_layers; ++i) RunLayer(i, rows);
  rows_done_ += rows.size();
}

void CpuDevice::ComputeLogits(int64_t first_row, int64_t count) {
  if (count > logits_capacity_) {
    logits_ = cpu::Pages(static_cast<size_t>(count * logits_stride_) * sizeof(float),
                         "the logits of a step");
    logits_capacity_ = count;
  }
  Multiply({Region::kHead, weights_.head(), hidden_.floats() + first_row * hidden_stride_,
            hidden_stride_, logits_.floats(), logits_stride_, cpu::Epilogue::kStore,
            weights_.final_norm_weight(), weights_.final_norm_bias()},
           count);
}

void CpuDevice::Prefill(const PrefillChunk* chunks, size_t count) {
  const cpu::ThreadPool::Turn turn(&pool_);
  std::vector<Row> rows;
  std::vector<float*> wanted;  // where the logits of a row go, or null
  for (size_t c = 0; c < count; ++c) {
    const PrefillChunk& chunk = chunks[c];
    const Slot& slot = At(chunk.slot);
    if (chunk.begin < 0 || chunk.count < 0 || chunk.begin + chunk.count > slot.prompt_length) {
      throw base::Error(FASTGEN_INTERNAL, "a prefill chunk lies outside its prompt");
    }
    for (int32_t i = 0; i < chunk.count; ++i) {
      const int32_t position = chunk.begin + i;
      rows.push_back({&slot, slot.tokens[position], position});
      wanted.push_back(chunk.logits ? chunk.logits + static_cast<int64_t>(i) * config_.vocab_size
                                    : nullptr);
      if (static_cast<int64_t>(rows.size()) == kMostRows) {
        PrefillRows(rows, wanted);
        rows.clear();
        wanted.clear();
      }
    }
  }
  if (!rows.empty()) PrefillRows(rows, wanted);
  for (size_t c = 0; c < count; ++c) At(chunks[c].slot).fed = chunks[c].begin + chunks[c].count;
}

void CpuDevice::PrefillRows(const std::vector<Row>& rows, const std::vector<float*>& wanted) {
  Forward(rows);
  for (size_t begin = 0; begin < rows.size();) {
    size_t end = begin;
    while (end < rows.size() && wanted[end] && end - begin < kLogitsRows) ++end;
    if (end == begin) {
      ++begin;
      continue;
    }
    ComputeLogits(static_cast<int64_t>(begin), static_cast<int64_t>(end - begin));
    for (size_t row = begin; row < end; ++row) {
      std::memcpy(wanted[row],
                  logits_.floats() + static_cast<int64_t>(row - begin) * logits_stride_,
                  sizeof(float) * config_.vocab_size);
    }
    begin = end;
  }
}

// Behind the rows that are sampled from: prompt tokens that come before them and are not in the
// cache yet. They cost next to nothing in the pass that reads the weights anyway.
void CpuDevice::AddUnfedPrompt(const int32_t* slots, size_t count, std::vector<Row>* rows) {
  std::vector<Row> unfed;
  for (size_t i = 0; i < count; ++i) {
    Slot& slot = At(slots[i]);
    for (; slot.fed + 1 < slot.prompt_length; ++slot.fed) {
      unfed.push_back({&slot, slot.tokens[slot.fed], slot.fed});
    }
  }
  if (static_cast<int64_t>(rows->size() + unfed.size()) <= kMostRows) {
    rows->insert(rows->end(), unfed.begin(), unfed.end());
    return;
  }
  for (size_t begin = 0; begin < unfed.size(); begin += kMostRows) {
    const size_t end = std::min(begin + static_cast<size_t>(kMostRows), unfed.size());
    Forward({unfed.begin() + static_cast<ptrdiff_t>(begin),
             unfed.begin() + static_cast<ptrdiff_t>(end)});
  }
}

int32_t CpuDevice::Decode(const int32_t* slots, size_t count, int32_t max_steps,
                          DecodeResult* results, float* logits) {
  cpu::ThreadPool::Turn turn(&pool_);
  std::vector<Row> rows;
  std::vector<size_t> results_at;
  int32_t step = 0;
  for (; step < max_steps; ++step, results += count) {
    rows.clear();
    results_at.clear();
    for (size_t i = 0; i < count; ++i) {
      const Slot& slot = At(slots[i]);
      results[i] = DecodeResult();
      if (slot.finished) continue;
      rows.push_back({&slot, slot.tokens.back(), static_cast<int32_t>(slot.tokens.size()) - 1});
      results_at.push_back(i);
    }
    if (rows.empty()) break;
    const size_t sampled = rows.size();
    if (step == 0) AddUnfedPrompt(slots, count, &rows);
    Forward(rows);
    ComputeLogits(0, static_cast<int64_t>(sampled));
    if (logits) {
      for (size_t r = 0; r < sampled; ++r) {
        std::memcpy(logits + (step * count + results_at[r]) * config_.vocab_size,
                    logits_.floats() + static_cast<int64_t>(r) * logits_stride_,
                    sizeof(float) * config_.vocab_size);
      }
    }
    SampleRows(slots, results_at, results);
    // Another session may open and close slots meanwhile, so nothing of them is kept.
    if (step + 1 < max_steps) turn.GiveWay();
  }
  return step;
}

void CpuDevice::SampleRows(const int32_t* slots, const std::vector<size_t>& results_at,
                           DecodeResult* results) {
  const Timed timed(times_, Region::kSample);
  std::exception_ptr failure;
  std::mutex failure_mutex;
  pool_.Run(static_cast<int64_t>(results_at.size()), 1,
            [&](int64_t begin, int64_t end, int thread) {
              try {
                for (int64_t r = begin; r < end; ++r) {
                  Slot& slot = slots_[slots[results_at[r]]];
                  DecodeResult& result = results[results_at[r]];
                  float* row = logits_.floats() + r * logits_stride_;
                  const auto length = static_cast<int32_t>(slot.tokens.size());
                  ProcessLogits(slot.sampling, {slot.tokens.data(), slot.prompt_length, length},
                                row, config_.vocab_size);
                  const int32_t new_tokens = length - slot.prompt_length;
                  const Choice choice = scratch_[thread].sampler->Choose(
                      slot.sampling, static_cast<uint32_t>(new_tokens), row, config_.vocab_size);
                  slot.tokens.push_back(choice.token);  // within the capacity that Open reserved
                  slot.finished = choice.token == slot.sampling.eos_token_id ||
                                  new_tokens + 1 >= slot.sampling.max_length;
                  result.token = choice.token;
                  result.score = choice.score;
                  result.finished = slot.finished;
                }
              } catch (...) {
                // Scratch could not grow. The row has no new token, so the step can be asked for again.
                std::lock_guard<std::mutex> lock(failure_mutex);
                failure = std::current_exception();
              }
            });
  if (failure) std::rethrow_exception(failure);
}

double CpuDevice::MeasureReadBandwidth(uint64_t bytes, int32_t passes) {
  const cpu::ThreadPool::Turn turn(&pool_);
  constexpr int64_t kPiece = int64_t{1} << 18;  // floats
  const auto pieces = static_cast<int64_t>(bytes / (kPiece * sizeof(float)));
  if (pieces < 1 || passes < 1) {
    throw base::Error(FASTGEN_INVALID_ARGUMENT,
                      "bytes=" + std::to_string(bytes) + ", passes=" + std::to_string(passes) +
                          ": measuring bandwidth takes at least 1048576 bytes and one pass");
  }
  const cpu::Pages buffer(static_cast<size_t>(pieces * kPiece) * sizeof(float),
                          "the buffer for measuring bandwidth");
  pool_.Run(pieces, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin * kPiece; i < end * kPiece; ++i) buffer.floats()[i] = 1.0f;
  });
  double best = 0.0;
  std::vector<float> sums(pieces);  // keeps the reads from being optimised away
  for (int32_t pass = 0; pass < passes; ++pass) {
    const auto since = std::chrono::steady_clock::now();
    pool_.Run(pieces, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        sums[i] = kernels_.read_sum(buffer.floats() + i * kPiece, kPiece);
      }
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - since;
    best = std::max(best, static_cast<double>(pieces * kPiece) * sizeof(float) / seconds.count());
  }
  if (sums[0] <= 0.0f) throw base::Error(FASTGEN_INTERNAL, "the bandwidth buffer reads as zero");
  return best;
}

}  // namespace fastgen::engine
