// The loops of one instruction set, as function pointers by element type.

#ifndef FUSEDCLIP_CPU_KERNEL_TABLE_H_
#define FUSEDCLIP_CPU_KERNEL_TABLE_H_

#include <cstdint>

#include "clip.h"

namespace fusedclip::cpu {

// The longest chunk a kernel is asked for. 256 KiB of fp32: it stays in a core's L2 cache between
// the sum and, when that cannot be trusted, its second pass.
inline constexpr int64_t kChunkElements = 65536;

struct DTypeKernels {
  // Σ(g·inv_scale)² with products in fp32 (fp64 for fp64).
  double (*sum_squares)(const void* data, int64_t n, float inv_scale);
  // The same with products in fp64: no overflow, no underflow, for any fp32 value.
  double (*sum_squares_wide)(const void* data, int64_t n, float inv_scale);
  // max|g·inv_scale|; NaN if any is.
  double (*max_abs)(const void* data, int64_t n, float inv_scale);
  // g ← g·factor, the factor rounded to fp32 (fp64 for fp64), the product rounded once.
  void (*scale)(void* data, int64_t n, double factor);
  // g ← min(max(g, -limit), limit), the limit rounded to g's type; whether any element changed.
  bool (*clamp)(void* data, int64_t n, double limit);
};

struct KernelTable {
  DTypeKernels by_dtype[kNumDTypes];  // indexed by DType
};

// memcpy for the kernels. Out of their sight, because GCC would see that only a few bytes are
// copied and emit `rep movs`, which takes longer to start than a whole row takes.
void CopyBytes(void* to, const void* from, int64_t n);

// Null where this build does not have the instruction set. Every table gives the same bits.
const KernelTable* BaselineKernels();
const KernelTable* Avx2Kernels();
const KernelTable* Avx512Kernels();

}  // namespace fusedclip::cpu

#endif  // FUSEDCLIP_CPU_KERNEL_TABLE_H_
