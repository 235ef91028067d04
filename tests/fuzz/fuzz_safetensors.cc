// libFuzzer target: config.json and a checkpoint in safetensors, read as far as a device reads them.
//
// An input is parts with "\n====\n" between them: config.json, then model.safetensors.index.json, empty
// if there is none, and then model.safetensors, or the shards 1.safetensors and 2.safetensors.
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>

#include "engine/config.h"
#include "fuzzing.h"
#include "io/safetensors.h"

namespace {

using namespace fastgen;  // NOLINT: a program, not a header

// A directory with an index, because the reader looks which files there are; what is in them comes
// from memory.
class ShardsDirectory {
 public:
  ShardsDirectory() {
    const char* folder = std::getenv("TMPDIR");
    path_ = std::string(folder == nullptr ? "/tmp" : folder) + "/fastgen-fuzz-XXXXXX";
    fuzz::Require(mkdtemp(&path_[0]) != nullptr);
    fuzz::Require(std::ofstream(index()).good());
  }
  ~ShardsDirectory() {
    unlink(index().c_str());
    rmdir(path_.c_str());
  }

  const std::string& path() const { return path_; }
  std::string index() const { return path_ + "/model.safetensors.index.json"; }

 private:
  std::string path_;
};

std::unique_ptr<io::TensorSource> Open(std::string rest) {
  const std::string index = fuzz::NextPart(&rest);
  if (index.empty()) {
    fuzz::SetFile("model.safetensors", rest);
    return io::OpenSafetensors("model.safetensors");
  }
  static const ShardsDirectory directory;
  fuzz::SetFile(directory.index(), index);
  fuzz::SetFile(directory.path() + "/1.safetensors", fuzz::NextPart(&rest));
  fuzz::SetFile(directory.path() + "/2.safetensors", rest);
  return io::OpenCheckpoint(directory.path());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string rest(reinterpret_cast<const char*>(data), size);
  fuzz::RemoveFiles();
  fuzz::SetFile("config.json", fuzz::NextPart(&rest));
  try {
    // The checkpoint is read even when the configuration is bad: both readers are on trial.
    const std::unique_ptr<io::TensorSource> tensors = Open(rest);
    fuzz::ReadWeights(engine::ReadHuggingFaceConfig("config.json"), *tensors);
    fuzz::refusal.clear();
  } catch (const base::Error& error) {
    fuzz::Refused(error);
  }
  return 0;
}
