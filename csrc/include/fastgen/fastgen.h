/**
 * @file fastgen.h
 * @brief C interface of libfastgen: GPT-2-family text generation.
 *
 * Every door into the engine (Python, the Paddle op, C++) goes through these functions. A program
 * loads a model with fastgen_model_load(), opens a session with fastgen_session_create(), submits
 * prompts as token ids and steps the session until all sequences have ended;
 * fastgen_tokenizer_load() and its companions turn text into token ids and back.
 *
 * **Errors.** A function that can fail returns a ::fastgen_status; on failure fastgen_last_error()
 * gives one sentence that names the option, the value and what is allowed. Every such function may
 * return ::FASTGEN_INVALID_ARGUMENT (a pointer is NULL that may not be, a `struct_size` is not
 * set), ::FASTGEN_OUT_OF_MEMORY and ::FASTGEN_INTERNAL; what else it may return, and why, stands
 * with it. A failed call leaves the objects it was given usable and, but for
 * fastgen_session_step(), as they were, and what its `[out]` parameters point to. The library never
 * prints, exits or aborts.
 *
 * **Threads.** A ::fastgen_model and a ::fastgen_tokenizer may be used by any number of threads at
 * the same time. A ::fastgen_session and a ::fastgen_text_stream may be used by one thread at a
 * time, not always the same one; sessions of one model on different threads take turns, on the CPU a
 * step at a time, on a GPU a call to fastgen_session_step(), at most 64 steps. Functions without a
 * handle may be called by any thread at any time. A handle may be freed once no call uses it.
 * fastgen_last_error() is per thread.
 *
 * **Ownership.** What a function gives as a handle belongs to the caller, who frees it once with
 * the matching `_free` function; handles may be freed in any order. What a function is given is
 * read during the call only and stays the caller's. Pointers that a function gives are the
 * library's: how long they are valid stands with each.
 *
 * **Structures** start with `struct_size`, so that a later library can add members at the end and
 * still serve programs compiled against this header. Options are filled by the matching `_init`
 * function, which sets it; for a structure that a call fills, set it to `sizeof` that structure
 * before the call, which writes no more than that.
 *
 * **Memory.** Pointers are to memory of the host, but for what a structure says lies on the device
 * that it names: "cuda" or "cuda:<index>", memory of an NVIDIA device that anything in the process
 * may have taken. With it goes a `stream`, a `cudaStream_t` or `CUstream` of that device, also one of
 * another CUDA run-time library in the process, or NULL, the legacy default stream. A call sees what
 * was put on the stream before it, and what is put on it afterwards sees what the call wrote; the
 * host need not wait for either. The stream must not be capturing a graph.
 *
 * **Units.** Tokens are int32, shapes are written [batch, length] with the last one contiguous,
 * memory is in bytes, text is UTF-8, names and paths end with a NUL.
 *
 * **Versions.** `@since` is the release that a declaration came with; a member or an enumerator
 * without one is as old as what it is part of. Whoever links libfastgen.a defines `FASTGEN_STATIC`,
 * which the CMake package and `fastgen.pc` do by themselves.
 */

/* C11 and later, C++11 and later. */
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

/**
 * @defgroup errors Results and errors
 * @{
 */

/**
 * Result of a call.
 * @since 0.1
 */
typedef enum fastgen_status {
  /** The call did what it was asked for. */
  FASTGEN_OK = 0,
  /** An option or an input is outside what is allowed. */
  FASTGEN_INVALID_ARGUMENT = 1,
  /** A file or directory does not exist or cannot be read. */
  FASTGEN_NOT_FOUND = 2,
  /** A file is truncated, foreign or contradicts itself. */
  FASTGEN_BAD_FILE = 3,
  /** Memory could not be had; the message says for what. */
  FASTGEN_OUT_OF_MEMORY = 4,
  /** This machine or this build cannot do that. */
  FASTGEN_UNSUPPORTED = 5,
  /** A defect of the library. */
  FASTGEN_INTERNAL = 6
} fastgen_status;

/**
 * Version of the library that runs.
 * @return "major.minor.patch"; static storage
 * @since 0.1
 */
FASTGEN_API const char* fastgen_version(void);

/**
 * What the library was built from: version, commit, compiler, flags and kernel sets. It tells nothing of
 * where, when and by whom, so the same inputs give the same library.
 * @return a JSON object with the members `version`, `commit`, `source_date_epoch`, `compiler`, `cmake`,
 *         `system`, `build_type`, `flags`, `shared`, `kernels` and `cuda`; null for what was not told.
 *         Static storage.
 * @since 0.1
 */
FASTGEN_API const char* fastgen_build_info(void);

/**
 * What the last failed call of this thread had to say.
 * @return one sentence; "" if no call of this thread has failed. Valid until the thread's next
 *         failing call or its end. Calls that succeed leave it.
 * @since 0.1
 */
