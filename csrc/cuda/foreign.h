// What other libraries of the process own: memory of the device, streams, and the context that is
// current on a thread that calls. Host code.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "engine/device_plugin.h"

namespace fastgen::cuda {

// Puts back what cudaSetDevice() changes: on the thread of a caller the current context is that of its
// own framework. The driver is asked, because the run-time library would make a context, and take its
// memory, where the thread has none.
class KeepContext {
 public:
  KeepContext();
  ~KeepContext();
  KeepContext(const KeepContext&) = delete;
  KeepContext& operator=(const KeepContext&) = delete;

 private:
  void* context_ = nullptr;
};

// Makes a device current; throws base::Error if there is none, or none with this index, or this library
// has no machine code for it.
void ChooseDevice(int32_t index);

// An event that says when something has been done.
class Event {
 public:
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  // Throws base::Error if `stream` is no stream of the current device, or captures a graph.
  void Record(cudaStream_t stream);
  void Wait();
  // What is put on `stream` from now on waits for it.
  void Hold(cudaStream_t stream);

 private:
  cudaEvent_t event_ = nullptr;
};

// These need the device to be current. Memory that does not lie on device `index` is refused with its
// name and where it lies.
void CheckMemory(const engine::PluginBuffer& buffer, int32_t index);
void ReadForeign(const engine::PluginBuffer& from, int32_t index, cudaStream_t stream, void* to);
void WriteForeign(const void* from, cudaStream_t stream, const engine::PluginBuffer& to,
                  int32_t index);
uint64_t ChecksumForeign(const engine::PluginBuffer* buffers, size_t count, int32_t index,
                         cudaStream_t stream);
bool EqualForeign(const engine::PluginBuffer& a, const engine::PluginBuffer& b, int32_t index,
                  cudaStream_t stream);

}  // namespace fastgen::cuda
