// What libfastgen asks of this library: engine/device_plugin.h. Nothing is thrown across it.
#include <algorithm>
#include <cstring>
#include <exception>
#include <new>

#include "cuda/cuda_device.h"
#include "cuda/foreign.h"
#include "engine/device_plugin.h"

namespace fastgen::cuda {
namespace {

using engine::PluginBuffer;
using engine::PluginError;

template <typename Call>
int Guard(PluginError* error, const Call& call) {
  const auto report = [error](const char* text) {
    const size_t size = std::min(std::strlen(text), sizeof error->text - 1);
    std::memcpy(error->text, text, size);
    error->text[size] = '\0';
  };
  try {
    const KeepContext keep;
    call();
    return FASTGEN_OK;
  } catch (const base::Error& e) {
    report(e.what());
    return e.status();
  } catch (const std::bad_alloc&) {
    report("the host has no memory left");
    return FASTGEN_OUT_OF_MEMORY;
  } catch (const std::exception& e) {
    report(e.what());
    return FASTGEN_INTERNAL;
  }
}

// Of calls that concern no device of ours.
template <typename Call>
int GuardOn(int32_t device_index, PluginError* error, const Call& call) {
  return Guard(error, [&] {
    ChooseDevice(device_index);
    call();
  });
}

CudaDevice& At(void* device) { return *static_cast<CudaDevice*>(device); }

constexpr engine::DevicePlugin kPlugin = {
    engine::kDevicePluginVersion,
    FASTGEN_VERSION,
    [](const engine::PluginConfig* config, const engine::PluginOptions* options,
       const engine::PluginWeights* weights, void** device, PluginError* error) {
      return Guard(error, [&] { *device = new CudaDevice(*config, *options, *weights); });
    },
    [](void* device) {
      const KeepContext keep;
      delete static_cast<CudaDevice*>(device);
    },
    [](void* device, engine::PluginInfo* info) { At(device).GetInfo(info); },
    [](void* device, const engine::SequenceSpec* spec, int32_t* slot, PluginError* error) {
      return Guard(error, [&] { *slot = At(device).Open(*spec); });
    },
    [](void* device, int32_t slot, PluginError* error) {
      return Guard(error, [&] { At(device).Close(slot); });
    },
    [](void* device, const engine::PrefillChunk* chunks, size_t count, PluginError* error) {
      return Guard(error, [&] { At(device).Prefill(chunks, count); });
    },
    [](void* device, int32_t from, int32_t to, int32_t count, PluginError* error) {
      return Guard(error, [&] { At(device).CopyPrefix(from, to, count); });
    },
    [](void* device, const int32_t* slots, size_t count, int32_t max_steps,
       engine::DecodeResult* results, float* logits, int32_t* steps, PluginError* error) {
      return Guard(error,
                   [&] { *steps = At(device).Decode(slots, count, max_steps, results, logits); });
    },
    [](void* device, uint64_t bytes, int32_t passes, double* bandwidth, PluginError* error) {
      return Guard(error, [&] { *bandwidth = At(device).MeasureReadBandwidth(bytes, passes); });
    },
    [](void* device, const PluginBuffer* from, void* stream, void* to, PluginError* error) {
      return Guard(error, [&] { At(device).ReadMemory(*from, stream, to); });
    },
    [](void* device, const void* from, void* stream, const PluginBuffer* to, PluginError* error) {
      return Guard(error, [&] { At(device).WriteMemory(from, stream, *to); });
    },
    [](int32_t index, const PluginBuffer* buffers, size_t count, PluginError* error) {
      return GuardOn(index, error, [&] {
        for (size_t i = 0; i < count; ++i) CheckMemory(buffers[i], index);
      });
    },
    [](int32_t index, const PluginBuffer* buffers, size_t count, void* stream, uint64_t* sum,
       PluginError* error) {
      return GuardOn(index, error, [&] {
        *sum = ChecksumForeign(buffers, count, index, static_cast<cudaStream_t>(stream));
      });
    },
    [](int32_t index, const PluginBuffer* a, const PluginBuffer* b, void* stream, int32_t* equal,
       PluginError* error) {
      return GuardOn(index, error, [&] {
        *equal = EqualForeign(*a, *b, index, static_cast<cudaStream_t>(stream)) ? 1 : 0;
      });
    },
};

}  // namespace
}  // namespace fastgen::cuda

// For tests: how steps run from now on, a StepPolicy by number.
extern "C" __attribute__((visibility("default"))) void fastgen_cuda_test_step_policy(int policy) {
  fastgen::cuda::SetStepPolicy(static_cast<fastgen::cuda::StepPolicy>(policy));
}

// For tests: steps so far that were one kernel, those of them that chose tokens, and those that were a graph
// where attention is one kernel with its input.
extern "C" __attribute__((visibility("default"))) void fastgen_cuda_test_steps(int64_t* one_kernel,
                                                                               int64_t* choosing,
                                                                               int64_t* joined) {
  const fastgen::cuda::StepCounts counts = fastgen::cuda::CountSteps();
  *one_kernel = counts.one_kernel;
  *choosing = counts.choosing;
  *joined = counts.joined;
}

extern "C" __attribute__((visibility("default"))) const fastgen::engine::DevicePlugin*
fastgen_device_plugin() {
  return &fastgen::cuda::kPlugin;
}
