// Tensors of a framework in and out: prompts, tokens, scores and checksums, on the host or a device.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "api/convert.h"
#include "api/handles.h"
#include "api/status.h"
#include "engine/device.h"
#include "engine/plugin_device.h"
#include "fastgen/fastgen.h"
#include "io/checksum.h"

using namespace fastgen;  // NOLINT: this file is the outside of that namespace
using api::CheckNotNull;
using api::Guard;
using api::Invalid;

namespace {

// Memory of a device must be that of the model's own: no other is in its reach.
void CheckPlace(const engine::Place& place, const engine::Device& device, const char* parameter) {
  if (place.on_host() || place.cuda_index == device.info().cuda_index) return;
  Invalid(std::string(parameter) + ".device is " + engine::DeviceName(place.cuda_index) +
          " and the model runs on " + engine::DeviceName(device.info().cuda_index) +
          ": it must be that or cpu");
}

void CheckSize(size_t size, const char* what, const char* why) {
  if (size < 1) Invalid(std::string(what) + " is 0, it must be at least 1" + why);
}

// That so many rows of so many tokens are no more than memory can hold.
void CheckArea(size_t rows, const char* rows_name, size_t width, const char* width_name) {
  constexpr size_t kMost = std::numeric_limits<ptrdiff_t>::max() / sizeof(int64_t);
  if (rows <= kMost && (rows == 0 || width <= kMost / rows)) return;
  Invalid(std::string(rows_name) + " is " + std::to_string(rows) + " and " + width_name + " " +
          std::to_string(width) + ": that is more than memory can hold");
}

// The tokens of a batch as they were given, in memory of the host.
class Tokens {
 public:
  Tokens(const fastgen_batch& batch, engine::Device& device)
      : bytes_(api::TokenBytes(batch.dtype, "batch")), data_(batch.tokens) {
    const engine::Place place = api::ToPlace(batch.device, batch.stream, "batch.device");
    CheckPlace(place, device, "batch");
    CheckArea(batch.rows, "batch.rows", batch.width, "batch.width");
    if (place.on_host()) return;
    copy_.resize(batch.rows * batch.width * bytes_);
    device.ReadMemory(batch.tokens, copy_.size(), place.stream, "batch.tokens", copy_.data());
    data_ = copy_.data();
  }

  int64_t operator[](size_t index) const {
    const char* const at = static_cast<const char*>(data_) + index * bytes_;
    if (bytes_ == sizeof(int64_t)) {
      int64_t token;
      std::memcpy(&token, at, sizeof token);
      return token;
    }
    int32_t token;
    std::memcpy(&token, at, sizeof token);
    return token;
  }

 private:
  const size_t bytes_;
  const void* data_;
  std::vector<char> copy_;
};

// The prompt of a row.
std::vector<int32_t> Prompt(const fastgen_batch& batch, const Tokens& tokens, size_t row) {
  const int64_t length = batch.lengths ? batch.lengths[row] : static_cast<int64_t>(batch.width);
  if (length < 1 || static_cast<uint64_t>(length) > batch.width) {
    Invalid("batch.lengths[" + std::to_string(row) + "] is " + std::to_string(length) +
            ", it must be from 1 to " + std::to_string(batch.width) + " (width)");
  }
  std::vector<int32_t> prompt(static_cast<size_t>(length));
  for (size_t i = 0; i < prompt.size(); ++i) {
    const int64_t token = tokens[row * batch.width + i];
    prompt[i] = static_cast<int32_t>(token);
    if (prompt[i] != token) {
      Invalid("prompt[" + std::to_string(i) + "] is " + std::to_string(token) +
              ", token ids must fit in 32 bits");
    }
  }
  return prompt;
}

// Sequences as rows of one tensor, in memory of the host.
struct Rows {
  std::vector<char> tokens;
  std::vector<float> scores;
};

Rows MakeRows(const engine::Session& session, const uint64_t* ids, size_t count,
              const fastgen_batch_output& output) {
  const size_t bytes = api::TokenBytes(output.dtype, "output");
  CheckArea(count, "count", output.tokens ? output.width : 1, "output.width");
  Rows rows;
  if (output.tokens) rows.tokens.resize(count * output.width * bytes);
  char* to = rows.tokens.data();
  const auto write = [&](int64_t token) {
    if (bytes == sizeof token) {
      std::memcpy(to, &token, sizeof token);
    } else {
      const auto narrow = static_cast<int32_t>(token);
      std::memcpy(to, &narrow, sizeof narrow);
    }
    to += bytes;
  };
  for (size_t i = 0; i < count; ++i) {
    const engine::Sequence& sequence = session.Get(ids[i]);
    rows.scores.push_back(sequence.score);
    if (!output.tokens) continue;
    const size_t length = sequence.tokens.size();
    if (length > output.width) {
      Invalid("output.width is " + std::to_string(output.width) + " and sequence " +
              std::to_string(ids[i]) + " has " + std::to_string(length) + " tokens");
    }
    if (length < output.width && output.pad_token_id < 0) {
      Invalid("sequence " + std::to_string(ids[i]) + " has " + std::to_string(length) +
              " tokens and output.width is " + std::to_string(output.width) +
              ": output.pad_token_id must name a token to pad it with");
    }
    for (const int32_t token : sequence.tokens) write(token);
    for (size_t pad = length; pad < output.width; ++pad) write(output.pad_token_id);
  }
  return rows;
}

}  // namespace