FASTGEN_API const char* fastgen_last_error(void);

/** @} */

/**
 * @defgroup isa Instruction sets
 *
 * Kernels are compiled for several instruction sets, and the best one that the machine can run is
 * chosen when a model is loaded, unless fastgen_model_options::isa or the environment variable
 * `FASTGEN_ISA` names another.
 * @{
 */

/**
 * Number of kernel sets compiled into this library.
 * @return at least 1; they are counted from 0, slowest first
 * @since 0.1
 */
FASTGEN_API size_t fastgen_isa_count(void);

/**
 * Name of a kernel set.
 * @param index from 0 to fastgen_isa_count() - 1
 * @return "generic", "avx2", "avx512", "avx512_vnni" or "avx512_bf16", static storage; NULL past the end
 * @since 0.1
 */
FASTGEN_API const char* fastgen_isa_name(size_t index);

/**
 * Whether this machine, its processor and its operating system, can run a kernel set.
 * @param index from 0 to fastgen_isa_count() - 1
 * @return 1 or 0; 0 past the end
 * @since 0.1
 */
FASTGEN_API int fastgen_isa_supported(size_t index);

/** @} */

/**
 * @defgroup model Models
 * @{
 */

/**
 * A network with its weights, packed for the device. It never changes, and any number of threads
 * may use it at the same time; their calls take turns on the device.
 * @since 0.1
 */
typedef struct fastgen_model fastgen_model;

/**
 * Shape of a GPT-2-family network: pre-norm blocks, tanh GELU, learned positions.
 * @since 0.1
 */
typedef struct fastgen_config {
  /** `sizeof(fastgen_config)`. */
  size_t struct_size;
  /** Tokens of the vocabulary, 1 to 2^24: rows of the embedding. */
  int32_t vocab_size;
  /** Rows of the position table, 1 to 2^20: the most of prompt and new tokens together. */
  int32_t max_positions;
  /** Width of the network, 1 to 65536: a multiple of `num_heads`. */
  int32_t hidden_size;
  /** Blocks, 1 to 1024. */
  int32_t num_layers;
  /** Attention heads of a block; `hidden_size` / `num_heads` is at most 1024. */
  int32_t num_heads;
  /** Width of the feed-forward block, 1 to 2^20. */
  int32_t intermediate_size;
  /** What the layer norms add to the variance, above 0 and below 1. */
  float layer_norm_eps;
  /** Token that begins a text; -1: the model names none. */
  int32_t bos_token_id;
  /** Token that ends a text; -1: the model names none. */
  int32_t eos_token_id;
  /** Token that stands for nothing; -1: the model names none. */
  int32_t pad_token_id;
} fastgen_config;

/**
 * Fills a configuration with sizes of 0, an epsilon of 1e-5 and no special tokens.
 * @param[out] config NULL: nothing happens
 * @since 0.1
 */
FASTGEN_API void fastgen_config_init(fastgen_config* config);

/**
 * Reads a configuration of HuggingFace's GPT-2 as fastgen_model_load() reads `config.json`: for weights
 * that come another way, by fastgen_model_create().
 *
 * Whether there is a head of its own (`tie_word_embeddings`), and how files store weights, is left to who
 * has the weights.
 * @param json the JSON text, [size] bytes of UTF-8
 * @param size its bytes
 * @param name what messages call it, such as the path of its file; NULL: "config"
 * @param[in,out] config with its `struct_size`
 * @retval FASTGEN_BAD_FILE it is no JSON, another network, one that computes otherwise (an activation, a
 *         scale of attention that the engine lacks), or a size is missing or out of its range
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_config_parse(const char* json, size_t size, const char* name,
                                                fastgen_config* config);

/**
 * Called while a model is packed, some dozen times, on the thread that loads it.
 *
 * It must not call back into the library, and nothing may be thrown through it.
 * @param done bytes of weights packed so far
 * @param total bytes of all weights; the last call has `done` equal to it
 * @param user_data fastgen_model_options::progress_user_data
 * @since 0.1
 */
typedef void (*fastgen_progress_fn)(uint64_t done, uint64_t total, void* user_data);

/**
 * How a model is loaded. Strings and user data are the caller's and are used during the call only.
 * @since 0.1
 */
