#include "cuda/foreign.h"

#include <dlfcn.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/check.h"
#include "cuda/checksum.h"
#include "cuda/pack.h"

namespace fastgen::cuda {
namespace {

// The driver's functions that the run-time library does not have, or null without a driver. Declared
// here: the library is not linked, it is opened where there is one.
struct Driver {
  int (*get_context)(void** context) = nullptr;
  int (*set_context)(void* context) = nullptr;

  static const Driver& Get() {
    static const Driver driver = [] {
      Driver found;
      if (void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) {
        found.get_context = reinterpret_cast<int (*)(void**)>(dlsym(library, "cuCtxGetCurrent"));
        found.set_context = reinterpret_cast<int (*)(void*)>(dlsym(library, "cuCtxSetCurrent"));
      }
      return found.get_context && found.set_context ? found : Driver();
    }();
    return driver;
  }
};

[[noreturn]] void Refuse(const std::string& message) {
  throw base::Error(FASTGEN_INVALID_ARGUMENT, message);
}

std::string NameOf(int32_t index) { return "cuda:" + std::to_string(index); }

void CheckAligned(const engine::PluginBuffer& buffer) {
  if (reinterpret_cast<uintptr_t>(buffer.data) % static_cast<uintptr_t>(buffer.element_bytes)) {
    Refuse(std::string(buffer.name) + " lies at an address that is no multiple of an element's " +
           std::to_string(buffer.element_bytes) + " bytes");
  }
}

// What kernels give to the host. One for all calls, which take turns: page-locked memory is slow to
// take and to give back. Never destroyed, because the driver may end before.
struct Results {
  std::mutex mutex;
  PinnedMemory memory;

  static Results& Get() {
    static Results* const results = new Results;
    return *results;
  }
  void Reserve(size_t bytes) {
    if (bytes > memory.size()) memory = PinnedMemory(bytes, "taking page-locked memory");
  }
};

}  // namespace

KeepContext::KeepContext() {
  // Before the driver has been initialised no thread has a context.
  const auto get = Driver::Get().get_context;
  if (get && get(&context_) != 0) context_ = nullptr;
}

KeepContext::~KeepContext() {
  if (const auto set = Driver::Get().set_context) set(context_);
}

void ChooseDevice(int32_t index) {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status != cudaSuccess || devices == 0) {
    cudaGetLastError();
    throw base::Error(FASTGEN_UNSUPPORTED,
                      std::string("device=cuda: there is no usable NVIDIA device: ") +
                          (status == cudaSuccess ? "none found" : cudaGetErrorString(status)));
  }
  if (index >= devices) {
    Refuse("device=" + NameOf(index) + ": this machine has " + std::to_string(devices) +
           (devices == 1 ? " device" : " devices") + ", counted from 0");
  }
  Check(cudaSetDevice(index), "choosing the device");
  if (CheckMachineCode() == cudaSuccess) return;
  cudaGetLastError();
  cudaDeviceProp properties;
  Check(cudaGetDeviceProperties(&properties, index), "asking what the device is");
  throw base::Error(FASTGEN_UNSUPPORTED,
                    std::string("device=cuda: this build of libfastgen_cuda has no machine code "
                                "for ") +
                        properties.name + ", compute capability " +
                        std::to_string(properties.major) + "." + std::to_string(properties.minor));
}

Event::Event() {
  Check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "creating an event");
}

Event::~Event() { cudaEventDestroy(event_); }

void Event::Record(cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaError_t status = cudaStreamIsCapturing(stream, &capture);
  if (status == cudaErrorStreamCaptureImplicit || capture != cudaStreamCaptureStatusNone) {
    cudaGetLastError();
    Refuse("stream is capturing a graph, of which a call that waits cannot be part");
  }
  if (status == cudaSuccess) status = cudaEventRecord(event_, stream);
  if (status == cudaErrorInvalidResourceHandle || status == cudaErrorContextIsDestroyed) {
    cudaGetLastError();
    Refuse(std::string("stream is not one of the device that the memory lies on: ") +
           cudaGetErrorString(status));
  }
  Check(status, "joining the caller's stream");
}

void Event::Wait() { Check(cudaEventSynchronize(event_), "waiting for the caller's stream"); }

void Event::Hold(cudaStream_t stream) {
  Check(cudaStreamWaitEvent(stream, event_, 0), "joining the caller's stream");
}

