// Sums and comparisons of memory that other libraries own. Launchers as in kernels.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace fastgen {
namespace cuda {

// Pieces of memory that one launch takes: they go by value, within the 4 KiB that arguments may have,
// so that no list of them has to be brought to the device.
constexpr int32_t kChecksumPieces = 128;

// Pieces are read in chunks, which blocks take in turn.
constexpr uint64_t kChecksumChunk = uint64_t{16} << 10;

struct ChecksumPiece {
  const void* data;      // a multiple of 2
  uint64_t bytes;        // a multiple of 2, at least 2
  uint32_t first_chunk;  // chunks of the pieces before it
};

struct ChecksumArgs {
  uint64_t first = 0;  // number of the first piece among those of all launches
  int32_t count = 0;
  uint32_t chunks = 0;  // of all pieces
  ChecksumPiece pieces[kChecksumPieces];
  uint64_t* sums = nullptr;  // [blocks]; their sum is that of the pieces
};

// Adds up every 8 bytes after a one-to-one mapping that depends on where they stand: a change of one
// element changes the sum, of several all but surely. Addition has no order, so neither the number of
// blocks nor their turn matters.
cudaError_t Checksum(const ChecksumArgs& args, int32_t blocks, cudaStream_t stream);

// *differ = 1 if the `bytes` (a multiple of 2) at `a` and `b` (multiples of 2) are not the same, else it
// is left alone.
cudaError_t Compare(const void* a, const void* b, uint64_t bytes, int32_t* differ,
                    cudaStream_t stream);

}  // namespace cuda
}  // namespace fastgen
