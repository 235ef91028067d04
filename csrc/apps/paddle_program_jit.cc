// Over the Paddle wheel: its paddle/jit headers and libpaddle.so, which needs an interpreter.
#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "apps/paddle_program.h"
#include "paddle/fluid/platform/init_phi.h"
#include "paddle/jit/all.h"
#include "paddle/phi/api/include/api.h"
#include "paddle/phi/api/include/tensor.h"

// In libpaddle.so, in no header of the wheel.
namespace phi {
namespace memory_utils {
void InitDevices();
}
}  // namespace phi
namespace paddle {
class OpMetaInfo;
namespace framework {
const std::unordered_map<std::string, std::vector<OpMetaInfo>>& LoadOpMetaInfoAndRegisterOp(
    const std::string& path);
}
}  // namespace paddle

// libpaddle.so is a Python extension.
extern "C" {
void Py_InitializeEx(int install_signal_handlers);
int Py_IsInitialized();
}

namespace fastgen::apps {
namespace {

paddle::Tensor MakeTensor(const std::vector<int64_t>& shape, paddle::DataType type,
                          const void* data, size_t bytes) {
  paddle::Tensor tensor = paddle::experimental::empty(shape, type, phi::CPUPlace());
  std::memcpy(tensor.data(), data, bytes);
  return tensor;
}

paddle::Tensor ToTensor(const Feed& feed) {
  if (!feed.int64s.empty()) {
    return MakeTensor(feed.shape, paddle::DataType::INT64, feed.int64s.data(),
                      feed.int64s.size() * sizeof(int64_t));
  }
  if (!feed.int32s.empty()) {
    return MakeTensor(feed.shape, paddle::DataType::INT32, feed.int32s.data(),
                      feed.int32s.size() * sizeof(int32_t));
  }
  return MakeTensor(feed.shape, paddle::DataType::FLOAT32, feed.floats.data(),
                    feed.floats.size() * sizeof(float));
}

// Paddle's jit loader narrates its passes on standard error and has no switch for it: silent while
// this lives, unless the environment asks for logs (GLOG_v). Failures come as exceptions.
class Quiet {
 public:
  Quiet() {
    if (std::getenv("GLOG_v") != nullptr) return;
    const int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
    if (null < 0) return;
    saved_ = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 0);
    if (saved_ >= 0) dup2(null, STDERR_FILENO);
    close(null);
  }
  ~Quiet() {
    if (saved_ < 0) return;
    dup2(saved_, STDERR_FILENO);
    close(saved_);
  }
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;

 private:
  int saved_ = -1;
};

class JitProgram : public PaddleProgram {
 public:
  explicit JitProgram(paddle::jit::Layer layer) : layer_(std::move(layer)) {}

  ProgramOutput Run(const std::vector<Feed>& feeds) override {
    ProgramOutput output;
    const Quiet quiet;
    try {
      std::vector<paddle::Tensor> tensors;
      for (const Feed& feed : feeds) tensors.push_back(ToTensor(feed));
      const std::vector<paddle::Tensor> results = layer_.forward(tensors);
      if (results.size() != 2 || results[0].shape().size() != 2) {
        throw std::runtime_error("the program does not have the outputs ids and scores");
      }
      output.rows = results[0].shape()[0];
      output.columns = results[0].shape()[1];
      const auto* ids = results[0].data<int64_t>();
      const auto* scores = results[1].data<float>();
      output.ids.assign(ids, ids + results[0].numel());
      output.scores.assign(scores, scores + results[1].numel());
    } catch (const std::exception& error) {
      throw std::runtime_error(PaddleSentence(error.what()));
    }
    return output;
  }

 private:
  paddle::jit::Layer layer_;
};

}  // namespace

std::unique_ptr<PaddleProgram> PaddleProgram::Load(const std::string& directory,
                                                   const std::string& program,
                                                   const std::string& op_library) {
  if (program != "gpt.pdmodel") {
    throw std::runtime_error(directory + "/" + program +
                             " is not of the form that Paddle's C++ jit loader reads: export with "
                             "--program_format pdmodel");
  }
  if (access(op_library.c_str(), R_OK) != 0) {
    throw std::runtime_error("the op library " + op_library + " cannot be read");
  }
  const Quiet quiet;
  if (Py_IsInitialized() == 0) Py_InitializeEx(0);
  try {
    static const paddle::InitPhi init_phi;
    phi::memory_utils::InitDevices();
    paddle::framework::LoadOpMetaInfoAndRegisterOp(op_library);
  } catch (const std::exception& error) {
    throw std::runtime_error("the op library " + op_library +
                             " cannot be loaded: " + PaddleSentence(error.what()));
  }
  try {
    return std::make_unique<JitProgram>(paddle::jit::Load(directory + "/gpt", phi::CPUPlace()));
  } catch (const std::exception& error) {
    throw std::runtime_error(directory +
                             " cannot be loaded by Paddle: " + PaddleSentence(error.what()));
  }
}

}  // namespace fastgen::apps
