#include "cuda/tensor_map.h"

#include "cuda/hopper.h"

namespace fastgen {
namespace cuda {
namespace {

// cuTensorMapEncodeTiled, and values of its enumerations; the driver is not linked with.
using Encode = int (*)(TensorMap* map, int type, uint32_t rank, void* data, const uint64_t* sizes,
                       const uint64_t* strides, const uint32_t* tile, const uint32_t* steps,
                       int interleave, int swizzle, int promotion, int fill);
constexpr int kUint16 = 1, kNotInterleaved = 0, kSwizzle128 = 3, kPromote256 = 3, kFillZero = 0;
constexpr uint32_t kChunkColumns = 64;

Encode FindEncode() {
  void* found = nullptr;
#if FASTGEN_CUDA_HAS_PERSISTENT
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const char* const name = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t status = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) {
    static_cast<void>(cudaGetLastError());  // said by the answer
    found = nullptr;
  }
#endif
  return reinterpret_cast<Encode>(found);
}

Encode EncodeTiled() {
  static const Encode encode = FindEncode();
  return encode;
}

}  // namespace

bool TensorMapsSupported() { return EncodeTiled() != nullptr; }

cudaError_t MakeTensorMap(const TiledMatrix& matrix, TensorMap* map) {
  const Encode encode = EncodeTiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  // Where rows are whole chunks, a chunk is a plane of the tensor; else there is one plane.
  const uint64_t chunks = matrix.columns % kChunkColumns == 0 ? matrix.columns / kChunkColumns : 1;
  const uint64_t sizes[3] = {static_cast<uint64_t>(matrix.columns) / chunks,
                             static_cast<uint64_t>(matrix.rows), chunks};
  const uint64_t strides[2] = {static_cast<uint64_t>(matrix.row_bytes), kChunkColumns * 2};
  const uint32_t tile[3] = {kChunkColumns, static_cast<uint32_t>(matrix.tile_rows),
                            static_cast<uint32_t>(matrix.chunks)};
  const uint32_t steps[3] = {1, 1, 1};
  const int status = encode(map, kUint16, 3, const_cast<void*>(matrix.data), sizes, strides, tile,
                            steps, kNotInterleaved, kSwizzle128, kPromote256, kFillZero);
  return status == 0 ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace fastgen
