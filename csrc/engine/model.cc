#include "engine/model.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>

#include "base/error.h"
#include "engine/request.h"
#include "engine/weights.h"
#include "io/export.h"
#include "io/safetensors.h"

namespace fastgen::engine {
namespace {

bool Exists(const std::string& path) {
  struct stat status;
  // Anything but "there is no such file" (a symlink loop, no permission) is for the opening to say.
  return stat(path.c_str(), &status) == 0 || errno != ENOENT;
}

void CheckDirectory(const std::string& directory) {
  struct stat status;
  if (stat(directory.c_str(), &status) != 0) {
    throw base::Error(FASTGEN_NOT_FOUND, "model directory '" + directory + "' does not exist");
  }
  if (!S_ISDIR(status.st_mode)) {
    throw base::Error(FASTGEN_NOT_FOUND, "'" + directory +
                                             "' is not a directory; a model is a directory with "
                                             "config.json and model.safetensors, or an export");
  }
}

// Files of other programs, for which there is a word of advice.
void CheckLayout(const std::string& directory) {
  if (Exists(directory + "/model_state.pdparams") && !Exists(directory + "/model.safetensors") &&
      !Exists(directory + "/model.safetensors.index.json")) {
    throw base::Error(FASTGEN_NOT_FOUND, "model directory '" + directory +
                                             "' has model_state.pdparams and no model.safetensors; "
                                             "`fastgen convert` makes one of the other");
  }
  if (Exists(directory + "/" + io::kParametersName) && !Exists(directory + "/config.json")) {
    throw base::Error(FASTGEN_NOT_FOUND, "model directory '" + directory + "' has " +
                                             io::kParametersName + " and no " + io::kManifestName +
                                             "; `fastgen export` writes both");
  }
}

DeviceOptions WithType(const ModelConfig& config, DeviceOptions options) {
  if (options.weight_dtype.empty()) {
    options.weight_dtype = config.weight_dtype.empty() ? "float32" : config.weight_dtype;
  }
  return options;
}

// Gives a slot back whatever happens.
class OpenSlot {
 public:
  OpenSlot(Device& device, const SequenceSpec& spec) : device_(device), slot_(device.Open(spec)) {}
  ~OpenSlot() { device_.Close(slot_); }
  OpenSlot(const OpenSlot&) = delete;
  OpenSlot& operator=(const OpenSlot&) = delete;
  int32_t index() const { return slot_; }

 private:
  Device& device_;
  const int32_t slot_;
};

}  // namespace

std::shared_ptr<Model> Model::Load(const std::string& directory, const DeviceOptions& options) {
  CheckDirectory(directory);
  if (Exists(directory + "/" + io::kManifestName)) {
    const io::ExportManifest manifest = io::ReadExportManifest(directory);
    const ModelConfig config = ReadExportConfig(manifest.config, manifest.path);
    const std::unique_ptr<io::TensorSource> tensors = io::OpenExport(directory, manifest);
    WeightSource weights(config, *tensors, directory);
    return std::make_shared<Model>(config, MakeDevice(config, weights, WithType(config, options)));
  }
  CheckLayout(directory);
  const ModelConfig config = ReadHuggingFaceConfig(directory + "/config.json");
  const std::unique_ptr<io::TensorSource> tensors = io::OpenCheckpoint(directory);
  WeightSource weights(config, *tensors, directory);
  return std::make_shared<Model>(config, MakeDevice(config, weights, WithType(config, options)));
}

std::shared_ptr<Model> Model::Create(const ModelConfig& config, io::TensorSource& tensors,
                                     const DeviceOptions& options) {
  CheckConfig(config, "config");
  WeightSource weights(config, tensors, "tensors");
  return std::make_shared<Model>(config, MakeDevice(config, weights, WithType(config, options)));
}

void Model::Logits(const int32_t* tokens, size_t length, float* logits) const {
  if (length < 1 || length > static_cast<size_t>(config_.max_positions)) {
    throw base::Error(FASTGEN_INVALID_ARGUMENT,
                      "length is " + std::to_string(length) + ", it must be from 1 to " +
                          std::to_string(config_.max_positions) + " (max_positions)");
  }
  CheckTokens("tokens", tokens, length, config_.vocab_size);
  SequenceSpec spec;
  spec.prompt = tokens;
  spec.prompt_length = static_cast<int32_t>(length);
  spec.sampling.max_length = 1;  // nothing is generated, but every position is fed
  const OpenSlot slot(*device_, spec);
  // In pieces, so that sessions on other threads get their turn.
  constexpr int32_t kPiece = 512;
  for (int32_t begin = 0; begin < spec.prompt_length; begin += kPiece) {
    PrefillChunk chunk;
    chunk.slot = slot.index();
    chunk.begin = begin;
    chunk.count = std::min(kPiece, spec.prompt_length - begin);
    chunk.logits = logits + static_cast<size_t>(begin) * static_cast<size_t>(config_.vocab_size);
    device_->Prefill(&chunk, 1);
  }
}

}  // namespace fastgen::engine
