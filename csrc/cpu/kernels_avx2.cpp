// The loops for AVX2. Compile with -mavx2 -mf16c -mfma; without them the table is absent.

#include "cpu/kernel_table.h"
#if defined(__AVX2__) && defined(__F16C__)
#include "cpu/kernels.h"
#endif

namespace fusedclip::cpu {

const KernelTable* Avx2Kernels() {
#if defined(__AVX2__) && defined(__F16C__)
  return &kKernels;
#else
  return nullptr;
#endif
}

}  // namespace fusedclip::cpu
