// The custom op `fusion_gpt`: GPT generation inside a Paddle program, over the C API of libfastgen.
//
// Inputs
//   Input        [batch, length]  int32 or int64, prompts padded on the right
//   StartLength  [batch]          int32 or int64, length of each prompt
//   TopK         [1] or [batch]   int32 or int64, 0: off
//   TopP         [1] or [batch]   float32, 0 or 1: off
//   Temperature  [1] or [batch]   float32
//   MaxLength    [1] or [batch]   int32 or int64, new tokens
//   Seed         [1] or [batch]   int64 holding the bits of a uint64; one seed is spread over the
//                                 rows by index, a row with a seed of its own counts from 0
//   Weight       list of tensors, named by the attribute weight_names as PaddleNLP does: all on the CPU, or
//                all on one GPU, where the engine then runs and the outputs but OutputSeed are
// Outputs
//   OutputIds    [batch * num_return_sequences, longest]  int64: eos, then pad
//   OutputScores [batch * num_return_sequences, 1]        float32
//   OutputSeed   shape of Seed, [batch] if the seeds were drawn: the seeds used
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "engine_cache.h"
#include "fastgen/fastgen.h"
#include "gpu_stream.h"
#include "paddle/phi/api/ext/op_meta_info.h"
#include "paddle/phi/api/include/api.h"
#include "paddle/phi/api/include/tensor.h"
#include "paddle/phi/core/enforce.h"
#include "python_interpreter.h"

// Paddle's C++ inference package does not have this header.
#if __has_include("paddle/phi/core/dense_tensor.h")
#include "paddle/phi/core/dense_tensor.h"
#define FASTGEN_HAS_DENSE_TENSOR 1
#else
#define FASTGEN_HAS_DENSE_TENSOR 0
#endif

#if !defined(FASTGEN_PADDLE_BUILD)
// Paddle's headers name neither their version nor their commit.
#error "define FASTGEN_PADDLE_BUILD as the string paddle=VERSION;commit=COMMIT;cuda=VERSION"
#endif

#define FASTGEN_STRING(x) #x
#define FASTGEN_EXPAND(x) FASTGEN_STRING(x)

