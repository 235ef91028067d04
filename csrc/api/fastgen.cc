// The C API. Everything is caught here; see fastgen.h for the contracts.
#include "fastgen/fastgen.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "api/convert.h"
#include "api/handles.h"
#include "api/status.h"
#include "cpu/dispatch.h"
#include "engine/config.h"
#include "engine/model.h"
#include "engine/session.h"
#include "io/tensor.h"
#include "text/tokenizer.h"

#if !defined(FASTGEN_VERSION)
#error "the build defines FASTGEN_VERSION"
#endif

using namespace fastgen;  // NOLINT: this file is the outside of that namespace
using api::CheckNotNull;
using api::Guard;
using api::Invalid;

namespace {

constexpr int32_t kDefaultRows = 256;
constexpr int32_t kMaxRows = 4096;

fastgen_model* NewModel(std::shared_ptr<const engine::Model> model) {
  return new fastgen_model{std::move(model)};
}

void CheckFlag(int32_t value, const char* parameter) {
  if (value == 0 || value == 1) return;
  Invalid(std::string(parameter) + " is " + std::to_string(value) + ", it must be 0 or 1");
}

void GivePiece(std::string piece, fastgen_text_stream* stream, const char** text, size_t* size) {
  stream->piece = std::move(piece);
  *text = stream->piece.c_str();
  *size = stream->piece.size();
}

}  // namespace

const char* fastgen_version(void) { return FASTGEN_VERSION; }

const char* fastgen_last_error(void) { return api::LastError(); }

// ---- instruction sets ----------------------------------------------------------------------

size_t fastgen_isa_count(void) { return cpu::AllKernels().size(); }

const char* fastgen_isa_name(size_t index) {
  return index < cpu::AllKernels().size() ? cpu::AllKernels()[index]->name : nullptr;
}

int fastgen_isa_supported(size_t index) {
  return index < cpu::AllKernels().size() && cpu::AllKernels()[index]->supported() ? 1 : 0;
}

// ---- model ---------------------------------------------------------------------------------

void fastgen_config_init(fastgen_config* config) {
  if (!config) return;
  *config = fastgen_config();
  config->struct_size = sizeof *config;
  config->layer_norm_eps = 1e-5f;
  config->bos_token_id = -1;
  config->eos_token_id = -1;
  config->pad_token_id = -1;
}

fastgen_status fastgen_config_parse(const char* json, size_t size, const char* name,
                                    fastgen_config* config) {
  return Guard([&] {
    CheckNotNull(json, "json");
    CheckNotNull(config, "config");
    const std::string where = name ? name : "config";
    api::WriteStruct(api::FromConfig(engine::ParseHuggingFaceConfig(json, size, where)), "config",
                     config);
  });
}

void fastgen_model_options_init(fastgen_model_options* options) {
  if (!options) return;
  *options = fastgen_model_options();
  options->struct_size = sizeof *options;
  options->device = "cpu";
}

fastgen_status fastgen_model_load(const char* directory, const fastgen_model_options* options,
                                  fastgen_model** model) {
  return Guard([&] {
    CheckNotNull(directory, "directory");
    CheckNotNull(model, "model");
    const engine::DeviceOptions device = api::ToDeviceOptions(options);
    if (!device.tensors.on_host()) {
      Invalid("tensor_device is " + engine::DeviceName(device.tensors.cuda_index) +
              ", it must be NULL or cpu for a model that is loaded from files");
    }
    *model = NewModel(engine::Model::Load(directory, device));
  });
}

fastgen_status fastgen_model_create(const fastgen_config* config, const fastgen_tensor* tensors,
                                    size_t num_tensors, const fastgen_model_options* options,
                                    fastgen_model** model) {
  return Guard([&] {
    CheckNotNull(model, "model");
    const engine::ModelConfig network = api::ToConfig(config);
    const engine::DeviceOptions device = api::ToDeviceOptions(options);
    const std::unique_ptr<io::TensorSource> source =
        engine::MakeTensorSource(api::ToTensors(tensors, num_tensors), device);
    *model = NewModel(engine::Model::Create(network, *source, device));
  });
}

fastgen_status fastgen_model_get_config(const fastgen_model* model, fastgen_config* config) {
  return Guard([&] {
    CheckNotNull(model, "model");
    CheckNotNull(config, "config");
    api::WriteStruct(api::FromConfig(model->model->config()), "config", config);
  });
}

