// Paddle's combined parameter file, `gpt.pdiparams`: one record after the other, each a small header
// (versions, level of detail, a TensorDesc message) and the tensor's bytes. It holds no names, so
// `fastgen.json` says which tensor lies where.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "io/tensor.h"

namespace fastgen::io {

// A tensor that somebody says is in the file.
struct StoredTensor {
  TensorView view;      // name, type (not kOther) and shape; `data` is filled in by the reader
  uint64_t offset = 0;  // of the tensor's first byte in the file
};

// Maps the file and walks all of its records: every header must be a plain tensor of the type and
// shape, and its data at the offset, that `tensors` gives, and the records must fill the file.
// Tensors come in the order of their bytes. Throws base::Error: kNotFound, or kBadFile with what is
// wrong.
std::unique_ptr<TensorSource> OpenPdiparams(const std::string& path,
                                            std::vector<StoredTensor> tensors);

}  // namespace fastgen::io
