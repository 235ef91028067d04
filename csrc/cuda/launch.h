// How kernels are launched, and what a block can say to the grid before and after it and to the
// other blocks of its cluster: nothing of it does anything before sm_90.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

#include "cuda/arch.h"
#include "cuda/graph.h"
#include "cuda/mma.h"

namespace fastgen {
namespace cuda {

struct LaunchShape {
  dim3 grid;
  int32_t threads = 0;
  size_t shared_bytes = 0;
  int32_t cluster = 1;   // neighbouring blocks in x that run together
  bool packed = false;   // a cluster's blocks may share multiprocessors as the device sees fit
  bool overlap = false;  // may start before the kernel before it has ended: see WaitForGrid
};

struct DeviceLimits {
  int device = 0;
  int multiprocessors = 0;
  int shared_bytes = 0;  // that a block can have
};

inline cudaError_t GetDeviceLimits(DeviceLimits* limits) {
  cudaError_t status = cudaGetDevice(&limits->device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount,
                                  limits->device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                limits->device);
}

// The architecture, 80 for sm_80, that the kernel was compiled for: what its guards saw, whatever
// the device.
inline cudaError_t CompiledArchitecture(const void* kernel, int* architecture) {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  if (status == cudaSuccess) *architecture = attributes.ptxVersion;
  return status;
}

// Lets the kernel have `bytes` of dynamic shared memory. The limit of a kernel is one for the whole
// process, so it is raised as far as the device allows: set to what one launch needs it would be too
// low for another that a second thread is about to make.
inline cudaError_t AllowSharedBytes(const void* kernel, size_t bytes) {
  if (bytes == 0) return cudaSuccess;
  cudaFuncAttributes attributes;
  cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  if (status != cudaSuccess) return status;
  if (bytes <= static_cast<size_t>(attributes.maxDynamicSharedSizeBytes)) return cudaSuccess;
  DeviceLimits limits;
  status = GetDeviceLimits(&limits);
  if (status != cudaSuccess) return status;
  const int most = limits.shared_bytes - static_cast<int>(attributes.sharedSizeBytes);
  if (most < 0 || bytes > static_cast<size_t>(most)) return cudaErrorInvalidValue;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

// While blocks run, a multiprocessor's shared memory cannot grow at the cost of its first-level cache. So a
// kernel of which only one block has room leaves none to the next one's, which start early, unless it asks for all.
inline cudaError_t PreferSharedMemory(const void* kernel) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                              cudaSharedmemCarveoutMaxShared);
}

#if FASTGEN_CUDA_HAS_CLUSTERS
constexpr int kMostAttributes = 3;
inline int SetAttributes(const LaunchShape& shape,
                         cudaLaunchAttribute (&attributes)[kMostAttributes]) {
  int count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attributes[count].val.clusterDim.y = 1;
    attributes[count].val.clusterDim.z = 1;
    ++count;
    if (shape.packed) {
      attributes[count].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
      attributes[count].val.clusterSchedulingPolicyPreference =
          cudaClusterSchedulingPolicyLoadBalancing;
      ++count;
    }
  }
  if (shape.overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  return count;
}
#endif

// Clusters of the shape that fit on the device at once.
inline cudaError_t MaxActiveClusters(const void* kernel, const LaunchShape& shape, int* clusters) {
#if FASTGEN_CUDA_HAS_CLUSTERS
  cudaError_t status = AllowSharedBytes(kernel, shape.shared_bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[kMostAttributes];
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.attrs = attributes;
  config.numAttrs = static_cast<unsigned>(SetAttributes(shape, attributes));
  return cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
#else
  static_cast<void>(kernel);
  static_cast<void>(shape);
  *clusters = 0;
  return cudaSuccess;
#endif
}

// What a device answered for clusters of a kernel; in static storage, so zero at first.
struct KnownClusters {
  static constexpr int kDevices = 16;
  static constexpr int kMaxBits = 3;
  std::atomic<int32_t> one_more[kDevices][kMaxBits + 1];  // than the answer
};

// Clusters of 1 << bits blocks, one to a multiprocessor, that run at once; 0 where they cannot. Asked
// once per device.
inline int32_t ClustersAtOnce(const void* kernel, int32_t bits, int32_t threads,
                              const DeviceLimits& limits, KnownClusters* known) {
  if (bits == 0) return limits.multiprocessors;
  std::atomic<int32_t>* const one_more =
      limits.device < KnownClusters::kDevices ? &known->one_more[limits.device][bits] : nullptr;
  if (one_more != nullptr && one_more->load() > 0) return one_more->load() - 1;
  LaunchShape shape;
  shape.cluster = 1 << bits;
  shape.grid = dim3(static_cast<unsigned>(shape.cluster));
  shape.threads = threads;
  shape.shared_bytes = static_cast<size_t>(limits.shared_bytes);
  int clusters = 0;
  if (MaxActiveClusters(kernel, shape, &clusters) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // said by the answer
    clusters = 0;
  }
  if (one_more != nullptr) one_more->store(clusters + 1);
  return clusters;
}

// Whether kernels wait for those before them: code for older devices has no WaitForGrid, whatever the
// device. Asked once per device, of any kernel, as all are compiled for the same ones.
inline cudaError_t CanOverlap(const void* kernel, bool* can) {
  static std::atomic<int32_t> known[KnownClusters::kDevices];  // the architecture, 0 at first
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  int architecture = device < KnownClusters::kDevices ? known[device].load() : 0;
  if (architecture == 0) {
    status = CompiledArchitecture(kernel, &architecture);
    if (status != cudaSuccess) return status;
    if (device < KnownClusters::kDevices) known[device].store(architecture);
  }
  *can = architecture >= 90;
  return cudaSuccess;
}

// A kernel that may have so much shared memory already.
template <typename Args>
cudaError_t LaunchAllowed(void (*kernel)(Args), LaunchShape shape, cudaStream_t stream, Args args) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shape.overlap) {
    const cudaError_t status = CanOverlap(function, &shape.overlap);
    if (status != cudaSuccess) return status;
  }
  void* pointers[] = {&args};
  const dim3 block(static_cast<unsigned>(shape.threads));
  if (GraphRecorder* const recorder = GraphRecorder::Current()) {
    return recorder->Add(function, shape.grid, block, shape.shared_bytes, shape.cluster,
                         shape.packed, shape.overlap, pointers);
  }
#if FASTGEN_CUDA_HAS_CLUSTERS
  cudaLaunchAttribute attributes[kMostAttributes];
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = static_cast<unsigned>(SetAttributes(shape, attributes));
  return cudaLaunchKernelExC(&config, function, pointers);
#else
  return cudaLaunchKernel(function, shape.grid, block, pointers, shape.shared_bytes, stream);
#endif
}