fastgen_status fastgen_model_get_info(const fastgen_model* model, fastgen_model_info* info) {
  return Guard([&] {
    CheckNotNull(model, "model");
    CheckNotNull(info, "info");
    const engine::DeviceInfo& device = model->model->device().info();
    fastgen_model_info result = {};
    result.device = device.device.c_str();
    result.isa = device.isa.c_str();
    result.weight_dtype = device.weight_dtype.c_str();
    result.num_threads = device.num_threads;
    result.weight_bytes = device.weight_bytes;
    result.step_bytes = device.step_bytes;
    result.cache_bytes_per_token = device.cache_bytes_per_token;
    result.cache_dtype = device.cache_dtype.c_str();
    api::WriteStruct(result, "info", info);
  });
}

void fastgen_model_free(fastgen_model* model) { delete model; }

fastgen_status fastgen_model_logits(fastgen_model* model, const int32_t* tokens, size_t length,
                                    float* logits) {
  return Guard([&] {
    CheckNotNull(model, "model");
    if (length > 0) CheckNotNull(tokens, "tokens");
    CheckNotNull(logits, "logits");
    model->model->Logits(tokens, length, logits);
  });
}

// ---- generation ----------------------------------------------------------------------------

void fastgen_options_init(fastgen_options* options) {
  if (!options) return;
  *options = fastgen_options();
  options->struct_size = sizeof *options;
  options->decode_strategy = FASTGEN_GREEDY_SEARCH;
  options->max_length = 20;
  options->top_p = 1.0f;
  options->temperature = 1.0f;
  options->repetition_penalty = 1.0f;
  options->num_return_sequences = 1;
  options->eos_token_id = -1;
  options->forced_bos_token_id = -1;
  options->forced_eos_token_id = -1;
}

void fastgen_session_options_init(fastgen_session_options* options) {
  if (!options) return;
  *options = fastgen_session_options();
  options->struct_size = sizeof *options;
}

fastgen_status fastgen_session_create(fastgen_model* model, const fastgen_session_options* options,
                                      fastgen_session** session) {
  return Guard([&] {
    CheckNotNull(model, "model");
    CheckNotNull(session, "session");
    const int32_t max_rows =
        api::ReadStruct(options, "options", fastgen_session_options_init).max_rows;
    if (max_rows < 0 || max_rows > kMaxRows) {
      Invalid("max_rows is " + std::to_string(max_rows) + ", it must be from 1 to " +
              std::to_string(kMaxRows) + ", or 0 for " + std::to_string(kDefaultRows));
    }
    *session = new fastgen_session(model->model, max_rows > 0 ? max_rows : kDefaultRows);
  });
}

void fastgen_session_free(fastgen_session* session) { delete session; }

fastgen_status fastgen_session_submit(fastgen_session* session, const int32_t* prompt,
                                      size_t length, const fastgen_options* options,
                                      uint64_t* first_id) {
  return Guard([&] {
    CheckNotNull(session, "session");
    CheckNotNull(first_id, "first_id");
    if (length > 0) CheckNotNull(prompt, "prompt");
    *first_id = session->session.Submit(prompt, length, api::ToRequestOptions(options));
  });
}

fastgen_status fastgen_session_step(fastgen_session* session, int32_t max_steps,
                                    size_t* unfinished) {
  return Guard([&] {
    CheckNotNull(session, "session");
    if (max_steps < 0) {
      Invalid("max_steps is " + std::to_string(max_steps) + ", it must be at least 0");
    }
    const size_t left = session->session.Step(max_steps);
    if (unfinished) *unfinished = left;
  });
}

fastgen_status fastgen_session_get(const fastgen_session* session, uint64_t id,
                                   fastgen_sequence* sequence) {
  return Guard([&] {
    CheckNotNull(session, "session");
    CheckNotNull(sequence, "sequence");
    const engine::Sequence& from = session->session.Get(id);
    fastgen_sequence result = {};
    result.tokens = from.tokens.data();
    result.length = from.tokens.size();
    result.finish_reason = from.finish_reason;
    result.score = from.score;
    result.seed = from.sampling.seed;
    result.sequence = from.sampling.sequence;
    result.logits = from.keep_logits ? from.logits.data() : nullptr;
    api::WriteStruct(result, "sequence", sequence);
  });
}

fastgen_status fastgen_session_cancel(fastgen_session* session, uint64_t id) {
  return Guard([&] {
    CheckNotNull(session, "session");
    session->session.Cancel(id);
  });
}