typedef struct fastgen_model_options {
  /** `sizeof(fastgen_model_options)`. */
  size_t struct_size;
  /** Where the model runs: "cpu"; "cuda" or "cuda:<index>", an NVIDIA device, through the library
   *  `libfastgen_cuda` that lies beside this one (the environment variable `FASTGEN_CUDA_LIBRARY` may
   *  name another place). NULL: "cpu". */
  const char* device;
  /** Kernel set of the CPU. NULL: the environment variable `FASTGEN_ISA`, else the best one; must be
   *  NULL for another device. */
  const char* isa;
  /** Type that weights are packed as: "float32", "float16", "bfloat16", "int8" or "int4" (the integers
   *  with a float16 scale for every 32 inputs of an output, int8 on the CPU for every 128; there the
   *  embedding and the head of "int4" have 8 bits). NULL or "": what the files say that `fastgen convert --weight_dtype` wrote, else
   *  "float32". Files of fewer bits can be loaded as any type: their weights are rounded again. */
  const char* weight_dtype;
  /** Threads that compute on the CPU, 1 to 1024. 0: the environment variable `FASTGEN_NUM_THREADS`,
   *  else the processors that this process may use. */
  int32_t num_threads;
  /** Told how far packing has come; may be NULL. */
  fastgen_progress_fn progress;
  /** Handed to `progress`; may be NULL. */
  void* progress_user_data;
  /** Where the tensors that fastgen_model_create() is given lie: "cpu", memory of the host; "cuda" or
   *  "cuda:<index>", memory of that device, which must be the one that `device` names: they are packed
   *  there and not copied to the host. NULL: "cpu". */
  const char* tensor_device;
  /** Stream of `tensor_device`, if that is no "cpu". */
  void* stream;
  /** Type that keys and values are kept as: on the CPU "float32", "float16", "bfloat16" or "int8" (with
   *  a float32 scale for every position's key and value of a head); on an NVIDIA device the one that
   *  goes with `weight_dtype`: "float32" with "float32", "bfloat16" with "bfloat16", else "float16".
   *  NULL: the device's; on the CPU "float32" with "float32", "float16" with "float16", else "bfloat16". */
  const char* cache_dtype;
} fastgen_model_options;

/**
 * Fills options with the defaults: "cpu", the best kernel set, the type of the files, all processors.
 * @param[out] options NULL: nothing happens
 * @since 0.1
 */
FASTGEN_API void fastgen_model_options_init(fastgen_model_options* options);

/**
 * Loads a model directory: HuggingFace GPT-2 (`config.json`, `model.safetensors`), which is also
 * what `fastgen convert` writes, or an export (`fastgen.json`, `gpt.pdiparams`), which is what
 * `fastgen export` writes.
 *
 * The file is mapped, packed and unmapped: afterwards there is one copy of the weights in memory
 * and the files may be removed.
 * @param directory its path
 * @param options NULL for the defaults
 * @param[out] model to be given to fastgen_model_free()
 * @retval FASTGEN_INVALID_ARGUMENT an option is outside what is allowed
 * @retval FASTGEN_NOT_FOUND the directory or one of its files is not there or cannot be read
 * @retval FASTGEN_BAD_FILE a file is truncated, foreign or contradicts itself
 * @retval FASTGEN_UNSUPPORTED this build lacks the device or the type of weights or cache, this machine
 *         the instruction set or the threads
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_model_load(const char* directory,
                                              const fastgen_model_options* options,
                                              fastgen_model** model);

/**
 * Type of the elements of a tensor.
 * @since 0.1
 */
typedef enum fastgen_dtype {
  /** IEEE 754, 4 bytes. */
  FASTGEN_FLOAT32 = 0,
  /** IEEE 754, 2 bytes. */
  FASTGEN_FLOAT16 = 1,
  /** The upper half of a float32, 2 bytes. */
  FASTGEN_BFLOAT16 = 2,
  /** 4 bytes, for tokens. */
  FASTGEN_INT32 = 3,
  /** 8 bytes, for tokens. */
  FASTGEN_INT64 = 4
} fastgen_dtype;

/**
 * A tensor in memory that the caller owns, dense and row-major. It comes in arrays, so it has no
 * `struct_size` and never grows: which memory it is stands with the call, for all tensors of it.
 * @since 0.1
 */
typedef struct fastgen_tensor {
  /** Name in the checkpoint, see fastgen_model_create(). */
  const char* name;
  /** [shape], at any address of the host; on a device at a multiple of an element's size. */
  const void* data;
  /** Type of the elements: ::FASTGEN_FLOAT32, ::FASTGEN_FLOAT16 or ::FASTGEN_BFLOAT16. */
  fastgen_dtype dtype;
  /** Dimensions, 1 to 4. */
  int32_t num_dims;
  /** Sizes, the first `num_dims` of them at least 1; the others are not read. */
  int64_t shape[4];
} fastgen_tensor;

