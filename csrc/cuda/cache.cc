#include "cuda/cache.h"

#include <algorithm>
#include <string>

namespace fastgen::cuda {
namespace {

constexpr size_t kPieceBytes = size_t{64} << 20;

size_t ElementBytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace

CacheLayout MakeCacheLayout(DType dtype, int32_t layers, int32_t heads, int32_t head_size) {
  const auto unit = static_cast<int32_t>(kAlign / static_cast<int32_t>(ElementBytes(dtype)));
  CacheLayout layout;
  layout.dtype = dtype;
  layout.num_layers = layers;
  layout.num_heads = heads;
  layout.head_size = head_size;
  layout.head_stride = (head_size + unit - 1) / unit * unit;
  return layout;
}

PagePool::PagePool(const CacheLayout& layout)
    : page_bytes_(ElementBytes(layout.dtype) * 2 * kPage * static_cast<size_t>(layout.num_layers) *
                  static_cast<size_t>(layout.num_heads) * static_cast<size_t>(layout.head_stride)),
      pages_per_piece_(std::max<size_t>(1, kPieceBytes / page_bytes_)) {}

void PagePool::Take(size_t count, std::vector<char*>* pages) {
  if (count > free_.size()) {
    const size_t missing = count - free_.size();
    // Whole pieces, unless only what is needed still fits.
    const size_t wanted = (missing + pages_per_piece_ - 1) / pages_per_piece_ * pages_per_piece_;
    size_t free_bytes = 0, total_bytes = 0;
    Check(cudaMemGetInfo(&free_bytes, &total_bytes), "asking for the free memory of the device");
    const size_t take = wanted * page_bytes_ <= free_bytes ? wanted : missing;
    pieces_.reserve(pieces_.size() + 1);
    free_.reserve(free_.size() + take);
    DeviceMemory piece(take * page_bytes_,
                       "the KV cache of " + std::to_string(count * kPage) + " positions");
    // The padding behind a head's elements is read, so it must be zero.
    // In another stream than the steps', so they must not begin before it ends.
    Check(cudaMemset(piece.as<>(), 0, piece.size()), "clearing device memory");
    Check(cudaStreamSynchronize(nullptr), "clearing device memory");
    for (size_t i = take; i-- > 0;) free_.push_back(piece.as<>() + i * page_bytes_);
    pieces_.push_back(std::move(piece));
  }
  pages->reserve(pages->size() + count);
  pages->insert(pages->end(), free_.end() - static_cast<std::ptrdiff_t>(count), free_.end());
  free_.resize(free_.size() - count);
}

void PagePool::GiveBack(std::vector<char*>* pages) {
  // Never grows beyond what was handed out, so nothing is allocated here.
  free_.insert(free_.end(), pages->begin(), pages->end());
  pages->clear();
}

}  // namespace fastgen::cuda
