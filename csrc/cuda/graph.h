// A graph of kernels, made without capturing a stream: while a stream is captured nobody else in the
// process may wait for the device, and who does so fails and breaks the capture.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "cuda/arch.h"

namespace fastgen {
namespace cuda {

// While it lives, Launch (launch.h) in this thread adds kernels to the graph, each after the one before,
// instead of launching them.
class GraphRecorder {
 public:
  explicit GraphRecorder(cudaGraph_t graph) : graph_(graph) { Current() = this; }
  ~GraphRecorder() { Current() = nullptr; }
  GraphRecorder(const GraphRecorder&) = delete;
  GraphRecorder& operator=(const GraphRecorder&) = delete;

  // The thread's, or null.
  static GraphRecorder*& Current() {
    static thread_local GraphRecorder* current = nullptr;
    return current;
  }

  // With `overlap` the kernel may start early, where graphs know of that (CUDA 12.3).
  // `arguments` are copied.
  cudaError_t Add(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, int cluster,
                  bool packed, bool overlap, void** arguments) {
    cudaGraphNode_t node = nullptr;
    const cudaGraphNode_t* const before = last_ == nullptr ? nullptr : &last_;
    const size_t num_before = last_ == nullptr ? 0 : 1;
#if FASTGEN_CUDA_HAS_GRAPH_EDGES
    cudaGraphNodeParams params = {};
    params.type = cudaGraphNodeTypeKernel;
    params.kernel.func = const_cast<void*>(kernel);
    params.kernel.gridDim = grid;
    params.kernel.blockDim = block;
    params.kernel.sharedMemBytes = static_cast<unsigned>(shared_bytes);
    params.kernel.kernelParams = arguments;
    cudaGraphEdgeData edge = {};
    if (overlap) {
      edge.from_port = cudaGraphKernelNodePortProgrammatic;
      edge.type = cudaGraphDependencyTypeProgrammatic;
    }
    const cudaGraphEdgeData* const edges = last_ == nullptr ? nullptr : &edge;
#if CUDART_VERSION >= 13000
    cudaError_t status = cudaGraphAddNode(&node, graph_, before, edges, num_before, &params);
#else
    cudaError_t status = cudaGraphAddNode_v2(&node, graph_, before, edges, num_before, &params);
#endif
#else
    static_cast<void>(overlap);
    cudaKernelNodeParams params = {};
    params.func = const_cast<void*>(kernel);
    params.gridDim = grid;
    params.blockDim = block;
    params.sharedMemBytes = static_cast<unsigned>(shared_bytes);
    params.kernelParams = arguments;
    cudaError_t status = cudaGraphAddKernelNode(&node, graph_, before, num_before, &params);
#endif
#if FASTGEN_CUDA_HAS_CLUSTERS
    if (status == cudaSuccess && cluster > 1) {
      cudaLaunchAttributeValue value = {};
      value.clusterDim.x = static_cast<unsigned>(cluster);
      value.clusterDim.y = 1;
      value.clusterDim.z = 1;
      status = cudaGraphKernelNodeSetAttribute(node, cudaLaunchAttributeClusterDimension, &value);
      if (status == cudaSuccess && packed) {
        value = {};
        value.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicyLoadBalancing;
        status = cudaGraphKernelNodeSetAttribute(
            node, cudaLaunchAttributeClusterSchedulingPolicyPreference, &value);
      }
    }
#else
    static_cast<void>(cluster);
    static_cast<void>(packed);
#endif
    last_ = node;
    return status;
  }

 private:
  cudaGraph_t graph_;
  cudaGraphNode_t last_ = nullptr;
};

}  // namespace cuda
}  // namespace fastgen