/**
 * Makes a model of tensors in memory, which are read during the call only.
 *
 * Names are those of HuggingFace (`wte.weight`, `h.0.attn.c_attn.weight`, ..., with or without
 * `transformer.`) or those of PaddleNLP (`gpt.embeddings.word_embeddings.weight`,
 * `gpt.decoder.layers.0.self_attn.q_proj.weight`, ...). Linear weights are [in, out].
 * A separate head (`lm_head.weight`, [vocab_size, hidden_size]) is used when it is given and is not
 * the embedding itself. Other names are an error.
 * @param config shape of the network; the special tokens are remembered, no more
 * @param tensors [num_tensors], in any order
 * @param num_tensors how many
 * @param options NULL for the defaults
 * @param[out] model to be given to fastgen_model_free()
 * @retval FASTGEN_INVALID_ARGUMENT an option or a member of `config` is outside what is allowed; a
 *         tensor has no name, data or sizes, or does not lie on `tensor_device`
 * @retval FASTGEN_BAD_FILE a tensor is missing, unknown, given twice or of another shape than
 *         `config` asks for
 * @retval FASTGEN_UNSUPPORTED this build lacks the device or the type of weights or cache, this machine
 *         the instruction set or the threads
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_model_create(const fastgen_config* config,
                                                const fastgen_tensor* tensors, size_t num_tensors,
                                                const fastgen_model_options* options,
                                                fastgen_model** model);

/**
 * Sums up the bytes of tensors, to tell whether they have been written to: the same bytes give the
 * same sum, and a change of one element always gives another. A pass over them at the speed that the
 * memory has.
 *
 * Sums of different tensors, devices or versions of the library cannot be compared.
 * @param tensors [num_tensors], whose names are for messages only
 * @param num_tensors how many
 * @param device where they lie: "cpu" or NULL; "cuda" or "cuda:<index>"
 * @param stream stream of `device`, if that is no "cpu"
 * @param[out] checksum the sum
 * @retval FASTGEN_INVALID_ARGUMENT a tensor has no data or sizes, or does not lie on `device`
 * @retval FASTGEN_UNSUPPORTED `device` is none of these, or cannot be had
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_checksum(const fastgen_tensor* tensors, size_t num_tensors,
                                            const char* device, void* stream, uint64_t* checksum);

/**
 * Rounds a matrix of weights to a type, for a file: to the same bits as a model that is loaded with this
 * `weight_dtype` on the CPU. `fastgen convert` writes its files with it.
 *
 * Inputs come in groups of 32, of which the last may be shorter; an output has a scale for each, and the
 * weight is scale * q. The number of groups is (in + 31) / 32. With "int8" the four groups of 128 inputs have
 * the same scale. Threads are those of a model.
 * @param matrix 2 dimensions: [in, out] of a linear layer, or [out, in] of a table
 * @param is_table 1: an embedding or a head; 0: a linear layer
 * @param weight_dtype "float16" or "bfloat16"; "int8"; or "int4", which no table can have: with the
 *        layers in int4, embedding and head are int8
 * @param[out] values at a multiple of 2. float16 and bfloat16: [shape of `matrix`], 2 bytes each, nearest,
 *        ties to even, saturated. int8: [shape of `matrix`], int8, -127 to 127. int4: [(in + 1) / 2, out],
 *        uint8, input 2 k as q + 8 in the low and 2 k + 1 in the high half, 8 past the last input.
 * @param[out] scales float16, at a multiple of 2: [groups, out], or [out, groups] of a table. Not used,
 *        and may be NULL, for float16 and bfloat16.
 * @retval FASTGEN_INVALID_ARGUMENT the matrix has no name, data or 2 dimensions; there is no such type, or
 *         not for a table
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_quantize(const fastgen_tensor* matrix, int32_t is_table,
                                            const char* weight_dtype, void* values, void* scales);

/**
 * Shape and special tokens of a model.
 * @param model the model
 * @param[out] config with `struct_size` set
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_model_get_config(const fastgen_model* model,
                                                    fastgen_config* config);

/**
 * How a model was loaded and what it costs. Strings live as long as the model.
 * @since 0.1
 */
typedef struct fastgen_model_info {
  /** `sizeof(fastgen_model_info)`. */
  size_t struct_size;
  /** Where it runs, as `device` of the options named it. */
  const char* device;
  /** Kernel set in use; of an NVIDIA device its architecture, "sm_90". */
  const char* isa;
  /** Type that its weights are packed as. */
  const char* weight_dtype;
  /** Threads that compute; 0 on an NVIDIA device. */
  int32_t num_threads;
  /** Bytes of packed weights in memory, padding included. */
  uint64_t weight_bytes;
  /** Bytes of weights that a decode step of one row reads. */
  uint64_t step_bytes;
  /** Bytes of KV cache for one position of one sequence. */
  uint64_t cache_bytes_per_token;
  /** Type that its keys and values are kept as. */
  const char* cache_dtype;
} fastgen_model_info;

/**
 * How a model was loaded and what it costs.
 * @param model the model
 * @param[out] info with `struct_size` set
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_model_get_info(const fastgen_model* model,
                                                  fastgen_model_info* info);

/**
 * Gives a model back. Its memory is released once its last session is freed.
 * @param model NULL: nothing happens
 * @since 0.1
 */
