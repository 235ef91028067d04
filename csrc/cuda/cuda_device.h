// The CUDA device: decode steps are graphs of a few kernels per layer that the host launches ahead,
// prefill goes through cuBLASLt.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/cache.h"
#include "cuda/check.h"
#include "cuda/cublaslt.h"
#include "cuda/decode_ring.h"
#include "cuda/kernels.h"
#include "cuda/persistent.h"
#include "cuda/slot_uploads.h"
#include "cuda/weights.h"
#include "engine/device_plugin.h"

namespace fastgen::cuda {

// How steps of few rows run: as the device decides, as those of many, as one kernel where they can but
// without choosing tokens in it, or as one kernel where they can. Tests choose; it is the whole process's.
enum class StepPolicy : int32_t { kAutomatic, kKernels, kChoiceApart, kOneKernel };
void SetStepPolicy(StepPolicy policy);
// Steps that were launched so far: as one kernel, of these those that chose tokens, and as a graph of kernels one
// of which is attention with its input.
struct StepCounts {
  int64_t one_kernel, choosing, joined;
};
StepCounts CountSteps();

inline int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

class CudaDevice {
 public:
  CudaDevice(const engine::PluginConfig& config, const engine::PluginOptions& options,
             const engine::PluginWeights& weights);
  ~CudaDevice();
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  // As engine::Device has them.
  void GetInfo(engine::PluginInfo* info) const;
  int32_t Open(const engine::SequenceSpec& spec);
  void Close(int32_t slot);
  void Prefill(const engine::PrefillChunk* chunks, size_t count);
  void CopyPrefix(int32_t from, int32_t to, int32_t count);
  int32_t Decode(const int32_t* slots, size_t count, int32_t max_steps,
                 engine::DecodeResult* results, float* logits);
  // Do not wait for steps of other threads.
  void ReadMemory(const engine::PluginBuffer& from, void* stream, void* to) const;
  void WriteMemory(const void* from, void* stream, const engine::PluginBuffer& to) const;
  double MeasureReadBandwidth(uint64_t bytes, int32_t passes);

 private:
  // Prompts of up to this many tokens are fed by the kernels of decode steps, longer ones through
  // cuBLASLt.
  static constexpr int32_t kShortPrompt = 64;
  // Rows that a prefill is asked for at once, and that it adds, one for a long prompt's end; rows of a
  // pass without cuBLASLt. They bound the work space.
  static constexpr int32_t kManyRows = 8192;
  static constexpr int32_t kLastRows = kManyRows / kShortPrompt;
  static constexpr int32_t kMostManyRows = kManyRows + kLastRows;
  static constexpr int32_t kFewRows = 512;
  // Rows, and tokens of each, up to which JoinsAttention may be.
  static constexpr int32_t kJoinedRows = 8;
  static constexpr int32_t kJoinedLength = kDecodeParts * kPage;
  // Steps of three and four rows of 16-bit weights are sooner done by kernels than as one where attention joins
  // the product before it and no row has more than so many tokens for each row of the step. In networks so wide
  // they are where it joins, and where it cannot if they have so many tokens in all. Measured on an H200.
  static constexpr int32_t kSplitRows = 3;
  static constexpr int32_t kSplitLength = 200;
  static constexpr int32_t kWideColumns = 1280;
  static constexpr int32_t kWideTokens = 900;
  static constexpr int32_t kLogitsRows = 32;  // rows of logits at a time, where all are wanted

  // What the host knows of a sequence.
  struct HostSlot {
    bool open = false;
    bool keep_logits = false;
    int32_t prompt_length = 0;
    int32_t fed = 0;              // prompt tokens in the cache
    int32_t like = -1;            // the slot that its prompt will be copied from, or -1
    int32_t launched = 0;         // of its steps
    bool chosen_in_step = false;  // its options are those of a step that chooses
    AheadResults ahead;
    std::vector<char*> pages;
  };
  // float32 activations of a decode step, and of a prefill of few rows.
  struct LayerSpace {
    int32_t rows = 0;
    DeviceMemory x, q, attended, wide, row_list, places, runs;
    // Where rows travel as 16 bits, and what the next norm needs of x.
    DeviceMemory packed_x, packed_attended, packed_wide, parts;
  };
  struct DecodeSpace {
    int32_t rows = 0;
    DeviceMemory logits, partial, arrived, plan, sample;
  };
  // Activations of a prefill through cuBLASLt, of activation_dtype_ but for the residual stream.
  struct PrefillSpace {
    int32_t rows = 0;
    DeviceMemory x, normed, qkv, attended, wide, weight, row_list, runs;
  };

