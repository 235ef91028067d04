// Structures of the C API and what the engine calls them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "api/status.h"
#include "engine/config.h"
#include "engine/device.h"
#include "engine/request.h"
#include "io/tensor.h"

namespace fastgen::api {

// A caller's structure of `struct_size` bytes, which may be older (shorter) or newer (longer) than
// this library's: members that the caller does not have keep the default, members that this library
// does not know are passed over.
template <typename Struct>
Struct ReadStruct(const Struct* from, const char* parameter, void (*init)(Struct*)) {
  Struct result;
  init(&result);
  if (!from) return result;
  const size_t size = from->struct_size;
  if (size <= sizeof(size_t)) {
    Invalid(std::string(parameter) + ".struct_size is " + std::to_string(size) +
            ", fill the structure with its _init function first");
  }
  std::memcpy(static_cast<void*>(&result), from, std::min(size, sizeof(Struct)));
  result.struct_size = sizeof(Struct);
  return result;
}

// The other way: no more than the caller has room for, and struct_size as the caller set it.
template <typename Struct>
void WriteStruct(const Struct& from, const char* parameter, Struct* to) {
  const size_t size = to->struct_size;
  if (size <= sizeof(size_t)) {
    Invalid(std::string(parameter) + ".struct_size is " + std::to_string(size) +
            ", set it to the size of the structure before the call");
  }
  std::memcpy(static_cast<void*>(to), &from, std::min(size, sizeof(Struct)));
  to->struct_size = size;
}

// All of these throw Error(kInvalidArgument) for what the engine does not check itself.
engine::ModelConfig ToConfig(const fastgen_config* config);
fastgen_config FromConfig(const engine::ModelConfig& config);
engine::DeviceOptions ToDeviceOptions(const fastgen_model_options* options);
engine::RequestOptions ToRequestOptions(const fastgen_options* options);
std::vector<io::TensorView> ToTensors(const fastgen_tensor* tensors, size_t count);
// `option` is what `device` is called in a message.
engine::Place ToPlace(const char* device, void* stream, const char* option);
// Bytes of a token of type FASTGEN_INT32 or FASTGEN_INT64.
size_t TokenBytes(const fastgen_dtype& dtype, const char* parameter);

}  // namespace fastgen::api
