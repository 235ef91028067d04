/**
 * @file fastgen.hpp
 * @brief C++17 over fastgen.h: ownership, exceptions, vectors. Header-only; link libfastgen.
 *
 * @code
 * fastgen::Model model = fastgen::Model::load("gpt2");
 * fastgen::Tokenizer tokenizer = fastgen::Tokenizer::load("gpt2");
 * fastgen::Options options;
 * options.max_length = 32;
 * options.eos_token_id = model.config().eos_token_id;
 * for (const fastgen::TextResult& result : model.generate(tokenizer, {"The answer is"}, options)) {
 *   use(result.text);
 * }
 * @endcode
 *
 * What fastgen.h says of options, shapes and units holds here too.
 *
 * **Errors.** Functions that can fail throw fastgen::Error, with the status and the sentence of the
 * C function behind them, or what the standard library throws when memory runs out. A failed call
 * leaves its object usable.
 *
 * **Threads.** Any number of threads may use a `Model` or a `Tokenizer` at the same time; a
 * `Session` and a `TextStream` are for one thread at a time.
 *
 * **Ownership.** Objects own what is behind them and give it back when they go; they can be moved,
 * not copied, and one that was moved from may only be destroyed or assigned to. They keep alive
 * what they were made of. A `handle()` stays its object's: it is for calling fastgen.h directly.
 *
 * `@since` is as in fastgen.h.
 */

/* C++17 and later. */
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

/**
 * A call of the library failed; what() names the option, the value and what is allowed.
 * @since 0.1
 */
class Error : public std::runtime_error {
 public:
  /**
   * What a call said.
   * @param status its result
   * @param message one sentence
   */
  Error(fastgen_status status, const std::string& message)
      : std::runtime_error(message), status_(status) {}
  /** Which kind of failure it is. */
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

/**
 * Version of the library that runs.
 * @return "major.minor.patch"
 * @since 0.1
 */
inline std::string version() { return fastgen_version(); }

/**
 * What the library was built from; see ::fastgen_build_info.
 * @return a JSON object
 * @since 0.1
 */
inline std::string build_info() { return fastgen_build_info(); }

/**
 * Shape of a network, with the members of ::fastgen_config.
 * @since 0.1
 */
struct Config : fastgen_config {
  /** As fastgen_config_init() fills it. */
  Config() { fastgen_config_init(this); }
};

/**
 * Options of one request, with the members of ::fastgen_options.
 * @since 0.1
 */
struct Options : fastgen_options {
  /** As fastgen_options_init() fills them: greedy search for 20 tokens. */
  Options() { fastgen_options_init(this); }
};

/**
 * How a model is loaded.
 * @since 0.1
 */
struct ModelOptions {
  /** Where the model runs: "cpu", "cuda", "cuda:<index>"; empty: "cpu". */
  std::string device;
  /** Kernel set of the CPU; empty: the environment variable `FASTGEN_ISA`, else the best one. */
  std::string isa;
  /** Type that weights are packed as, see ::fastgen_model_options; empty: the type of the files. */
  std::string weight_dtype;
  /** Threads that compute; 0: the environment variable `FASTGEN_NUM_THREADS`, else the processors
   *  that this process may use. */
  std::int32_t num_threads = 0;
  /** Called with bytes packed and bytes in total, on the loading thread; may be empty. Loading goes
   *  on if it throws; the exception comes out of load() or create() afterwards. */
  std::function<void(std::uint64_t done, std::uint64_t total)> progress;
  /** Where the tensors that Model::create() is given lie: "cpu", or the device that `device` names;
   *  empty: "cpu". */
  std::string tensor_device;
  /** Stream of `tensor_device`, if that is no "cpu". */
  void* stream = nullptr;
  /** Type that keys and values are kept as, see ::fastgen_model_options; empty: the device's own. */
  std::string cache_dtype;
};

/**
 * One sequence, as far as it has come.
 * @since 0.1
 */
struct Result {
  /** New tokens only. */
  std::vector<std::int32_t> tokens;
  /** Why it ended, or ::FASTGEN_RUNNING. */
  fastgen_finish_reason finish_reason = FASTGEN_RUNNING;
  /** See fastgen_sequence::score. */
  float score = 0.0f;
  /** The seed used, drawn or given. */
  std::uint64_t seed = 0;
  /** The sequence index used. */
  std::uint32_t sequence = 0;
  /** [tokens.size(), vocab_size] if `keep_logits` was set, else empty. */
  std::vector<float> logits;
};

/**
 * A sequence as text.
 * @since 0.1
 */
struct TextResult : Result {
  /** The prompt's tokens. */
  std::vector<std::int32_t> prompt;
  /** Of the new tokens, without eos and special tokens; UTF-8. */
  std::string text;
};

/**
 * Byte-level BPE of a model directory: text to token ids and back. Any number of threads may use
 * one at the same time.
 * @since 0.1
 */
class Tokenizer {
 public:
  /**
   * Loads the tokenizer of a model directory, see fastgen_tokenizer_load().
   * @param directory its path
   * @throws Error there is none, a file is damaged, or it is of another kind
   */
  static Tokenizer load(const std::string& directory) {
    fastgen_tokenizer* handle = nullptr;
    detail::check(fastgen_tokenizer_load(directory.c_str(), &handle));
    return Tokenizer(handle);
  }