namespace fastgen::paddle {
namespace {

using ::paddle::DataType;
using ::paddle::Tensor;
using Clock = std::chrono::steady_clock;

// Found in the file without loading it, so that a library for another Paddle is never loaded.
__attribute__((used)) const char kBuildInfo[] =
    "fastgen-op-build-info:" FASTGEN_PADDLE_BUILD
    ";cxx11_abi=" FASTGEN_EXPAND(_GLIBCXX_USE_CXX11_ABI) ";compiler=" __VERSION__ ";";

// How often a long call looks for signals.
constexpr std::chrono::milliseconds kSignalInterval(50);

// What the last call of this thread failed with; Paddle wraps what is thrown in text of its own.
struct LastError {
  int status = FASTGEN_OK;
  std::string message;
};
thread_local LastError last_error;

[[noreturn]] void Refuse(const std::string& message) {
  throw StatusError(FASTGEN_INVALID_ARGUMENT, message);
}

// Executors pass on the sentence of Paddle's own exception only.
[[noreturn]] void Raise(const LastError& error) {
  switch (error.status) {
    case FASTGEN_INVALID_ARGUMENT:
      PADDLE_THROW(phi::errors::InvalidArgument("fusion_gpt: %s", error.message));
    case FASTGEN_OUT_OF_MEMORY:
      PADDLE_THROW(phi::errors::ResourceExhausted("fusion_gpt: %s", error.message));
    case FASTGEN_UNSUPPORTED:
      PADDLE_THROW(phi::errors::Unimplemented("fusion_gpt: %s", error.message));
    default: PADDLE_THROW(phi::errors::External("fusion_gpt: %s", error.message));
  }
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::vector<int64_t> ReadIntegers(const Tensor& input, const char* name) {
  const Tensor tensor = input.is_cpu() ? input : input.copy_to(::paddle::CPUPlace(), true);
  const auto count = static_cast<size_t>(tensor.numel());
  if (tensor.dtype() == DataType::INT64) {
    const auto* data = tensor.data<int64_t>();
    return std::vector<int64_t>(data, data + count);
  }
  if (tensor.dtype() == DataType::INT32) {
    const auto* data = tensor.data<int32_t>();
    return std::vector<int64_t>(data, data + count);
  }
  Refuse(std::string(name) + " must be int32 or int64");
}

std::vector<float> ReadFloats(const Tensor& input, const char* name) {
  const Tensor tensor = input.is_cpu() ? input : input.copy_to(::paddle::CPUPlace(), true);
  if (tensor.dtype() != DataType::FLOAT32) Refuse(std::string(name) + " must be float32");
  const auto* data = tensor.data<float>();
  return std::vector<float>(data, data + static_cast<size_t>(tensor.numel()));
}

// A value for every row: one for all, or one for each.
template <typename T>
std::vector<T> PerRow(std::vector<T> values, size_t batch, const char* name) {
  if (values.size() == 1) values.resize(batch, values[0]);
  if (values.size() != batch) {
    Refuse(std::string(name) + " has " + std::to_string(values.size()) +
           " values: it must be one value or one for each of the " + std::to_string(batch) +
           " rows");
  }
  return values;
}

int32_t ToInt32(int64_t value, const char* name) {
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max()) {
    Refuse(std::string(name) + " is " + std::to_string(value) + ": it must fit in 32 bits");
  }
  return static_cast<int32_t>(value);
}

#if FASTGEN_HAS_DENSE_TENSOR
// The memory of a tensor. Paddle 2.6 installs no header with an accessor for it.
struct DenseTensorMemory : phi::DenseTensor {
  static const std::shared_ptr<phi::Allocation>& Of(const phi::DenseTensor& tensor) {
    return tensor.*(&DenseTensorMemory::holder_);
  }
};

std::weak_ptr<void> MemoryOf(const Tensor& tensor) {
  return DenseTensorMemory::Of(*static_cast<const phi::DenseTensor*>(tensor.impl().get()));
}
#else
// Nobody tells when the memory goes: see EngineCache::Get() about such weights.
std::weak_ptr<void> MemoryOf(const Tensor&) { return UnknownMemory(); }
#endif

// As the C API calls it.
std::string DeviceOf(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return "cuda:" + std::to_string(static_cast<int>(tensor.place().GetDeviceId()));
}

Weight DescribeWeight(const Tensor& tensor, const std::string& name) {
  if (!tensor.initialized() || !tensor.is_dense_tensor()) {
    Refuse("weight " + name + " is not an initialized dense tensor");
  }
  if (!tensor.is_cpu() && !tensor.is_gpu()) {
    Refuse("weight " + name + " is neither on the CPU nor on a GPU, where it must be");
  }
  Weight weight;
  weight.name = name;
  weight.shape = tensor.shape();
  weight.data = tensor.data();
  switch (tensor.dtype()) {
    case DataType::FLOAT32: weight.dtype = FASTGEN_FLOAT32; break;
    case DataType::FLOAT16: weight.dtype = FASTGEN_FLOAT16; break;
    case DataType::BFLOAT16: weight.dtype = FASTGEN_BFLOAT16; break;
    default:
      Refuse("weight " + name + " has type " + phi::DataTypeToString(tensor.dtype()) +
             ": it must be float32, float16 or bfloat16");
  }
  weight.memory = MemoryOf(tensor);
  weight.version = const_cast<Tensor&>(tensor).current_inplace_version();
  return weight;
}

std::vector<Weight> DescribeWeights(const std::vector<Tensor>& tensors,
                                    const std::vector<std::string>& names) {
  if (tensors.size() != names.size()) {
    Refuse("weight_names has " + std::to_string(names.size()) + " names for " +
           std::to_string(tensors.size()) + " weights");
  }
  std::vector<Weight> weights;
  weights.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    weights.push_back(DescribeWeight(tensors[i], names[i]));
    if (tensors[i].place() != tensors[0].place()) {
      Refuse("weight " + names[i] + " is on " + DeviceOf(tensors[i]) + " and weight " + names[0] +
             " on " + DeviceOf(tensors[0]) + ": all weights must be in one place");
    }
  }
  return weights;
}

// The type that most of the weights have, by their elements: norms are often left in float32.
std::string CommonType(const std::vector<Weight>& weights) {
  constexpr const char* kNames[] = {"float32", "float16", "bfloat16"};
  int64_t elements[] = {0, 0, 0};
  for (const Weight& weight : weights) {
    int64_t count = 1;
    for (const int64_t size : weight.shape) count *= size;
    elements[weight.dtype] += count;
  }
  return kNames[std::max_element(elements, elements + 3) - elements];
}

Placement PlacementOf(const std::vector<Tensor>& tensors, const std::vector<Weight>& weights,
                      const std::string& weight_dtype, const std::string& cache_dtype) {
  Placement placement;
  if (cache_dtype != "auto") placement.cache_dtype = cache_dtype;
  placement.weight_dtype = weight_dtype;
  const bool automatic = weight_dtype == "auto";
  if (tensors.empty() || tensors[0].is_cpu()) {
    if (automatic) placement.weight_dtype = "float32";
    return placement;
  }
  placement.device = DeviceOf(tensors[0]);
  placement.stream = CurrentStream(tensors[0].place());
  if (automatic) placement.weight_dtype = CommonType(weights);
  return placement;
}

// Everything of a call but the weights.
struct Request {
  Tensor input;  // [batch, width], on the CPU or where the weights are
  std::vector<int64_t> lengths;
  int32_t num_return_sequences = 1;
  int32_t pad_token_id = -1;
  bool seed_per_row = false;
  std::vector<fastgen_options> options;  // [batch]

