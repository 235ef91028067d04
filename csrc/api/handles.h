// What the handles of the C API point to.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "engine/model.h"
#include "engine/session.h"
#include "fastgen/fastgen.h"
#include "text/tokenizer.h"

struct fastgen_model {
  std::shared_ptr<const fastgen::engine::Model> model;
};

struct fastgen_session {
  fastgen_session(std::shared_ptr<const fastgen::engine::Model> model, int32_t max_rows)
      : session(std::move(model), max_rows) {}
  fastgen::engine::Session session;
};

struct fastgen_tokenizer {
  std::shared_ptr<const fastgen::text::Tokenizer> tokenizer;
};

struct fastgen_text_stream {
  fastgen::text::TextStream stream;
  std::string piece;  // what the last call gave
};
