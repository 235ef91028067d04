/**
 * @file fastgen.h
 * @brief C interface of libfastgen: GPT-2-family text generation.
 *
 * Every door into the engine (Python, the Paddle op, C++) goes through these functions.
 *
 * Errors. Functions that can fail return a ::fastgen_status; on failure fastgen_last_error() gives
 * one sentence that names the option, the value and what is allowed. A failed call leaves the
 * objects it was given usable and, but for fastgen_session_step(), as they were. The library never
 * prints, exits or aborts.
 *
 * Threads. A ::fastgen_model and a ::fastgen_tokenizer may be used from any number of threads. A
 * ::fastgen_session and a ::fastgen_text_stream belong to one thread at a time.
 * fastgen_last_error() is per thread.
 *
 * Structures start with `struct_size`, so that a later library can add members and still serve
 * programs compiled against this header. Options are filled by the matching `_init` function, which
 * sets it; for a structure that a call fills, set it to sizeof that structure before the call.
 *
 * Tokens are int32, shapes are written [batch, length], memory is in bytes.
 */
#ifndef FASTGEN_FASTGEN_H_
#define FASTGEN_FASTGEN_H_

#include <stddef.h>
#include <stdint.h>

#if defined(FASTGEN_STATIC)
#define FASTGEN_API
#elif defined(__GNUC__)
#define FASTGEN_API __attribute__((visibility("default")))
#else
#define FASTGEN_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/** Result of a call. */
typedef enum fastgen_status {
  FASTGEN_OK = 0,
  FASTGEN_INVALID_ARGUMENT = 1, /**< an option or an input is outside what is allowed */
  FASTGEN_NOT_FOUND = 2,        /**< a file or directory does not exist or cannot be read */
  FASTGEN_BAD_FILE = 3,         /**< a file is truncated, foreign or contradicts itself */
  FASTGEN_OUT_OF_MEMORY = 4,    /**< memory could not be had; the message says for what */
  FASTGEN_UNSUPPORTED = 5,      /**< this machine or this build cannot do that */
  FASTGEN_INTERNAL = 6          /**< a defect of the library */
} fastgen_status;

/** Type of the elements of a tensor. */
typedef enum fastgen_dtype {
  FASTGEN_FLOAT32 = 0,
  FASTGEN_FLOAT16 = 1,
  FASTGEN_BFLOAT16 = 2
} fastgen_dtype;

/** How the next token is chosen from the logits. */
typedef enum fastgen_decode_strategy {
  FASTGEN_GREEDY_SEARCH = 0, /**< the largest logit; ties go to the smallest token id */
  FASTGEN_SAMPLING = 1       /**< a draw from the filtered distribution */
} fastgen_decode_strategy;

/** Why a sequence ended. */
typedef enum fastgen_finish_reason {
  FASTGEN_RUNNING = 0,          /**< it has not ended yet */
  FASTGEN_FINISH_EOS = 1,       /**< eos_token_id was generated (and is the last token) */
  FASTGEN_FINISH_LENGTH = 2,    /**< max_length new tokens were generated */
  FASTGEN_FINISH_CANCELLED = 3, /**< fastgen_session_cancel() */
  FASTGEN_FINISH_FAILED = 4     /**< a fastgen_session_step() that failed; tokens are readable */
} fastgen_finish_reason;

typedef struct fastgen_model fastgen_model;
typedef struct fastgen_session fastgen_session;
typedef struct fastgen_tokenizer fastgen_tokenizer;
typedef struct fastgen_text_stream fastgen_text_stream;

/** Version of the library, "major.minor.patch". Static storage. */
FASTGEN_API const char* fastgen_version(void);

/** What the last failed call of this thread had to say; "" if none failed. Valid until the
 *  thread's next failing call. */
FASTGEN_API const char* fastgen_last_error(void);

/* ---- Instruction sets ---------------------------------------------------------------------- */

/** Number of kernel sets compiled into this library, slowest first. */
FASTGEN_API size_t fastgen_isa_count(void);
/** Name of kernel set `index`: "generic", "avx2", "avx512"; NULL past the end. Static storage. */
FASTGEN_API const char* fastgen_isa_name(size_t index);
/** 1 if this machine (processor and operating system) can run kernel set `index`, else 0. */
FASTGEN_API int fastgen_isa_supported(size_t index);

/* ---- Model --------------------------------------------------------------------------------- */

/** Shape of a GPT-2-family network: pre-norm blocks, tanh GELU, learned positions, tied head. */
typedef struct fastgen_config {
  size_t struct_size;
  int32_t vocab_size;
  int32_t max_positions; /**< rows of the position table: the most of prompt + new tokens */
  int32_t hidden_size;   /**< a multiple of num_heads */
  int32_t num_layers;
  int32_t num_heads;
  int32_t intermediate_size; /**< width of the feed-forward block */
  float layer_norm_eps;
  int32_t bos_token_id; /**< -1: the model names none */
  int32_t eos_token_id; /**< -1: the model names none */
  int32_t pad_token_id; /**< -1: the model names none */
} fastgen_config;

