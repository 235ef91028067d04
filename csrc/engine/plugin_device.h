// Devices that live in libraries of their own.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/device.h"
#include "io/tensor.h"

namespace fastgen::engine {

// Opens libfastgen_cuda and makes the device that `options.device` names: "cuda" or "cuda:<index>".
//
// The library is the file that the environment variable FASTGEN_CUDA_LIBRARY names, or else the one that
// lies beside libfastgen, or else the one that the system's loader finds. Throws Error(kUnsupported)
// saying what is missing: the library, a driver, a device, a compute capability.
std::unique_ptr<Device> MakeCudaDevice(const ModelConfig& config, WeightSource& weights,
                                       const DeviceOptions& options);

// Tensors in memory of a CUDA device. Nothing on the host may read them: they are packed where they lie.
std::unique_ptr<io::TensorSource> MakeCudaTensorSource(std::vector<io::TensorView> tensors,
                                                       const Place& place);

// Sum of the bytes of tensors in memory of a CUDA device, see fastgen_checksum().
uint64_t CudaChecksum(const std::vector<io::TensorView>& tensors, const Place& place);

}  // namespace fastgen::engine