  size_t batch() const { return lengths.size(); }
};

fastgen_dtype TokenType(const Tensor& tensor) {
  return tensor.dtype() == DataType::INT64 ? FASTGEN_INT64 : FASTGEN_INT32;
}

void ReadPrompts(const Tensor& input, const Tensor& start_length, const Placement& placement,
                 Request* request) {
  const std::vector<int64_t> shape = input.shape();
  if (shape.size() != 2 || shape[0] < 1 || shape[1] < 1) {
    Refuse("input_ids has shape " + ShapeText(shape) +
           ": it must be [batch, length] with at least one row and one token");
  }
  if (input.dtype() != DataType::INT64 && input.dtype() != DataType::INT32) {
    Refuse("input_ids must be int32 or int64");
  }
  const auto batch = static_cast<size_t>(shape[0]);
  const int64_t length = shape[1];
  request->lengths = PerRow(ReadIntegers(start_length, "seq_len"), batch, "seq_len");
  for (size_t row = 0; row < batch; ++row) {
    if (request->lengths[row] < 1 || request->lengths[row] > length) {
      Refuse("seq_len[" + std::to_string(row) + "] is " + std::to_string(request->lengths[row]) +
             ": it must be between 1 and " + std::to_string(length) + ", the width of input_ids");
    }
  }
  // What the engine does not reach: on another GPU, or on any for an engine on the CPU.
  const bool reached = input.is_cpu() || (input.is_gpu() && DeviceOf(input) == placement.device);
  request->input = reached ? input : input.copy_to(::paddle::CPUPlace(), true);
}

struct SessionDeleter {
  void operator()(fastgen_session* session) const { fastgen_session_free(session); }
};

// Steps until every sequence has ended, more of them at a time as long as they are short.
void RunToEnd(fastgen_session* session, WithoutInterpreter* interpreter) {
  int32_t steps = 1;
  Clock::time_point checked = Clock::now();
  for (size_t unfinished = 1; unfinished > 0;) {
    const Clock::time_point begin = Clock::now();
    CheckStatus(fastgen_session_step(session, steps, &unfinished));
    const Clock::time_point end = Clock::now();
    steps = end - begin < kSignalInterval / 8 ? std::min(2 * steps, 64) : std::max(steps / 2, 1);
    if (end - checked >= kSignalInterval) {
      interpreter->CheckSignals();
      checked = Clock::now();
    }
  }
}

struct Generated {
  std::unique_ptr<fastgen_session, SessionDeleter> session;
  std::vector<uint64_t> ids;
};

Generated Generate(fastgen_model* model, const Request& request, const Placement& placement,
                   WithoutInterpreter* interpreter) {
  Generated generated;
  fastgen_session* created = nullptr;
  CheckStatus(fastgen_session_create(model, nullptr, &created));
  generated.session.reset(created);
  std::vector<const fastgen_options*> options;
  for (const fastgen_options& row : request.options) options.push_back(&row);
  const std::string device = DeviceOf(request.input);
  fastgen_batch batch;
  fastgen_batch_init(&batch);
  batch.tokens = request.input.data();
  batch.dtype = TokenType(request.input);
  batch.rows = request.batch();
  batch.width = static_cast<size_t>(request.input.shape()[1]);
  batch.lengths = request.lengths.data();
  batch.options = options.data();
  batch.device = device.c_str();
  batch.stream = placement.stream;
  std::vector<uint64_t> first(request.batch());
  CheckStatus(fastgen_session_submit_batch(created, &batch, first.data()));
  for (const uint64_t id : first) {
    for (int32_t i = 0; i < request.num_return_sequences; ++i) {
      generated.ids.push_back(id + static_cast<uint64_t>(i));
    }
  }
  interpreter->CheckSignals();
  RunToEnd(created, interpreter);
  return generated;
}

std::vector<Tensor> MakeOutputs(const Request& request, const Generated& generated,
                                const ::paddle::Place& place, const Placement& placement) {
  size_t longest = 0;
  size_t shortest = std::numeric_limits<size_t>::max();
  std::vector<uint64_t> used_seeds;
  for (const uint64_t id : generated.ids) {
    fastgen_sequence state = {};
    state.struct_size = sizeof(state);
    CheckStatus(fastgen_session_get(generated.session.get(), id, &state));
    longest = std::max(longest, state.length);
    shortest = std::min(shortest, state.length);
    used_seeds.push_back(state.seed);
  }
  if (shortest != longest && request.pad_token_id < 0) {
    Refuse("pad_token_id is none and the rows have " + std::to_string(shortest) + " to " +
           std::to_string(longest) + " tokens: it must name a token to pad them with");
  }
  const auto rows = static_cast<int64_t>(generated.ids.size());
  Tensor ids =
      ::paddle::experimental::empty({rows, static_cast<int64_t>(longest)}, DataType::INT64, place);
  Tensor scores = ::paddle::experimental::empty({rows, 1}, DataType::FLOAT32, place);
  fastgen_batch_output output;
  fastgen_batch_output_init(&output);
  output.tokens = ids.data();
  output.dtype = FASTGEN_INT64;
  output.width = longest;
  output.pad_token_id = request.pad_token_id;
  output.scores = scores.data<float>();
  output.device = placement.device.c_str();
  output.stream = placement.stream;
  CheckStatus(fastgen_session_get_batch(generated.session.get(), generated.ids.data(),
                                        generated.ids.size(), &output));
  const size_t num_seeds = request.seed_per_row ? request.batch() : 1;
  Tensor seeds = ::paddle::experimental::empty({static_cast<int64_t>(num_seeds)}, DataType::INT64,
                                               ::paddle::CPUPlace());
  for (size_t row = 0; row < num_seeds; ++row) {
    seeds.data<int64_t>()[row] =
        static_cast<int64_t>(used_seeds[row * static_cast<size_t>(request.num_return_sequences)]);
  }
  return {ids, scores, seeds};
}

std::vector<Tensor> FusionGpt(
    const Tensor& input, const Tensor& start_length, const Tensor& top_k, const Tensor& top_p,
    const Tensor& temperature, const Tensor& max_length, const Tensor& seed,
    const std::vector<Tensor>& weights, std::vector<std::string> weight_names, int vocab_size,
    int max_positions, int hidden_size, int num_layers, int num_heads, int intermediate_size,
    float layer_norm_eps, std::string decode_strategy, int min_length, float repetition_penalty,
    int no_repeat_ngram_size, int num_return_sequences, int eos_token_id, int pad_token_id,
    int forced_bos_token_id, int forced_eos_token_id, bool draw_seed, std::string weight_check,
    int64_t owner, std::string weight_dtype, std::string cache_dtype) {
  last_error = LastError();
  DropInterrupt();
  try {
    fastgen_options common;
    fastgen_options_init(&common);
    if (decode_strategy == "greedy_search") {
      common.decode_strategy = FASTGEN_GREEDY_SEARCH;
    } else if (decode_strategy == "sampling") {
      common.decode_strategy = FASTGEN_SAMPLING;
    } else {
      Refuse("decode_strategy is \"" + decode_strategy +
             "\": it must be \"greedy_search\" or \"sampling\"");
    }
    if (weight_check != "content" && weight_check != "identity") {
      Refuse("weight_check is \"" + weight_check + "\": it must be \"content\" or \"identity\"");
    }
    common.min_length = min_length;
    common.repetition_penalty = repetition_penalty;
    common.no_repeat_ngram_size = no_repeat_ngram_size;
    common.num_return_sequences = num_return_sequences;
    common.eos_token_id = eos_token_id;
    common.forced_bos_token_id = forced_bos_token_id;
    common.forced_eos_token_id = forced_eos_token_id;
    common.has_seed = draw_seed ? 0 : 1;

    const std::vector<Weight> described = DescribeWeights(weights, weight_names);
    const Placement placement = PlacementOf(weights, described, weight_dtype, cache_dtype);
    Request request;
    ReadPrompts(input, start_length, placement, &request);
    request.num_return_sequences = num_return_sequences;
    request.pad_token_id = pad_token_id;
    const size_t batch = request.batch();
    const auto top_ks = PerRow(ReadIntegers(top_k, "top_k"), batch, "top_k");
    const auto top_ps = PerRow(ReadFloats(top_p, "top_p"), batch, "top_p");
    const auto temperatures = PerRow(ReadFloats(temperature, "temperature"), batch, "temperature");
    const auto max_lengths = PerRow(ReadIntegers(max_length, "max_length"), batch, "max_length");
    const auto given_seeds = ReadIntegers(seed, "seed");
    request.seed_per_row = draw_seed || given_seeds.size() > 1;
    const auto seeds = PerRow(given_seeds, batch, "seed");
    request.options.assign(batch, common);
    for (size_t row = 0; row < batch; ++row) {
      fastgen_options& options = request.options[row];
      options.top_k = ToInt32(top_ks[row], "top_k");
      options.top_p = top_ps[row];
      options.temperature = temperatures[row];
      options.max_length = ToInt32(max_lengths[row], "max_length");
      options.seed = static_cast<uint64_t>(seeds[row]);
      options.first_sequence = request.seed_per_row
                                   ? 0u
                                   : static_cast<uint32_t>(row) *
                                         static_cast<uint32_t>(std::max(num_return_sequences, 0));
    }

    fastgen_config config;
    fastgen_config_init(&config);
    config.vocab_size = vocab_size;
    config.max_positions = max_positions;
    config.hidden_size = hidden_size;
    config.num_layers = num_layers;
    config.num_heads = num_heads;
    config.intermediate_size = intermediate_size;
    config.layer_norm_eps = layer_norm_eps;

    Generated generated;
    {
      WithoutInterpreter interpreter;
      const auto model = EngineCache::Instance().Get(
          config, described, placement,
          weight_check == "content" ? WeightCheck::kContent : WeightCheck::kIdentity, owner);
      generated = Generate(model.get(), request, placement, &interpreter);
    }
    return MakeOutputs(request, generated, weights.at(0).place(), placement);
  } catch (const StatusError& error) {
    last_error.status = error.status();
    last_error.message = error.what();
  } catch (const Interrupted& error) {
    last_error.message = error.what();
  } catch (const std::bad_alloc&) {
    last_error.status = FASTGEN_OUT_OF_MEMORY;
    last_error.message = "memory could not be had for the inputs and outputs of a call";
  }
  Raise(last_error);
}

std::vector<std::vector<int64_t>> InferShape(
    const std::vector<int64_t>&, const std::vector<int64_t>&, const std::vector<int64_t>&,
    const std::vector<int64_t>&, const std::vector<int64_t>&, const std::vector<int64_t>&,
    const std::vector<int64_t>&, const std::vector<std::vector<int64_t>>&) {
  return {{-1, -1}, {-1, 1}, {-1}};
}

std::vector<DataType> InferDtype(DataType, DataType, DataType, DataType, DataType, DataType,
                                 DataType, const std::vector<DataType>&) {
  return {DataType::INT64, DataType::FLOAT32, DataType::INT64};
}

}  // namespace
}  // namespace fastgen::paddle