FASTGEN_API void fastgen_model_free(fastgen_model* model);

/**
 * Logits of every position of one token sequence, without generating.
 * @param model the model
 * @param tokens [length], each from 0 to vocab_size - 1
 * @param length 1 to max_positions
 * @param[out] logits [length, vocab_size], float32: row i is the distribution after tokens[0..i].
 *        A call that fails may have written part of it.
 * @retval FASTGEN_INVALID_ARGUMENT `length` or a token is outside what is allowed
 * @retval FASTGEN_OUT_OF_MEMORY there is no memory for the cache of `length` positions
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_model_logits(fastgen_model* model, const int32_t* tokens,
                                                size_t length, float* logits);

/** @} */

/**
 * @defgroup generation Generation
 * @{
 */

/**
 * Requests that run together on one model, in the order of submission. One thread at a time.
 * @since 0.1
 */
typedef struct fastgen_session fastgen_session;

/**
 * How the next token is chosen from the logits.
 * @since 0.1
 */
typedef enum fastgen_decode_strategy {
  /** The largest logit; ties go to the smallest token id. */
  FASTGEN_GREEDY_SEARCH = 0,
  /** A draw from the filtered distribution. */
  FASTGEN_SAMPLING = 1
} fastgen_decode_strategy;

/**
 * Why a sequence ended.
 * @since 0.1
 */
typedef enum fastgen_finish_reason {
  /** It has not ended yet. */
  FASTGEN_RUNNING = 0,
  /** `eos_token_id` was generated and is the last token. */
  FASTGEN_FINISH_EOS = 1,
  /** `max_length` new tokens were generated. */
  FASTGEN_FINISH_LENGTH = 2,
  /** fastgen_session_cancel(). */
  FASTGEN_FINISH_CANCELLED = 3,
  /** A fastgen_session_step() that failed; the tokens up to there are readable. */
  FASTGEN_FINISH_FAILED = 4
} fastgen_finish_reason;

/**
 * Options of one request, with PaddleNLP's names and meanings.
 * @since 0.1
 */
typedef struct fastgen_options {
  /** `sizeof(fastgen_options)`. */
  size_t struct_size;
  /** A ::fastgen_decode_strategy. */
  int32_t decode_strategy;
  /** The most new tokens, at least 1; with the prompt at most the model's max_positions. */
  int32_t max_length;
  /** No eos among the first `min_length` new tokens; 0: off. */
  int32_t min_length;
  /** Keep the k most probable tokens and their ties; 0: off. */
  int32_t top_k;
  /** Keep the smallest set of the most probable tokens whose mass exceeds p; 0 or 1: off. */
  float top_p;
  /** What logits are divided by before sampling, above 0. */
  float temperature;
  /** Divides the logits above 0 of tokens that occurred, multiplies the others; above 0; 1: off. */
  float repetition_penalty;
  /** No n tokens in a row occur twice; 0: off. */
  int32_t no_repeat_ngram_size;
  /** Sequences for the prompt, 1 to 65536; 1 for greedy search. */
  int32_t num_return_sequences;
  /** Token that ends a sequence; -1: none. */
  int32_t eos_token_id;
  /** First new token if the prompt is one token long; -1: none. */
  int32_t forced_bos_token_id;
  /** The token at `max_length`; -1: none. */
  int32_t forced_eos_token_id;
  /** 1: `seed` is used; 0: one is drawn from the operating system, see fastgen_sequence::seed. */
  int32_t has_seed;
  /** Any 64 bits: the same seed, prompt and options give the same tokens. */
  uint64_t seed;
  /** Index of the first returned sequence in the draws of its seed, the others follow; the draw at
   *  a step is Philox(key = seed, counter = (sequence, step)). Requests that share a seed and not
   *  their samples differ in it. */
  uint32_t first_sequence;
  /** 1: keep the raw logits of every step (tests, analysis); 0: do not. */
  int32_t keep_logits;
} fastgen_options;

/**
 * Fills options with the defaults: greedy search for 20 tokens, every filter off, no special token.
 * @param[out] options NULL: nothing happens
 * @since 0.1
 */
FASTGEN_API void fastgen_options_init(fastgen_options* options);

/**
 * How a session runs.
 * @since 0.1
 */
typedef struct fastgen_session_options {
  /** `sizeof(fastgen_session_options)`. */
  size_t struct_size;
  /** Sequences decoded together, 1 to 4096, more wait; 0: 256. */
  int32_t max_rows;
} fastgen_session_options;

/**
 * Fills options with the defaults.
 * @param[out] options NULL: nothing happens
 * @since 0.1
 */
FASTGEN_API void fastgen_session_options_init(fastgen_session_options* options);