  /**
   * Token ids of a text, see fastgen_tokenizer_encode().
   * @param text UTF-8; other bytes are encoded as themselves
   * @throws Error the text is too long, or the vocabulary has no token for a byte
   */
  std::vector<std::int32_t> encode(const std::string& text) const {
    std::vector<std::int32_t> tokens(text.size());
    std::size_t length = 0;
    detail::check(fastgen_tokenizer_encode(handle_.get(), text.data(), text.size(), tokens.data(),
                                           tokens.size(), &length));
    tokens.resize(length);
    return tokens;
  }

  /**
   * Text of token ids, valid UTF-8, see fastgen_tokenizer_decode().
   * @param tokens each at least 0; those that the vocabulary lacks are left out
   * @param skip_special_tokens true (the default): special tokens are left out
   * @throws Error a token is negative
   */
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

  /**
   * Id of one token as the vocabulary writes it, e.g. "<|endoftext|>".
   * @param token its text, without a NUL
   * @return -1: the vocabulary has no such token
   */
  std::int32_t token_id(const std::string& token) const {
    std::int32_t id = -1;
    detail::check(fastgen_tokenizer_token_id(handle_.get(), token.c_str(), &id));
    return id;
  }

  /** Number of tokens, special ones included. */
  std::size_t vocab_size() const { return fastgen_tokenizer_vocab_size(handle_.get()); }

  /** For fastgen.h; it stays this object's. */
  fastgen_tokenizer* handle() const noexcept { return handle_.get(); }

 private:
  struct Free {
    void operator()(fastgen_tokenizer* tokenizer) const { fastgen_tokenizer_free(tokenizer); }
  };
  explicit Tokenizer(fastgen_tokenizer* handle) : handle_(handle) {}
  std::unique_ptr<fastgen_tokenizer, Free> handle_;
};

/**
 * Decodes tokens as they come, never half a character. One thread at a time.
 * @since 0.1
 */
class TextStream {
 public:
  /**
   * A stream at the beginning of a sequence. It keeps what is behind the tokenizer alive.
   * @param tokenizer the tokenizer
   * @param skip_special_tokens true (the default): special tokens are left out
   */
  explicit TextStream(const Tokenizer& tokenizer, bool skip_special_tokens = true) {
    fastgen_text_stream* handle = nullptr;
    detail::check(
        fastgen_text_stream_create(tokenizer.handle(), skip_special_tokens ? 1 : 0, &handle));
    handle_.reset(handle);
  }

  /**
   * Adds tokens.
   * @param tokens [length], each at least 0
   * @param length how many
   * @return the text that is now certain, often none
   * @throws Error a token is negative; nothing is added then
   */
  std::string push(const std::int32_t* tokens, std::size_t length) {
    const char* text = nullptr;
    std::size_t size = 0;
    detail::check(fastgen_text_stream_push(handle_.get(), tokens, length, &text, &size));
    return std::string(text, size);
  }
  /**
   * Adds one token.
   * @param token at least 0
   * @return the text that is now certain, often none
   * @throws Error the token is negative; nothing is added then
   */
  std::string push(std::int32_t token) { return push(&token, 1); }

