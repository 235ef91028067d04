#include "gpu_stream.h"

#include "engine_cache.h"

// Weak: a Paddle without CUDA has no GPU tensors and need not have them. The context of a place is not the
// one of the current device, as Tensor::stream() has it, and not one that was seen first, as
// paddle::experimental::DeviceContextPool has it: a predictor may have a context of its own.
extern "C" {
__attribute__((weak)) void* fastgen_op_pool() __asm__("_ZN3phi17DeviceContextPool8InstanceEv");
__attribute__((weak)) void* fastgen_op_context(void* pool, const phi::Place& place) __asm__(
    "_ZN3phi17DeviceContextPool3GetERKNS_5PlaceE");
__attribute__((weak)) void* fastgen_op_stream(const void* context) __asm__(
    "_ZNK3phi10GPUContext6streamEv");
}

namespace fastgen::paddle {

void* CurrentStream(const phi::Place& place) {
  if (!fastgen_op_pool || !fastgen_op_context || !fastgen_op_stream) {
    throw StatusError(FASTGEN_UNSUPPORTED,
                      "the weights are on a GPU and this build of Paddle has no "
                      "phi::GPUContext::stream, which tells the stream: move them to the CPU");
  }
  return fastgen_op_stream(fastgen_op_context(fastgen_op_pool(), place));
}

}  // namespace fastgen::paddle
