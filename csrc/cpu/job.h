// One call's shares, claimed one by one by the threads that happen to be there.
//
// Each thread has a part, a range of the shares that it takes in order: what it read in one pass it
// finds in its caches in the next. A thread whose own part is done takes from the far ends of the
// others' parts: all of it where the owner has not come, else down to the last few shares, which an
// owner that gets on keeps.

#ifndef FUSEDCLIP_CPU_JOB_H_
#define FUSEDCLIP_CPU_JOB_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include "cpu/team.h"

namespace fusedclip::cpu {

class Job {
 public:
  Job(const Shares& shares, RunShare run, const void* context);

  // Runs shares as the owner of a part until none is left to claim, and calls before_share() ahead
  // of each. Whoever comes late finds none, and touches nothing that is the caller's: the job must
  // outlive it, the context need not.
  template <typename BeforeShare>
  void Work(int part, const BeforeShare& before_share) {
    parts_[part].owner_came.store(true, std::memory_order_relaxed);
    int done = 0;
    for (int share; (share = ClaimOwn(part)) >= 0; ++done) {
      before_share();
      run_(context_, share);
    }
    Finish(done);
    for (int share; (share = ClaimOfOthers(part)) >= 0; Finish(1)) {
      before_share();
      run_(context_, share);
    }
  }

  // Returns when every share has ended. After Work(), so that each is claimed.
  void Wait();

  int CountUnclaimed() const;
  bool HasUnclaimed() const { return CountUnclaimed() > 0; }

  // The next part whose thread was not woken yet; 0, the caller's own, when there is none.
  int NextToWake();
  void WakeNobodyElse() { next_to_wake_.store(num_parts(), std::memory_order_relaxed); }

 private:
  // In a cache line of its own, which mostly its owner writes.
  struct alignas(64) Part {
    std::atomic<uint64_t> unclaimed;  // [first, stop) of its shares, in one word
    std::atomic<bool> owner_came{false};
  };

  int num_parts() const { return static_cast<int>(parts_.size()); }
  // A share, or -1: none is left.
  int ClaimOwn(int part);
  int ClaimOfOthers(int part);
  int ClaimFarEnd(int part, int left_to_owner);  // or -1: none that may be taken
  void Finish(int done);

  const RunShare run_;
  const void* const context_;
  const bool forward_;
  std::vector<Part> parts_;
  std::atomic<int> next_to_wake_{1};
  std::atomic<int> unfinished_;
  std::mutex mutex_;
  std::condition_variable finished_;
};

}  // namespace fusedclip::cpu

#endif  // FUSEDCLIP_CPU_JOB_H_
