// Which device an option means.
#include "engine/device.h"

#include <cstdlib>
#include <utility>

#include "base/error.h"
#include "engine/cpu_device.h"
#include "engine/plugin_device.h"

namespace fastgen::engine {

int32_t CudaIndex(const std::string& device, const char* option) {
  if (device == "cpu") return -1;
  const std::string start = std::string(option) + "=" + device;
  if (device.compare(0, 4, "cuda") != 0) {
    throw base::Error(FASTGEN_UNSUPPORTED, start + " is not one of: cpu, cuda, cuda:<index>");
  }
  const bool named = device == "cuda" || device.compare(0, 5, "cuda:") == 0;
  const std::string digits = device.size() < 5 ? "0" : device.substr(5);
  char* end = nullptr;
  const long index = std::strtol(digits.c_str(), &end, 10);
  if (!named || digits.empty() || *end || index < 0 || index > 1023) {
    throw base::Error(FASTGEN_INVALID_ARGUMENT, start + " is neither cuda nor cuda:<index>");
  }
  return static_cast<int32_t>(index);
}

std::string DeviceName(int32_t cuda_index) {
  return cuda_index < 0 ? "cpu" : "cuda:" + std::to_string(cuda_index);
}

void Device::ReadMemory(const void*, size_t, void*, const char*, void*) {
  throw base::Error(FASTGEN_INTERNAL, "a device without memory of its own was asked to read it");
}

void Device::WriteMemory(const void*, size_t, void*, const char*, void*) {
  throw base::Error(FASTGEN_INTERNAL, "a device without memory of its own was asked to write it");
}

std::unique_ptr<io::TensorSource> MakeTensorSource(std::vector<io::TensorView> tensors,
                                                   const DeviceOptions& options) {
  if (options.tensors.on_host())
    return std::make_unique<io::MemoryTensorSource>(std::move(tensors));
  if (CudaIndex(options.device, "device") != options.tensors.cuda_index) {
    throw base::Error(FASTGEN_INVALID_ARGUMENT,
                      "device=" + options.device + " cannot take tensors that lie on " +
                          DeviceName(options.tensors.cuda_index) +
                          " (tensor_device): they must lie on the host or on the model's device");
  }
  return MakeCudaTensorSource(std::move(tensors), options.tensors);
}

std::unique_ptr<Device> MakeDevice(const ModelConfig& config, WeightSource& weights,
                                   const DeviceOptions& options) {
  if (CudaIndex(options.device, "device") >= 0) return MakeCudaDevice(config, weights, options);
  return std::make_unique<CpuDevice>(config, weights, options);
}

}  // namespace fastgen::engine
