// Weights on their way from where the caller has them to where they are packed.
#pragma once

#include <cstdint>
#include <memory>

#include "cuda/types.h"
#include "engine/device_plugin.h"

namespace fastgen::cuda {

// Puts work on a stream; what it reads must stay until that is done. Throws base::Error.
class Loader {
 public:
  virtual ~Loader() = default;

  // Outputs [first, first + outputs) of `to` are the columns of one role.
  virtual void Columns(int32_t layer, engine::Matrix which, int32_t outputs, const Matrix& to,
                       int32_t first) = 0;
  // The embedding or the head: outputs are rows.
  virtual void Rows(engine::End which, const Matrix& to) = 0;
  // The rest is float32.
  virtual void Positions(int32_t rows, int32_t size, const float* to) = 0;
  virtual void Vector(int32_t layer, engine::Vector which, int32_t size, const float* to) = 0;
  virtual void FinalNorm(const Norm& norm, int32_t size) = 0;
};

// For weights on the host, or on the device, as `options` say; `source` must outlive it.
std::unique_ptr<Loader> MakeLoader(const engine::PluginConfig& config,
                                   const engine::PluginOptions& options,
                                   const engine::PluginWeights& source, cudaStream_t stream);

// Throws if a function of the source failed; its own error is reported in place of this one.
void CheckReader(int status);

}  // namespace fastgen::cuda
