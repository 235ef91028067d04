#include "api/convert.h"

#include <cstdint>
#include <utility>

namespace fastgen::api {
namespace {

constexpr int32_t kMaxThreads = 1024;

// Its bytes: a C caller may pass any number, and C++ may not read it as the enumeration.
int32_t Number(const fastgen_dtype& from) {
  static_assert(sizeof from == sizeof(int32_t), "an enumeration of the C interface has 32 bits");
  int32_t number;
  std::memcpy(&number, &from, sizeof number);
  return number;
}

io::DType ToDType(const fastgen_dtype& from, const std::string& where) {
  const int32_t dtype = Number(from);
  switch (dtype) {
    case FASTGEN_FLOAT32: return io::DType::kFloat32;
    case FASTGEN_FLOAT16: return io::DType::kFloat16;
    case FASTGEN_BFLOAT16: return io::DType::kBFloat16;
    default:
      Invalid(where + ".dtype is " + std::to_string(dtype) +
              ", it must be 0 (float32), 1 (float16) or 2 (bfloat16)");
  }
}

void CheckFlag(const char* name, int32_t value) {
  if (value != 0 && value != 1) {
    Invalid(std::string(name) + " is " + std::to_string(value) + ", it must be 0 or 1");
  }
}

}  // namespace

engine::ModelConfig ToConfig(const fastgen_config* config) {
  CheckNotNull(config, "config");
  const fastgen_config from = ReadStruct(config, "config", fastgen_config_init);
  engine::ModelConfig to;
  to.vocab_size = from.vocab_size;
  to.max_positions = from.max_positions;
  to.hidden_size = from.hidden_size;
  to.num_layers = from.num_layers;
  to.num_heads = from.num_heads;
  to.intermediate_size = from.intermediate_size;
  to.layer_norm_eps = from.layer_norm_eps;
  to.bos_token_id = from.bos_token_id;
  to.eos_token_id = from.eos_token_id;
  to.pad_token_id = from.pad_token_id;
  return to;
}

fastgen_config FromConfig(const engine::ModelConfig& config) {
  fastgen_config to;
  fastgen_config_init(&to);
  to.vocab_size = config.vocab_size;
  to.max_positions = config.max_positions;
  to.hidden_size = config.hidden_size;
  to.num_layers = config.num_layers;
  to.num_heads = config.num_heads;
  to.intermediate_size = config.intermediate_size;
  to.layer_norm_eps = config.layer_norm_eps;
  to.bos_token_id = config.bos_token_id;
  to.eos_token_id = config.eos_token_id;
  to.pad_token_id = config.pad_token_id;
  return to;
}

engine::DeviceOptions ToDeviceOptions(const fastgen_model_options* options) {
  const fastgen_model_options from = ReadStruct(options, "options", fastgen_model_options_init);
  if (from.num_threads < 0 || from.num_threads > kMaxThreads) {
    Invalid("num_threads is " + std::to_string(from.num_threads) + ", it must be from 1 to " +
            std::to_string(kMaxThreads) + ", or 0 for the default");
  }
  engine::DeviceOptions to;
  // Which names there are is the device's business; NULL is the default everywhere.
  if (from.device) to.device = from.device;
  if (from.isa) to.isa = from.isa;
  if (from.weight_dtype) to.weight_dtype = from.weight_dtype;
  if (from.cache_dtype) to.cache_dtype = from.cache_dtype;
  to.num_threads = from.num_threads;
  to.tensors = ToPlace(from.tensor_device, from.stream, "tensor_device");
  if (from.progress) {
    to.progress = [function = from.progress, data = from.progress_user_data](
                      uint64_t done, uint64_t total) { function(done, total, data); };
  }
  return to;
}

engine::RequestOptions ToRequestOptions(const fastgen_options* options) {
  const fastgen_options from = ReadStruct(options, "options", fastgen_options_init);
  if (from.decode_strategy != FASTGEN_GREEDY_SEARCH && from.decode_strategy != FASTGEN_SAMPLING) {
    Invalid("decode_strategy is " + std::to_string(from.decode_strategy) +
            ", it must be 0 (greedy search) or 1 (sampling)");
  }
  CheckFlag("has_seed", from.has_seed);
  CheckFlag("keep_logits", from.keep_logits);
  engine::RequestOptions to;
  to.sampling.sample = from.decode_strategy == FASTGEN_SAMPLING;
  to.sampling.max_length = from.max_length;
  to.sampling.min_length = from.min_length;
  to.sampling.top_k = from.top_k;
  to.sampling.top_p = from.top_p;
  to.sampling.temperature = from.temperature;
  to.sampling.repetition_penalty = from.repetition_penalty;
  to.sampling.no_repeat_ngram_size = from.no_repeat_ngram_size;
  to.sampling.eos_token_id = from.eos_token_id;
  to.sampling.forced_bos_token_id = from.forced_bos_token_id;
  to.sampling.forced_eos_token_id = from.forced_eos_token_id;
  to.sampling.seed = from.seed;
  to.sampling.sequence = from.first_sequence;
  to.num_return_sequences = from.num_return_sequences;
  to.has_seed = from.has_seed == 1;
  to.keep_logits = from.keep_logits == 1;
  return to;
}

engine::Place ToPlace(const char* device, void* stream, const char* option) {
  engine::Place place;
  if (device) place.cuda_index = engine::CudaIndex(device, option);
  place.stream = stream;
  return place;
}

size_t TokenBytes(const fastgen_dtype& dtype, const char* parameter) {
  const int32_t number = Number(dtype);
  if (number == FASTGEN_INT32) return sizeof(int32_t);
  if (number == FASTGEN_INT64) return sizeof(int64_t);
  Invalid(std::string(parameter) + ".dtype is " + std::to_string(number) +
          ", it must be 3 (int32) or 4 (int64)");
}

std::vector<io::TensorView> ToTensors(const fastgen_tensor* tensors, size_t count) {
  if (count > 0) CheckNotNull(tensors, "tensors");
  constexpr size_t kMostTensors = size_t{1} << 24;
  if (count > kMostTensors) {
    Invalid("num_tensors is " + std::to_string(count) + ", it must be at most " +
            std::to_string(kMostTensors));
  }
  std::vector<io::TensorView> views;
  views.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const fastgen_tensor& from = tensors[i];
    const std::string where = "tensors[" + std::to_string(i) + "]";
    CheckNotNull(from.name, (where + ".name").c_str());
    constexpr int32_t kMaxDims = sizeof(from.shape) / sizeof(from.shape[0]);
    if (from.num_dims < 1 || from.num_dims > kMaxDims) {
      Invalid(where + ".num_dims is " + std::to_string(from.num_dims) + ", it must be from 1 to " +
              std::to_string(kMaxDims));
    }
    io::TensorView view;
    view.name = from.name;
    view.data = from.data;
    view.dtype = ToDType(from.dtype, where);
    view.shape.assign(from.shape, from.shape + from.num_dims);
    for (const int64_t size : view.shape) {
      if (size < 1) {
        Invalid(where + ".shape of '" + view.name + "' has the size " + std::to_string(size) +
                ", every size must be at least 1");
      }
    }
    int64_t bytes = static_cast<int64_t>(io::DTypeSize(view.dtype));
    for (const int64_t size : view.shape) {
      if (__builtin_mul_overflow(bytes, size, &bytes)) {
        Invalid(where + ".shape of '" + view.name + "' is " + view.ShapeText() +
                ", which has too many elements");
      }
    }
    CheckNotNull(from.data, (where + ".data").c_str());
    views.push_back(std::move(view));
  }
  return views;
}

}  // namespace fastgen::api