/**
 * Makes a session. It keeps its model alive: the model's handle may be freed before it.
 * @param model the model
 * @param options NULL for the defaults
 * @param[out] session to be given to fastgen_session_free()
 * @retval FASTGEN_INVALID_ARGUMENT an option is outside what is allowed
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_session_create(fastgen_model* model,
                                                  const fastgen_session_options* options,
                                                  fastgen_session** session);

/**
 * Ends every sequence of a session and gives its cache back.
 * @param session NULL: nothing happens
 * @since 0.1
 */
FASTGEN_API void fastgen_session_free(fastgen_session* session);

/**
 * Adds a request; it may join while others run, and takes memory for its cache when its turn comes.
 * Nothing of it depends on them: the same prompt, options and seed give the same tokens alone and
 * in any company.
 * @param session the session
 * @param prompt [length], each from 0 to vocab_size - 1; copied
 * @param length at least 1; `length` + max_length may not exceed the model's max_positions
 * @param options NULL for the defaults
 * @param[out] first_id num_return_sequences sequences get the ids first_id, first_id + 1, ...; a
 *        session gives no id twice
 * @retval FASTGEN_INVALID_ARGUMENT an option, the length or a token is outside what is allowed
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_session_submit(fastgen_session* session, const int32_t* prompt,
                                                  size_t length, const fastgen_options* options,
                                                  uint64_t* first_id);

/**
 * Prompts as a framework has them: the rows of one tensor, padded on the right.
 * @since 0.1
 */
typedef struct fastgen_batch {
  /** `sizeof(fastgen_batch)`. */
  size_t struct_size;
  /** [rows, width] tokens; of each row those behind its length are not looked at. */
  const void* tokens;
  /** Type of `tokens`: ::FASTGEN_INT32 or ::FASTGEN_INT64. */
  fastgen_dtype dtype;
  /** Prompts, at least 1. */
  size_t rows;
  /** Tokens from one row to the next, at least 1. */
  size_t width;
  /** [rows], length of each prompt, 1 to `width`, in memory of the host. NULL: all are full. */
  const int64_t* lengths;
  /** [rows], options of each prompt, of which each may be NULL for the defaults. NULL: all are. */
  const fastgen_options* const* options;
  /** Where `tokens` lie: "cpu", or the device that the model runs on. NULL: "cpu". */
  const char* device;
  /** Stream of `device`, if that is no "cpu". */
  void* stream;
} fastgen_batch;

/**
 * Fills a batch with nothing: no tokens, ::FASTGEN_INT32, memory of the host.
 * @param[out] batch NULL: nothing happens
 * @since 0.1
 */
FASTGEN_API void fastgen_batch_init(fastgen_batch* batch);

/**
 * Adds a request for every row of a batch, as fastgen_session_submit() does; all of them or none.
 * The tokens are read during the call, which waits for them.
 * @param session the session
 * @param batch the prompts and their options
 * @param[out] first_ids [rows], the id of the first sequence of each row
 * @retval FASTGEN_INVALID_ARGUMENT a member of `batch`, an option, a length or a token is outside what
 *         is allowed, which the message names with its row; or the tokens do not lie on `device`
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_session_submit_batch(fastgen_session* session,
                                                        const fastgen_batch* batch,
                                                        uint64_t* first_ids);

/**
 * Runs up to `max_steps` steps. A step feeds a bounded number of prompt tokens or gives every
 * running sequence one token, so a caller that loops stays responsive.
 *
 * If it fails, the sequences that the failure concerns have ended with ::FASTGEN_FINISH_FAILED, the
 * session stays usable and all others go on with the next call. A sequence whose cache finds no
 * memory waits while others of its session run, and fails when none does.
 * @param session the session
 * @param max_steps at least 0; fewer are run when all sequences have ended
 * @param[out] unfinished sequences that still run or wait; may be NULL
 * @retval FASTGEN_INVALID_ARGUMENT `max_steps` is negative
 * @retval FASTGEN_OUT_OF_MEMORY there is no memory for a sequence, or for the logits it keeps
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_session_step(fastgen_session* session, int32_t max_steps,
                                                size_t* unfinished);

/**
 * State of a sequence. Its pointers are valid until the sequence is released, or its session steps
 * or is freed.
 * @since 0.1
 */
typedef struct fastgen_sequence {
  /** `sizeof(fastgen_sequence)`. */
  size_t struct_size;
  /** [length], new tokens only; eos is one of them. */
  const int32_t* tokens;
  /** New tokens so far. */
  size_t length;
  /** A ::fastgen_finish_reason. */
  int32_t finish_reason;
  /** Mean over the new tokens: log-probability before temperature and filters (sampling), processed
   *  logit (greedy search), as PaddleNLP reports; 0 without a token. */
  float score;
  /** The seed used, drawn or given; greedy search makes no draw. */
  uint64_t seed;
  /** The sequence index used, see fastgen_options::first_sequence. */
  uint32_t sequence;
  /** [length, vocab_size] if `keep_logits` was set, else NULL. */
  const float* logits;
} fastgen_sequence;

