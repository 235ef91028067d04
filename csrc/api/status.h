// How the C API turns what goes wrong into a status and a sentence.
#pragma once

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "base/error.h"
#include "fastgen/fastgen.h"

namespace fastgen::api {

// Keeps `message` for fastgen_last_error() of this thread and returns `status`.
fastgen_status Fail(fastgen_status status, const char* message) noexcept;
const char* LastError() noexcept;

// Runs `body`; no exception gets past it.
template <typename Body>
fastgen_status Guard(const Body& body) noexcept {
  try {
    body();
    return FASTGEN_OK;
  } catch (const base::Error& error) {
    return Fail(error.status(), error.what());
  } catch (const std::bad_alloc&) {
    return Fail(FASTGEN_OUT_OF_MEMORY, "memory for the library's own bookkeeping could not be had");
  } catch (const std::length_error&) {
    return Fail(FASTGEN_OUT_OF_MEMORY, "a size is more than memory can hold");
  } catch (const std::exception& error) {
    return Fail(FASTGEN_INTERNAL, error.what());
  } catch (...) {
    return Fail(FASTGEN_INTERNAL, "an exception of an unknown type got to the C interface");
  }
}

[[noreturn]] inline void Invalid(const std::string& message) {
  throw base::Error(FASTGEN_INVALID_ARGUMENT, message);
}

inline void CheckNotNull(const void* pointer, const char* parameter) {
  if (!pointer) Invalid(std::string(parameter) + " is NULL, it must point to something");
}

}  // namespace fastgen::api
