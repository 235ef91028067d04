// An exported program inside Paddle, whichever C++ interface of Paddle runs it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace fastgen::apps {

// A feed of the program; exactly one of the vectors is filled.
struct Feed {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<int64_t> int64s;
  std::vector<int32_t> int32s;
  std::vector<float> floats;
};

struct ProgramOutput {
  int64_t rows = 0;
  int64_t columns = 0;
  std::vector<int64_t> ids;   // [rows, columns]: new tokens, eos, then pad
  std::vector<float> scores;  // [rows]
};

class PaddleProgram {
 public:
  virtual ~PaddleProgram() = default;

  // `feeds` in the order of the program's inputs. Throws std::runtime_error with one sentence.
  virtual ProgramOutput Run(const std::vector<Feed>& feeds) = 0;

  // Loads `directory`/`program` with `directory`/gpt.pdiparams, after registering the op
  // `fusion_gpt` from the file `op_library`. Throws std::runtime_error with one sentence.
  static std::unique_ptr<PaddleProgram> Load(const std::string& directory,
                                             const std::string& program,
                                             const std::string& op_library);
};

// Paddle's exceptions carry a stack and a summary; of those the sentence that says what happened.
std::string PaddleSentence(const std::string& message);

}  // namespace fastgen::apps