/**
 * State of a sequence, running or ended.
 * @param session the session
 * @param id of a sequence that has not been released
 * @param[out] sequence with `struct_size` set
 * @retval FASTGEN_INVALID_ARGUMENT the session has no such sequence
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_session_get(const fastgen_session* session, uint64_t id,
                                               fastgen_sequence* sequence);

/**
 * Where sequences are written to, in the form that frameworks have.
 * @since 0.1
 */
typedef struct fastgen_batch_output {
  /** `sizeof(fastgen_batch_output)`. */
  size_t struct_size;
  /** [count, width] tokens; may be NULL. */
  void* tokens;
  /** Type of `tokens`: ::FASTGEN_INT32 or ::FASTGEN_INT64. */
  fastgen_dtype dtype;
  /** Tokens of a row: at least as many as the longest sequence has. */
  size_t width;
  /** What is written behind a sequence that is shorter than `width`; -1: none is. */
  int32_t pad_token_id;
  /** [count], see fastgen_sequence::score; may be NULL. */
  float* scores;
  /** Where `tokens` and `scores` lie: "cpu", or the device that the model runs on. NULL: "cpu". */
  const char* device;
  /** Stream of `device`, if that is no "cpu". */
  void* stream;
} fastgen_batch_output;

/**
 * Fills an output with nothing: no memory, ::FASTGEN_INT32, no padding, memory of the host.
 * @param[out] output NULL: nothing happens
 * @since 0.1
 */
FASTGEN_API void fastgen_batch_output_init(fastgen_batch_output* output);

/**
 * Writes the tokens and scores of sequences, running or ended, one below the other. On a device that
 * is put on the stream, and may be yet to come when the call returns.
 * @param session the session
 * @param ids [count], of sequences that have not been released
 * @param count at least 1
 * @param output where to
 * @retval FASTGEN_INVALID_ARGUMENT the session has no such sequence; a sequence is longer than `width`,
 *         or shorter and there is no `pad_token_id`; or the memory does not lie on `device`. Nothing
 *         is written then.
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_session_get_batch(const fastgen_session* session,
                                                     const uint64_t* ids, size_t count,
                                                     const fastgen_batch_output* output);

/**
 * Ends a sequence where it is and gives its cache back; its tokens stay readable. Ending an ended
 * one does nothing.
 * @param session the session
 * @param id of a sequence that has not been released
 * @retval FASTGEN_INVALID_ARGUMENT the session has no such sequence
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_session_cancel(fastgen_session* session, uint64_t id);

/**
 * Forgets a sequence and its tokens, ending it first if it runs.
 * @param session the session
 * @param id of a sequence that has not been released
 * @retval FASTGEN_INVALID_ARGUMENT the session has no such sequence
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_session_release(fastgen_session* session, uint64_t id);

/** @} */

/**
 * @defgroup text Text
 * @{
 */

/**
 * Byte-level BPE: text to token ids and back. It never changes, and any number of threads may use
 * it at the same time.
 * @since 0.1
 */
typedef struct fastgen_tokenizer fastgen_tokenizer;

/**
 * Decodes token ids as they come. One thread at a time.
 * @since 0.1
 */
typedef struct fastgen_text_stream fastgen_text_stream;

/**
 * Loads the byte-level BPE tokenizer of a model directory: `tokenizer.json`, or else `vocab.json`
 * or `vocab.txt` (one token a line; the number of the line, from 0, is its id) with `merges.txt`.
 *
 * With the latter, `<|endoftext|>` and what `special_tokens_map.json` and `tokenizer_config.json`
 * name as bos, eos, pad and unk are special tokens where the vocabulary has them; of an export those
 * that its `fastgen.json` lists.
 * @param directory its path
 * @param[out] tokenizer to be given to fastgen_tokenizer_free()
 * @retval FASTGEN_NOT_FOUND there is no tokenizer, or a file cannot be read
 * @retval FASTGEN_BAD_FILE a file is damaged or contradicts another
 * @retval FASTGEN_UNSUPPORTED the tokenizer is of another kind
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_tokenizer_load(const char* directory,
                                                  fastgen_tokenizer** tokenizer);

/**
 * Gives a tokenizer back. Its memory is released once its last text stream is freed.
 * @param tokenizer NULL: nothing happens
 * @since 0.1
 */
FASTGEN_API void fastgen_tokenizer_free(fastgen_tokenizer* tokenizer);

/**
 * Number of tokens, special ones included. A model may have more.
 * @param tokenizer the tokenizer
 * @return 0 for NULL
 * @since 0.1
 */
FASTGEN_API size_t fastgen_tokenizer_vocab_size(const fastgen_tokenizer* tokenizer);

