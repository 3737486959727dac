// The arithmetic that all threads share.

#ifndef FUSEDCLIP_CPU_ARITHMETIC_H_
#define FUSEDCLIP_CPU_ARITHMETIC_H_

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

}  // namespace fusedclip::cpu

#endif  // FUSEDCLIP_CPU_ARITHMETIC_H_
