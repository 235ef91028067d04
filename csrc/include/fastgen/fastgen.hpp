/**
 * @file fastgen.hpp
 * @brief C++17 over fastgen.h: ownership, exceptions, vectors. Header-only; link libfastgen.
 *
 *     fastgen::Model model = fastgen::Model::load("gpt2");
 *     fastgen::Tokenizer tokenizer = fastgen::Tokenizer::load("gpt2");
 *     fastgen::Options options;
 *     options.max_length = 32;
 *     options.eos_token_id = model.info().config.eos_token_id;
 *     for (const fastgen::TextResult& result :
 *          model.generate(tokenizer, {"The answer is"}, options)) {
 *       use(result.text);
 *     }
 *
 * What fastgen.h says of options, threads and failures holds here too.
 */
#ifndef FASTGEN_FASTGEN_HPP_
#define FASTGEN_FASTGEN_HPP_

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fastgen/fastgen.h"

namespace fastgen {

/** A call of the library failed; what() names the option, the value and what is allowed. */
class Error : public std::runtime_error {
 public:
  Error(fastgen_status status, const std::string& message)
      : std::runtime_error(message), status_(status) {}
  fastgen_status status() const noexcept { return status_; }

 private:
  fastgen_status status_;
};

namespace detail {

inline void check(fastgen_status status) {
  if (status != FASTGEN_OK) throw Error(status, fastgen_last_error());
}

/* Carries what a progress function throws over the C frames of the library. */
struct Progress {
  const std::function<void(std::uint64_t, std::uint64_t)>& function;
  std::exception_ptr failure;

  static void call(std::uint64_t done, std::uint64_t total, void* data) {
    auto* self = static_cast<Progress*>(data);
    if (self->failure) return;
    try {
      self->function(done, total);
    } catch (...) {
      self->failure = std::current_exception();
    }
  }
};

}  // namespace detail

/** Version of the library, "major.minor.patch". */
inline std::string version() { return fastgen_version(); }

/** Shape of a network; every member starts as in fastgen_config_init(). */
struct Config : fastgen_config {
  Config() { fastgen_config_init(this); }
};

/** Options of one request; every member starts as in fastgen_options_init(). */
struct Options : fastgen_options {
  Options() { fastgen_options_init(this); }
};

/** How a model is loaded. Empty strings and 0 are the defaults. */
struct ModelOptions {
  std::string device;
  std::string isa;
  std::string weight_dtype;
  std::int32_t num_threads = 0;
  /** Called with bytes packed and bytes in total. Loading goes on if it throws; the exception comes
   *  out of load() or create() afterwards. */
  std::function<void(std::uint64_t done, std::uint64_t total)> progress;
};

/** One sequence, as far as it has come. */
struct Result {
  std::vector<std::int32_t> tokens; /**< new tokens only */
  fastgen_finish_reason finish_reason = FASTGEN_RUNNING;
  float score = 0.0f;         /**< fastgen_sequence::score */
  std::uint64_t seed = 0;     /**< the seed used, drawn or given */
  std::uint32_t sequence = 0; /**< the sequence index used */
  std::vector<float> logits;  /**< [tokens, vocab_size] if keep_logits was set */
};

/** A sequence as text. */
struct TextResult : Result {
  std::vector<std::int32_t> prompt; /**< the prompt's tokens */
  std::string text;                 /**< of the new tokens, without eos and special tokens; UTF-8 */
};

/** Byte-level BPE of a model directory. Any number of threads may use one; movable, not copyable. */
class Tokenizer {
 public:
  /** Loads the tokenizer of a model directory, see fastgen_tokenizer_load(). */
  static Tokenizer load(const std::string& directory) {
    fastgen_tokenizer* handle = nullptr;
    detail::check(fastgen_tokenizer_load(directory.c_str(), &handle));
    return Tokenizer(handle);
  }

  /** Token ids of a text, see fastgen_tokenizer_encode(). */
  std::vector<std::int32_t> encode(const std::string& text) const {
    std::vector<std::int32_t> tokens(text.size());
    std::size_t length = 0;
    detail::check(fastgen_tokenizer_encode(handle_.get(), text.data(), text.size(), tokens.data(),
                                           tokens.size(), &length));
    tokens.resize(length);
    return tokens;
  }

