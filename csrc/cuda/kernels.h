// The kernels of the CUDA device, as launchers: asynchronous on a stream, allocate nothing, never
// synchronise, so that any sequence of them can be a graph (graph.h). Each returns what the launch
// said. Sizes are checked by the caller; pointers are device pointers.
//
// Activations are float32 [rows, stride] in decode steps, and of the weights' type in prefill.
#pragma once

#include "cuda/types.h"

namespace fastgen {
namespace cuda {

// ---- linear.cu: products of few rows, bound by reading the weights ------------------------------

enum class Epilogue : int32_t {
  kStore,     // y = acc + bias
  kGelu,      // y = gelu_tanh(acc + bias)
  kResidual,  // y += acc + bias
  kQkv,       // columns [0, h): y = (acc + bias) / sqrt(head_size); the rest goes to the cache
};

struct LinearArgs {
  Matrix w;
  const float* x = nullptr;  // [rows, ldx], zero from w.in to a multiple of 8 columns
  int64_t ldx = 0;
  const Norm* norm = nullptr;  // x is normed first (host pointer, read at launch)
  int32_t rows = 0;
  float* y = nullptr;  // [rows, ldy]
  int64_t ldy = 0;
  Epilogue epilogue = Epilogue::kStore;
  // kQkv only: w.out is 3 * num_heads * head_size, q then k then v.
  const Row* row_list = nullptr;  // [rows]
  const Slot* slots = nullptr;
  CacheLayout cache;
  int32_t layer = 0;
  // The kernel may start before the kernel before it in the stream has ended (programmatic dependent
  // launch), and read the weights, the biases, the norm, row_list, slots and their tables of pages: none
  // of the kernels before it may write these, back to the last one that was launched without `overlap`.
  bool overlap = false;
  int32_t cluster = 0;  // blocks that share an output, 1, 2, 4 or 8 on sm_90; 0: to be chosen
  // With a norm, both or none: what FoldNorm made of w and the norm. Lets x be read before its norm is
  // known; bias has w.bias in it.
  const float* norm_sums = nullptr;  // [w.out]
  const float* norm_bias = nullptr;  // [w.out]
};

// Every output is one sum in an order that depends on the shape and type of w alone: a row's result is
// the same bits with any number of rows beside it, and with any `cluster` but 0. Weights of 16 bits
// and fewer go to tensor cores where there are any (sm_80), also for one row. There, x is the sum of two
// numbers of 16 bits; on sm_90, where `cluster` is 0 and a norm comes with its sums, it is one such
// number, before the norm: of the weights' type, or float16. float32 weights are multiplied in float32.
cudaError_t Linear(const LinearArgs& args, cudaStream_t stream);

// ---- linear_rows.cu: the same where rows travel as 16 bits --------------------------------------

// Columns of a row that share their part of a norm's sums.
constexpr int32_t kPartColumns = 64;

// Rows as LinearRows multiplies them, by weights of 16 bits: of the weights' type, float16 as a sixteenth
// of the number, so that it can be as large as 2^20; what is larger becomes the largest. Of a row that
// is to be normed, they are its columns times the norm's weight, and what the norm needs of the row.
struct PackedRows {
  void* data = nullptr;  // [rows, stride]
  int64_t stride = 0;    // in elements, a multiple of 8
  float2* parts =
      nullptr;  // [rows, part_stride] or null: of kPartColumns columns each, the mean and the
                // sum of squares about it
  int32_t part_stride = 0;
};

// Pieces of the cache that a kernel brings into the L2 cache on the side, for attention that comes later.
struct PiecesAhead {
  const uint64_t* pieces = nullptr;  // [count] addresses; 0 is none
  int32_t count = 0;
  int64_t behind = 0;  // what is wanted lies so many bytes behind each,
  uint32_t bytes = 0;  // and is as long as this, a multiple of 16
};

struct LinearRowsArgs {
  Matrix w;  // kFloat16 or kBFloat16
  PackedRows x;
  // For an x that is to be normed, all of them or none: what FoldNorm made of w and the norm, which has
  // w.bias in it.
  const float* norm_sums = nullptr;  // [w.out]
  const float* norm_bias = nullptr;  // [w.out]
  float eps = 0.0f;
  int32_t rows = 0;
  Epilogue epilogue = Epilogue::kStore;
  float* y = nullptr;  // [rows, ldy]; not for kGelu
  int64_t ldy = 0;
  // kGelu: what it gives, packed. kResidual: y packed for the norm that comes next, whose weight this is;
  // or null.
  PackedRows out;
  const float* out_weight = nullptr;
  // As in LinearArgs.
  const Row* row_list = nullptr;
  const Slot* slots = nullptr;
  CacheLayout cache;
  int32_t layer = 0;
  const RowPlace* places =
      nullptr;  // of row_list, as Embed writes them: read before the kernel before
                // has ended, as row_list; null: found out from it
  PiecesAhead ahead;
  // The kernel before is attention, which fills multiprocessors: this one's blocks start when it ends, with little to
  // ask for, and the next ones need not wait for them.
  bool after_attention = false;
  bool overlap = false;
  // With `overlap`, of a step's first product: nothing that the kernel before writes is read before that has
  // ended, and the next kernel starts no sooner, so that what it reads early is there. QkvAttention has no
  // `places` then, and reads row_list and what it leads to early.
  bool first = false;
  int32_t cluster = 0;  // blocks that share outputs, 1, 2, 4 or 8; 0: by the shape of w
};

// Whether there can be such products on this device: with weights of that type, and of normed rows of so
// many columns.
cudaError_t LinearRowsSupported(DType weights, int32_t normed_columns, bool* supported);

// The bits of a row's result depend on the row and on w alone, but for `cluster`.
cudaError_t LinearRows(const LinearRowsArgs& args, cudaStream_t stream);

// ---- qkv_attention.cu: the product before attention, and attention, as one kernel ---------------

struct QkvAttentionArgs {
  // kQkv; y is not used. Rows are the newest tokens of different slots, each of which sees up to
  // kDecodeParts * kPage positions.
  LinearRowsArgs qkv;
  // [rows, ld]: what attention gives, of the weights' type, as in PackedRows; zeros for rows without a
  // token.
  void* packed = nullptr;
  int64_t ld = 0;  // a multiple of 8
};

// Whether there can be such a kernel: weights and cache of the same 16 bits, heads of 64 numbers, as many
// columns of weights as have room in shared memory.
cudaError_t QkvAttentionSupported(const Matrix& w, const CacheLayout& cache, bool* supported);

// The bits are those of LinearRows and DecodeAttention. With `overlap` the kernel may
// start before the kernel before it in the stream has ended, and reads page tables and the cache but for
// each row's own position, as DecodeAttention does.
cudaError_t QkvAttention(const QkvAttentionArgs& args, cudaStream_t stream);

// Packs rows of float32.
struct PackRowsArgs {
  const float* x = nullptr;  // [rows, ldx]
  int64_t ldx = 0;
  int32_t rows = 0;
  int32_t size = 0;               // columns
  const float* weight = nullptr;  // the norm's, or null
  DType dtype = DType::kFloat16;  // of the weights that will multiply them
  PackedRows out;
  bool overlap = false;  // as for Linear
};
cudaError_t PackRows(const PackRowsArgs& args, cudaStream_t stream);

// ---- rows.cu: what is done per row --------------------------------------------------------------

struct EmbedArgs {
  Matrix table;                      // [vocab, hidden] rows, any DType
  const float* positions = nullptr;  // [max_positions, position_stride]
  int64_t position_stride = 0;
  const Row* row_list = nullptr;  // [rows]
  const Slot* slots = nullptr;
  int32_t rows = 0;
  float* out = nullptr;  // [rows, ldo]; zero for padding rows
  int64_t ldo = 0;
  bool overlap = false;  // as for Linear
  // With `overlap`: nothing here is written by the kernel before, which is waited for at the end only.
  bool beside = false;
  // Beside `out`, where packed.data is not null: packed for the norm with that weight, as `dtype`.
  PackedRows packed;
  const float* weight = nullptr;
  DType dtype = DType::kFloat16;
  RowPlace* places = nullptr;  // [rows] or null: written for QkvAttention and LinearRows
};
cudaError_t Embed(const EmbedArgs& args, cudaStream_t stream);

// out[row] = norm(x[row]) as `dtype` (float32, float16, bfloat16; finite values saturate instead of
// becoming infinite), zero from `size` to `ldo`.
struct LayerNormArgs {
  const float* x = nullptr;  // [rows, ldx]
  int64_t ldx = 0;
  Norm norm;
  int32_t size = 0;
  int32_t rows = 0;
  DType dtype = DType::kFloat32;
  void* out = nullptr;  // [rows, ldo]
  int64_t ldo = 0;
  bool overlap = false;  // may start before the kernel before it has ended, and then waits for it
};
cudaError_t LayerNorm(const LayerNormArgs& args, cudaStream_t stream);

// Infinite numbers become the largest finite ones, as where a product of ours is rounded.
struct SaturateArgs {
  void* x = nullptr;  // [rows, ld] of float16
  int64_t ld = 0;     // a multiple of 8
  int32_t rows = 0;
};
cudaError_t Saturate(const SaturateArgs& args, cudaStream_t stream);

// Takes the product of a prefill apart: q / sqrt(head_size) stays (in place), k and v go to the cache.
struct QkvArgs {
  void* qkv = nullptr;  // [rows, ld], `dtype`; bias is already in
  int64_t ld = 0;
  DType dtype = DType::kFloat16;
  const Row* row_list = nullptr;
  const Slot* slots = nullptr;
  int32_t rows = 0;
  CacheLayout cache;
  int32_t layer = 0;
};
cudaError_t StoreQkv(const QkvArgs& args, cudaStream_t stream);

// Weights as another type, for products of many rows: out [out, ldo] as `dtype`.
cudaError_t Dequantize(const Matrix& w, DType dtype, void* out, int64_t ldo, cudaStream_t stream);

// ---- attention.cu -------------------------------------------------------------------------------

// Parts that a row's pages are cut into at most, by the row's length alone.
constexpr int32_t kDecodeParts = 32;

// Decode: one query per row against its slot's cache, the positions up to the row's own. Blocks share
// the parts, which the last one of them puts together in order: the result is the same bits however
// they are shared. Rows without a token get zeros.
struct DecodeAttentionArgs {
  const float* q = nullptr;  // [rows, ldq], scaled
  int64_t ldq = 0;
  float* out = nullptr;  // [rows, ldo]
  int64_t ldo = 0;
  // Instead of `out`, with a plan and a cache of 16 bits: of the cache's type, as in PackedRows.
  void* packed = nullptr;  // [rows, ldo]
  const Row* row_list = nullptr;
  const Slot* slots = nullptr;
  int32_t rows = 0;
  CacheLayout cache;
  int32_t layer = 0;
  int32_t splits = 1;  // blocks that share a head, without a plan
  // For heads that blocks share; may be null if `splits` is 1. [rows, heads, kDecodeParts,
  // head_size + 2]
  float* partial = nullptr;
  int32_t* arrived = nullptr;  // [rows, heads], zero before and after
  // Null: a kernel for any device. Else made by PlanDecodeAttention for the same rows, slots, cache and
  // `partial`, and the kernel streams pages by bulk copies, balanced by pages.
  void* plan = nullptr;
  // With a plan: the kernel may start before the kernel before it in the stream has ended, and reads
  // the plan, page tables and the cache but for each row's own position. Between what wrote these and
  // this kernel there has to be one that has started without overlapping, or a product that was launched as
  // `first`.
  bool overlap = false;
};
// Splits that fill a device of so many multiprocessors.
int32_t DecodeSplits(int32_t rows, int32_t heads, int32_t multiprocessors);
cudaError_t DecodeAttention(const DecodeAttentionArgs& args, cudaStream_t stream);

// Bytes of a plan; 0 where the device, the cache's shape or the number of rows (4096) allow none.
cudaError_t DecodePlanBytes(int32_t rows, const CacheLayout& cache, size_t* bytes);
// Makes the plan of a step, which all layers share; may itself overlap as Linear does.
cudaError_t PlanDecodeAttention(const DecodeAttentionArgs& args, cudaStream_t stream);
// What a kernel before that of layer `args.layer` can bring into the L2 cache for it: pieces that come after
// those that it asks for before it may start. None without a plan, or beyond the last layer.
cudaError_t DecodePiecesAhead(const DecodeAttentionArgs& args, PiecesAhead* ahead);

// Prefill: rows are runs of neighbouring positions of a slot; a run's queries see the cache up to
// their own position. Never holds a [length, length] matrix in device memory. Nothing is written for
// a run without a slot.
struct PrefillRun {
  int32_t slot;
  int32_t first_row;  // of q and out
  int32_t begin;      // position of the first query
  int32_t count;
};
struct PrefillAttentionArgs {
  const void* q = nullptr;  // [rows, ldq] of `dtype`
  int64_t ldq = 0;
  // Null: all keys and values are in the cache. Else the runs' own are here, [rows, ldq] of `dtype`,
  // and are put into the cache on the way; see PrefillAttentionStores. Two runs are then of two slots.
  const void* k = nullptr;
  const void* v = nullptr;
  void* out = nullptr;  // [rows, ldo] of `dtype`
  int64_t ldo = 0;
  float scale = 1.0f;  // of scores
  DType dtype = DType::kFloat16;
  const PrefillRun* runs = nullptr;  // device, [num_runs]
  int32_t num_runs = 0;
  int32_t longest_run = 0;
  const Slot* slots = nullptr;
  CacheLayout cache;
  int32_t layer = 0;
  bool overlap = false;  // as for LayerNorm
};
cudaError_t PrefillAttention(const PrefillAttentionArgs& args, cudaStream_t stream);
// Whether it takes `k` and `v`, whose rows must then begin at multiples of 16 bytes as q's.
cudaError_t PrefillAttentionStores(DType dtype, const CacheLayout& cache, bool* stores);

// What a prefill leaves of the last row of a prompt, for the step that gives the prompt's first token.
struct LastRowsArgs {
  float* x = nullptr;     // [rows, ld]
  float* last = nullptr;  // [slots, ld]
  int64_t ld = 0;         // a multiple of 4
  const Slot* slots = nullptr;
  const PrefillRun* runs = nullptr;  // [count] that KeepLastRows looks at
  const Row* row_list = nullptr;     // [count] that TakeLastRows fills
  int32_t count = 0;
};
// last[slot] = the row in x of the last token of the slot's prompt, of runs that hold it.
cudaError_t KeepLastRows(const LastRowsArgs& args, cudaStream_t stream);
// x[i] = last[row_list[i].slot], zero for padding.
cudaError_t TakeLastRows(const LastRowsArgs& args, cudaStream_t stream);

// ---- sample.cu ----------------------------------------------------------------------------------

// Logits processing, then the choice of engine/sampler.h: the same token as there from the same
// logits, but for the rounding of sums. Appends the token to the slot and ends the slot.
struct SampleArgs {
  float* logits = nullptr;  // [rows, ld]; changed
  int64_t ld = 0;
  int32_t vocab = 0;
  const Row* row_list = nullptr;
  Slot* slots = nullptr;
  int32_t rows = 0;
  StepResult* results = nullptr;  // [result_steps, result_rows], mapped host memory
  int32_t result_steps = 0;       // step n goes to place n % result_steps
  int32_t result_rows = 0;        // at least `rows`
  int32_t* step = nullptr;        // number of the step; the kernel adds 1 at its end
  void* workspace = nullptr;      // SampleWorkspaceBytes(rows, vocab), zero before the first call
  // As for Linear. The kernel before may write all of this but row_list, and of slots what a step
  // changes: length, finished, tokens.
  bool overlap = false;
};
size_t SampleWorkspaceBytes(int32_t rows, int32_t vocab);
cudaError_t Sample(const SampleArgs& args, cudaStream_t stream);

}  // namespace cuda
}  // namespace fastgen