#define FASTGEN_OP_EXPORT extern "C" __attribute__((visibility("default")))

// What this library was built for: "fastgen-op-build-info:key=value;...;".
FASTGEN_OP_EXPORT const char* fastgen_op_build_info() { return fastgen::paddle::kBuildInfo; }

// fastgen_status of this thread's last call of the op, and its sentence ("" if it succeeded).
FASTGEN_OP_EXPORT int fastgen_op_last_status() { return fastgen::paddle::last_error.status; }
FASTGEN_OP_EXPORT const char* fastgen_op_last_error() {
  return fastgen::paddle::last_error.message.c_str();
}

// With the interpreter's lock held: raises the Python exception that ended the last call.
FASTGEN_OP_EXPORT int fastgen_op_raise_interrupt() { return fastgen::paddle::RaiseInterrupt(); }

// The object that passed `owner` to the op is gone.
FASTGEN_OP_EXPORT void fastgen_op_release(int64_t owner) {
  fastgen::paddle::EngineCache::Instance().Release(owner);
}

// Engines held now, and engines built since the library was loaded.
FASTGEN_OP_EXPORT uint64_t fastgen_op_engine_count() {
  return fastgen::paddle::EngineCache::Instance().Count();
}
FASTGEN_OP_EXPORT uint64_t fastgen_op_engines_built() {
  return fastgen::paddle::EngineCache::Instance().Built();
}