  /**
   * The end of a sequence. The stream may then begin another one.
   * @return the rest: an incomplete character as U+FFFD, often nothing
   */
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

/**
 * Requests that run together on one model, in the order of submission. One thread at a time;
 * sessions of one model on different threads take turns.
 * @since 0.1
 */
class Session {
 public:
  /**
   * A session without requests. It keeps what is behind the model alive.
   * @param model the model
   * @param max_rows sequences decoded together, 1 to 4096, more wait; 0 (the default): 256
   * @throws Error `max_rows` is outside what is allowed
   */
  explicit Session(const Model& model, std::int32_t max_rows = 0);

  /**
   * Adds a request, see fastgen_session_submit().
   * @param prompt token ids, at least one
   * @param options of the request; the defaults if left out
   * @return id of its first sequence; the others of `num_return_sequences` have the ids after it
   * @throws Error an option, the length or a token is outside what is allowed
   */
  std::uint64_t submit(const std::vector<std::int32_t>& prompt, const Options& options = {}) {
    std::uint64_t first_id = 0;
    detail::check(
        fastgen_session_submit(handle_.get(), prompt.data(), prompt.size(), &options, &first_id));
    return first_id;
  }

  /**
   * Runs steps, see fastgen_session_step().
   * @param max_steps at least 0; 1 if left out
   * @return how many sequences still run or wait
   * @throws Error `max_steps` is negative, or sequences failed, which are then ended with
   *         ::FASTGEN_FINISH_FAILED; all others go on with the next call
   */
  std::size_t step(std::int32_t max_steps = 1) {
    std::size_t unfinished = 0;
    detail::check(fastgen_session_step(handle_.get(), max_steps, &unfinished));
    return unfinished;
  }

  /**
   * State of a sequence without a copy.
   * @param id of a sequence that has not been released
   * @return its pointers live until it is released, or the session steps or goes
   * @throws Error the session has no such sequence
   */
  fastgen_sequence view(std::uint64_t id) const {
    fastgen_sequence sequence = {};
    sequence.struct_size = sizeof sequence;
    detail::check(fastgen_session_get(handle_.get(), id, &sequence));
    return sequence;
  }

  /**
   * State of a sequence.
   * @param id of a sequence that has not been released
   * @throws Error the session has no such sequence
   */
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

  /**
   * Ends a sequence where it is; its tokens stay readable. Ending an ended one does nothing.
   * @param id of a sequence that has not been released
   * @throws Error the session has no such sequence
   */
  void cancel(std::uint64_t id) { detail::check(fastgen_session_cancel(handle_.get(), id)); }

  /**
   * Forgets a sequence and its tokens, ending it first if it runs.
   * @param id of a sequence that has not been released
   * @throws Error the session has no such sequence
   */
  void release(std::uint64_t id) { detail::check(fastgen_session_release(handle_.get(), id)); }

  /** For fastgen.h; it stays this object's. */
  fastgen_session* handle() const noexcept { return handle_.get(); }

 private:
  struct Free {
    void operator()(fastgen_session* session) const { fastgen_session_free(session); }
  };
  std::unique_ptr<fastgen_session, Free> handle_;
  std::size_t vocab_size_ = 0;
};

/**
 * A network with its weights. Any number of threads may use one at the same time.
 * @since 0.1
 */
class Model {
 public:
  /** Told of a token of a running generation, on the thread that called generate(): index of the
   *  sequence among the results, and the token. Returning false ends that sequence there. What it
   *  throws ends the generation and comes out of generate(). */
  using OnToken = std::function<bool(std::size_t index, std::int32_t token)>;

  /** Told of a piece of text of a running generation, otherwise as `OnToken`. */
  using OnText = std::function<bool(std::size_t index, const std::string& piece)>;

  /**
   * Loads a model directory, see fastgen_model_load().
   * @param directory its path
   * @param options how; the defaults if left out
   * @throws Error a file is missing or damaged, or an option cannot be had
   */
  static Model load(const std::string& directory, const ModelOptions& options = {}) {
    return make(options, [&](const fastgen_model_options* c_options, fastgen_model** model) {
      return fastgen_model_load(directory.c_str(), c_options, model);
    });
  }

  /**
   * Makes a model of tensors in memory, see fastgen_model_create().
   * @param config shape of the network
   * @param tensors read during the call only
   * @param options how; the defaults if left out
   * @throws Error tensors and configuration do not fit, or an option cannot be had
   */
  static Model create(const Config& config, const std::vector<fastgen_tensor>& tensors,
                      const ModelOptions& options = {}) {
    return make(options, [&](const fastgen_model_options* c_options, fastgen_model** model) {
      return fastgen_model_create(&config, tensors.data(), tensors.size(), c_options, model);
    });
  }

