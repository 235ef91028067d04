// What the fuzz targets share. A target defines Parse(); libFuzzer, or replay.cc, calls the rest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "base/error.h"
#include "engine/config.h"
#include "io/tensor.h"

namespace fastgen::fuzz {

// What became of the last input: empty, or the sentence it was refused with. For replay.cc.
extern std::string refusal;

inline void Require(bool condition) {
  if (!condition) std::abort();
}

// An input is parts with "\n====\n" between them.
std::string NextPart(std::string* rest);

// The files that io/mapped_file.h finds: fuzzing.cc stands in for mapped_file.cc. A file lies in memory
// of its exact size, so that AddressSanitizer sees the first byte read beyond its end.
void SetFile(const std::string& path, const std::string& content);
void RemoveFiles();

// Binds the tensors to the roles of a network and reads every weight, as a device does.
void ReadWeights(const engine::ModelConfig& config, io::TensorSource& source);

// The input was refused: with one sentence, fit to be printed whatever the file holds.
void Refused(const base::Error& error);

}  // namespace fastgen::fuzz
