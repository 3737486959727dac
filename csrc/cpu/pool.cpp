// The threads are started when a job first asks for them and end with the process. Nothing joins
// them, and the pool is never destroyed: they may be asleep or at work while static objects are.

#include "cpu/pool.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/arithmetic.h"
#include "cpu/spin.h"
#include "cpu/tuning.h"

namespace fusedclip::cpu {
namespace {

// While it lives, threads that are started take no signals: these are for the threads that the
// program knows of, which may have blocked them everywhere to wait for them in one place.
class BlockSignals {
 public:
  BlockSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~BlockSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

class Pool;

// A thread that owns the same part of every job it is given.
class Worker {
 public:
  // Throws std::system_error when no thread can be had.
  Worker(Pool* pool, int part) : pool_(pool), part_(part) {
    const BlockSignals blocked;
    std::thread(&Worker::Loop, this).detach();
  }

  void Give(const std::shared_ptr<Job>& job) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      // Another caller's that still wants it. One with nothing left to claim can be forgotten.
      if (job_ != nullptr && job_->HasUnclaimed()) return;
      job_ = job;
      has_job_.store(true, std::memory_order_relaxed);
    }
    given_.notify_one();
  }

 private:
  void Loop();
  std::shared_ptr<Job> Next();

  Pool* const pool_;
  const int part_;
  std::mutex mutex_;
  std::condition_variable given_;
  std::shared_ptr<Job> job_;
  std::atomic<bool> has_job_{false};  // for looks without the lock
};

class Pool {
 public:
  // Before each share a thread wakes one more, as long as there is one: those at work double with
  // every share, one that does not get going keeps nobody asleep, and nobody is woken for work that
  // is done already.
  void Work(const std::shared_ptr<Job>& job, int part) {
    job->Work(part, [&] { WakeNext(job); });
  }

 private:
  void WakeNext(const std::shared_ptr<Job>& job) noexcept {
    const int part = job->NextToWake();
    if (part == 0) return;
    try {
      WorkerOf(part)->Give(job);
    } catch (...) {  // the process may have no more threads: those there are do the work
      job->WakeNobodyElse();
    }
  }

  Worker* WorkerOf(int part) {
    const std::lock_guard<std::mutex> lock(mutex_);
    workers_.reserve(part);  // first: a thread that was started must not be lost
    while (static_cast<int>(workers_.size()) < part) {
      workers_.push_back(std::make_unique<Worker>(this, static_cast<int>(workers_.size()) + 1));
    }
    return workers_[part - 1].get();
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> workers_;  // [i] owns part i + 1
};

void Worker::Loop() {
  const IeeeArithmetic ieee;
  while (true) pool_->Work(Next(), part_);
}

std::shared_ptr<Job> Worker::Next() {
  SpinUntil([this] { return has_job_.load(std::memory_order_relaxed); }, kSpinForJobNs);
  std::unique_lock<std::mutex> lock(mutex_);
  given_.wait(lock, [this] { return job_ != nullptr; });
  has_job_.store(false, std::memory_order_relaxed);
  return std::move(job_);
}

std::atomic<Pool*> g_pool{nullptr};

// The child of fork() has none of the pool's threads, and its locks may be held by threads that it
// has not either: it leaves all that where it is and starts a pool of its own. Registered while the
// module is loaded, when nobody clips yet.
const bool g_survives_fork =
    pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr, std::memory_order_relaxed); }) == 0;

// Without a lock, which a fork could find taken.
Pool* CurrentPool() {
  Pool* pool = g_pool.load(std::memory_order_acquire);
  if (pool != nullptr) return pool;
  auto own = std::make_unique<Pool>();
  return g_pool.compare_exchange_strong(pool, own.get()) ? own.release() : pool;
}

}  // namespace

void RunOnPool(const std::shared_ptr<Job>& job) {
  if (!g_survives_fork) {
    job->Work(0, [] {});
  } else {
    CurrentPool()->Work(job, 0);
  }
  job->Wait();
}

}  // namespace fusedclip::cpu