  /** Shape and special tokens of the network. */
  Config config() const {
    Config config;
    detail::check(fastgen_model_get_config(handle_.get(), &config));
    return config;
  }

  /** How the model was loaded and what it costs; strings live as long as the model. */
  fastgen_model_info info() const {
    fastgen_model_info info = {};
    info.struct_size = sizeof info;
    detail::check(fastgen_model_get_info(handle_.get(), &info));
    return info;
  }

  /**
   * Logits of every position of one token sequence, without generating.
   * @param tokens 1 to max_positions of them
   * @return [tokens.size(), vocab_size]: row i is the distribution after tokens[0..i]
   * @throws Error the length or a token is outside what is allowed
   */
  std::vector<float> logits(const std::vector<std::int32_t>& tokens) const {
    const Config shape = config();
    // The library refuses other lengths: no memory for those.
    const bool fits =
        !tokens.empty() && tokens.size() <= static_cast<std::size_t>(shape.max_positions);
    const std::size_t rows = fits ? tokens.size() : 1;
    std::vector<float> result(rows * static_cast<std::size_t>(shape.vocab_size));
    detail::check(fastgen_model_logits(handle_.get(), tokens.data(), tokens.size(), result.data()));
    return result;
  }

  /**
   * Generates for several prompts together and waits for all of them.
   * @param prompts token ids, at least one prompt of at least one token
   * @param options of every prompt; the defaults if left out
   * @param on_token called after every step for each new token; none if left out
   * @param max_rows sequences decoded together, more wait; 0 (the default): 256
   * @return `num_return_sequences` results per prompt, in the order of the prompts. With one seed
   *         for all, the rows draw apart: result i has sequence index `first_sequence` + i.
   * @throws Error a prompt or an option is outside what is allowed, or memory runs out
   */
  std::vector<Result> generate(const std::vector<std::vector<std::int32_t>>& prompts,
                               const Options& options = {}, const OnToken& on_token = {},
                               std::int32_t max_rows = 0) const {
    if (prompts.empty()) {
      throw Error(FASTGEN_INVALID_ARGUMENT, "prompts is empty, it must have at least one prompt");
    }
    const std::uint64_t sequences =
        std::uint64_t{prompts.size()} *
        static_cast<std::uint64_t>(options.num_return_sequences > 0 ? options.num_return_sequences
                                                                    : 1);
    if (sequences - 1 > UINT32_MAX - options.first_sequence) {
      throw Error(FASTGEN_INVALID_ARGUMENT,
                  "first_sequence is " + std::to_string(options.first_sequence) + ", with " +
                      std::to_string(sequences) + " sequences it must be at most " +
                      std::to_string(std::uint64_t{UINT32_MAX} + 1 - sequences));
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
   * Text in, text out, else as above. Set `options.eos_token_id` to `config().eos_token_id` to let
   * the model end its texts.
   * @param tokenizer the model's
   * @param prompts texts, each at least one token long
   * @param options of every prompt; the defaults if left out
   * @param on_text called after every step for each new piece of text, never half a character; none
   *        if left out. The pieces of one index joined are its result's text.
   * @param max_rows sequences decoded together, more wait; 0 (the default): 256
   * @return `num_return_sequences` results per prompt, in the order of the prompts
   * @throws Error a prompt or an option is outside what is allowed, or memory runs out
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

  /** For fastgen.h; it stays this object's. */
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
    if (!options.tensor_device.empty()) c_options.tensor_device = options.tensor_device.c_str();
    c_options.stream = options.stream;
    if (!options.cache_dtype.empty()) c_options.cache_dtype = options.cache_dtype.c_str();
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
    : vocab_size_(static_cast<std::size_t>(model.config().vocab_size)) {
  fastgen_session_options options;
  fastgen_session_options_init(&options);
  options.max_rows = max_rows;
  fastgen_session* handle = nullptr;
  detail::check(fastgen_session_create(model.handle(), &options, &handle));
  handle_.reset(handle);
}

}  // namespace fastgen

#endif /* FASTGEN_FASTGEN_HPP_ */
