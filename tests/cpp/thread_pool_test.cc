// cpu/thread_pool.h: every task once, whatever the sizes, the users and the moment.
#include "cpu/thread_pool.h"

#include <gtest/gtest.h>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"
#include "memory_limit.h"

namespace fastgen::cpu {
namespace {

constexpr uint64_t kSeed = 20240607;

// Runs a region in which every task is counted, and each piece looked at.
void CheckRegion(ThreadPool* pool, int64_t tasks, int64_t grain) {
  std::vector<std::atomic<int>> runs(static_cast<size_t>(std::max<int64_t>(tasks, 0)));
  std::atomic<bool> odd{false};
  {
    std::lock_guard<std::mutex> lock(pool->mutex());
    pool->Run(tasks, grain, [&](int64_t begin, int64_t end, int thread) {
      const bool whole = pool->threads() == 1 || tasks <= grain;
      if (begin < 0 || begin >= end || end > tasks || (end - begin > grain && !whole) ||
          thread < 0 || thread >= pool->threads()) {
        odd = true;
        return;
      }
      for (int64_t i = begin; i < end; ++i) runs[static_cast<size_t>(i)].fetch_add(1);
    });
  }
  ASSERT_FALSE(odd) << "tasks=" << tasks << " grain=" << grain;
  for (const std::atomic<int>& count : runs) {
    ASSERT_EQ(count.load(), 1) << "tasks=" << tasks << " grain=" << grain;
  }
}

// The same with pieces as they are claimed: a share, of which there is one for each thread, at most, and
// few, as a claim halves a share. A thread that comes late from another region may claim less once.
void CheckClaims(ThreadPool* pool, int64_t tasks) {
  std::vector<std::atomic<int>> runs(static_cast<size_t>(std::max<int64_t>(tasks, 0)));
  std::atomic<bool> odd{false};
  std::atomic<int64_t> pieces{0};
  const int64_t share = (tasks + pool->threads() - 1) / pool->threads();
  {
    std::lock_guard<std::mutex> lock(pool->mutex());
    pool->RunClaims(tasks, [&](int64_t begin, int64_t end, int thread) {
      if (begin < 0 || begin >= end || end > tasks || end - begin > share || thread < 0 ||
          thread >= pool->threads()) {
        odd = true;
        return;
      }
      ++pieces;
      for (int64_t i = begin; i < end; ++i) runs[static_cast<size_t>(i)].fetch_add(1);
    });
  }
  ASSERT_FALSE(odd) << "tasks=" << tasks;
  for (const std::atomic<int>& count : runs) ASSERT_EQ(count.load(), 1) << "tasks=" << tasks;
  int64_t halvings = 0;
  for (int64_t left = share; left > 1; left -= left / 2) ++halvings;
  ASSERT_LE(pieces, pool->threads() * (halvings + 1 + 1)) << "tasks=" << tasks;
}

// Long enough for workers to come and take their share, however few the cores.
void Work() {
  const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(20);
  while (std::chrono::steady_clock::now() < until) std::this_thread::yield();
}

// A region that ends only if two threads are in it at once.
void Meet(ThreadPool* pool) {
  std::atomic<int> here{0};
  std::lock_guard<std::mutex> lock(pool->mutex());
  pool->Run(2, 1, [&](int64_t, int64_t, int) {
    ++here;
    while (here < 2) std::this_thread::yield();
  });
}

TEST(ThreadPool, RunsEveryTaskOnce) {
  std::mt19937_64 random(kSeed);
  for (const int threads : {1, 2, 3, 5, 16}) {
    ThreadPool pool(threads);
    ASSERT_EQ(pool.threads(), threads);
    for (int64_t tasks = -1; tasks < 40; ++tasks) {
      CheckRegion(&pool, tasks, 1);
      CheckClaims(&pool, tasks);
    }
    for (int region = 0; region < 300; ++region) {
      const auto tasks = static_cast<int64_t>(random() % 1000);
      const auto grain = static_cast<int64_t>(1 + random() % (region % 2 == 0 ? 8 : 1200));
      CheckRegion(&pool, tasks, grain);
      CheckClaims(&pool, tasks);
    }
  }
}

TEST(ThreadPool, SerialPoolRunsOnTheCaller) {
  ThreadPool pool(1);
  const std::thread::id caller = std::this_thread::get_id();
  int pieces = 0;
  pool.Run(100, 1, [&](int64_t begin, int64_t end, int thread) {
    EXPECT_EQ(std::this_thread::get_id(), caller);
    EXPECT_EQ(end - begin, 100);
    EXPECT_EQ(thread, 0);
    ++pieces;
  });
  EXPECT_EQ(pieces, 1);
}

TEST(ThreadPool, PiecesOfOneThreadDoNotOverlap) {
  // Scratch memory is per thread number: two pieces at once with one number would share it.
  ThreadPool pool(8);
  std::vector<std::atomic<int>> inside(8);
  std::atomic<bool> shared{false};
  for (int region = 0; region < 50; ++region) {
    pool.Run(64, 1, [&](int64_t, int64_t, int thread) {
      std::atomic<int>& mine = inside[static_cast<size_t>(thread)];
      if (mine.fetch_add(1) != 0) shared = true;
      Work();
      mine.fetch_sub(1);
    });
  }
  EXPECT_FALSE(shared);
}

TEST(ThreadPool, ThreadsRunAtOnce) {
  for (const int threads : {2, 3, 9}) {
    ThreadPool pool(threads);
    for (int region = 0; region < 50; ++region) Meet(&pool);
  }
}

TEST(ThreadPool, WhatARegionWroteIsSeenByTheNext) {
  // No atomics here: the pool itself must order the regions, which ThreadSanitizer checks.
  ThreadPool pool(4);
  constexpr int64_t kSize = 37;
  std::vector<int64_t> values(kSize, 0);
  std::vector<int64_t> next(kSize, 0);
  for (int64_t region = 0; region < 200; ++region) {
    pool.Run(kSize, 3, [&](int64_t begin, int64_t end, int) {
      Work();
      for (int64_t i = begin; i < end; ++i) {
        next[static_cast<size_t>(i)] = values[static_cast<size_t>(kSize - 1 - i)] + 1;
      }
    });
    std::swap(values, next);
  }
  for (const int64_t value : values) ASSERT_EQ(value, 200);
}

TEST(ThreadPool, SlowPieceIsWaitedFor) {
  ThreadPool pool(3);
  std::mt19937_64 random(kSeed);
  for (int region = 0; region < 20; ++region) {
    const auto slow = static_cast<int64_t>(random() % 12);
    std::vector<int> done(12, 0);
    pool.Run(12, 1, [&](int64_t begin, int64_t, int) {
      if (begin == slow) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      done[static_cast<size_t>(begin)] = 1;
    });
    ASSERT_EQ(std::count(done.begin(), done.end(), 1), 12);
  }
}

TEST(ThreadPool, SleepingWorkersWakeUp) {
  ThreadPool pool(4);
  for (int region = 0; region < 20; ++region) {
    // Longer than workers spin, so that they sleep, or are about to.
    std::this_thread::sleep_for(std::chrono::microseconds(60 + 10 * region));
    CheckRegion(&pool, 100, 1);
  }
}

TEST(ThreadPool, UsersTakeTurns) {
  ThreadPool pool(3);
  std::vector<std::thread> users;
  int64_t shared = 0;  // guarded by the pool's mutex
  for (int user = 0; user < 6; ++user) {
    users.emplace_back([&, user] {
      std::mt19937_64 random(kSeed + static_cast<uint64_t>(user));
      for (int region = 0; region < 60; ++region) {
        CheckRegion(&pool, static_cast<int64_t>(random() % 200), 1 + region % 7);
        std::lock_guard<std::mutex> lock(pool.mutex());
        ++shared;
      }
    });
  }
  for (std::thread& user : users) user.join();
  EXPECT_EQ(shared, 6 * 60);
}

// One that never lets go for long: without giving way it would be alone for ever.
TEST(ThreadPool, ThoseThatWaitHaveATurn) {
  constexpr int kTurns = 50;
  ThreadPool pool(1);
  std::atomic<int> ended{0};
  std::atomic<int64_t> steps{0};
  std::thread holder([&] {
    ThreadPool::Turn turn(&pool);
    while (ended < 2) {
      Work();
      steps.fetch_add(1);
      turn.GiveWay();
    }
  });
  while (steps == 0) std::this_thread::yield();
  std::vector<std::thread> others;
  for (int i = 0; i < 2; ++i) {
    others.emplace_back([&] {
      for (int t = 0; t < kTurns; ++t) {
        const ThreadPool::Turn turn(&pool);
        Work();
      }
      ended.fetch_add(1);
    });
  }
  for (std::thread& other : others) other.join();
  holder.join();
}

TEST(ThreadPool, PoolsMayBeNested) {
  ThreadPool outer(3);
  ThreadPool inner(3);
  std::vector<std::atomic<int>> runs(20 * 30);
  for (int region = 0; region < 10; ++region) {
    outer.Run(20, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        std::lock_guard<std::mutex> lock(inner.mutex());
        inner.Run(30, 4, [&](int64_t first, int64_t last, int) {
          for (int64_t j = first; j < last; ++j) runs[static_cast<size_t>(i * 30 + j)].fetch_add(1);
        });
      }
    });
  }
  for (const std::atomic<int>& count : runs) ASSERT_EQ(count.load(), 10);
}