/** Fills `config` with zeros, eps 1e-5 and no special tokens. */
FASTGEN_API void fastgen_config_init(fastgen_config* config);

/** Called while a model is packed. `done` of `total` bytes of weights are packed. Called on the
 *  loading thread; must not call back into the library. */
typedef void (*fastgen_progress_fn)(uint64_t done, uint64_t total, void* user_data);

/** How a model is loaded. */
typedef struct fastgen_model_options {
  size_t struct_size;
  const char* device;           /**< "cpu" */
  const char* isa;              /**< kernel set; NULL: environment FASTGEN_ISA, else the best one */
  const char* weight_dtype;     /**< "float32" */
  int32_t num_threads;          /**< 0: environment FASTGEN_NUM_THREADS, else the processors this
                                     process may use */
  fastgen_progress_fn progress; /**< may be NULL */
  void* progress_user_data;
} fastgen_model_options;

FASTGEN_API void fastgen_model_options_init(fastgen_model_options* options);

/**
 * Loads a model directory: HuggingFace GPT-2 (`config.json`, `model.safetensors`), which is also
 * what `fastgen convert` writes, or an export (`fastgen.json`, `gpt.pdiparams`), which is what
 * `fastgen export` writes. The file is mapped, packed and unmapped: afterwards there is one
 * copy of the weights in memory and the files may be removed.
 * @param options may be NULL for the defaults
 * @param[out] model to be given to fastgen_model_free()
 */
FASTGEN_API fastgen_status fastgen_model_load(const char* directory,
                                              const fastgen_model_options* options,
                                              fastgen_model** model);

/** A tensor in memory that the caller owns, dense and row-major. */
typedef struct fastgen_tensor {
  const char* name;
  const void* data;
  fastgen_dtype dtype;
  int32_t num_dims;
  int64_t shape[4];
} fastgen_tensor;

/**
 * Makes a model of tensors in memory, which are read during the call only.
 *
 * Names are those of HuggingFace (`wte.weight`, `h.0.attn.c_attn.weight`, ..., with or without
 * `transformer.`) or those of PaddleNLP (`gpt.embeddings.word_embeddings.weight`,
 * `gpt.decoder.layers.0.self_attn.q_proj.weight`, ...). Linear weights are [in, out].
 * A separate head (`lm_head.weight`, [vocab, hidden]) is used when it is given and is not the
 * embedding itself. Other names are an error.
 * @param options may be NULL for the defaults
 * @param[out] model to be given to fastgen_model_free()
 */
FASTGEN_API fastgen_status fastgen_model_create(const fastgen_config* config,
                                                const fastgen_tensor* tensors, size_t num_tensors,
                                                const fastgen_model_options* options,
                                                fastgen_model** model);

/** What a loaded model is and what it costs. Strings live as long as the model. */
typedef struct fastgen_model_info {
  size_t struct_size;
  fastgen_config config;
  const char* device;
  const char* isa;
  const char* weight_dtype;
  int32_t num_threads;
  uint64_t weight_bytes;          /**< packed weights in memory, padding included */
  uint64_t step_bytes;            /**< weights that a decode step of one row reads */
  uint64_t cache_bytes_per_token; /**< KV cache for one position of one sequence */
} fastgen_model_info;

FASTGEN_API fastgen_status fastgen_model_get_info(const fastgen_model* model,
                                                  fastgen_model_info* info);

/** Releases the model once its last session is freed. NULL is allowed. */
FASTGEN_API void fastgen_model_free(fastgen_model* model);

/**
 * Logits of every position of one token sequence, without generating.
 * @param tokens [length], 1 <= length <= max_positions
 * @param[out] logits [length, vocab_size], float32: row i is the distribution after tokens[0..i]
 */
FASTGEN_API fastgen_status fastgen_model_logits(fastgen_model* model, const int32_t* tokens,
                                                size_t length, float* logits);

/* ---- Generation ---------------------------------------------------------------------------- */

