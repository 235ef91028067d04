#include <cuda_runtime.h>

#include "cuda/checksum.h"

namespace fastgen {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kUnroll = 4;
// What a block reads at a time, in 16-byte words.
constexpr uint64_t kChunk = static_cast<uint64_t>(kThreads) * kUnroll;
static_assert(16 * kChunk == kChecksumChunk, "a chunk is what a block reads at a time");

struct Words {
  uint64_t low, high;
};

// 16 bytes from the start, or what is left of them and zeros.
__device__ inline Words LoadWords(const unsigned short* data, uint64_t word, uint64_t halves) {
  uint64_t parts[2] = {0, 0};
  const uint64_t begin = word * 8;
  for (int i = 0; i < 8; ++i) {
    if (begin + i < halves) {
      parts[i / 4] |= static_cast<uint64_t>(__ldg(data + begin + i)) << (16 * (i % 4));
    }
  }
  return {parts[0], parts[1]};
}

// One-to-one for a given key.
__device__ inline uint64_t Mix(uint64_t word, uint64_t key) {
  uint64_t x = word ^ key * 0x9E3779B97F4A7C15ull;
  x = (x ^ x >> 32) * 0xD6E8FEB86659FD93ull;
  x = (x ^ x >> 32) * 0xD6E8FEB86659FD93ull;
  return x ^ x >> 32;
}

__device__ inline uint64_t Mix(Words words, uint64_t key) {
  return Mix(words.low, 2 * key) + Mix(words.high, 2 * key + 1);
}

__device__ inline bool IsAligned(const void* data) {
  return (reinterpret_cast<uintptr_t>(data) & 15u) == 0;
}

// Blocks take chunks in turn and look up whose they are: the same few steps for all threads of a block,
// where going through the list of pieces would cost more than reading them.
__global__ void ChecksumKernel(const ChecksumArgs args) {
  uint64_t sum = 0;
  for (uint32_t turn = blockIdx.x; turn < args.chunks; turn += gridDim.x) {
    int piece = 0;
    for (int last = args.count - 1; piece < last;) {
      const int middle = (piece + last + 1) / 2;
      if (args.pieces[middle].first_chunk <= turn) {
        piece = middle;
      } else {
        last = middle - 1;
      }
    }
    const uint64_t chunk = turn - args.pieces[piece].first_chunk;
    const uint64_t bytes = args.pieces[piece].bytes;
    const unsigned short* const halves =
        static_cast<const unsigned short*>(args.pieces[piece].data);
    const uint64_t key = (args.first + static_cast<uint64_t>(piece) + 1) << 40;
    const uint64_t whole = IsAligned(halves) ? bytes / 16 : 0;  // words that may be loaded at once
    const uint64_t words = (bytes + 15) / 16;
    const uint64_t begin = chunk * kChunk + threadIdx.x;
    if (chunk * kChunk + kChunk <= whole) {
      uint4 v[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        v[u] = __ldg(reinterpret_cast<const uint4*>(halves) + begin + u * kThreads);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const Words w = {v[u].x | static_cast<uint64_t>(v[u].y) << 32,
                         v[u].z | static_cast<uint64_t>(v[u].w) << 32};
        sum += Mix(w, key + begin + u * kThreads);
      }
      continue;
    }
    for (int u = 0; u < kUnroll; ++u) {
      const uint64_t word = begin + u * kThreads;
      if (word < words) sum += Mix(LoadWords(halves, word, bytes / 2), key + word);
    }
  }
  __shared__ uint64_t partial[kWarps];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) sum += partial[warp];
  args.sums[blockIdx.x] = sum;
}

__global__ void CompareKernel(const unsigned short* a, const unsigned short* b, uint64_t bytes,
                              int32_t* differ) {
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  const uint64_t first = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const uint64_t whole = IsAligned(a) && IsAligned(b) ? bytes / 16 : 0;
  bool same = true;
  for (uint64_t i = first; i < whole; i += stride) {
    const uint4 x = __ldg(reinterpret_cast<const uint4*>(a) + i);
    const uint4 y = __ldg(reinterpret_cast<const uint4*>(b) + i);
    same = same && x.x == y.x && x.y == y.y && x.z == y.z && x.w == y.w;
  }
  for (uint64_t i = whole * 8 + first; i < bytes / 2; i += stride) {
    same = same && __ldg(a + i) == __ldg(b + i);
  }
  if (!same) *differ = 1;
}

}  // namespace

cudaError_t Checksum(const ChecksumArgs& args, int32_t blocks, cudaStream_t stream) {
  static_assert(sizeof(ChecksumArgs) <= 4096, "arguments of a kernel");
  ChecksumKernel<<<blocks, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t Compare(const void* a, const void* b, uint64_t bytes, int32_t* differ,
                    cudaStream_t stream) {
  CompareKernel<<<1024, kThreads, 0, stream>>>(
      static_cast<const unsigned short*>(a), static_cast<const unsigned short*>(b), bytes, differ);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fastgen
