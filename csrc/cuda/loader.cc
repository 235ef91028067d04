#include "cuda/loader.h"

#include <algorithm>

#include "cuda/check.h"
#include "cuda/foreign.h"
#include "cuda/pack.h"
#include "io/tensor.h"

namespace fastgen::cuda {
namespace {

using engine::PluginPart;
using engine::PluginWeights;

constexpr int64_t kStagingFloats = int64_t{4} << 20;

// Two staging buffers: while one is copied and converted the source is read into the other.
class HostLoader : public Loader {
 public:
  HostLoader(const PluginWeights& source, int64_t staging_floats, cudaStream_t stream)
      : source_(source), stream_(stream), staging_floats_(staging_floats) {
    const size_t bytes = static_cast<size_t>(staging_floats) * sizeof(float);
    for (Stage& stage : stages_) {
      stage.host = PinnedMemory(bytes, "taking page-locked memory for loading");
      stage.device = DeviceMemory(bytes, "the staging buffer for loading");
      Check(cudaEventCreateWithFlags(&stage.free, cudaEventDisableTiming), "creating an event");
    }
  }
  ~HostLoader() override { cudaStreamSynchronize(stream_); }
  HostLoader(const HostLoader&) = delete;
  HostLoader& operator=(const HostLoader&) = delete;

  void Columns(int32_t layer, engine::Matrix which, int32_t outputs, const Matrix& to,
               int32_t first) override {
    const auto at_once = static_cast<int32_t>(
        std::max<int64_t>(1, std::min<int64_t>(outputs, staging_floats_ / to.in)));
    for (int32_t begin = 0; begin < outputs; begin += at_once) {
      const int32_t count = std::min(at_once, outputs - begin);
      float* host = Next();
      CheckReader(source_.read_columns(source_.self, layer, static_cast<int32_t>(which), begin,
                                       begin + count, host, count));
      PackSource from;
      from.data = Copy(static_cast<int64_t>(count) * to.in);
      from.column_stride = count;
      from.output_stride = 1;
      Check(PackOutputs(to, first + begin, count, from, stream_), "packing weights");
      Done();
    }
  }

  void Rows(engine::End which, const Matrix& to) override {
    const auto at_once = static_cast<int32_t>(
        std::max<int64_t>(1, std::min<int64_t>(to.out, staging_floats_ / to.in)));
    const auto read =
        which == engine::End::kHead ? source_.read_head_rows : source_.read_embedding_rows;
    for (int32_t begin = 0; begin < to.out; begin += at_once) {
      const int32_t count = std::min(at_once, to.out - begin);
      CheckReader(read(source_.self, begin, begin + count, Next()));
      PackSource from;
      from.data = Copy(static_cast<int64_t>(count) * to.in);
      from.column_stride = 1;
      from.output_stride = to.in;
      Check(PackOutputs(to, begin, count, from, stream_), "packing weights");
      Done();
    }
  }

  void Positions(int32_t rows, int32_t size, const float* to) override {
    const auto at_once =
        static_cast<int32_t>(std::max<int64_t>(1, std::min<int64_t>(rows, staging_floats_ / size)));
    for (int32_t begin = 0; begin < rows; begin += at_once) {
      const int32_t count = std::min(at_once, rows - begin);
      CheckReader(source_.read_position_rows(source_.self, begin, begin + count, Next()));
      CopyTo(to + static_cast<int64_t>(begin) * size, static_cast<int64_t>(count) * size);
    }
  }

  void Vector(int32_t layer, engine::Vector which, int32_t size, const float* to) override {
    CheckReader(source_.read_vector(source_.self, layer, static_cast<int32_t>(which), Next()));
    CopyTo(to, size);
  }

  void FinalNorm(const Norm& norm, int32_t size) override {
    float* host = Next();
    CheckReader(source_.read_final_norm(source_.self, host, host + size));
    const size_t bytes = static_cast<size_t>(size) * sizeof(float);
    Check(cudaMemcpyAsync(const_cast<float*>(norm.weight), host, bytes, cudaMemcpyHostToDevice,
                          stream_),
          "copying weights");
    Check(cudaMemcpyAsync(const_cast<float*>(norm.bias), host + size, bytes, cudaMemcpyHostToDevice,
                          stream_),
          "copying weights");
    Done();
  }

 private:
  struct Stage {
    PinnedMemory host;
    DeviceMemory device;
    cudaEvent_t free = nullptr;

    ~Stage() {
      if (free) cudaEventDestroy(free);
    }
  };

  float* Next() {
    current_ ^= 1;
    Check(cudaEventSynchronize(stages_[current_].free), "waiting for a copy of weights");
    return stages_[current_].host.as<float>();
  }
  const float* Copy(int64_t floats) {
    float* const to = stages_[current_].device.as<float>();
    Check(cudaMemcpyAsync(to, stages_[current_].host.as<float>(),
                          static_cast<size_t>(floats) * sizeof(float), cudaMemcpyHostToDevice,
                          stream_),
          "copying weights");
    return to;
  }
  void CopyTo(const float* to, int64_t floats) {
    Check(cudaMemcpyAsync(const_cast<float*>(to), stages_[current_].host.as<float>(),
                          static_cast<size_t>(floats) * sizeof(float), cudaMemcpyHostToDevice,
                          stream_),
          "copying weights");
    Done();
  }
  void Done() { Check(cudaEventRecord(stages_[current_].free, stream_), "recording an event"); }