/** Options of one request, with PaddleNLP's names and meanings. */
typedef struct fastgen_options {
  size_t struct_size;
  int32_t decode_strategy;      /**< ::fastgen_decode_strategy */
  int32_t max_length;           /**< new tokens, >= 1 */
  int32_t min_length;           /**< no eos among the first min_length new tokens; 0: off */
  int32_t top_k;                /**< keep the k most probable and their ties; 0: off */
  float top_p;                  /**< keep the smallest set of the most probable whose mass
                                     exceeds p; 0 or 1: off */
  float temperature;            /**< > 0 */
  float repetition_penalty;     /**< > 0; 1: off */
  int32_t no_repeat_ngram_size; /**< 0: off */
  int32_t num_return_sequences; /**< >= 1; must be 1 for greedy search */
  int32_t eos_token_id;         /**< a sequence ends with it; -1: none */
  int32_t forced_bos_token_id;  /**< first new token if the prompt is one token long; -1: none */
  int32_t forced_eos_token_id;  /**< the token at max_length; -1: none */
  int32_t has_seed;             /**< 0: a seed is drawn from the operating system and reported */
  uint64_t seed;
  uint32_t first_sequence; /**< sequence index of the first returned sequence; the draw at a
                                     step is Philox(key = seed, counter = (sequence, step)) */
  int32_t keep_logits;     /**< 1: keep the raw logits of every step (tests, analysis) */
} fastgen_options;

/** Greedy search for 20 tokens, every filter off, no special token. */
FASTGEN_API void fastgen_options_init(fastgen_options* options);

/** How a session runs. It runs sequences in the order of submission. */
typedef struct fastgen_session_options {
  size_t struct_size;
  int32_t max_rows; /**< sequences decoded together, at most 4096, more wait; 0: 256 */
} fastgen_session_options;

FASTGEN_API void fastgen_session_options_init(fastgen_session_options* options);

/** A session holds requests and runs them together. It keeps its model alive.
 *  @param options may be NULL for the defaults */
FASTGEN_API fastgen_status fastgen_session_create(fastgen_model* model,
                                                  const fastgen_session_options* options,
                                                  fastgen_session** session);

/** Ends every sequence of the session and gives its cache back. NULL is allowed. */
FASTGEN_API void fastgen_session_free(fastgen_session* session);

/**
 * Adds a request; it may join while others run, and takes memory for its cache when its turn comes.
 * Nothing of it depends on them: the same prompt, options and seed give the same tokens alone and
 * in any company.
 * @param prompt [length], read during the call; length >= 1, and length + max_length may not exceed
 *        the model's max_positions
 * @param options may be NULL for the defaults
 * @param[out] first_id num_return_sequences sequences get the ids first_id, first_id + 1, ...
 */
FASTGEN_API fastgen_status fastgen_session_submit(fastgen_session* session, const int32_t* prompt,
                                                  size_t length, const fastgen_options* options,
                                                  uint64_t* first_id);

/**
 * Runs up to `max_steps` steps. A step feeds a bounded number of prompt tokens or gives every
 * running sequence one token, so a caller that loops stays responsive.
 *
 * If it fails, the sequences that the failure concerns have ended with ::FASTGEN_FINISH_FAILED, the
 * session stays usable and all others go on with the next call. A sequence whose cache finds no
 * memory waits while others of its session run, and fails when none does.
 * @param max_steps >= 0
 * @param[out] unfinished sequences that still run or wait; may be NULL
 */
FASTGEN_API fastgen_status fastgen_session_step(fastgen_session* session, int32_t max_steps,
                                                size_t* unfinished);

/** State of a sequence. Pointers are valid until the session's next step, release or free. */
typedef struct fastgen_sequence {
  size_t struct_size;
  const int32_t* tokens; /**< [length], new tokens only */
  size_t length;
  int32_t finish_reason; /**< ::fastgen_finish_reason */
  float score;           /**< mean over the new tokens: log-probability before temperature and
                              filters (sampling), processed logit (greedy), as PaddleNLP reports */
  uint64_t seed;         /**< the seed used, drawn or given; greedy search makes no draw */
  uint32_t sequence;     /**< the sequence index used */
  const float* logits;   /**< [length, vocab_size] if keep_logits was set, else NULL */
} fastgen_sequence;

FASTGEN_API fastgen_status fastgen_session_get(const fastgen_session* session, uint64_t id,
                                               fastgen_sequence* sequence);

/** Ends a sequence where it is; its tokens stay readable. Ending an ended one does nothing. */
FASTGEN_API fastgen_status fastgen_session_cancel(fastgen_session* session, uint64_t id);

/** Forgets a sequence, ending it first if it runs. */
FASTGEN_API fastgen_status fastgen_session_release(fastgen_session* session, uint64_t id);

/* ---- Text ---------------------------------------------------------------------------------- */

