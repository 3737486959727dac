// In the place of csrc/cpu/threads.h: shares run on std::thread, whose happens-before relations
// ThreadSanitizer knows. It does not know libgomp's, and would report every barrier.

#ifndef FUSEDCLIP_CPU_THREADS_H_
#define FUSEDCLIP_CPU_THREADS_H_

#include <algorithm>
#include <thread>
#include <vector>

namespace fusedclip::cpu {

class IeeeArithmetic {
 public:
  IeeeArithmetic() {}
  ~IeeeArithmetic() {}
};

inline int UsableThreads(int requested) { return std::max(1, requested); }

template <typename Run>
void RunShares(int num_shares, Run run) {
  std::vector<std::thread> team;
  for (int share = 1; share < num_shares; ++share) team.emplace_back([&run, share] { run(share); });
  run(0);
  for (std::thread& thread : team) thread.join();
}

}  // namespace fusedclip::cpu

#endif  // FUSEDCLIP_CPU_THREADS_H_