  /** Text of token ids, valid UTF-8, see fastgen_tokenizer_decode(). */
  std::string decode(const std::vector<std::int32_t>& tokens,
                     bool skip_special_tokens = true) const {
    std::string text(8 * tokens.size(), '\0');  // enough for most; if not, once more
    while (true) {
      const std::size_t capacity = text.size();
      std::size_t size = 0;
      detail::check(fastgen_tokenizer_decode(handle_.get(), tokens.data(), tokens.size(),
                                             skip_special_tokens ? 1 : 0, &text[0], capacity,
                                             &size));
      text.resize(size);
      if (size <= capacity) return text;
    }
  }

  /** Id of one token as the vocabulary writes it, e.g. "<|endoftext|>"; -1: it has no such token. */
  std::int32_t token_id(const std::string& token) const {
    std::int32_t id = -1;
    detail::check(fastgen_tokenizer_token_id(handle_.get(), token.c_str(), &id));
    return id;
  }

  /** Number of tokens, special ones included. */
  std::size_t vocab_size() const { return fastgen_tokenizer_vocab_size(handle_.get()); }

  fastgen_tokenizer* handle() const noexcept { return handle_.get(); }

 private:
  struct Free {
    void operator()(fastgen_tokenizer* tokenizer) const { fastgen_tokenizer_free(tokenizer); }
  };
  explicit Tokenizer(fastgen_tokenizer* handle) : handle_(handle) {}
  std::unique_ptr<fastgen_tokenizer, Free> handle_;
};

/** Decodes tokens as they come, never half a character. One thread at a time; it keeps its
 *  tokenizer alive; movable, not copyable. */
class TextStream {
 public:
  explicit TextStream(const Tokenizer& tokenizer, bool skip_special_tokens = true) {
    fastgen_text_stream* handle = nullptr;
    detail::check(
        fastgen_text_stream_create(tokenizer.handle(), skip_special_tokens ? 1 : 0, &handle));
    handle_.reset(handle);
  }

  /** Adds `length` tokens; returns the text that is now certain, often none. */
  std::string push(const std::int32_t* tokens, std::size_t length) {
    const char* text = nullptr;
    std::size_t size = 0;
    detail::check(fastgen_text_stream_push(handle_.get(), tokens, length, &text, &size));
    return std::string(text, size);
  }
  std::string push(std::int32_t token) { return push(&token, 1); }

  /** The rest, at the end of a sequence. The stream may then begin another one. */
  std::string flush() {
    const char* text = nullptr;
    std::size_t size = 0;
    detail::check(fastgen_text_stream_flush(handle_.get(), &text, &size));
    return std::string(text, size);
  }

 private:
  struct Free {
    void operator()(fastgen_text_stream* stream) const { fastgen_text_stream_free(stream); }
  };
  std::unique_ptr<fastgen_text_stream, Free> handle_;
};

class Model;

/** Requests that run together on one model. One thread at a time; movable, not copyable. */
class Session {
 public:
  /** @param max_rows sequences decoded together; 0 is the default */
  explicit Session(const Model& model, std::int32_t max_rows = 0);

  /** Adds a request. Its sequences have the ids returned, +1, ... (num_return_sequences of them). */
  std::uint64_t submit(const std::vector<std::int32_t>& prompt, const Options& options = {}) {
    std::uint64_t first_id = 0;
    detail::check(
        fastgen_session_submit(handle_.get(), prompt.data(), prompt.size(), &options, &first_id));
    return first_id;
  }

  /** Runs up to `max_steps` steps; returns how many sequences still run or wait. */
  std::size_t step(std::int32_t max_steps = 1) {
    std::size_t unfinished = 0;
    detail::check(fastgen_session_step(handle_.get(), max_steps, &unfinished));
    return unfinished;
  }

  /** State of a sequence without a copy: pointers live until the next step or release. */
  fastgen_sequence view(std::uint64_t id) const {
    fastgen_sequence sequence = {};
    sequence.struct_size = sizeof sequence;
    detail::check(fastgen_session_get(handle_.get(), id, &sequence));
    return sequence;
  }

