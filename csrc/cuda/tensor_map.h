// Tensor maps: how the bulk engine of sm_90 finds a tile of a matrix of 16-bit numbers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastgen {
namespace cuda {

// What the driver encodes; a kernel gets it as a parameter that is never copied (__grid_constant__).
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// A matrix of `rows` rows of `columns` numbers of 16 bits, row_bytes apart (a multiple of 16), read in
// tiles of tile_rows rows by `chunks` times 64 columns, which is 1 where rows are no whole chunks. In
// shared memory, chunk after chunk, the 16 bytes of columns 8 c to 8 c + 7 of a chunk of row r of a tile
// are at r * 128 + (c ^ r % 8) * 16. What lies outside of the matrix is zero.
struct TiledMatrix {
  const void* data = nullptr;
  int64_t row_bytes = 0;
  int32_t rows = 0;
  int32_t columns = 0;
  int32_t tile_rows = 0;
  int32_t chunks = 1;
};

// Whether the driver has tensor maps; asked once.
bool TensorMapsSupported();

cudaError_t MakeTensorMap(const TiledMatrix& matrix, TensorMap* map);

}  // namespace cuda
}  // namespace fastgen
