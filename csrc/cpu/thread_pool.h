// Threads for regions of a few microseconds: they spin briefly between regions, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

namespace fastgen::cpu {

// Processors this process may use.
int DefaultThreads();

// `asked`, or if that is 0 what the environment variable FASTGEN_NUM_THREADS says, else DefaultThreads().
// Throws base::Error for a variable that is no such number.
int ResolveThreads(int32_t asked);

class ThreadPool {
 public:
  // `threads` includes the caller of Run. Throws base::Error if they cannot be started.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // Held around every use of the pool. A fork waits for it, so a child never inherits a region
  // half done.
  std::mutex& mutex() { return mutex_; }

  // Holds mutex() while it lives, and lets others have it in turn: who gives a mutex back and asks for
  // it again has it, mostly, before one who has slept for it is awake.
  class Turn {
   public:
    explicit Turn(ThreadPool* pool) : pool_(pool) { Take(); }
    ~Turn() { pool_->mutex_.unlock(); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

    // Where others wait, lets one of them have a turn. No region may be under way.
    void GiveWay();

   private:
    void Take();

    ThreadPool* const pool_;
  };

  // Calls body(begin, end, thread) over [0, tasks) in pieces of at most `grain`, until all are
  // done. Each thread starts on its own share, the same in every call of the same size, so that
  // it meets the memory it touched before; who is done early takes from the others. The body must
  // not throw, and there are less than 2^31 tasks. The caller holds mutex().
  template <typename Body>
  void Run(int64_t tasks, int64_t grain, const Body& body) {
    RunErased(tasks, grain, grain, Call<Body>, &body);
  }

  // As Run() with pieces of any size: all that a thread claims at once, half of what its share has left.
  template <typename Body>
  void RunClaims(int64_t tasks, const Body& body) {
    RunErased(tasks, 1, tasks, Call<Body>, &body);
  }

 private:
  friend struct ForkHandlers;
  using Erased = void (*)(const void*, int64_t, int64_t, int);
  struct Shared;

  template <typename Body>
  static void Call(const void* context, int64_t begin, int64_t end, int thread) {
    (*static_cast<const Body*>(context))(begin, end, thread);
  }

  // Claims of `grain` at least, in pieces of `most` at most.
  void RunErased(int64_t tasks, int64_t grain, int64_t most, Erased body, const void* context);
  void Start();

  const int threads_;
  std::mutex mutex_;
  std::atomic<int> waiting_{0};             // for a turn
  std::atomic<uint32_t> turns_{0};          // begun so far
  std::atomic<const void*> last_{nullptr};  // stands for the thread that had the last one
  Shared* shared_ = nullptr;                // null in a forked child until its first region
};

}  // namespace fastgen::cpu