TEST(ThreadPool, MayBeDestroyedAtAnyMoment) {
  std::mt19937_64 random(kSeed);
  for (int life = 0; life < 150; ++life) {
    ThreadPool pool(2 + life % 6);
    const auto regions = random() % 4;
    for (uint64_t region = 0; region < regions; ++region) CheckRegion(&pool, 50, 1);
    if (life % 10 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
  }
}

TEST(ThreadPool, PoolsLiveBesideEachOther) {
  std::vector<std::thread> owners;
  for (int owner = 0; owner < 4; ++owner) {
    owners.emplace_back([owner] {
      for (int life = 0; life < 15; ++life) {
        ThreadPool pool(2 + owner);
        CheckRegion(&pool, 40 + owner, 1);
      }
    });
  }
  for (std::thread& owner : owners) owner.join();
}

TEST(ThreadPool, ThreadsThatCannotBeStartedAreAnError) {
  // Stacks so large that the limit lets some threads start and not all of them.
  pthread_attr_t before;
  pthread_attr_t large;
  ASSERT_EQ(pthread_getattr_default_np(&before), 0);
  ASSERT_EQ(pthread_getattr_default_np(&large), 0);
  ASSERT_EQ(pthread_attr_setstacksize(&large, size_t{64} << 20), 0);
  ASSERT_EQ(pthread_setattr_default_np(&large), 0);
  std::string message;
  {
    const tests::MemoryLimit limit(uint64_t{300} << 20);
    try {
      ThreadPool pool(24);
    } catch (const base::Error& error) {
      EXPECT_EQ(error.status(), FASTGEN_UNSUPPORTED);
      message = error.what();
    }
  }
  ASSERT_EQ(pthread_setattr_default_np(&before), 0);
  EXPECT_EQ(message.compare(0, 21, "num_threads=24: only "), 0) << message;
  EXPECT_NE(message.find("threads could be started"), std::string::npos) << message;
  ThreadPool pool(4);
  CheckRegion(&pool, 100, 1);
}

// ---- fork ----------------------------------------------------------------------------------

// Status of a child that runs `body` and ends with what it returns; -1: it hung or crashed.
template <typename Body>
int StatusOfChild(const Body& body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);
    _exit(body());
  }
  int status = -1;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status)) return -1;
  return WEXITSTATUS(status);
}

