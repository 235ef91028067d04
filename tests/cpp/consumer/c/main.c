/* An application in C that has nothing but the installed library and a model directory. */
#include <fastgen/fastgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(fastgen_status status, const char* what) {
  if (status == FASTGEN_OK) return;
  fprintf(stderr, "%s: %s\n", what, fastgen_last_error());
  exit(1);
}

static void require(int condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "it does not hold that %s\n", what);
  exit(1);
}

int main(int argc, char** argv) {
  static const char text[] = "Return a list of";
  enum { kMaxPrompt = sizeof text, kMaxLength = 16 };
  int32_t prompt[kMaxPrompt];
  fastgen_model* model = NULL;
  fastgen_tokenizer* tokenizer = NULL;
  fastgen_session* session = NULL;
  fastgen_options options;
  fastgen_sequence sequence;
  char output[1024];
  size_t length, size, unfinished = 1;
  uint64_t id;

  if (argc != 2) return 2;
  require(fastgen_isa_count() >= 1, "there is a kernel set");
  require(fastgen_model_load("/nonexistent/model", NULL, &model) == FASTGEN_NOT_FOUND,
          "a model that is not there is not found");
  require(model == NULL && strstr(fastgen_last_error(), "/nonexistent/model") != NULL,
          "the error names the directory");

  check(fastgen_model_load(argv[1], NULL, &model), "model");
  check(fastgen_tokenizer_load(argv[1], &tokenizer), "tokenizer");
  check(fastgen_tokenizer_encode(tokenizer, text, strlen(text), prompt, kMaxPrompt, &length),
        "encode");
  require(length >= 1 && length <= strlen(text), "there are no more tokens than bytes");

  fastgen_options_init(&options);
  options.max_length = kMaxLength;
  check(fastgen_session_create(model, NULL, &session), "session");
  check(fastgen_session_submit(session, prompt, length, &options, &id), "submit");
  while (unfinished > 0) check(fastgen_session_step(session, 4, &unfinished), "step");
  sequence.struct_size = sizeof sequence;
  check(fastgen_session_get(session, id, &sequence), "get");
  require(sequence.length == kMaxLength, "as many tokens come as were asked for");
  require(sequence.finish_reason == FASTGEN_FINISH_LENGTH, "the length ended the sequence");
  check(fastgen_tokenizer_decode(tokenizer, sequence.tokens, sequence.length, 1, output,
                                 sizeof output, &size),
        "decode");
  require(size >= 1 && size <= sizeof output, "the tokens are a text");
  fprintf(stderr, "%s%.*s\n", text, (int)size, output);

  fastgen_session_free(session);
  fastgen_tokenizer_free(tokenizer);
  fastgen_model_free(model);
  puts(fastgen_version());
  return 0;
}
