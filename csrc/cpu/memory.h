// Large blocks of memory for weights and caches.
#pragma once

#include <cstddef>
#include <string>

namespace fastgen::cpu {

// Zeroed pages straight from the operating system, huge ones where it offers them (a step reads
// every weight once, and small pages would spend it on address translation).
class Pages {
 public:
  Pages() = default;
  // Throws base::Error(FASTGEN_OUT_OF_MEMORY) that names `what` and the size.
  Pages(size_t bytes, const std::string& what);
  ~Pages();
  Pages(Pages&& other) noexcept;
  Pages& operator=(Pages&& other) noexcept;

  char* data() const { return data_; }
  float* floats() const { return reinterpret_cast<float*>(data_); }
  size_t size() const { return size_; }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace fastgen::cpu
