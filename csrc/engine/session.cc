#include "engine/session.h"

#include <algorithm>
#include <cstddef>
#include <exception>
#include <new>
#include <string>
#include <utility>

#include "base/error.h"
#include "engine/rng.h"

namespace fastgen::engine {
namespace {

// Steps asked of the device in one call when nobody waits.
constexpr int32_t kMaxStepsAtOnce = 64;

bool IsOutOfMemory(const std::exception_ptr& failure) {
  try {
    std::rethrow_exception(failure);
  } catch (const base::Error& error) {
    return error.status() == FASTGEN_OUT_OF_MEMORY;
  } catch (const std::bad_alloc&) {
    return true;
  } catch (...) {
    return false;
  }
}

}  // namespace

Session::Session(std::shared_ptr<const Model> model, int32_t max_rows)
    : model_(std::move(model)), max_rows_(static_cast<size_t>(max_rows)) {}

Session::~Session() {
  try {
    for (Sequence* sequence : open_) Finish(sequence, FASTGEN_FINISH_CANCELLED);
  } catch (...) {
    // Only a defect of the device gets here; a destructor has nobody to tell.
  }
}

// What is not in the cache of the prompt can be fed by the first decode step: its last token, or, where
// that costs the device little, a few when no other sequence waits for them: a short prompt then has its
// first token after one pass over the weights instead of two.
bool Session::IsReady(const Sequence& sequence) const {
  if (sequence.leader) return false;
  const int32_t left = static_cast<int32_t>(sequence.prompt->size()) - sequence.prefilled;
  return left == 1 || (left <= model_->device().info().tail_tokens && sequence.followers == 0);
}

Sequence& Session::Find(uint64_t id) const {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) {
    throw base::Error(FASTGEN_INVALID_ARGUMENT,
                      "id " + std::to_string(id) + " is not a sequence of this session");
  }
  return *found->second;
}

uint64_t Session::Submit(const int32_t* prompt, size_t length, const RequestOptions& options) {
  CheckRequest(model_->config(), prompt, length, options);
  // Batches often repeat a prompt: neighbours that are equal share it.
  auto shared = last_prompt_;
  if (!shared || shared->size() != length || !std::equal(prompt, prompt + length, shared->data())) {
    shared = std::make_shared<const std::vector<int32_t>>(prompt, prompt + length);
  }
  const uint64_t seed = options.has_seed ? options.sampling.seed : RandomSeed();
  const uint64_t first_id = next_id_;
  const size_t waiting_before = waiting_.size();
  try {
    for (int32_t i = 0; i < options.num_return_sequences; ++i) {
      auto sequence = std::make_unique<Sequence>();
      sequence->id = first_id + static_cast<uint64_t>(i);
      sequence->sampling = options.sampling;
      sequence->sampling.seed = seed;
      sequence->sampling.sequence += static_cast<uint32_t>(i);
      sequence->keep_logits = options.keep_logits;
      sequence->prompt = shared;
      waiting_.push_back(sequence.get());
      sequences_.emplace(sequence->id, std::move(sequence));
    }
  } catch (...) {
    waiting_.resize(waiting_before);
    for (int32_t i = 0; i < options.num_return_sequences; ++i) {
      sequences_.erase(first_id + static_cast<uint64_t>(i));
    }
    throw;
  }
  last_prompt_ = std::move(shared);
  next_id_ += static_cast<uint64_t>(options.num_return_sequences);
  return first_id;
}

size_t Session::Step(int32_t max_steps) {
  for (int32_t left = max_steps; left > 0;) {
    Admit();
    if (open_.empty()) break;
    const bool some_ready =
        std::any_of(open_.begin(), open_.end(), [this](const Sequence* s) { return IsReady(*s); });
    const bool all_ready =
        std::all_of(open_.begin(), open_.end(), [this](const Sequence* s) { return IsReady(*s); });
    if (all_ready || (some_ready && decode_is_due_)) {
      decode_is_due_ = false;
      left -= Decode(left);
    } else {
      decode_is_due_ = true;
      Prefill();
      --left;
    }
  }
  return waiting_.size() + open_.size();
}

const Sequence& Session::Get(uint64_t id) const { return Find(id); }

void Session::Cancel(uint64_t id) {
  Sequence& sequence = Find(id);
  if (sequence.finish_reason != FASTGEN_RUNNING) return;
  if (sequence.slot < 0) waiting_.erase(std::find(waiting_.begin(), waiting_.end(), &sequence));
  Finish(&sequence, FASTGEN_FINISH_CANCELLED);
  DropFinished();
}

void Session::Release(uint64_t id) {
  Cancel(id);
  sequences_.erase(id);
}

// ---- steps ---------------------------------------------------------------------------------