  /** State of a sequence. */
  Result get(std::uint64_t id) const {
    const fastgen_sequence from = view(id);
    Result result;
    result.tokens.assign(from.tokens, from.tokens + from.length);
    result.finish_reason = static_cast<fastgen_finish_reason>(from.finish_reason);
    result.score = from.score;
    result.seed = from.seed;
    result.sequence = from.sequence;
    if (from.logits) result.logits.assign(from.logits, from.logits + from.length * vocab_size_);
    return result;
  }

  /** Ends a sequence where it is; its tokens stay readable. */
  void cancel(std::uint64_t id) { detail::check(fastgen_session_cancel(handle_.get(), id)); }

  /** Forgets a sequence, ending it first if it runs. */
  void release(std::uint64_t id) { detail::check(fastgen_session_release(handle_.get(), id)); }

  fastgen_session* handle() const noexcept { return handle_.get(); }

 private:
  struct Free {
    void operator()(fastgen_session* session) const { fastgen_session_free(session); }
  };
  std::unique_ptr<fastgen_session, Free> handle_;
  std::size_t vocab_size_ = 0;
};

/** A network with its weights. Any number of threads may use one; movable, not copyable. */
class Model {
 public:
  /** A token of a running generation. Return false to end that sequence there.
   *  @param index of the sequence among the results of generate() */
  using OnToken = std::function<bool(std::size_t index, std::int32_t token)>;

  /** A piece of text of a running generation. Return false to end that sequence there. */
  using OnText = std::function<bool(std::size_t index, const std::string& piece)>;

  /** Loads a model directory, see fastgen_model_load(). */
  static Model load(const std::string& directory, const ModelOptions& options = {}) {
    return make(options, [&](const fastgen_model_options* c_options, fastgen_model** model) {
      return fastgen_model_load(directory.c_str(), c_options, model);
    });
  }

  /** Makes a model of tensors in memory, see fastgen_model_create(). */
  static Model create(const Config& config, const std::vector<fastgen_tensor>& tensors,
                      const ModelOptions& options = {}) {
    return make(options, [&](const fastgen_model_options* c_options, fastgen_model** model) {
      return fastgen_model_create(&config, tensors.data(), tensors.size(), c_options, model);
    });
  }

  /** What the model is and costs; strings live as long as the model. */
  fastgen_model_info info() const {
    fastgen_model_info info = {};
    info.struct_size = sizeof info;
    detail::check(fastgen_model_get_info(handle_.get(), &info));
    return info;
  }

  /** Logits after every token, [tokens.size(), vocab_size]. */
  std::vector<float> logits(const std::vector<std::int32_t>& tokens) const {
    const fastgen_config config = info().config;
    // The library refuses other lengths: no memory for those.
    const bool fits =
        !tokens.empty() && tokens.size() <= static_cast<std::size_t>(config.max_positions);
    const std::size_t rows = fits ? tokens.size() : 1;
    std::vector<float> result(rows * static_cast<std::size_t>(config.vocab_size));
    detail::check(fastgen_model_logits(handle_.get(), tokens.data(), tokens.size(), result.data()));
    return result;
  }

  /**
   * Generates for several prompts together and waits for all of them.
   * @return num_return_sequences results per prompt, in the order of the prompts. With one seed for
   *         all, the rows draw apart: result i has sequence index first_sequence + i.
   * @param on_token called after every step for each new token; may be empty
   * @param max_rows sequences decoded together, more wait; 0 is the default
   */
  std::vector<Result> generate(const std::vector<std::vector<std::int32_t>>& prompts,
                               const Options& options = {}, const OnToken& on_token = {},
                               std::int32_t max_rows = 0) const {
    if (prompts.empty()) {
      throw Error(FASTGEN_INVALID_ARGUMENT, "prompts is empty, it must have at least one prompt");
    }
    Session session(*this, max_rows);
    std::vector<std::uint64_t> ids;
    Options request = options;
    for (const std::vector<std::int32_t>& prompt : prompts) {
      request.first_sequence = options.first_sequence + static_cast<std::uint32_t>(ids.size());
      const std::uint64_t first = session.submit(prompt, request);
      for (std::int32_t i = 0; i < options.num_return_sequences; ++i) {
        ids.push_back(first + static_cast<std::uint64_t>(i));
      }
    }
    // Without a listener nobody needs to hear of every token.
    const std::int32_t steps = on_token ? 1 : 64;
    std::vector<std::size_t> heard(ids.size(), 0);
    for (std::size_t unfinished = ids.size(); unfinished > 0;) {
      unfinished = session.step(steps);
      if (!on_token) continue;
      for (std::size_t i = 0; i < ids.size(); ++i) {
        const fastgen_sequence now = session.view(ids[i]);
        for (; heard[i] < now.length; ++heard[i]) {
          if (on_token(i, now.tokens[heard[i]])) continue;
          session.cancel(ids[i]);
          heard[i] = now.length;
          break;
        }
      }
    }
    std::vector<Result> results;
    results.reserve(ids.size());
    for (const std::uint64_t id : ids) {
      results.push_back(session.get(id));
      session.release(id);
    }
    return results;
  }

