// The one exception of the library; the C API turns it into a status and a sentence.
#pragma once

#include <stdexcept>
#include <string>
#include <system_error>

#include "fastgen/fastgen.h"

namespace fastgen::base {

class Error : public std::runtime_error {
 public:
  Error(fastgen_status status, const std::string& message)
      : std::runtime_error(message), status_(status) {}
  fastgen_status status() const { return status_; }

 private:
  fastgen_status status_;
};

// Text out of a file, fit for a sentence: in quotes, printable ASCII only (other bytes as \xNN),
// cut when that is long. A hostile name can then neither break the message nor flood it.
inline std::string Quote(const std::string& text) {
  constexpr size_t kMaxShown = 120;
  static const char kHex[] = "0123456789abcdef";
  std::string shown;
  size_t read = 0;
  for (; read < text.size() && shown.size() < kMaxShown; ++read) {
    const unsigned char byte = static_cast<unsigned char>(text[read]);
    if (byte < 0x20 || byte >= 0x7f) {
      shown += "\\x";
      shown += kHex[byte >> 4];
      shown += kHex[byte & 15];
    } else {
      shown += text[read];
    }
  }
  return "'" + shown + (read < text.size() ? "...'" : "'");
}

// What the operating system calls `error_number`.
inline std::string ErrnoText(int error_number) {
  return std::generic_category().message(error_number);
}

}  // namespace fastgen::base
