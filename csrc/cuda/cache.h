// Pages of the KV cache, of which sequences take what they need.
#pragma once

#include <cstddef>
#include <vector>

#include "cuda/check.h"
#include "cuda/types.h"

namespace fastgen::cuda {

// Stay free of pages and work spaces: graphs of steps, code that is loaded when it first runs, a prompt's
// logits.
constexpr size_t kSpareBytes = size_t{64} << 20;

// Takes device memory in large pieces and keeps it until it is told to release it. Not thread-safe.
class PagePool {
 public:
  // `stream`: that of all kernels that use pages.
  PagePool(const CacheLayout& layout, cudaStream_t stream);

  // Bytes of a page.
  size_t page_bytes() const { return page_bytes_; }
  // Appends `count` pages, all or none; throws Error(kOutOfMemory) saying how much is needed and how
  // much there is.
  void Take(size_t count, std::vector<char*>* pages);
  // Takes the pages back and clears the list.
  void GiveBack(std::vector<char*>* pages) noexcept;
  // Gives the device the pieces back of which no page is taken, once kernels in flight have ended;
  // whether there were any.
  bool Release();

 private:
  struct Piece {
    DeviceMemory memory;
    size_t pages;
  };
  void Grow(size_t missing, size_t count);

  size_t page_bytes_;
  size_t pages_per_piece_;
  cudaStream_t stream_;
  std::vector<Piece> pieces_;
  size_t total_ = 0;         // pages of all pieces
  std::vector<char*> free_;  // has room for all of them
};

// The layout for a network's heads.
CacheLayout MakeCacheLayout(DType dtype, int32_t layers, int32_t heads, int32_t head_size);

}  // namespace fastgen::cuda