  /**
   * Text in, text out, else as above. Set options.eos_token_id to info().config.eos_token_id to let
   * the model end its texts.
   * @param on_text called after every step for each new piece of text, never half a character; may
   *        be empty. The pieces of one index joined are its result's text.
   */
  std::vector<TextResult> generate(const Tokenizer& tokenizer,
                                   const std::vector<std::string>& prompts,
                                   const Options& options = {}, const OnText& on_text = {},
                                   std::int32_t max_rows = 0) const {
    std::vector<std::vector<std::int32_t>> encoded;
    encoded.reserve(prompts.size());
    for (const std::string& prompt : prompts) encoded.push_back(tokenizer.encode(prompt));
    std::map<std::size_t, TextStream> streams;
    OnToken on_token;
    if (on_text) {
      on_token = [&](std::size_t index, std::int32_t token) {
        // The end is no text, whether or not the tokenizer takes it for special.
        if (token == options.eos_token_id) return true;
        const std::string piece = streams.try_emplace(index, tokenizer).first->second.push(token);
        return piece.empty() || on_text(index, piece);
      };
    }
    std::vector<Result> sequences = generate(encoded, options, on_token, max_rows);
    std::vector<TextResult> results(sequences.size());
    for (std::size_t i = 0; i < results.size(); ++i) {
      static_cast<Result&>(results[i]) = std::move(sequences[i]);
      results[i].prompt = encoded[i / static_cast<std::size_t>(options.num_return_sequences)];
      std::vector<std::int32_t> words = results[i].tokens;
      if (results[i].finish_reason == FASTGEN_FINISH_EOS) words.pop_back();
      results[i].text = tokenizer.decode(words);
    }
    // A character that a sequence's end has cut off.
    for (auto& [index, stream] : streams) {
      const std::string rest = stream.flush();
      if (!rest.empty()) on_text(index, rest);
    }
    return results;
  }

  fastgen_model* handle() const noexcept { return handle_.get(); }

 private:
  struct Free {
    void operator()(fastgen_model* model) const { fastgen_model_free(model); }
  };

  explicit Model(fastgen_model* handle) : handle_(handle) {}

  template <typename Call>
  static Model make(const ModelOptions& options, const Call& call) {
    fastgen_model_options c_options;
    fastgen_model_options_init(&c_options);
    if (!options.device.empty()) c_options.device = options.device.c_str();
    if (!options.isa.empty()) c_options.isa = options.isa.c_str();
    if (!options.weight_dtype.empty()) c_options.weight_dtype = options.weight_dtype.c_str();
    c_options.num_threads = options.num_threads;
    detail::Progress progress{options.progress, nullptr};
    if (options.progress) {
      c_options.progress = detail::Progress::call;
      c_options.progress_user_data = &progress;
    }
    fastgen_model* handle = nullptr;
    detail::check(call(&c_options, &handle));
    Model model(handle);
    if (progress.failure) std::rethrow_exception(progress.failure);
    return model;
  }

  std::unique_ptr<fastgen_model, Free> handle_;
};

inline Session::Session(const Model& model, std::int32_t max_rows)
    : vocab_size_(static_cast<std::size_t>(model.info().config.vocab_size)) {
  fastgen_session_options options;
  fastgen_session_options_init(&options);
  options.max_rows = max_rows;
  fastgen_session* handle = nullptr;
  detail::check(fastgen_session_create(model.handle(), &options, &handle));
  handle_.reset(handle);
}

}  // namespace fastgen

#endif /* FASTGEN_FASTGEN_HPP_ */
