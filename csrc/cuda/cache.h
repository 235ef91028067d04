// Pages of the KV cache, of which sequences take what they need.
#pragma once

#include <cstddef>
#include <vector>

#include "cuda/check.h"
#include "cuda/types.h"

namespace fastgen::cuda {

// Takes device memory in large pieces and keeps it. Not thread-safe.
class PagePool {
 public:
  explicit PagePool(const CacheLayout& layout);

  // Bytes of a page.
  size_t page_bytes() const { return page_bytes_; }
  // Appends `count` pages, all or none; throws Error(kOutOfMemory) saying how much is missing.
  void Take(size_t count, std::vector<char*>* pages);
  // Takes the pages back and clears the list.
  void GiveBack(std::vector<char*>* pages);

 private:
  size_t page_bytes_;
  size_t pages_per_piece_;
  std::vector<DeviceMemory> pieces_;
  std::vector<char*> free_;
};

// The layout for a network's heads.
CacheLayout MakeCacheLayout(DType dtype, int32_t layers, int32_t heads, int32_t head_size);

}  // namespace fastgen::cuda
