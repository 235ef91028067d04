#include "api/status.h"

namespace fastgen::api {
namespace {

// The text, or a literal when even that found no memory.
struct LastFailure {
  std::string text;
  const char* literal = nullptr;
};

thread_local LastFailure last_failure;

}  // namespace

fastgen_status Fail(fastgen_status status, const char* message) noexcept {
  try {
    last_failure.text = message;
    last_failure.literal = nullptr;
  } catch (...) {
    last_failure.literal = "memory for an error message could not be had";
  }
  return status;
}

const char* LastError() noexcept {
  return last_failure.literal ? last_failure.literal : last_failure.text.c_str();
}

}  // namespace fastgen::api
