#include "cpu/memory.h"

#include <sys/mman.h>

#include <utility>

#include "base/error.h"

namespace fastgen::cpu {

namespace {
constexpr size_t kHugePage = size_t{1} << 21;
}

Pages::Pages(size_t bytes, const std::string& what) {
  if (bytes == 0) return;
  // Mappings that are large beside a huge page are made of whole ones.
  const size_t unit = bytes >= 32 * kHugePage ? kHugePage : size_t{4096};
  const size_t size = (bytes + unit - 1) / unit * unit;
  void* data = size < bytes ? MAP_FAILED
                            : mmap(nullptr, size, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    throw base::Error(FASTGEN_OUT_OF_MEMORY, what + " needs " + std::to_string(bytes) +
                                                 " bytes that the operating system does not give");
  }
  if (size >= kHugePage) madvise(data, size, MADV_HUGEPAGE);
  data_ = static_cast<char*>(data);
  size_ = size;
}

Pages::~Pages() {
  if (data_) munmap(data_, size_);
}

Pages::Pages(Pages&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Pages& Pages::operator=(Pages&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace fastgen::cpu