  HostSlot& At(int32_t slot);
  void GrowSlots();
  void DropGraphs();

  // A part of a work space, to be taken.
  struct Buffer {
    DeviceMemory* to;
    size_t bytes;
    bool zeroed;
    const char* what;
  };
  std::vector<Buffer> Buffers(int32_t rows, LayerSpace* space) const;
  std::vector<Buffer> Buffers(int32_t rows, DecodeSpace* space) const;
  std::vector<Buffer> Buffers(int32_t rows, PrefillSpace* space) const;
  void TakeBuffers(const std::vector<Buffer>& buffers);
  template <typename Space>
  void Empty(Space* space);
  template <typename Space>
  void Fill(int32_t rows, Space* space);
  // Work space for so many rows, if there is less. Steps must have been read, and what is in the spaces
  // is lost; if there is no memory for it, so are they, and the next step takes what it needs.
  void ReserveLayer(int32_t rows);
  void ReserveDecode(int32_t rows);
  void ReservePrefill(int32_t rows);
  // Rows of all three, and bytes that they take beside what there is.
  struct SpaceRows {
    int32_t layer = 0, decode = 0, prefill = 0;
  };
  size_t BytesMore(const SpaceRows& wanted) const;
  void Reserve(const SpaceRows& rows);
  // What the open sequences and this one need; to have it; and its pages.
  SpaceRows RowsFor(const engine::SequenceSpec& spec) const;
  void ReserveFor(const engine::SequenceSpec& spec);
  void TakePages(const engine::SequenceSpec& spec, size_t count, std::vector<char*>* pages);
  // Whether another sequence's prompt will be copied, so that none of this is fed.
  static bool IsCopied(const engine::SequenceSpec& spec) {
    return spec.like >= 0 && spec.alike + 1 == spec.prompt_length;
  }
  // Rows of a step of so many sequences.
  static int32_t StepRows(size_t sequences);
  // Whether blocks of a step of so many rows share heads.
  bool SharesHeads(int32_t rows) const;

  // Decode: the kernels up to the logits, the choice, and both as a graph.
  void LaunchForward(int32_t rows);
  // The same where products take rows as 16 bits, between the embedding and the logits.
  void LaunchPackedForward(int32_t rows);
  // Whether attention and the product before it are one kernel in the step of step_slots_: the same bits,
  // sooner where they wait for each other, later where there is much to read.
  bool JoinsAttention(int32_t rows) const;
  // Of the sequences of step_slots_.
  struct Tokens {
    int32_t longest = 0;
    int64_t all = 0;
  };
  Tokens StepTokens() const;
  DecodeAttentionArgs Attention(int32_t rows) const;
  void LaunchAfterAttention(const LayerWeights& layer, int32_t rows);
  // logits[i] = head(final norm(x[first_row + i])).
  void LaunchHead(const DeviceMemory& x, int32_t first_row, int32_t rows);
  SampleArgs Choice(int32_t rows) const;
  void LaunchSample(int32_t rows);
  void LaunchStep(int32_t rows);
  // The first step of long prompts, whose last rows a prefill has left: logits alone are to be made.
  void LaunchFirst(int32_t rows);
  // Steps of few rows as one kernel, where the device and the network allow it.
  void PreparePersistent();
  // Whether the step of step_slots_ does.
  bool RunsPersistent(int32_t rows) const;
  // With a choice the step ends with its tokens, else with its logits.
  void LaunchPersistent(int32_t rows, const SampleArgs* choice = nullptr);
  // Whether a step of step_slots_ chooses its tokens in its kernel.
  bool ChoosesInStep() const;
  int32_t Splits(int32_t rows) const;

  // Launches until each of these slots that goes on has so many steps pending, or the ring is full of
  // others' and none of these waits. Logits [count, vocab] or null: of the sequences that keep them.
  void RunAhead(const int32_t* slots, size_t count, int32_t pending, float* logits);
  // A step of step_slots_, the first one of all or of none; the logits of a row go to its place in
  // step_logits_, if that is not null.
  void LaunchStepOfSlots(bool first);
  // Waits for the oldest step in flight; for all, before what they use is replaced.
  void ReadStep();
  void ReadSteps();

