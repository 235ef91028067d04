// Requests that run together on one model: who waits, whose prompt is being fed, who decodes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "engine/model.h"
#include "engine/request.h"
#include "fastgen/fastgen.h"

namespace fastgen::engine {

// One sequence of a request, as far as it has come.
struct Sequence {
  uint64_t id = 0;
  SamplingParams sampling;
  bool keep_logits = false;
  fastgen_finish_reason finish_reason = FASTGEN_RUNNING;
  std::vector<int32_t> tokens;  // new ones only
  std::vector<float> logits;    // [tokens, vocab] if keep_logits
  float score = 0.0f;           // mean over the tokens

  // While it waits or runs. Sequences with equal prompts may share one vector.
  std::shared_ptr<const std::vector<int32_t>> prompt;
  int32_t slot = -1;      // -1: waits
  int32_t prefilled = 0;  // prompt tokens in the cache

  // Another open sequence whose first `shared` prompt tokens are the same: they are waited for and
  // copied.
  Sequence* leader = nullptr;
  int32_t shared = 0;
  int32_t followers = 0;  // that wait for this one
};

// Rows are taken up in the order of submission, as far as max_rows and the device's memory allow.
// What the prompts of open sequences begin with alike is fed once and copied: all of equal prompts, as
// many tokens of different ones as suit the device. While some sequences decode and others' prompts are fed,
// steps alternate between the two.
//
// A failure ends the sequences that it concerns with FASTGEN_FINISH_FAILED and is thrown once; all
// others go on with the next step. A sequence for which the device has no memory waits while others
// of the session are open, because they give memory back; if none is, it fails.
class Session {
 public:
  // max_rows >= 1.
  Session(std::shared_ptr<const Model> model, int32_t max_rows);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Returns the id of the first of options.num_return_sequences sequences; ids follow one another.
  uint64_t Submit(const int32_t* prompt, size_t length, const RequestOptions& options);
  // Up to max_steps steps; returns how many sequences wait or run.
  size_t Step(int32_t max_steps);
  const Sequence& Get(uint64_t id) const;
  void Cancel(uint64_t id);
  void Release(uint64_t id);

  const Model& model() const { return *model_; }

 private:
  using Sequences = std::vector<Sequence*>;

  bool IsReady(const Sequence& sequence) const;
  Sequence& Find(uint64_t id) const;

  void Admit();
  // Chooses whom a sequence follows, if anybody. `before`: how many of open_ it may wait for; of the
  // others it takes what is in the cache already, so nobody waits in a circle.
  void FindLeader(Sequence* sequence, size_t before);
  static void LeaveLeader(Sequence* sequence);
  // Takes over what it waits for, once that is in the cache.
  void CopyPrompt(Sequence* sequence);
  void Prefill();
  int32_t Decode(int32_t max_steps);
  int32_t StepsAtOnce(const Sequences& running, int32_t max_steps) const;
  void ReserveLogits(const Sequences& running, int32_t steps);
  void Append(Sequence* sequence, const DecodeResult& result, const float* logits);

  // Ends it and gives its slot back; it must still be taken out of waiting_ or open_.
  void Finish(Sequence* sequence, fastgen_finish_reason reason);
  void Fail(const Sequences& sequences);
  void DropFinished();

  const std::shared_ptr<const Model> model_;
  const size_t max_rows_;
  std::unordered_map<uint64_t, std::unique_ptr<Sequence>> sequences_;
  std::deque<Sequence*> waiting_;  // in the order of submission
  Sequences open_;                 // with a slot, in the order of admission
  uint64_t next_id_ = 1;
  std::shared_ptr<const std::vector<int32_t>> last_prompt_;
  bool no_memory_ = false;      // the device refused a row; try again after one is closed
  bool decode_is_due_ = false;  // the last step fed prompts

  std::vector<DecodeResult> results_;
  std::vector<int32_t> slots_;
  std::unique_ptr<float[]> logits_;
  size_t logits_size_ = 0;
};

}  // namespace fastgen::engine
