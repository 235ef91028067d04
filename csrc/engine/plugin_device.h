// Devices that live in libraries of their own.
#pragma once

#include <memory>

#include "engine/device.h"

namespace fastgen::engine {

// Opens libfastgen_cuda and makes the device that `options.device` names: "cuda" or "cuda:<index>".
//
// The library is the file that the environment variable FASTGEN_CUDA_LIBRARY names, or else the one that
// lies beside libfastgen, or else the one that the system's loader finds. Throws Error(kUnsupported)
// saying what is missing: the library, a driver, a device, a compute capability.
std::unique_ptr<Device> MakeCudaDevice(const ModelConfig& config, WeightSource& weights,
                                       const DeviceOptions& options);

}  // namespace fastgen::engine