  const PluginWeights& source_;
  const cudaStream_t stream_;
  const int64_t staging_floats_;
  Stage stages_[2];
  int current_ = 0;
};

// Packs from where the tensors lie on the device.
class DeviceLoader : public Loader {
 public:
  // The loop of steps has a stream of its own, which sessions of all callers share, so packing is put
  // there too and waits for what is on the caller's.
  DeviceLoader(const PluginWeights& source, cudaStream_t callers, cudaStream_t stream)
      : source_(source), stream_(stream) {
    Event written;
    written.Record(callers);
    written.Hold(stream_);
  }

  void Columns(int32_t layer, engine::Matrix which, int32_t outputs, const Matrix& to,
               int32_t first) override {
    const PluginPart part = Find(source_.find_matrix, layer, static_cast<int32_t>(which));
    Pack(to, first, outputs, AsColumns(part));
  }

  void Rows(engine::End which, const Matrix& to) override { Pack(to, 0, to.out, AsRows(which)); }

  void Positions(int32_t rows, int32_t size, const float* to) override {
    Pack(Floats(to, size, rows), 0, rows, AsRows(engine::End::kPositions));
  }

  void Vector(int32_t layer, engine::Vector which, int32_t size, const float* to) override {
    const PluginPart part = Find(source_.find_vector, layer, static_cast<int32_t>(which));
    Pack(Floats(to, 1, size), 0, size, AsColumns(part));
  }

  void FinalNorm(const Norm& norm, int32_t size) override {
    Pack(Floats(norm.weight, 1, size), 0, size, AsColumns(FindEnd(engine::End::kFinalNormWeight)));
    Pack(Floats(norm.bias, 1, size), 0, size, AsColumns(FindEnd(engine::End::kFinalNormBias)));
  }

 private:
  template <typename Function>
  PluginPart Find(Function find, int32_t layer, int32_t which) const {
    PluginPart part = {};
    CheckReader(find(source_.self, layer, which, &part));
    return part;
  }
  PluginPart FindEnd(engine::End which) const {
    PluginPart part = {};
    CheckReader(source_.find_end(source_.self, static_cast<int32_t>(which), &part));
    return part;
  }

  static PackSource SourceOf(const PluginPart& part) {
    PackSource from;
    switch (static_cast<io::DType>(part.dtype)) {
      case io::DType::kFloat16: from.dtype = DType::kFloat16; break;
      case io::DType::kBFloat16: from.dtype = DType::kBFloat16; break;
      default: from.dtype = DType::kFloat32; break;
    }
    const int64_t element = from.dtype == DType::kFloat32 ? 4 : 2;
    from.data = static_cast<const char*>(part.data) + part.offset * element;
    return from;
  }
  // Outputs are the columns of the part.
  static PackSource AsColumns(const PluginPart& part) {
    PackSource from = SourceOf(part);
    from.column_stride = part.row_size;
    from.output_stride = 1;
    from.group_size = static_cast<int32_t>(part.group_size);
    from.group_stride = part.group_stride;
    return from;
  }
  PackSource AsRows(engine::End which) const {
    const PluginPart part = FindEnd(which);
    PackSource from = SourceOf(part);
    from.column_stride = 1;
    from.output_stride = part.row_size;
    return from;
  }
  // What lies as float32, without padding, in rows of `size`.
  static Matrix Floats(const float* to, int32_t size, int32_t rows) {
    Matrix m;
    m.data = to;
    m.row_bytes = size * static_cast<int64_t>(sizeof(float));
    m.in = size;
    m.out = rows;
    return m;
  }
  void Pack(const Matrix& to, int32_t first, int32_t count, const PackSource& from) const {
    Check(PackOutputs(to, first, count, from, stream_), "packing weights");
  }

  const PluginWeights& source_;
  const cudaStream_t stream_;
};

}  // namespace

std::unique_ptr<Loader> MakeLoader(const engine::PluginConfig& config,
                                   const engine::PluginOptions& options,
                                   const engine::PluginWeights& source, cudaStream_t stream) {
  if (options.weights_on_device) {
    return std::make_unique<DeviceLoader>(source, static_cast<cudaStream_t>(options.stream),
                                          stream);
  }
  const int64_t longest_row =
      std::max(int64_t{2} * config.hidden_size, int64_t{config.intermediate_size});
  return std::make_unique<HostLoader>(source, std::max(kStagingFloats, longest_row), stream);
}

void CheckReader(int status) {
  if (status != FASTGEN_OK) throw base::Error(FASTGEN_INTERNAL, "the weights cannot be read");
}

}  // namespace fastgen::cuda
