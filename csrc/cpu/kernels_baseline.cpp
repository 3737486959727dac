// The loops for what the compiler targets by default: SSE2 on x86-64, NEON on AArch64.

#include "cpu/kernels.h"

namespace fusedclip::cpu {

const KernelTable* BaselineKernels() { return &kKernels; }

}  // namespace fusedclip::cpu
