// Which device an option means.
#include "engine/device.h"

#include "base/error.h"
#include "engine/cpu_device.h"
#include "engine/plugin_device.h"

namespace fastgen::engine {

std::unique_ptr<Device> MakeDevice(const ModelConfig& config, WeightSource& weights,
                                   const DeviceOptions& options) {
  if (options.device.compare(0, 4, "cuda") == 0) return MakeCudaDevice(config, weights, options);
  if (options.device != "cpu") {
    throw base::Error(FASTGEN_UNSUPPORTED,
                      "device=" + options.device + " is not one of: cpu, cuda, cuda:<index>");
  }
  if (options.weight_dtype != "float32") {
    throw base::Error(FASTGEN_UNSUPPORTED, "weight_dtype=" + options.weight_dtype +
                                               " is not one that device=cpu has: float32");
  }
  return std::make_unique<CpuDevice>(config, weights, options);
}

}  // namespace fastgen::engine