void CheckMemory(const engine::PluginBuffer& buffer, int32_t index) {
  CheckAligned(buffer);
  const std::string name = buffer.name;
  cudaPointerAttributes attributes = {};
  const cudaError_t status = cudaPointerGetAttributes(&attributes, buffer.data);
  const bool device = status == cudaSuccess && (attributes.type == cudaMemoryTypeDevice ||
                                                attributes.type == cudaMemoryTypeManaged);
  if (!device) {
    cudaGetLastError();
    // CUDA 10.2 fails where later ones call memory unregistered.
    Refuse(name + " does not lie on " + NameOf(index) +
           ": its address is memory of the host, or of nobody");
  }
  if (attributes.type == cudaMemoryTypeDevice && attributes.device != index) {
    Refuse(name + " lies on " + NameOf(attributes.device) + ", not on " + NameOf(index));
  }
}

// Copies are put on the caller's stream itself: its own order is then the one that is asked for, before
// and after, and memory that a caching allocator hands out again within a stream is safe.
void ReadForeign(const engine::PluginBuffer& from, int32_t index, cudaStream_t stream, void* to) {
  CheckMemory(from, index);
  Event done;
  done.Record(stream);
  Check(cudaMemcpyAsync(to, from.data, from.bytes, cudaMemcpyDeviceToHost, stream),
        "reading the caller's memory");
  done.Record(stream);
  done.Wait();
}

void WriteForeign(const void* from, cudaStream_t stream, const engine::PluginBuffer& to,
                  int32_t index) {
  CheckMemory(to, index);
  Event order;
  order.Record(stream);
  Check(cudaMemcpyAsync(const_cast<void*>(to.data), from, to.bytes, cudaMemcpyHostToDevice, stream),
        "writing the caller's memory");
  // The source is pageable: CUDA has taken it over by now, but where the device reads the host's pages
  // itself.
  int reads_pages = 0;
  Check(cudaDeviceGetAttribute(&reads_pages, cudaDevAttrPageableMemoryAccessUsesHostPageTables,
                               index),
        "asking what the device is");
  if (reads_pages == 0) return;
  order.Record(stream);
  order.Wait();
}

uint64_t ChecksumForeign(const engine::PluginBuffer* buffers, size_t count, int32_t index,
                         cudaStream_t stream) {
  for (size_t i = 0; i < count; ++i) CheckMemory(buffers[i], index);
  int processors = 0;
  Check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index),
        "asking what the device is");
  const auto blocks = static_cast<size_t>(8 * processors);
  const size_t lists = (count + kChecksumPieces - 1) / kChecksumPieces;
  Event done;
  done.Record(stream);
  Results& results = Results::Get();
  std::lock_guard<std::mutex> lock(results.mutex);
  results.Reserve(lists * blocks * sizeof(uint64_t));
  for (size_t i = 0; i < lists; ++i) {
    ChecksumArgs args;
    args.first = i * kChecksumPieces;
    args.count = static_cast<int32_t>(std::min<size_t>(kChecksumPieces, count - args.first));
    for (int32_t k = 0; k < args.count; ++k) {
      const engine::PluginBuffer& buffer = buffers[args.first + static_cast<size_t>(k)];
      args.pieces[k].data = buffer.data;
      args.pieces[k].bytes = buffer.bytes;
      args.pieces[k].first_chunk = args.chunks;
      args.chunks += static_cast<uint32_t>((buffer.bytes + kChecksumChunk - 1) / kChecksumChunk);
    }
    args.sums = results.memory.on_device<uint64_t>() + i * blocks;
    Check(Checksum(args, static_cast<int32_t>(blocks), stream), "launching a checksum");
  }
  done.Record(stream);
  done.Wait();
  const uint64_t* const sums = results.memory.as<uint64_t>();
  uint64_t total = count;
  for (size_t i = 0; i < lists * blocks; ++i) total += sums[i];
  return total;
}

bool EqualForeign(const engine::PluginBuffer& a, const engine::PluginBuffer& b, int32_t index,
                  cudaStream_t stream) {
  CheckMemory(a, index);
  CheckMemory(b, index);
  Event done;
  done.Record(stream);
  Results& results = Results::Get();
  std::lock_guard<std::mutex> lock(results.mutex);
  results.Reserve(sizeof(int32_t));
  volatile int32_t* const differ = results.memory.as<int32_t>();
  *differ = 0;
  Check(Compare(a.data, b.data, a.bytes, results.memory.on_device<int32_t>(), stream),
        "launching a comparison");
  done.Record(stream);
  done.Wait();
  return *differ == 0;
}

}  // namespace fastgen::cuda
