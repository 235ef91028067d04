// The boundary of a device that lives in a library of its own, e.g. libfastgen_cuda: a table of C
// functions, because the two libraries may come from different compilers and carry different C++
// run-time libraries. engine/plugin_device.* makes a Device of it.
//
// Every function returns a fastgen_status; where that is not FASTGEN_OK, `error` holds one sentence.
// What may be called at the same time is what Device allows: the table's functions lock by themselves.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/device.h"

namespace fastgen::engine {

// Rises whenever a structure below changes, or one of those it passes on: SequenceSpec,
// PrefillChunk, DecodeResult, SamplingParams.
constexpr uint32_t kDevicePluginVersion = 3;
// The function that a plug-in exports: const DevicePlugin* fastgen_device_plugin(void).
constexpr char kDevicePluginEntry[] = "fastgen_device_plugin";

struct PluginError {
  char text[1024];
};

struct PluginConfig {
  int32_t vocab_size, max_positions, hidden_size, num_layers, num_heads, intermediate_size;
  float layer_norm_eps;
  int32_t head_is_tied;
};

struct PluginOptions {
  int32_t device_index;
  const char* weight_dtype;
  // 1: the weights lie in memory of the device as the work that is on `stream` leaves them, and the
  // find_ functions of PluginWeights say where; 0: its read_ functions give them.
  int32_t weights_on_device;
  void* stream;
};

// A tensor, or part of one, in memory of the device: see WeightSource::Part.
struct PluginPart {
  const void* data;  // of the tensor
  int32_t dtype;     // io::DType, but kOther
  int64_t rows;      // 1 of a vector
  int64_t row_size;  // elements from a row to the next
  int64_t size, offset, group_size, group_stride;
};

// The network's weights. A function that fails makes create() fail, and the error that is reported is
// its own.
struct PluginWeights {
  void* self;
  // As float32 into memory of the host, see WeightSource.
  int (*read_columns)(void* self, int32_t layer, int32_t matrix, int64_t begin, int64_t end,
                      float* out, int64_t ld);
  int (*read_vector)(void* self, int32_t layer, int32_t vector, float* out);
  int (*read_final_norm)(void* self, float* weight, float* bias);
  int (*read_embedding_rows)(void* self, int64_t begin, int64_t end, float* out);
  int (*read_position_rows)(void* self, int64_t begin, int64_t end, float* out);
  int (*read_head_rows)(void* self, int64_t begin, int64_t end, float* out);
  // Where they lie on the device.
  int (*find_matrix)(void* self, int32_t layer, int32_t matrix, PluginPart* part);
  int (*find_vector)(void* self, int32_t layer, int32_t vector, PluginPart* part);
  int (*find_end)(void* self, int32_t end, PluginPart* part);
  int (*release_layer)(void* self, int32_t layer);
  int (*release_ends)(void* self);
  int (*report_progress)(void* self, uint64_t done, uint64_t total);
};

struct PluginInfo {
  char name[256];         // of the device, e.g. "NVIDIA H200"
  char architecture[32];  // "sm_90"
  char weight_dtype[32];
  uint64_t weight_bytes, step_bytes, cache_bytes_per_token;
  int32_t prefill_tokens;
};

// Memory of a device that the caller of the C API has named.
struct PluginBuffer {
  const char* name;  // for messages
  const void* data;
  uint64_t bytes;
  int32_t element_bytes;  // `data` must be a multiple of it
};

struct DevicePlugin {
  uint32_t version;           // kDevicePluginVersion that it was built with
  const char* build_version;  // FASTGEN_VERSION that it was built with

  int (*create)(const PluginConfig* config, const PluginOptions* options,
                const PluginWeights* weights, void** device, PluginError* error);
  void (*destroy)(void* device);
  void (*get_info)(void* device, PluginInfo* info);
  int (*open)(void* device, const SequenceSpec* spec, int32_t* slot, PluginError* error);
  int (*close)(void* device, int32_t slot, PluginError* error);
  int (*prefill)(void* device, const PrefillChunk* chunks, size_t count, PluginError* error);
  int (*copy_prefix)(void* device, int32_t from, int32_t to, int32_t count, PluginError* error);
  int (*decode)(void* device, const int32_t* slots, size_t count, int32_t max_steps,
                DecodeResult* results, float* logits, int32_t* steps, PluginError* error);
  int (*measure_read_bandwidth)(void* device, uint64_t bytes, int32_t passes,
                                double* bytes_per_second, PluginError* error);
  // See Device::ReadMemory and WriteMemory.
  int (*read_memory)(void* device, const PluginBuffer* from, void* stream, void* to,
                     PluginError* error);
  int (*write_memory)(void* device, const void* from, void* stream, const PluginBuffer* to,
                      PluginError* error);

  // Of memory that no device of the plug-in's has been made for yet: whether all of it lies on the
  // device, its sum (see fastgen_checksum), and whether two buffers of the same size are equal.
  int (*check_memory)(int32_t device_index, const PluginBuffer* buffers, size_t count,
                      PluginError* error);
  int (*checksum)(int32_t device_index, const PluginBuffer* buffers, size_t count, void* stream,
                  uint64_t* sum, PluginError* error);
  int (*equal)(int32_t device_index, const PluginBuffer* a, const PluginBuffer* b, void* stream,
               int32_t* equal, PluginError* error);
};

}  // namespace fastgen::engine
