// CUDA's status codes as errors, and memory that gives itself back. Host code.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <utility>

#include "base/error.h"

namespace fastgen::cuda {

inline void Check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it would otherwise be reported again by the next call
  throw base::Error(status == cudaErrorMemoryAllocation ? FASTGEN_OUT_OF_MEMORY : FASTGEN_INTERNAL,
                    std::string(what) + ": " + cudaGetErrorString(status) + " (CUDA error " +
                        cudaGetErrorName(status) + ")");
}

// Of the current device.
struct MemorySize {
  size_t bytes, total;
};
inline MemorySize FreeMemory() {
  MemorySize size = {};
  Check(cudaMemGetInfo(&size.bytes, &size.total), "asking for the free memory of the device");
  return size;
}

// Says what needs so many bytes, and how many are free.
[[noreturn]] inline void ThrowMissing(const std::string& what, size_t bytes,
                                      const MemorySize& memory) {
  throw base::Error(FASTGEN_OUT_OF_MEMORY, what + " needs " + std::to_string(bytes) +
                                               " bytes of the device, which has " +
                                               std::to_string(memory.bytes) + " of " +
                                               std::to_string(memory.total) + " free");
}

// Device memory, uninitialised.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  // `what` names it in the error, which says how much there is and how much is missing.
  DeviceMemory(size_t bytes, const std::string& what) {
    if (bytes == 0) return;
    const MemorySize memory = FreeMemory();
    const bool fits = bytes <= memory.bytes;
    const cudaError_t status = fits ? cudaMalloc(&data_, bytes) : cudaErrorMemoryAllocation;
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      ThrowMissing(what, bytes, memory);
    }
    Check(status, "taking device memory");
    size_ = bytes;
  }
  ~DeviceMemory() {
    if (data_) cudaFree(data_);
  }
  DeviceMemory(DeviceMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  template <typename T = char>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Page-locked host memory that the device may write to directly.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  PinnedMemory(size_t bytes, const char* what) {
    Check(cudaHostAlloc(&data_, bytes, cudaHostAllocMapped | cudaHostAllocPortable), what);
    size_ = bytes;
  }
  ~PinnedMemory() {
    if (data_) cudaFreeHost(data_);
  }
  PinnedMemory(PinnedMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  PinnedMemory& operator=(PinnedMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  template <typename T = char>
  T* as() const {
    return static_cast<T*>(data_);
  }
  // The same memory as the device addresses it.
  template <typename T = char>
  T* on_device() const {
    void* mapped = nullptr;
    Check(cudaHostGetDevicePointer(&mapped, data_, 0), "mapping host memory");
    return static_cast<T*>(mapped);
  }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace fastgen::cuda
