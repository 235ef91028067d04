// A limit on the memory that a test may take, touched or not.
#pragma once

#include <sys/resource.h>

#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>

namespace fastgen::tests {

// While it lives, private writable mappings (the heap, Pages, thread stacks) may grow by `bytes` only,
// and what asks for more is refused. Counted by the kernel, so that a sanitizer's shadow, which is
// there already, does no harm.
class MemoryLimit {
 public:
  explicit MemoryLimit(uint64_t bytes) {
    if (getrlimit(RLIMIT_DATA, &before_) != 0) throw std::runtime_error("getrlimit failed");
    rlimit limit = before_;
    limit.rlim_cur = Used() + bytes;
    if (setrlimit(RLIMIT_DATA, &limit) != 0) throw std::runtime_error("setrlimit failed");
  }
  ~MemoryLimit() { setrlimit(RLIMIT_DATA, &before_); }
  MemoryLimit(const MemoryLimit&) = delete;
  MemoryLimit& operator=(const MemoryLimit&) = delete;

 private:
  static uint64_t Used() {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
      if (line.compare(0, 7, "VmData:") == 0) return std::stoull(line.substr(7)) << 10;
    }
    throw std::runtime_error("/proc/self/status has no VmData");
  }

  rlimit before_;
};

}  // namespace fastgen::tests