void Session::Admit() {
  while (!waiting_.empty() && open_.size() < max_rows_ && !no_memory_) {
    Sequence* const sequence = waiting_.front();
    try {
      open_.reserve(open_.size() + 1);
      sequence->tokens.reserve(static_cast<size_t>(sequence->sampling.max_length));
      SequenceSpec spec;
      spec.prompt = sequence->prompt->data();
      spec.prompt_length = static_cast<int32_t>(sequence->prompt->size());
      spec.sampling = sequence->sampling;
      spec.keep_logits = sequence->keep_logits;
      FindLeader(sequence, open_.size());
      if (sequence->leader) {
        spec.like = sequence->leader->slot;
        spec.alike = sequence->shared;
      }
      sequence->slot = model_->device().Open(spec);
    } catch (...) {
      if (!open_.empty() && IsOutOfMemory(std::current_exception())) {
        LeaveLeader(sequence);
        no_memory_ = true;
        return;
      }
      waiting_.pop_front();
      Finish(sequence, FASTGEN_FINISH_FAILED);
      throw;
    }
    waiting_.pop_front();
    open_.push_back(sequence);
    CopyPrompt(sequence);
  }
}

void Session::FindLeader(Sequence* sequence, size_t before) {
  const std::vector<int32_t>& prompt = *sequence->prompt;
  for (size_t i = 0; i < open_.size(); ++i) {
    Sequence* const other = open_[i];
    if (other == sequence) continue;
    const std::vector<int32_t>& theirs = *other->prompt;
    // The last token of a prompt is fed by the step that samples.
    const size_t most = std::min(prompt.size(), theirs.size()) - 1;
    const auto end = prompt.begin() + static_cast<std::ptrdiff_t>(most);
    const auto alike =
        sequence->prompt == other->prompt
            ? static_cast<int32_t>(most)
            : static_cast<int32_t>(std::mismatch(prompt.begin(), end, theirs.begin()).first -
                                   prompt.begin());
    const bool equal = alike + 1 == static_cast<int32_t>(prompt.size()) &&
                       prompt.size() == theirs.size() && prompt.back() == theirs.back();
    const int32_t least = model_->device().info().least_shared;
    if (alike <= sequence->prefilled) continue;
    if (!equal && (least == 0 || alike < least)) continue;
    const bool is_there = other->prefilled >= alike;
    if (i >= before && !is_there) continue;
    const Sequence* const best = sequence->leader;
    if (best && (alike < sequence->shared ||
                 (alike == sequence->shared && (!is_there || best->prefilled >= alike)))) {
      continue;
    }
    LeaveLeader(sequence);
    sequence->leader = other;
    sequence->shared = alike;
    ++other->followers;
  }
}

void Session::LeaveLeader(Sequence* sequence) {
  if (sequence->leader) --sequence->leader->followers;
  sequence->leader = nullptr;
}

void Session::CopyPrompt(Sequence* sequence) {
  const Sequence* const leader = sequence->leader;
  if (!leader || leader->prefilled < sequence->shared) return;
  try {
    model_->device().CopyPrefix(leader->slot, sequence->slot, sequence->shared);
  } catch (...) {
    Fail({sequence});
    throw;
  }
  sequence->prefilled = sequence->shared;
  LeaveLeader(sequence);
}

void Session::Prefill() {
  Sequences fed;
  std::vector<PrefillChunk> chunks;
  int32_t left = model_->device().info().prefill_tokens;
  for (size_t i = 0; i < open_.size() && left > 0; ++i) {
    Sequence* const sequence = open_[i];
    if (sequence->leader || IsReady(*sequence)) continue;
    PrefillChunk chunk;
    chunk.slot = sequence->slot;
    chunk.begin = sequence->prefilled;
    chunk.count =
        std::min(left, static_cast<int32_t>(sequence->prompt->size()) - 1 - sequence->prefilled);
    chunks.push_back(chunk);
    fed.push_back(sequence);
    left -= chunk.count;
  }
  try {
    // None are left when all wait for what is there: then only the copying below is to be done.
    if (!chunks.empty()) model_->device().Prefill(chunks.data(), chunks.size());
  } catch (...) {
    Fail(fed);
    throw;
  }
  for (size_t i = 0; i < fed.size(); ++i) fed[i]->prefilled += chunks[i].count;
  // By index: a failure takes its sequence out of open_ and leaves by an exception.
  for (size_t i = 0; i < open_.size(); ++i) CopyPrompt(open_[i]);
}

int32_t Session::StepsAtOnce(const Sequences& running, int32_t max_steps) const {
  if (!waiting_.empty() || running.size() < open_.size()) return 1;
  int32_t longest = 1;
  for (const Sequence* sequence : running) {
    if (sequence->keep_logits) return 1;  // logits of a step are large
    const auto generated = static_cast<int32_t>(sequence->tokens.size());
    longest = std::max(longest, sequence->sampling.max_length - generated);
  }
  return std::min({max_steps, longest, kMaxStepsAtOnce});
}

