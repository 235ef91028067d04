#include "cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"

namespace fastgen::cpu {

namespace {

// Regions of a decode step follow one another within microseconds; a worker that has waited this
// long is between requests and should give its processor away.
constexpr std::chrono::microseconds kSpin(100);
constexpr int kPausesPerLook = 32;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

int DefaultThreads() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return 1;
}

int ResolveThreads(int32_t asked) {
  if (asked > 0) return asked;
  const char* environment = std::getenv("FASTGEN_NUM_THREADS");
  if (!environment || !*environment) return DefaultThreads();
  char* end = nullptr;
  const long value = std::strtol(environment, &end, 10);
  if (*end || value < 1 || value > 1024) {
    throw base::Error(FASTGEN_INVALID_ARGUMENT, std::string("FASTGEN_NUM_THREADS=") + environment +
                                                    " is not a number of threads from 1 to 1024");
  }
  return static_cast<int>(value);
}

// A region is a share of tasks per thread and the body that runs them. Half of what a share has left, or
// the grain if that is more, is claimed by one atomic addition that yields the share's next and last task
// together, so a claim is right however late its thread comes: a region cannot end before what is
// claimed is done, and a thread that claims nothing touches nothing. Claims are few, as each makes its
// processor wait for all memory that is on its way.
struct ThreadPool::Shared {
  struct alignas(64) Share {
    std::atomic<uint64_t> next_and_end{0};  // next << 32 | end
  };

  // What a worker is started with.
  struct Worker {
    Shared* shared;
    int thread;
  };

  explicit Shared(int threads) : shares(new Share[threads]), count(threads) {}
  ~Shared() { delete[] shares; }

  Share* const shares;
  const int count;
  alignas(64) std::atomic<int64_t> done{0};
  alignas(64) std::atomic<uint64_t> region{0};
  std::atomic<Erased> body{nullptr};
  std::atomic<const void*> context{nullptr};
  std::atomic<int64_t> grain{1};
  std::atomic<int64_t> most{1};  // tasks of a piece

  std::atomic<int> sleeping{0};
  std::atomic<bool> stop{false};
  std::mutex sleep_mutex;
  std::condition_variable wake;
  std::vector<Worker> arguments;
  std::vector<pthread_t> workers;

  bool RunOne(Share& share, int thread) {
    uint64_t word = share.next_and_end.load(std::memory_order_acquire);
    if ((word >> 32) >= (word & 0xffffffffu)) return false;
    const uint64_t left = (word & 0xffffffffu) - (word >> 32);
    const uint64_t step =
        std::max(static_cast<uint64_t>(grain.load(std::memory_order_relaxed)), left / 2);
    word = share.next_and_end.fetch_add(step << 32, std::memory_order_acq_rel);
    const int64_t begin = static_cast<int64_t>(word >> 32);
    const int64_t end = static_cast<int64_t>(word & 0xffffffffu);
    if (begin >= end) return false;
    // `step` may be of a region that has just ended. What was claimed belongs to this one, and so
    // does `most` now: it cannot end before this is done.
    const int64_t last = std::min(end, begin + static_cast<int64_t>(step));
    const int64_t piece = most.load(std::memory_order_relaxed);
    const Erased run = body.load(std::memory_order_relaxed);
    const void* const what = context.load(std::memory_order_relaxed);
    for (int64_t first = begin; first < last; first += piece) {
      run(what, first, std::min(last, first + piece), thread);
    }
    done.fetch_add(last - begin, std::memory_order_release);
    return true;
  }

  void Work(int thread) {
    for (int i = 0; i < count; ++i) {
      Share& share = shares[(thread + i) % count];
      while (RunOne(share, thread)) {
      }
    }
  }

  void WorkerLoop(int thread) {
    uint64_t seen = 0;
    for (;;) {
      auto since = std::chrono::steady_clock::now();
      while (region.load(std::memory_order_acquire) == seen) {
        for (int i = 0; i < kPausesPerLook; ++i) {
          if (region.load(std::memory_order_relaxed) != seen) break;
          Pause();
        }
        if (std::chrono::steady_clock::now() - since < kSpin) continue;
        std::unique_lock<std::mutex> lock(sleep_mutex);
        sleeping.fetch_add(1);
        wake.wait(lock, [&] { return region.load() != seen; });
        sleeping.fetch_sub(1);
      }
      seen = region.load(std::memory_order_acquire);
      if (stop.load(std::memory_order_relaxed)) return;
      Work(thread);
    }
  }