void fastgen_batch_init(fastgen_batch* batch) {
  if (!batch) return;
  *batch = fastgen_batch();
  batch->struct_size = sizeof *batch;
  batch->dtype = FASTGEN_INT32;
}

void fastgen_batch_output_init(fastgen_batch_output* output) {
  if (!output) return;
  *output = fastgen_batch_output();
  output->struct_size = sizeof *output;
  output->dtype = FASTGEN_INT32;
  output->pad_token_id = -1;
}

fastgen_status fastgen_session_submit_batch(fastgen_session* session, const fastgen_batch* batch,
                                            uint64_t* first_ids) {
  return Guard([&] {
    CheckNotNull(session, "session");
    CheckNotNull(batch, "batch");
    CheckNotNull(first_ids, "first_ids");
    const fastgen_batch from = api::ReadStruct(batch, "batch", fastgen_batch_init);
    CheckNotNull(from.tokens, "batch.tokens");
    CheckSize(from.rows, "batch.rows", "");
    CheckSize(from.width, "batch.width", "");
    engine::Session& to = session->session;
    const Tokens tokens(from, to.model().device());
    std::vector<uint64_t> ids;  // of all sequences
    std::vector<uint64_t> first(from.rows);
    for (size_t row = 0; row < from.rows; ++row) {
      try {
        const engine::RequestOptions options =
            api::ToRequestOptions(from.options ? from.options[row] : nullptr);
        const std::vector<int32_t> prompt = Prompt(from, tokens, row);
        ids.reserve(ids.size() + static_cast<size_t>(std::max(options.num_return_sequences, 0)));
        first[row] = to.Submit(prompt.data(), prompt.size(), options);
        for (int32_t i = 0; i < options.num_return_sequences; ++i) {
          ids.push_back(first[row] + static_cast<uint64_t>(i));
        }
      } catch (const base::Error& error) {
        for (const uint64_t id : ids) to.Release(id);
        if (from.rows == 1) throw;
        throw base::Error(error.status(),
                          "row " + std::to_string(row) + " of the batch: " + error.what());
      } catch (...) {
        for (const uint64_t id : ids) to.Release(id);
        throw;
      }
    }
    std::copy(first.begin(), first.end(), first_ids);
  });
}

fastgen_status fastgen_session_get_batch(const fastgen_session* session, const uint64_t* ids,
                                         size_t count, const fastgen_batch_output* output) {
  return Guard([&] {
    CheckNotNull(session, "session");
    CheckNotNull(ids, "ids");
    CheckNotNull(output, "output");
    CheckSize(count, "count", "");
    const auto to = api::ReadStruct(output, "output", fastgen_batch_output_init);
    engine::Device& device = session->session.model().device();
    const engine::Place place = api::ToPlace(to.device, to.stream, "output.device");
    CheckPlace(place, device, "output");
    if (to.tokens) CheckSize(to.width, "output.width", " where there are tokens");
    const Rows rows = MakeRows(session->session, ids, count, to);
    const size_t score_bytes = rows.scores.size() * sizeof(float);
    if (place.on_host()) {
      if (to.tokens) std::memcpy(to.tokens, rows.tokens.data(), rows.tokens.size());
      if (to.scores) std::memcpy(to.scores, rows.scores.data(), score_bytes);
      return;
    }
    if (to.tokens) {
      device.WriteMemory(rows.tokens.data(), rows.tokens.size(), place.stream, "output.tokens",
                         to.tokens);
    }
    if (to.scores) {
      device.WriteMemory(rows.scores.data(), score_bytes, place.stream, "output.scores", to.scores);
    }
  });
}

fastgen_status fastgen_checksum(const fastgen_tensor* tensors, size_t num_tensors,
                                const char* device, void* stream, uint64_t* checksum) {
  return Guard([&] {
    CheckNotNull(checksum, "checksum");
    const std::vector<io::TensorView> views = api::ToTensors(tensors, num_tensors);
    const engine::Place place = api::ToPlace(device, stream, "device");
    *checksum = place.on_host() ? io::Checksum(views) : engine::CudaChecksum(views, place);
  });
}
