// Runs shares of work on a team of threads.

#ifndef FUSEDCLIP_CPU_THREADS_H_
#define FUSEDCLIP_CPU_THREADS_H_

#include <pthread.h>

#include <algorithm>
#include <atomic>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace fusedclip::cpu {

// IEEE arithmetic while it lives. Under torch.set_flush_denormal(True) the calling thread would
// flush subnormals and the others not, and the result would depend on which thread took which
// chunk.
class IeeeArithmetic {
 public:
#if defined(__SSE2__)
  IeeeArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }  // the power-on default
  ~IeeeArithmetic() { _mm_setcsr(saved_); }
#else
  IeeeArithmetic() : saved_(0) {}
  ~IeeeArithmetic() {}
#endif
  IeeeArithmetic(const IeeeArithmetic&) = delete;
  IeeeArithmetic& operator=(const IeeeArithmetic&) = delete;

 private:
  [[maybe_unused]] unsigned int saved_;
};

inline std::atomic<bool> g_is_forked_child{false};

// The number of threads to use where `requested` are allowed. After fork() the child has none of
// OpenMP's threads but still their bookkeeping, and libgomp would wait for them for ever: a forked
// child works serially from then on.
inline int UsableThreads(int requested) {
#ifdef _OPENMP
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { g_is_forked_child.store(true); });
  return registered != 0 || g_is_forked_child.load() ? 1 : std::max(1, requested);
#else
  return std::min(requested, 1);
#endif
}

// Calls run(share) for 0 … num_shares - 1, at the same time where it can. A share meets the same
// thread, and so its cache, in consecutive calls.
template <typename Run>
void RunShares(int num_shares, Run run) {
  if (num_shares == 1) return run(0);
#ifdef _OPENMP
#pragma omp parallel for num_threads(num_shares) schedule(static, 1)
#endif
  for (int share = 0; share < num_shares; ++share) {
    const IeeeArithmetic ieee;
    run(share);
  }
}

}  // namespace fusedclip::cpu

#endif  // FUSEDCLIP_CPU_THREADS_H_
