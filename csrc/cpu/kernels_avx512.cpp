// The loops for AVX-512. Compile with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mf16c -mfma;
// without them the table is absent.

#include "cpu/kernel_table.h"
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define FUSEDCLIP_HAVE_AVX512
#include "cpu/kernels.h"
#endif

namespace fusedclip::cpu {

const KernelTable* Avx512Kernels() {
#ifdef FUSEDCLIP_HAVE_AVX512
  return &kKernels;
#else
  return nullptr;
#endif
}

}  // namespace fusedclip::cpu
