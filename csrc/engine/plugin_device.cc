#include "engine/plugin_device.h"

#include <dlfcn.h>

#include <cstdlib>
#include <exception>
#include <string>
#include <utility>

#include "base/error.h"
#include "engine/device_plugin.h"

namespace fastgen::engine {
namespace {

constexpr char kLibraryName[] = "libfastgen_cuda.so";

// Directory of the file that this code was loaded from, with a slash; "" if that is not known.
std::string OwnDirectory() {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&OwnDirectory), &info) == 0 || !info.dli_fname)
    return "";
  const std::string path = info.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "" : path.substr(0, slash + 1);
}

std::string LoaderError() {
  const char* error = dlerror();
  return error ? error : "no reason given";
}

void* OpenLibrary() {
  const char* named = std::getenv("FASTGEN_CUDA_LIBRARY");
  if (named && *named) {
    void* library = dlopen(named, RTLD_NOW | RTLD_LOCAL);
    if (library) return library;
    throw base::Error(FASTGEN_UNSUPPORTED,
                      "device=cuda: FASTGEN_CUDA_LIBRARY=" + std::string(named) +
                          " cannot be opened: " + LoaderError());
  }
  const std::string beside = OwnDirectory() + kLibraryName;
  if (void* library = dlopen(beside.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
  const std::string first = LoaderError();
  if (void* library = dlopen(kLibraryName, RTLD_NOW | RTLD_LOCAL)) return library;
  throw base::Error(FASTGEN_UNSUPPORTED,
                    std::string("device=cuda needs ") + kLibraryName +
                        " beside libfastgen or where the system's loader looks (the environment "
                        "variable FASTGEN_CUDA_LIBRARY may name it): " +
                        first);
}

// Stays open for the life of the process: CUDA does not like to be unloaded.
const DevicePlugin& CudaPlugin() {
  static const DevicePlugin* const plugin = [] {
    void* const library = OpenLibrary();
    using Entry = const DevicePlugin* (*)();
    const auto entry = reinterpret_cast<Entry>(dlsym(library, kDevicePluginEntry));
    const DevicePlugin* const found = entry ? entry() : nullptr;
    if (!found || found->version != kDevicePluginVersion ||
        found->build_version != std::string(FASTGEN_VERSION)) {
      const std::string version = !found ? "is no library of fastgen"
                                  : !found->build_version
                                      ? "has no version"
                                      : std::string("is of version ") + found->build_version;
      dlclose(library);
      throw base::Error(FASTGEN_UNSUPPORTED, std::string("device=cuda: ") + kLibraryName + " " +
                                                 version + ", libfastgen needs its own, " +
                                                 FASTGEN_VERSION);
    }
    return found;
  }();
  return *plugin;
}

// Hands a WeightSource to C. What it throws waits here until the plug-in has returned.
class Reader {
 public:
  Reader(WeightSource& weights, const Progress& progress)
      : weights_(weights), progress_(progress) {}

  PluginWeights table() {
    PluginWeights t = {};
    t.self = this;
    t.read_columns = [](void* self, int32_t layer, int32_t matrix, int64_t begin, int64_t end,
                        float* out, int64_t ld) {
      return Guard(self, [&](Reader& r) {
        r.weights_.ReadColumns(layer, static_cast<Matrix>(matrix), begin, end, out, ld);
      });
    };
    t.read_vector = [](void* self, int32_t layer, int32_t vector, float* out) {
      return Guard(
          self, [&](Reader& r) { r.weights_.ReadVector(layer, static_cast<Vector>(vector), out); });
    };
    t.read_final_norm = [](void* self, float* weight, float* bias) {
      return Guard(self, [&](Reader& r) { r.weights_.ReadFinalNorm(weight, bias); });
    };
    t.read_embedding_rows = [](void* self, int64_t begin, int64_t end, float* out) {
      return Guard(self, [&](Reader& r) { r.weights_.ReadEmbeddingRows(begin, end, out); });
    };
    t.read_position_rows = [](void* self, int64_t begin, int64_t end, float* out) {
      return Guard(self, [&](Reader& r) { r.weights_.ReadPositionRows(begin, end, out); });
    };
    t.read_head_rows = [](void* self, int64_t begin, int64_t end, float* out) {
      return Guard(self, [&](Reader& r) { r.weights_.ReadHeadRows(begin, end, out); });
    };
    t.find_matrix = [](void* self, int32_t layer, int32_t matrix, PluginPart* part) {
      return Guard(self, [&](Reader& r) {
        *part = PartOf(r.weights_.matrix(layer, static_cast<Matrix>(matrix)));
      });
    };
    t.find_vector = [](void* self, int32_t layer, int32_t vector, PluginPart* part) {
      return Guard(self, [&](Reader& r) {
        *part = PartOf(r.weights_.vector(layer, static_cast<Vector>(vector)));
      });
    };
    t.find_end = [](void* self, int32_t end, PluginPart* part) {
      return Guard(self, [&](Reader& r) { *part = PartOf(r.weights_.end(static_cast<End>(end))); });
    };
    t.release_layer = [](void* self, int32_t layer) {
      return Guard(self, [&](Reader& r) { r.weights_.ReleaseLayer(layer); });
    };
    t.release_ends = [](void* self) {
      return Guard(self, [&](Reader& r) { r.weights_.ReleaseEnds(); });
    };
    t.report_progress = [](void* self, uint64_t done, uint64_t total) {
      return Guard(self, [&](Reader& r) {
        if (r.progress_) r.progress_(done, total);
      });
    };
    return t;
  }
  void Rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  static PluginPart PartOf(const WeightSource::Part& from) {
    const io::TensorView& tensor = *from.tensor;
    PluginPart part = {};
    part.data = tensor.data;
    part.dtype = static_cast<int32_t>(tensor.dtype);
    part.rows = tensor.shape.size() == 1 ? 1 : tensor.shape[0];
    part.row_size = tensor.shape.back();
    part.size = from.size;
    part.offset = from.offset;
    part.group_size = from.group_size;
    part.group_stride = from.group_stride;
    return part;
  }

  template <typename Call>
  static int Guard(void* self, const Call& call) {
    Reader& reader = *static_cast<Reader*>(self);
    try {
      call(reader);
      return FASTGEN_OK;
    } catch (...) {
      reader.failure_ = std::current_exception();
      return FASTGEN_INTERNAL;
    }
  }

  WeightSource& weights_;
  const Progress& progress_;
  std::exception_ptr failure_;
};

void Check(int status, const PluginError& error) {
  if (status != FASTGEN_OK) throw base::Error(static_cast<fastgen_status>(status), error.text);
}

// The cache that the library has with weights of a type: it has no other.
std::string CacheTypeBeside(const std::string& weight_dtype) {
  return weight_dtype == "float32" || weight_dtype == "bfloat16" ? weight_dtype : "float16";
}

class PluginDevice : public Device {
 public:
  PluginDevice(const DevicePlugin& plugin, void* device, const std::string& name,
               int32_t cuda_index)
      : plugin_(plugin), device_(device) {
    PluginInfo info = {};
    plugin_.get_info(device_, &info);
    info_.device = name;
    info_.cuda_index = cuda_index;
    info_.isa = info.architecture;
    info_.weight_dtype = info.weight_dtype;
    info_.cache_dtype = CacheTypeBeside(info_.weight_dtype);
    info_.weight_bytes = info.weight_bytes;
    info_.step_bytes = info.step_bytes;
    info_.cache_bytes_per_token = info.cache_bytes_per_token;
    info_.prefill_tokens = info.prefill_tokens;
    info_.tail_tokens = 1;
  }
  ~PluginDevice() override { plugin_.destroy(device_); }
  PluginDevice(const PluginDevice&) = delete;
  PluginDevice& operator=(const PluginDevice&) = delete;

  const DeviceInfo& info() const override { return info_; }
  int32_t Open(const SequenceSpec& spec) override {
    int32_t slot = -1;
    PluginError error = {};
    Check(plugin_.open(device_, &spec, &slot, &error), error);
    return slot;
  }
  void Close(int32_t slot) override {
    PluginError error = {};
    Check(plugin_.close(device_, slot, &error), error);
  }
  void Prefill(const PrefillChunk* chunks, size_t count) override {
    PluginError error = {};
    Check(plugin_.prefill(device_, chunks, count, &error), error);
  }
  void CopyPrefix(int32_t from, int32_t to, int32_t count) override {
    PluginError error = {};
    Check(plugin_.copy_prefix(device_, from, to, count, &error), error);
  }
  int32_t Decode(const int32_t* slots, size_t count, int32_t max_steps, DecodeResult* results,
                 float* logits) override {
    int32_t steps = 0;
    PluginError error = {};
    Check(plugin_.decode(device_, slots, count, max_steps, results, logits, &steps, &error), error);
    return steps;
  }
  void ReadMemory(const void* from, size_t bytes, void* stream, const char* what,
                  void* to) override {
    const PluginBuffer buffer = {what, from, bytes, 1};
    PluginError error = {};
    Check(plugin_.read_memory(device_, &buffer, stream, to, &error), error);
  }
  void WriteMemory(const void* from, size_t bytes, void* stream, const char* what,
                   void* to) override {
    const PluginBuffer buffer = {what, to, bytes, 1};
    PluginError error = {};
    Check(plugin_.write_memory(device_, from, stream, &buffer, &error), error);
  }
  double MeasureReadBandwidth(uint64_t bytes, int32_t passes) override {
    double bandwidth = 0.0;
    PluginError error = {};
    Check(plugin_.measure_read_bandwidth(device_, bytes, passes, &bandwidth, &error), error);
    return bandwidth;
  }

 private:
  const DevicePlugin& plugin_;
  void* const device_;
  DeviceInfo info_;
};

std::vector<PluginBuffer> BuffersOf(const std::vector<io::TensorView>& tensors) {
  std::vector<PluginBuffer> buffers;
  buffers.reserve(tensors.size());
  for (const io::TensorView& tensor : tensors) {
    buffers.push_back({tensor.name.c_str(), tensor.data, tensor.num_bytes(),
                       static_cast<int32_t>(io::DTypeSize(tensor.dtype))});
  }
  return buffers;
}

class CudaTensorSource : public io::MemoryTensorSource {
 public:
  CudaTensorSource(std::vector<io::TensorView> tensors, const Place& place)
      : MemoryTensorSource(std::move(tensors)), plugin_(CudaPlugin()), place_(place) {
    const std::vector<PluginBuffer> buffers = BuffersOf(this->tensors());
    PluginError error = {};
    Check(plugin_.check_memory(place_.cuda_index, buffers.data(), buffers.size(), &error), error);
  }

  bool Equal(const io::TensorView& a, const io::TensorView& b) override {
    const std::vector<io::TensorView> both = {a, b};
    const std::vector<PluginBuffer> buffers = BuffersOf(both);
    int32_t equal = 0;
    PluginError error = {};
    Check(plugin_.equal(place_.cuda_index, &buffers[0], &buffers[1], place_.stream, &equal, &error),
          error);
    return equal == 1;
  }

 private:
  const DevicePlugin& plugin_;
  const Place place_;
};

}  // namespace

std::unique_ptr<io::TensorSource> MakeCudaTensorSource(std::vector<io::TensorView> tensors,
                                                       const Place& place) {
  return std::make_unique<CudaTensorSource>(std::move(tensors), place);
}

uint64_t CudaChecksum(const std::vector<io::TensorView>& tensors, const Place& place) {
  const std::vector<PluginBuffer> buffers = BuffersOf(tensors);
  uint64_t sum = 0;
  PluginError error = {};
  Check(CudaPlugin().checksum(place.cuda_index, buffers.data(), buffers.size(), place.stream, &sum,
                              &error),
        error);
  return sum;
}

std::unique_ptr<Device> MakeCudaDevice(const ModelConfig& config, WeightSource& weights,
                                       const DeviceOptions& options) {
  PluginOptions plugin_options = {};
  plugin_options.device_index = CudaIndex(options.device, "device");
  plugin_options.weights_on_device = options.tensors.on_host() ? 0 : 1;
  plugin_options.stream = options.tensors.stream;
  if (!options.isa.empty()) {
    throw base::Error(FASTGEN_INVALID_ARGUMENT,
                      "isa=" + options.isa + " is for device=cpu, with device=" + options.device +
                          " it must be left out");
  }
  const std::string cache = CacheTypeBeside(options.weight_dtype);
  if (!options.cache_dtype.empty() && options.cache_dtype != cache) {
    throw base::Error(FASTGEN_UNSUPPORTED, "cache_dtype=" + options.cache_dtype +
                                               " is not one that device=" + options.device +
                                               " has with weight_dtype=" + options.weight_dtype +
                                               ": " + cache);
  }
  plugin_options.weight_dtype = options.weight_dtype.c_str();
  const DevicePlugin& plugin = CudaPlugin();
  PluginConfig plugin_config = {};
  plugin_config.vocab_size = config.vocab_size;
  plugin_config.max_positions = config.max_positions;
  plugin_config.hidden_size = config.hidden_size;
  plugin_config.num_layers = config.num_layers;
  plugin_config.num_heads = config.num_heads;
  plugin_config.intermediate_size = config.intermediate_size;
  plugin_config.layer_norm_eps = config.layer_norm_eps;
  plugin_config.head_is_tied = weights.head_is_tied() ? 1 : 0;
  Reader reader(weights, options.progress);
  const PluginWeights table = reader.table();
  void* device = nullptr;
  PluginError error = {};
  const int status = plugin.create(&plugin_config, &plugin_options, &table, &device, &error);
  reader.Rethrow();
  Check(status, error);
  try {
    return std::make_unique<PluginDevice>(plugin, device, options.device,
                                          plugin_options.device_index);
  } catch (...) {
    plugin.destroy(device);
    throw;
  }
}

}  // namespace fastgen::engine