template <typename Args>
cudaError_t Launch(void (*kernel)(Args), const LaunchShape& shape, cudaStream_t stream, Args args) {
  const cudaError_t status =
      AllowSharedBytes(reinterpret_cast<const void*>(kernel), shape.shared_bytes);
  if (status != cudaSuccess) return status;
  return LaunchAllowed(kernel, shape, stream, args);
}

#ifdef __CUDACC__

// The block's dynamic shared memory.
__device__ inline char* SharedMemory() {
  extern __shared__ __align__(16) char shared_memory[];
  return shared_memory;
}

// Waits until all that the kernels before wrote can be read; before it, only what no kernel writes
// may be read. Every block of a kernel that is launched with `overlap` calls it: the kernel after
// relies on it for the kernels before.
__device__ inline void WaitForGrid() {
#if FASTGEN_ARCH_HAS_CLUSTERS
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start, once all blocks have said so: it waits in WaitForGrid for the end.
__device__ inline void LetNextGridStart() {
#if FASTGEN_ARCH_HAS_CLUSTERS
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A barrier of the cluster's blocks. What was written to shared memory before can be read after.
__device__ inline void ClusterSync() {
#if FASTGEN_ARCH_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// A barrier in two halves that orders no writes: it says that the other blocks have got so far, and
// have read what they needed.
__device__ inline void ClusterArrive() {
#if FASTGEN_ARCH_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

__device__ inline void ClusterWait() {
#if FASTGEN_ARCH_HAS_CLUSTERS
  asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}

// Reads and writes the same place in the shared memory of block `rank` of the cluster.
__device__ inline float ReadInBlock(const float* shared, int32_t rank) {
  float value = 0.0f;
#if FASTGEN_ARCH_HAS_CLUSTERS
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(SharedAddress(shared)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
#endif
  return value;
}

__device__ inline void WriteInBlock(float* shared, int32_t rank, float value) {
#if FASTGEN_ARCH_HAS_CLUSTERS
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(SharedAddress(shared)), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
#endif
}

// Copies 16 bytes to shared memory past the first-level cache, or zeros. Weights are read once: the
// rest of the 128 bytes is what the warp reads next.
__device__ inline void StreamCopy16(void* shared, const void* global, bool valid) {
#if FASTGEN_ARCH_HAS_CP_ASYNC && CUDART_VERSION >= 11040
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(SharedAddress(shared)),
      "l"(global), "r"(valid ? 16 : 0)
      : "memory");
#elif FASTGEN_ARCH_HAS_CP_ASYNC
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#endif
}

// Copies the first `bytes` of 4 bytes to shared memory, zeros for the rest.
__device__ inline void StreamCopy4(void* shared, const void* global, int32_t bytes) {
#if FASTGEN_ARCH_HAS_CP_ASYNC
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(SharedAddress(shared)),
               "l"(global), "r"(bytes)
               : "memory");
#endif
}

__device__ inline void PrefetchL2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

#endif  // __CUDACC__

}  // namespace cuda
}  // namespace fastgen