// Where the op's libfastgen is, to see that a process has only one.
FASTGEN_OP_EXPORT const void* fastgen_op_library_address() {
  return reinterpret_cast<const void*>(&fastgen_version);
}

PD_BUILD_OP(fusion_gpt)
    .Inputs({"Input", "StartLength", "TopK", "TopP", "Temperature", "MaxLength", "Seed",
             ::paddle::Vec("Weight")})
    .Outputs({"OutputIds", "OutputScores", "OutputSeed"})
    .Attrs({"weight_names: std::vector<std::string>",
            "vocab_size: int",
            "max_positions: int",
            "hidden_size: int",
            "num_layers: int",
            "num_heads: int",
            "intermediate_size: int",
            "layer_norm_eps: float",
            "decode_strategy: std::string",
            "min_length: int",
            "repetition_penalty: float",
            "no_repeat_ngram_size: int",
            "num_return_sequences: int",
            "eos_token_id: int",
            "pad_token_id: int",
            "forced_bos_token_id: int",
            "forced_eos_token_id: int",
            "draw_seed: bool",
            "weight_check: std::string",
            "owner: int64_t",
            "weight_dtype: std::string",
            "cache_dtype: std::string"})
    .SetKernelFn(PD_KERNEL(fastgen::paddle::FusionGpt))
    .SetInferShapeFn(PD_INFER_SHAPE(fastgen::paddle::InferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(fastgen::paddle::InferDtype));