fastgen_status fastgen_session_release(fastgen_session* session, uint64_t id) {
  return Guard([&] {
    CheckNotNull(session, "session");
    session->session.Release(id);
  });
}

// ---- text ----------------------------------------------------------------------------------

fastgen_status fastgen_tokenizer_load(const char* directory, fastgen_tokenizer** tokenizer) {
  return Guard([&] {
    CheckNotNull(directory, "directory");
    CheckNotNull(tokenizer, "tokenizer");
    *tokenizer = new fastgen_tokenizer{text::Tokenizer::Load(directory)};
  });
}

void fastgen_tokenizer_free(fastgen_tokenizer* tokenizer) { delete tokenizer; }

size_t fastgen_tokenizer_vocab_size(const fastgen_tokenizer* tokenizer) {
  return tokenizer ? tokenizer->tokenizer->vocabulary().size() : 0;
}

fastgen_status fastgen_tokenizer_token_id(const fastgen_tokenizer* tokenizer, const char* token,
                                          int32_t* id) {
  return Guard([&] {
    CheckNotNull(tokenizer, "tokenizer");
    CheckNotNull(token, "token");
    CheckNotNull(id, "id");
    *id = tokenizer->tokenizer->vocabulary().Find(token);
  });
}

fastgen_status fastgen_tokenizer_encode(const fastgen_tokenizer* tokenizer, const char* text,
                                        size_t size, int32_t* tokens, size_t capacity,
                                        size_t* length) {
  return Guard([&] {
    CheckNotNull(tokenizer, "tokenizer");
    if (size > 0) CheckNotNull(text, "text");
    if (capacity > 0) CheckNotNull(tokens, "tokens");
    CheckNotNull(length, "length");
    const std::vector<int32_t> ids = tokenizer->tokenizer->Encode(text, size);
    std::copy_n(ids.begin(), std::min(capacity, ids.size()), tokens);
    *length = ids.size();
  });
}

fastgen_status fastgen_tokenizer_decode(const fastgen_tokenizer* tokenizer, const int32_t* tokens,
                                        size_t length, int32_t skip_special_tokens, char* text,
                                        size_t capacity, size_t* size) {
  return Guard([&] {
    CheckNotNull(tokenizer, "tokenizer");
    if (length > 0) CheckNotNull(tokens, "tokens");
    CheckFlag(skip_special_tokens, "skip_special_tokens");
    if (capacity > 0) CheckNotNull(text, "text");
    CheckNotNull(size, "size");
    const std::string decoded =
        tokenizer->tokenizer->Decode(tokens, length, skip_special_tokens == 1);
    std::copy_n(decoded.begin(), std::min(capacity, decoded.size()), text);
    *size = decoded.size();
  });
}

fastgen_status fastgen_text_stream_create(const fastgen_tokenizer* tokenizer,
                                          int32_t skip_special_tokens,
                                          fastgen_text_stream** stream) {
  return Guard([&] {
    CheckNotNull(tokenizer, "tokenizer");
    CheckFlag(skip_special_tokens, "skip_special_tokens");
    CheckNotNull(stream, "stream");
    *stream = new fastgen_text_stream{
        text::TextStream(tokenizer->tokenizer, skip_special_tokens == 1), {}};
  });
}

fastgen_status fastgen_text_stream_push(fastgen_text_stream* stream, const int32_t* tokens,
                                        size_t length, const char** text, size_t* size) {
  return Guard([&] {
    CheckNotNull(stream, "stream");
    if (length > 0) CheckNotNull(tokens, "tokens");
    CheckNotNull(text, "text");
    CheckNotNull(size, "size");
    GivePiece(stream->stream.Push(tokens, length), stream, text, size);
  });
}

fastgen_status fastgen_text_stream_flush(fastgen_text_stream* stream, const char** text,
                                         size_t* size) {
  return Guard([&] {
    CheckNotNull(stream, "stream");
    CheckNotNull(text, "text");
    CheckNotNull(size, "size");
    GivePiece(stream->stream.Flush(), stream, text, size);
  });
}

void fastgen_text_stream_free(fastgen_text_stream* stream) { delete stream; }

// ---- measurement ---------------------------------------------------------------------------

fastgen_status fastgen_measure_read_bandwidth(fastgen_model* model, uint64_t bytes, int32_t passes,
                                              double* bytes_per_second) {
  return Guard([&] {
    CheckNotNull(model, "model");
    CheckNotNull(bytes_per_second, "bytes_per_second");
    *bytes_per_second = model->model->device().MeasureReadBandwidth(bytes, passes);
  });
}