// Makes room for the logits of `steps` steps, so that nothing can fail once the device has decoded.
void Session::ReserveLogits(const Sequences& running, int32_t steps) {
  const auto vocab = static_cast<size_t>(model_->config().vocab_size);
  Sequences keepers;
  for (Sequence* sequence : running) {
    if (sequence->keep_logits) keepers.push_back(sequence);
  }
  const size_t size = keepers.empty() ? 0 : static_cast<size_t>(steps) * running.size() * vocab;
  try {
    for (Sequence* sequence : keepers) {
      const size_t needed = (sequence->tokens.size() + static_cast<size_t>(steps)) * vocab;
      const size_t capacity = sequence->logits.capacity();
      if (needed <= capacity) continue;
      const size_t most = static_cast<size_t>(sequence->sampling.max_length) * vocab;
      sequence->logits.reserve(std::max(needed, std::min(most, 2 * capacity)));
    }
    if (size > logits_size_ || size == 0) {
      logits_.reset();
      logits_size_ = 0;
      if (size > 0) logits_.reset(new float[size]);  // not zeroed: the device writes it
      logits_size_ = size;
    }
  } catch (...) {
    Fail(keepers);
    throw;
  }
}

int32_t Session::Decode(int32_t max_steps) {
  Sequences running;
  for (Sequence* sequence : open_) {
    if (IsReady(*sequence)) running.push_back(sequence);
  }
  const size_t count = running.size();
  const int32_t steps = StepsAtOnce(running, max_steps);
  results_.resize(static_cast<size_t>(steps) * count);
  slots_.clear();
  for (const Sequence* sequence : running) slots_.push_back(sequence->slot);
  ReserveLogits(running, steps);
  int32_t done = 0;
  try {
    done = model_->device().Decode(slots_.data(), count, steps, results_.data(), logits_.get());
    const auto first_step_end = results_.begin() + static_cast<std::ptrdiff_t>(count);
    if (done < 1 || done > steps ||
        std::any_of(results_.begin(), first_step_end,
                    [](const DecodeResult& result) { return result.token < 0; })) {
      throw base::Error(FASTGEN_INTERNAL, "the device gave a running sequence no token");
    }
  } catch (...) {
    Fail(running);
    throw;
  }
  for (Sequence* sequence : running) {
    sequence->prefilled = static_cast<int32_t>(sequence->prompt->size()) - 1;
  }
  const auto vocab = static_cast<size_t>(model_->config().vocab_size);
  for (size_t at = 0; at < static_cast<size_t>(done) * count; ++at) {
    if (results_[at].token < 0) continue;
    Append(running[at % count], results_[at], logits_ ? logits_.get() + at * vocab : nullptr);
  }
  DropFinished();
  return done;
}

void Session::Append(Sequence* sequence, const DecodeResult& result, const float* logits) {
  // The reference's running mean, in its precision and order of operations.
  const auto n = static_cast<float>(sequence->tokens.size());
  sequence->score = (sequence->score * n + result.score) / (n + 1.0f);
  sequence->tokens.push_back(result.token);
  if (sequence->keep_logits) {
    sequence->logits.insert(sequence->logits.end(), logits, logits + model_->config().vocab_size);
  }
  if (result.finished) {
    const bool is_eos = result.token == sequence->sampling.eos_token_id;
    Finish(sequence, is_eos ? FASTGEN_FINISH_EOS : FASTGEN_FINISH_LENGTH);
  }
}

// ---- ends ----------------------------------------------------------------------------------

void Session::Finish(Sequence* sequence, fastgen_finish_reason reason) {
  sequence->finish_reason = reason;
  LeaveLeader(sequence);
  sequence->prompt.reset();
  if (sequence->slot < 0) return;
  no_memory_ = false;
  model_->device().Close(std::exchange(sequence->slot, -1));
}

void Session::Fail(const Sequences& sequences) {
  for (Sequence* sequence : sequences) Finish(sequence, FASTGEN_FINISH_FAILED);
  DropFinished();
}

void Session::DropFinished() {
  constexpr int32_t kOrphan = -1;
  for (Sequence* sequence : open_) {
    if (!sequence->leader || sequence->leader->finish_reason == FASTGEN_RUNNING) continue;
    LeaveLeader(sequence);
    sequence->shared = kOrphan;
  }
  open_.erase(std::remove_if(open_.begin(), open_.end(),
                             [](const Sequence* s) { return s->finish_reason != FASTGEN_RUNNING; }),
              open_.end());
  for (size_t i = 0; i < open_.size(); ++i) {
    if (open_[i]->shared != kOrphan) continue;
    open_[i]->shared = 0;
    FindLeader(open_[i], i);
  }
}

}  // namespace fastgen::engine