/**
 * Loads the byte-level BPE tokenizer of a model directory: `tokenizer.json`, or else `vocab.json`
 * or `vocab.txt` (one token a line; the number of the line, from 0, is its id) with `merges.txt`.
 *
 * With the latter, `<|endoftext|>` and what `special_tokens_map.json` and `tokenizer_config.json`
 * name as bos, eos, pad and unk are special tokens where the vocabulary has them; of an export those
 * that its `fastgen.json` lists.
 *
 * ::FASTGEN_NOT_FOUND: there is no tokenizer. ::FASTGEN_UNSUPPORTED: it is of another kind.
 * @param[out] tokenizer to be given to fastgen_tokenizer_free(). It never changes.
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_tokenizer_load(const char* directory,
                                                  fastgen_tokenizer** tokenizer);

/** Releases the tokenizer once its last text stream is freed. NULL is allowed. @since 0.1 */
FASTGEN_API void fastgen_tokenizer_free(fastgen_tokenizer* tokenizer);

/** Number of tokens, special ones included; 0 for NULL. A model may have more. @since 0.1 */
FASTGEN_API size_t fastgen_tokenizer_vocab_size(const fastgen_tokenizer* tokenizer);

/**
 * Id of one token as the vocabulary writes it, e.g. "<|endoftext|>".
 * @param token ends with a NUL
 * @param[out] id -1: the vocabulary does not have it, which is no error
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_tokenizer_token_id(const fastgen_tokenizer* tokenizer,
                                                      const char* token, int32_t* id);

/**
 * Token ids of a text, with nothing put before or after it. Special tokens written out in the text
 * become their one id. The time it takes grows linearly with the text (a single word of n bytes:
 * n log n).
 *
 * The text should be UTF-8. A byte that is not part of valid UTF-8 is encoded as itself, and counts
 * as a character that is neither letter nor number nor white space where text is split.
 * @param text [size] bytes, at most 2^31 - 1; may hold NULs; may be NULL if size is 0
 * @param[out] tokens [capacity], the first `capacity` ids; may be NULL if capacity is 0. There are
 *        never more ids than bytes, so a capacity of `size` always suffices.
 * @param[out] length ids that the text has, which may be more than `capacity`
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_tokenizer_encode(const fastgen_tokenizer* tokenizer,
                                                    const char* text, size_t size, int32_t* tokens,
                                                    size_t capacity, size_t* length);

/**
 * Text of token ids: valid UTF-8, without a NUL at the end. Bytes that are not UTF-8 become U+FFFD,
 * one for each maximal subpart. Ids that the vocabulary does not have are left out (a model's
 * vocabulary may be padded); a negative one is an error.
 * @param tokens [length]; may be NULL if length is 0
 * @param skip_special_tokens 1: special tokens are left out; 0: they are written out
 * @param[out] text [capacity], the first `capacity` bytes; may be NULL if capacity is 0
 * @param[out] size bytes that the text has, which may be more than `capacity`
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_tokenizer_decode(const fastgen_tokenizer* tokenizer,
                                                    const int32_t* tokens, size_t length,
                                                    int32_t skip_special_tokens, char* text,
                                                    size_t capacity, size_t* size);

/**
 * A text stream decodes tokens as they come and never gives half a UTF-8 character. Its pieces
 * joined are what fastgen_tokenizer_decode() makes of all tokens. It keeps its tokenizer alive.
 * @param[out] stream to be given to fastgen_text_stream_free()
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_text_stream_create(const fastgen_tokenizer* tokenizer,
                                                      int32_t skip_special_tokens,
                                                      fastgen_text_stream** stream);

/**
 * Adds tokens and gives the text that is now certain, often none.
 * @param tokens [length]; may be NULL if length is 0
 * @param[out] text [size] bytes, followed by a NUL that is not counted; the stream's, until its next
 *        call
 * @param[out] size may be 0
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_text_stream_push(fastgen_text_stream* stream,
                                                    const int32_t* tokens, size_t length,
                                                    const char** text, size_t* size);

/** Gives what is left at the end of a sequence, an incomplete character as U+FFFD, as
 *  fastgen_text_stream_push() does. The stream may then begin another sequence. @since 0.1 */
FASTGEN_API fastgen_status fastgen_text_stream_flush(fastgen_text_stream* stream, const char** text,
                                                     size_t* size);

/** NULL is allowed. @since 0.1 */
FASTGEN_API void fastgen_text_stream_free(fastgen_text_stream* stream);

/* ---- Measurement --------------------------------------------------------------------------- */

/**
 * Read bandwidth of this machine's memory with the model's threads: a pass reads one buffer once.
 * @param bytes size of the buffer, at least 1 MiB and more than the caches hold; memory for it is
 *        taken and given back
 * @param passes the best of these is reported; >= 1
 * @param[out] bytes_per_second
 */
FASTGEN_API fastgen_status fastgen_measure_read_bandwidth(fastgen_model* model, uint64_t bytes,
                                                          int32_t passes, double* bytes_per_second);

#ifdef __cplusplus
}
#endif

#endif /* FASTGEN_FASTGEN_H_ */
