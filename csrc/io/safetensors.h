// safetensors: an 8-byte little-endian header length, a JSON header, and the tensors' bytes.
#pragma once

#include <memory>
#include <string>

#include "io/tensor.h"

namespace fastgen::io {

// Maps the file and checks its whole header (sizes, offsets, overlaps, types) before a byte of a
// tensor is trusted. Tensors come in the order of their bytes. Throws base::Error: kNotFound, or
// kBadFile with what is wrong.
std::unique_ptr<TensorSource> OpenSafetensors(const std::string& path);

// Opens the checkpoint of a directory: `model.safetensors`, or else all the shards that
// `model.safetensors.index.json` lists, which must lie in that directory. Throws base::Error:
// kNotFound when the directory or both files are not there, or as above.
std::unique_ptr<TensorSource> OpenCheckpoint(const std::string& directory);

}  // namespace fastgen::io
