// Waiting without giving up the processor, for microseconds.

#ifndef FUSEDCLIP_CPU_SPIN_H_
#define FUSEDCLIP_CPU_SPIN_H_

#include <chrono>
#include <cstdint>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fusedclip::cpu {

// Tells the processor that this is a loop that waits.
inline void Pause() {
#if defined(__SSE2__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Calls done() until it is true, for `most_ns` at most; what it returned last.
template <typename Done>
bool SpinUntil(const Done& done, int64_t most_ns) {
  if (done()) return true;
  const auto end = std::chrono::steady_clock::now() + std::chrono::nanoseconds(most_ns);
  while (!done()) {
    if (std::chrono::steady_clock::now() >= end) return false;
    Pause();
  }
  return true;
}

}  // namespace fusedclip::cpu

#endif  // FUSEDCLIP_CPU_SPIN_H_
