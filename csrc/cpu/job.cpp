#include "cpu/job.h"

#include "cpu/spin.h"
#include "cpu/tuning.h"

namespace fusedclip::cpu {
namespace {

constexpr uint64_t Pack(uint64_t first, uint64_t stop) { return first << 32 | stop; }
constexpr uint32_t First(uint64_t range) { return static_cast<uint32_t>(range >> 32); }
constexpr uint32_t Stop(uint64_t range) { return static_cast<uint32_t>(range); }
constexpr int Count(uint64_t range) { return static_cast<int>(Stop(range) - First(range)); }

// One from the front or the back of a range, -1 when it is empty. Relaxed, because a claim
// publishes nothing: the job was handed over under a lock, and Finish() hands over what came of it.
int Take(std::atomic<uint64_t>* range, bool front) {
  uint64_t seen = range->load(std::memory_order_relaxed);
  while (First(seen) < Stop(seen)) {
    const uint64_t left =
        front ? Pack(First(seen) + 1, Stop(seen)) : Pack(First(seen), Stop(seen) - 1);
    if (range->compare_exchange_weak(seen, left, std::memory_order_relaxed)) {
      return static_cast<int>(front ? First(seen) : Stop(left));
    }
  }
  return -1;
}

}  // namespace

Job::Job(const Shares& shares, RunShare run, const void* context)
    : run_(run),
      context_(context),
      forward_(shares.order == Order::kForward),
      parts_(shares.threads),
      unfinished_(shares.count) {
  const auto border = [&](int64_t part) { return part * shares.count / shares.threads; };
  for (int part = 0; part < shares.threads; ++part) {
    parts_[part].unclaimed.store(Pack(border(part), border(part + 1)), std::memory_order_relaxed);
  }
}

int Job::ClaimOwn(int part) { return Take(&parts_[part].unclaimed, forward_); }

int Job::ClaimOfOthers(int part) {
  for (int unclaimed; (unclaimed = CountUnclaimed()) > 0;) {
    const int far = ClaimFarEnd(part, kSharesLeftToOwner);
    if (far >= 0) return far;
    // Owners are at the last of theirs. Whether they get on shows in the time of a share.
    if (SpinUntil([&] { return CountUnclaimed() != unclaimed; }, kSpinForSharesNs)) continue;
    const int any = ClaimFarEnd(part, 0);
    if (any >= 0) return any;
  }
  return -1;
}

int Job::ClaimFarEnd(int part, int left_to_owner) {
  for (int next = 1; next < num_parts(); ++next) {
    Part& other = parts_[(part + next) % num_parts()];
    const bool owner_came = other.owner_came.load(std::memory_order_relaxed);
    const int left = Count(other.unclaimed.load(std::memory_order_relaxed));
    if (owner_came && left <= left_to_owner) continue;
    const int share = Take(&other.unclaimed, !forward_);
    if (share >= 0) return share;
  }
  return -1;
}

int Job::CountUnclaimed() const {
  int count = 0;
  for (const Part& part : parts_) count += Count(part.unclaimed.load(std::memory_order_relaxed));
  return count;
}

int Job::NextToWake() {
  if (next_to_wake_.load(std::memory_order_relaxed) >= num_parts()) return 0;
  const int part = next_to_wake_.fetch_add(1, std::memory_order_relaxed);
  return part < num_parts() ? part : 0;
}

void Job::Finish(int done) {
  if (done == 0 || unfinished_.fetch_sub(done, std::memory_order_acq_rel) != done) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  finished_.notify_one();
}

void Job::Wait() {
  const auto all_ended = [this] { return unfinished_.load(std::memory_order_acquire) == 0; };
  if (SpinUntil(all_ended, kSpinForSharesNs)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  finished_.wait(lock, all_ended);
}

}  // namespace fusedclip::cpu
