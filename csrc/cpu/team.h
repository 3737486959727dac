// Shares of work on several threads, of which the caller is one. Nobody waits for a thread that is
// not at work: on a busy machine the caller does everything, and waits only for shares that others
// are in the middle of.

#ifndef FUSEDCLIP_CPU_TEAM_H_
#define FUSEDCLIP_CPU_TEAM_H_

#include <type_traits>

namespace fusedclip::cpu {

// The direction in which each thread goes through its part of the shares. A second pass over the
// same shares, backwards, begins with what was read last and is still in the cache.
enum class Order { kForward, kBackward };

// The shares 0 … count - 1.
struct Shares {
  int count;
  int threads;  // at most, the caller among them
  Order order;
};

using RunShare = void (*)(const void* context, int share) noexcept;

void RunOnTeam(const Shares& shares, RunShare run, const void* context);

// Calls run(share) once for each share and returns when all have ended. Calls from several threads
// at once are allowed. `run` must not throw: others would still be at work with the caller's data.
template <typename Run>
void RunShares(const Shares& shares, const Run& run) {
  static_assert(std::is_nothrow_invocable_v<const Run&, int>);
  RunOnTeam(
      shares,
      [](const void* context, int share) noexcept { (*static_cast<const Run*>(context))(share); },
      &run);
}

}  // namespace fusedclip::cpu

#endif  // FUSEDCLIP_CPU_TEAM_H_