  void Announce() {
    region.fetch_add(1);
    if (sleeping.load() > 0) {
      {
        std::lock_guard<std::mutex> lock(sleep_mutex);
      }
      wake.notify_all();
    }
  }
};

namespace {

// Pools alive, so that fork can wait for them and the child can forget their threads.
std::mutex& PoolsMutex() {
  static std::mutex* mutex = new std::mutex;
  return *mutex;
}
std::vector<ThreadPool*>& Pools() {
  static auto* pools = new std::vector<ThreadPool*>;
  return *pools;
}

}  // namespace

struct ForkHandlers {
  static void Prepare() {
    PoolsMutex().lock();
    for (ThreadPool* pool : Pools()) pool->mutex_.lock();
  }
  static void Parent() {
    for (ThreadPool* pool : Pools()) pool->mutex_.unlock();
    PoolsMutex().unlock();
  }
  static void Child() {
    // The workers do not exist here. Their shared state is left as it is: a condition variable
    // with waiters that are gone cannot be destroyed.
    for (ThreadPool* pool : Pools()) {
      pool->shared_ = nullptr;
      pool->waiting_.store(0);  // nor do those that waited
      pool->mutex_.unlock();
    }
    PoolsMutex().unlock();
  }
};

void ThreadPool::Turn::GiveWay() {
  if (pool_->waiting_.load(std::memory_order_relaxed) == 0) return;
  pool_->mutex_.unlock();
  Take();
}

void ThreadPool::Turn::Take() {
  static thread_local char self;
  if (pool_->last_.load() == &self) {
    const uint32_t turn = pool_->turns_.load();
    while (pool_->waiting_.load() > 0 && pool_->turns_.load() == turn) std::this_thread::yield();
  }
  pool_->waiting_.fetch_add(1);
  pool_->mutex_.lock();
  pool_->waiting_.fetch_sub(1);
  pool_->turns_.fetch_add(1);
  pool_->last_.store(&self);
}

ThreadPool::ThreadPool(int threads) : threads_(threads) {
  Start();
  std::lock_guard<std::mutex> lock(PoolsMutex());
  static const int registered =
      pthread_atfork(ForkHandlers::Prepare, ForkHandlers::Parent, ForkHandlers::Child);
  (void)registered;
  Pools().push_back(this);
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(PoolsMutex());
    auto& pools = Pools();
    pools.erase(std::remove(pools.begin(), pools.end(), this), pools.end());
  }
  if (!shared_) return;
  shared_->stop.store(true);
  shared_->Announce();
  for (pthread_t worker : shared_->workers) pthread_join(worker, nullptr);
  delete shared_;
}

void ThreadPool::Start() {
  std::unique_ptr<Shared> shared(new Shared(threads_));
  // All memory first: no exception may leave while workers run.
  shared->workers.reserve(threads_);
  for (int thread = 1; thread < threads_; ++thread) {
    shared->arguments.push_back({shared.get(), thread});
  }
  int error = 0;
  for (Shared::Worker& worker : shared->arguments) {
    pthread_t id;
    error = pthread_create(
        &id, nullptr,
        [](void* argument) -> void* {
          const auto* self = static_cast<const Shared::Worker*>(argument);
          self->shared->WorkerLoop(self->thread);
          return nullptr;
        },
        &worker);
    if (error) break;
    shared->workers.push_back(id);
  }
  if (error) {
    const size_t started = shared->workers.size() + 1;
    shared->stop.store(true);
    shared->Announce();
    for (pthread_t worker : shared->workers) pthread_join(worker, nullptr);
    throw base::Error(FASTGEN_UNSUPPORTED, "num_threads=" + std::to_string(threads_) + ": only " +
                                               std::to_string(started) +
                                               " threads could be started");
  }
  shared_ = shared.release();
}

void ThreadPool::RunErased(int64_t tasks, int64_t grain, int64_t most, Erased body,
                           const void* context) {
  if (tasks <= 0) return;
  if (threads_ == 1 || tasks <= grain) {
    body(context, 0, tasks, 0);
    return;
  }
  if (!shared_) Start();
  Shared& shared = *shared_;
  shared.done.store(0, std::memory_order_relaxed);
  shared.body.store(body, std::memory_order_relaxed);
  shared.context.store(context, std::memory_order_relaxed);
  shared.grain.store(grain, std::memory_order_relaxed);
  shared.most.store(most, std::memory_order_relaxed);
  for (int i = 0; i < threads_; ++i) {
    const uint64_t begin = static_cast<uint64_t>(tasks * i / threads_);
    const uint64_t end = static_cast<uint64_t>(tasks * (i + 1) / threads_);
    shared.shares[i].next_and_end.store(begin << 32 | end, std::memory_order_release);
  }
  shared.Announce();
  shared.Work(0);
  for (int looks = 0; shared.done.load(std::memory_order_acquire) != tasks; ++looks) {
    Pause();
    // Somebody's piece is on a processor that another process has: let it run.
    if (looks > 2000) sched_yield();
  }
}

}  // namespace fastgen::cpu
