// Over Paddle's C++ inference package: paddle_inference_api.h and libpaddle_inference.so.
#include <dlfcn.h>
#include <paddle_inference_api.h>

#include <stdexcept>
#include <utility>

#include "apps/paddle_program.h"

namespace fastgen::apps {
namespace {

class InferenceProgram : public PaddleProgram {
 public:
  explicit InferenceProgram(std::shared_ptr<paddle_infer::Predictor> predictor)
      : predictor_(std::move(predictor)) {}

  ProgramOutput Run(const std::vector<Feed>& feeds) override {
    ProgramOutput output;
    try {
      for (const Feed& feed : feeds) {
        const auto handle = predictor_->GetInputHandle(feed.name);
        handle->Reshape(std::vector<int>(feed.shape.begin(), feed.shape.end()));
        if (!feed.int64s.empty()) {
          handle->CopyFromCpu(feed.int64s.data());
        } else if (!feed.int32s.empty()) {
          handle->CopyFromCpu(feed.int32s.data());
        } else {
          handle->CopyFromCpu(feed.floats.data());
        }
      }
      if (!predictor_->Run()) throw std::runtime_error("the program did not run");
      const std::vector<std::string> names = predictor_->GetOutputNames();
      if (names.size() != 2) throw std::runtime_error("the program does not have two outputs");
      const auto ids = predictor_->GetOutputHandle(names[0]);
      const auto scores = predictor_->GetOutputHandle(names[1]);
      const std::vector<int> shape = ids->shape();
      if (shape.size() != 2) throw std::runtime_error("the program's first output is no matrix");
      output.rows = shape[0];
      output.columns = shape[1];
      output.ids.resize(static_cast<size_t>(output.rows * output.columns));
      output.scores.resize(static_cast<size_t>(output.rows));
      ids->CopyToCpu(output.ids.data());
      scores->CopyToCpu(output.scores.data());
    } catch (const std::exception& error) {
      throw std::runtime_error(PaddleSentence(error.what()));
    }
    return output;
  }

 private:
  std::shared_ptr<paddle_infer::Predictor> predictor_;
};

}  // namespace

std::unique_ptr<PaddleProgram> PaddleProgram::Load(const std::string& directory,
                                                   const std::string& program,
                                                   const std::string& op_library) {
  // Its static objects put the op into Paddle's list, which a predictor registers when it is made.
  if (dlopen(op_library.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    throw std::runtime_error(std::string("the op library cannot be loaded: ") + dlerror());
  }
  try {
    paddle_infer::Config config(directory + "/" + program, directory + "/gpt.pdiparams");
    config.DisableGpu();
    config.DisableGlogInfo();
    return std::make_unique<InferenceProgram>(paddle_infer::CreatePredictor(config));
  } catch (const std::exception& error) {
    throw std::runtime_error(directory +
                             " cannot be loaded by Paddle: " + PaddleSentence(error.what()));
  }
}

}  // namespace fastgen::apps