int RegionsInChild(ThreadPool* pool) {
  Meet(pool);
  for (int region = 0; region < 50; ++region) {
    std::vector<int> runs(64, 0);
    std::lock_guard<std::mutex> lock(pool->mutex());
    pool->Run(64, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) ++runs[static_cast<size_t>(i)];
    });
    if (std::count(runs.begin(), runs.end(), 1) != 64) return 1;
  }
  return 0;
}

class ThreadPoolFork : public ::testing::Test {
 protected:
  void SetUp() override {
#if defined(__SANITIZE_THREAD__)
    GTEST_SKIP() << "ThreadSanitizer does not follow threads started after a fork";
#endif
  }
};

TEST_F(ThreadPoolFork, ChildHasItsOwnThreads) {
  ThreadPool pool(4);
  CheckRegion(&pool, 100, 1);
  EXPECT_EQ(StatusOfChild([&] { return RegionsInChild(&pool); }), 0);
  CheckRegion(&pool, 100, 1);
}

TEST_F(ThreadPoolFork, ChildMayDestroyThePool) {
  auto pool = std::make_unique<ThreadPool>(4);
  CheckRegion(pool.get(), 100, 1);
  EXPECT_EQ(StatusOfChild([&] {
              pool.reset();
              ThreadPool another(3);
              return RegionsInChild(&another);
            }),
            0);
}

TEST_F(ThreadPoolFork, WaitsForTheRegionsOfOtherThreads) {
  ThreadPool first(3);
  ThreadPool second(2);
  std::atomic<bool> stop{false};
  std::vector<std::thread> users;
  for (ThreadPool* pool : {&first, &second, &first}) {
    // Allocates nothing: the fork waits for the pools, not for AddressSanitizer's allocator.
    users.emplace_back([&stop, pool] {
      std::atomic<int64_t> done{0};
      int64_t wanted = 0;
      for (; !stop; wanted += 64) {
        std::lock_guard<std::mutex> lock(pool->mutex());
        pool->Run(64, 1, [&](int64_t begin, int64_t end, int) { done += end - begin; });
      }
      EXPECT_EQ(done, wanted);
    });
  }
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(StatusOfChild([&] { return RegionsInChild(&first) + RegionsInChild(&second); }), 0);
  }
  stop = true;
  for (std::thread& user : users) user.join();
}

TEST_F(ThreadPoolFork, PoolsComeAndGoMeanwhile) {
  std::atomic<bool> stop{false};
  std::thread owner([&stop] {
    while (!stop) {
      ThreadPool pool(2);
      CheckRegion(&pool, 32, 1);
    }
  });
  for (int i = 0; i < 20; ++i) EXPECT_EQ(StatusOfChild([] { return 0; }), 0);
  stop = true;
  owner.join();
}

}  // namespace
}  // namespace fastgen::cpu
