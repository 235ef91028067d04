// The seam between engine and device. It is the step, not the op: a device takes the weights once,
// owns its KV cache and its per-sequence state, and is asked to prefill and to decode-and-sample.
// A CPU step is a loop over fused regions; a CUDA step may replay a graph or run one persistent
// kernel, several tokens ahead. The engine cannot tell.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/config.h"
#include "engine/sampling_params.h"
#include "engine/weights.h"

namespace fastgen::engine {

// Where memory lies that a caller gives: on the host, or on a CUDA device, where it belongs to the
// order of a stream.
struct Place {
  int32_t cuda_index = -1;  // -1: the host
  void* stream = nullptr;

  bool on_host() const { return cuda_index < 0; }
};

// -1 for "cpu", else the index of "cuda" or "cuda:<index>". Throws an error that begins with
// "<option>=<device>" for any other name.
int32_t CudaIndex(const std::string& device, const char* option);
// "cpu", "cuda:1".
std::string DeviceName(int32_t cuda_index);

// What a device needs to know of a sequence before its first token.
struct SequenceSpec {
  const int32_t* prompt = nullptr;  // [prompt_length], read during Open()
  int32_t prompt_length = 0;
  SamplingParams sampling;   // limits included: the device stops a sequence by itself
  bool keep_logits = false;  // report raw logits with every token
  // An open slot whose prompt begins with the same `alike` tokens, or -1: the caller will copy them with
  // CopyPrefix(), unless that slot is closed before. The device may share memory of them beforehand.
  int32_t like = -1;
  int32_t alike = 0;
};

// Part of a prompt to be written into the cache: tokens [begin, begin + count) of `slot`.
struct PrefillChunk {
  int32_t slot = -1;
  int32_t begin = 0;
  int32_t count = 0;
  float* logits = nullptr;  // [count, vocab], or null when only the cache is wanted
};

// What a decode step says of one row.
struct DecodeResult {
  int32_t token = -1;     // the sampled token, -1 if the sequence had ended before this step
  float score = 0.0f;     // its log-probability or processed logit, see fastgen_sequence::score
  bool finished = false;  // it was eos or the last allowed one
};

struct DeviceInfo {
  std::string device;        // "cpu", "cuda"
  int32_t cuda_index = -1;   // of a CUDA device
  std::string isa;           // kernel set in use
  std::string weight_dtype;  // "float32"
  std::string cache_dtype;
  int32_t num_threads = 0;
  uint64_t weight_bytes = 0;
  uint64_t step_bytes = 0;
  uint64_t cache_bytes_per_token = 0;
  // What suits it: prompt tokens of one Prefill(), and how many of a prompt's last ones Decode() may
  // be left to feed at little cost.
  int32_t prefill_tokens = 512;
  int32_t tail_tokens = 64;
  // From how many tokens on CopyPrefix() between different prompts gives the bits that feeding them would
  // and is worth waiting for; 0: only between equal ones.
  int32_t least_shared = 0;
};

// Thread-safe: sessions on different threads share one device, a call at a time.
class Device {
 public:
  virtual ~Device() = default;

  virtual const DeviceInfo& info() const = 0;

  // Takes cache for prompt + sampling.max_length positions and returns a slot. Throws
  // Error(kOutOfMemory) with the size that is missing before anything is taken.
  virtual int32_t Open(const SequenceSpec& spec) = 0;
  // Gives the slot and its cache back.
  virtual void Close(int32_t slot) = 0;

  // Writes prompt tokens into the cache. Chunks of a slot come in order and without gaps; there is
  // at least one chunk, of at least one token.
  virtual void Prefill(const PrefillChunk* chunks, size_t count) = 0;
  // Makes positions [0, count) of `to` equal to those of `from`, whose prompt begins alike and is in the
  // cache so far. `to` has fewer of its own, and goes on from there.
  virtual void CopyPrefix(int32_t from, int32_t to, int32_t count) = 0;

  // Feeds every slot its newest token (at first what Prefill was not asked for: the prompt's last token,
  // and those before it that are not in the cache) and samples the next, up to `max_steps` times;
  // returns the steps done, at least 1. It may run ahead of the caller: a sequence's tokens do not
  // depend on what is decoded beside it, so they can be kept until they are asked for.
  // results [max_steps, count]; logits [max_steps, count, vocab] or null: rows of the sequences that
  // keep_logits are written.
  virtual int32_t Decode(const int32_t* slots, size_t count, int32_t max_steps,
                         DecodeResult* results, float* logits) = 0;

  // Copies from and to memory of the device's own, in the order of the caller's `stream`. `what` names
  // the memory in an error. The host has what it reads when the call returns, and may change what it
  // writes. For a device whose cuda_index is not -1.
  virtual void ReadMemory(const void* from, size_t bytes, void* stream, const char* what, void* to);
  virtual void WriteMemory(const void* from, size_t bytes, void* stream, const char* what,
                           void* to);

  // Best of `passes` reads of a buffer of `bytes`, in bytes per second.
  virtual double MeasureReadBandwidth(uint64_t bytes, int32_t passes) = 0;
};

struct DeviceOptions {
  std::string device = "cpu";
  std::string isa;           // empty: environment, then the best
  std::string weight_dtype;  // empty: the type of the files, else float32
  std::string cache_dtype;   // empty: the device's own choice
  int32_t num_threads = 0;
  Progress progress;
  Place tensors;  // where the tensors of a model made of memory lie
};

// Tensors of a caller in the memory that `options.tensors` names, for the device that `options` name:
// throws Error(kInvalidArgument) if that cannot read them.
std::unique_ptr<io::TensorSource> MakeTensorSource(std::vector<io::TensorView> tensors,
                                                   const DeviceOptions& options);

// Packs `weights` for the device that `options` name. The source may be dropped afterwards; it is
// released tensor by tensor while packing, so that memory holds one copy.
std::unique_ptr<Device> MakeDevice(const ModelConfig& config, WeightSource& weights,
                                   const DeviceOptions& options);

}  // namespace fastgen::engine