/**
 * Id of one token as the vocabulary writes it, e.g. "<|endoftext|>".
 * @param tokenizer the tokenizer
 * @param token its text
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
 * @param tokenizer the tokenizer
 * @param text [size] bytes; may hold NULs; may be NULL if `size` is 0
 * @param size at most 2^31 - 1
 * @param[out] tokens [capacity], the first `capacity` ids; may be NULL if `capacity` is 0. There
 *         are never more ids than bytes, so a capacity of `size` always suffices.
 * @param capacity ids that `tokens` has room for
 * @param[out] length ids that the text has, which may be more than `capacity`
 * @retval FASTGEN_INVALID_ARGUMENT the text is too long, or has a byte for which the vocabulary has
 *         no token
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_tokenizer_encode(const fastgen_tokenizer* tokenizer,
                                                    const char* text, size_t size, int32_t* tokens,
                                                    size_t capacity, size_t* length);

/**
 * Text of token ids: valid UTF-8, without a NUL at the end. Bytes that are not UTF-8 become U+FFFD,
 * one for each maximal subpart. Ids that the vocabulary does not have are left out (a model's
 * vocabulary may be padded); a negative one is an error.
 * @param tokenizer the tokenizer
 * @param tokens [length], each at least 0; may be NULL if `length` is 0
 * @param length how many
 * @param skip_special_tokens 1: special tokens are left out; 0: they are written out
 * @param[out] text [capacity], the first `capacity` bytes; may be NULL if `capacity` is 0
 * @param capacity bytes that `text` has room for
 * @param[out] size bytes that the text has, which may be more than `capacity`
 * @retval FASTGEN_INVALID_ARGUMENT a token is negative, or `skip_special_tokens` is not 0 or 1
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_tokenizer_decode(const fastgen_tokenizer* tokenizer,
                                                    const int32_t* tokens, size_t length,
                                                    int32_t skip_special_tokens, char* text,
                                                    size_t capacity, size_t* size);

/**
 * Makes a text stream, which decodes tokens as they come and never gives half a UTF-8 character.
 * Its pieces joined are what fastgen_tokenizer_decode() makes of all tokens. It keeps its tokenizer
 * alive: the tokenizer's handle may be freed before it.
 * @param tokenizer the tokenizer
 * @param skip_special_tokens 1: special tokens are left out; 0: they are written out
 * @param[out] stream to be given to fastgen_text_stream_free()
 * @retval FASTGEN_INVALID_ARGUMENT `skip_special_tokens` is not 0 or 1
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_text_stream_create(const fastgen_tokenizer* tokenizer,
                                                      int32_t skip_special_tokens,
                                                      fastgen_text_stream** stream);

/**
 * Adds tokens and gives the text that is now certain, often none.
 * @param stream the stream
 * @param tokens [length], each at least 0; may be NULL if `length` is 0
 * @param length how many
 * @param[out] text [size] bytes, followed by a NUL that is not counted; the stream's, valid until
 *        its next call that succeeds
 * @param[out] size may be 0
 * @retval FASTGEN_INVALID_ARGUMENT a token is negative
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_text_stream_push(fastgen_text_stream* stream,
                                                    const int32_t* tokens, size_t length,
                                                    const char** text, size_t* size);

/**
 * Gives what is left at the end of a sequence, an incomplete character as U+FFFD. The stream may
 * then begin another sequence.
 * @param stream the stream
 * @param[out] text [size] bytes, as fastgen_text_stream_push() gives them
 * @param[out] size may be 0
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_text_stream_flush(fastgen_text_stream* stream, const char** text,
                                                     size_t* size);

/**
 * Gives a text stream back.
 * @param stream NULL: nothing happens
 * @since 0.1
 */
FASTGEN_API void fastgen_text_stream_free(fastgen_text_stream* stream);

/** @} */

/**
 * @defgroup measurement Measurement
 * @{
 */

/**
 * Read bandwidth of this machine's memory with the model's threads: a pass reads one buffer once.
 * Other calls on the model wait for it.
 * @param model the model, whose threads read
 * @param bytes size of the buffer, at least 1 MiB, and more than the caches hold to mean anything;
 *        memory for it is taken and given back
 * @param passes the best of these is reported; at least 1
 * @param[out] bytes_per_second the bandwidth
 * @retval FASTGEN_INVALID_ARGUMENT `bytes` or `passes` is too small
 * @retval FASTGEN_OUT_OF_MEMORY there is no memory for the buffer
 * @since 0.1
 */
FASTGEN_API fastgen_status fastgen_measure_read_bandwidth(fastgen_model* model, uint64_t bytes,
                                                          int32_t passes, double* bytes_per_second);

/** @} */

#ifdef __cplusplus
}
#endif

#endif /* FASTGEN_FASTGEN_H_ */