  // Prefill, in one of two ways: as decode steps multiply, or through cuBLASLt.
  void FeedRows(const std::vector<Row>& rows, const std::vector<float*>& wanted);
  // Whether the slot's prompt goes through cuBLASLt, to its last token. It depends on the prompt alone,
  // so that its bits do.
  bool IsLong(int32_t slot) const;
  bool IsLongPrompt(int32_t length) const { return multiplier_ && length > kShortPrompt; }
  // Whether the slot's next step is the first one of such a prompt.
  bool IsFirst(int32_t slot) const;
  void FeedPart(const std::vector<Row>& rows, const std::vector<float*>& wanted, bool many);
  void CopyLogits(const DeviceMemory& x, const std::vector<float*>& wanted, size_t begin,
                  size_t end);
  void FeedFewRows(int32_t rows, int32_t num_runs, int32_t longest_run);
  void FeedManyRows(int32_t rows, int32_t num_runs, int32_t longest_run);
  // A layer's products over so many rows in the work space of a prefill.
  struct LayerProducts {
    CublasLt::Product qkv, attention_out, feed_forward_in, feed_forward_out;
  };
  LayerProducts ProductsOf(const LayerWeights& layer, int32_t rows) const;
  // Opens cuBLASLt, and leaves it where it has not all of a layer's products.
  void PrepareMultiplier();
  void Multiply(const Matrix& w, const CublasLt::Product& product);
  void SaturateRows(const DeviceMemory& x, int64_t stride, int32_t rows);
  // What the arguments of products of both kinds have in common.
  template <typename Args>
  Args ProductArgs(const Matrix& w, int32_t rows, Epilogue epilogue) const {
    Args args;
    args.w = w;
    args.rows = rows;
    args.epilogue = epilogue;
    args.row_list = layer_space_.row_list.as<Row>();
    args.slots = device_slots_.as<Slot>();
    args.cache = layout_;
    args.overlap = true;
    return args;
  }
  LinearArgs Product(const Matrix& w, const DeviceMemory& x, int64_t ldx, const DeviceMemory& y,
                     int64_t ldy, int32_t rows, Epilogue epilogue) const;
  // Packed rows of so many columns; `parts`: x, to be normed.
  PackedRows Packed(const DeviceMemory& data, int64_t stride, bool parts) const;
  LinearRowsArgs PackedProduct(const Matrix& w, const PackedRows& x, int32_t rows,
                               Epilogue epilogue) const;
  // The product's input is normed first.
  static void FoldIn(const Norm& norm, const FoldedNorm& folded, LinearArgs* args);
  EmbedArgs Embedding(const DeviceMemory& row_list, int32_t rows, const DeviceMemory& x) const;

  const engine::PluginConfig config_;
  const int32_t index_;
  const DType weight_dtype_;
  // What the matrix units take together with the weights.
  const DType activation_dtype_;
  cudaDeviceProp properties_ = {};
  cudaStream_t stream_ = nullptr;
  std::mutex mutex_;

  std::unique_ptr<Weights> weights_;
  CacheLayout layout_;
  std::unique_ptr<PagePool> pages_;
  // Strides of activation rows, in elements.
  const int64_t hidden_stride_, qkv_stride_, wide_stride_, logits_stride_;

  std::vector<HostSlot> slots_;
  DeviceMemory device_slots_;
  DeviceMemory last_rows_;  // [slots, hidden_stride_] of long prompts, before their first step
  size_t slot_capacity_ = 0;
  SlotUploads uploads_;

  LayerSpace layer_space_;
  DecodeSpace decode_space_;
  DecodeRing ring_;
  std::vector<int32_t> listed_;  // slots in layer_space_.row_list; empty: something else is there
  std::vector<int32_t> step_slots_;
  std::vector<float*> step_logits_;
  PrefillSpace prefill_space_;
  std::map<std::pair<int32_t, bool>, cudaGraphExec_t> graphs_;  // by rows and JoinsAttention
  bool packs_rows_ = false;                                     // in steps that are not one kernel
  bool joins_attention_ = false;  // with its input, in steps of few packed rows
  PersistentArgs persistent_;     // but for what a step brings
  // Whether steps of so many rows can run so, and choose tokens.
  bool persistent_rows_[kPersistentRows + 1] = {};
  bool persistent_chooses_[kPersistentRows + 1] = {};
  uint32_t persistent_steps_left_ = 0;  // before the exchange has to be zeroed
  DeviceMemory exchange_;
  bool attention_stores_ = false;  // keys and values of a prefill through cuBLASLt
  bool saturates_ = false;         // what cuBLASLt rounds to float16 may become infinite
  // Null where cuBLASLt cannot be had, or has not all that is needed.
  std::unique_ptr<Multiplier> multiplier_;
};

}  // namespace fastgen::cuda
