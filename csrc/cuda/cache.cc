#include "cuda/cache.h"

#include <algorithm>
#include <string>

namespace fastgen::cuda {
namespace {

constexpr size_t kPieceBytes = size_t{64} << 20;

}  // namespace

CacheLayout MakeCacheLayout(DType dtype, int32_t layers, int32_t heads, int32_t head_size) {
  const auto unit = static_cast<int32_t>(kAlign / static_cast<int32_t>(SizeOf(dtype)));
  CacheLayout layout;
  layout.dtype = dtype;
  layout.num_layers = layers;
  layout.num_heads = heads;
  layout.head_size = head_size;
  layout.head_stride = (head_size + unit - 1) / unit * unit;
  return layout;
}

PagePool::PagePool(const CacheLayout& layout, cudaStream_t stream)
    : page_bytes_(SizeOf(layout.dtype) * 2 * kPage * static_cast<size_t>(layout.num_layers) *
                  static_cast<size_t>(layout.num_heads) * static_cast<size_t>(layout.head_stride)),
      pages_per_piece_(std::max<size_t>(1, kPieceBytes / page_bytes_)),
      stream_(stream) {}

void PagePool::Take(size_t count, std::vector<char*>* pages) {
  pages->reserve(pages->size() + count);
  if (count > free_.size()) Grow(count - free_.size(), count);
  pages->insert(pages->end(), free_.end() - static_cast<std::ptrdiff_t>(count), free_.end());
  free_.resize(free_.size() - count);
}

void PagePool::Grow(size_t missing, size_t count) {
  // Whole pieces, unless only what is needed still fits.
  const size_t wanted = (missing + pages_per_piece_ - 1) / pages_per_piece_ * pages_per_piece_;
  const std::string what = "the KV cache of " + std::to_string(count * kPage) + " positions";
  const MemorySize memory = FreeMemory();
  const size_t take = wanted * page_bytes_ + kSpareBytes <= memory.bytes ? wanted : missing;
  if (take * page_bytes_ + kSpareBytes > memory.bytes) {
    ThrowMissing(what + ", beside " + std::to_string(kSpareBytes) + " bytes to spare,",
                 take * page_bytes_, memory);
  }
  pieces_.reserve(pieces_.size() + 1);
  free_.reserve(total_ + take);
  DeviceMemory piece(take * page_bytes_, what);
  // The padding behind a head's elements is read, so it must be zero.
  // In another stream than the steps', so they must not begin before it ends.
  Check(cudaMemset(piece.as<>(), 0, piece.size()), "clearing device memory");
  Check(cudaStreamSynchronize(nullptr), "clearing device memory");
  for (size_t i = take; i-- > 0;) free_.push_back(piece.as<>() + i * page_bytes_);
  pieces_.push_back({std::move(piece), take});
  total_ += take;
}

void PagePool::GiveBack(std::vector<char*>* pages) noexcept {
  free_.insert(free_.end(), pages->begin(), pages->end());
  pages->clear();
}

bool PagePool::Release() {
  if (free_.empty()) return false;
  Check(cudaStreamSynchronize(stream_), "a decode step");
  bool any = false;
  for (size_t i = pieces_.size(); i-- > 0;) {
    const char* const begin = pieces_[i].memory.as<>();
    const char* const end = begin + pieces_[i].memory.size();
    const auto is_inside = [begin, end](const char* page) { return begin <= page && page < end; };
    const auto count = std::count_if(free_.begin(), free_.end(), is_inside);
    if (static_cast<size_t>(count) < pieces_[i].pages) continue;
    free_.erase(std::remove_if(free_.begin(), free_.end(), is_inside), free_.end());
    total_ -= pieces_[i].pages;
    pieces_.erase(pieces_.begin() + static_cast<std::ptrdiff_t>(i));
    any = true;
  }
  return any;
}

}  // namespace fastgen::cuda
