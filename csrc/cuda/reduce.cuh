// How one number comes out of many: over a warp, over a block, over slots in memory.

#ifndef FUSEDCLIP_CUDA_REDUCE_CUH_
#define FUSEDCLIP_CUDA_REDUCE_CUH_

#include <cuda_runtime.h>

#include "clip.h"
#include "cuda/launch_shape.h"
#include "semantics.h"

namespace fusedclip::cuda {

inline constexpr int kMaxWarps = kMaxThreads / kWarp;

struct SharedMemory {
  double warp_totals[kMaxWarps];
  uint4 resident[1];  // [warps · resident_vectors]
};

__device__ inline SharedMemory& Shared() {
  extern __shared__ uint4 shared_memory[];
  return *reinterpret_cast<SharedMemory*>(shared_memory);
}

template <typename Value>
__device__ inline Value Combine(NormKind kind, Value a, Value b) {
  return kind == NormKind::kInf ? MaxWithNan(a, b) : a + b;
}

// The total over the warp's lanes, the same bits in all of them. Every lane takes part.
__device__ inline double WarpTotal(NormKind kind, double value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value = Combine(kind, value, __shfl_xor_sync(0xffffffffu, value, lanes));
  }
  return value;
}

// The total over the block's threads, in those of its first warp. Once in a kernel: no barrier
// keeps a second call from the numbers of the first.
__device__ inline double BlockTotal(NormKind kind, double value) {
  double* warp_totals = Shared().warp_totals;
  const int lane = threadIdx.x % kWarp;
  value = WarpTotal(kind, value);
  if (lane == 0) warp_totals[threadIdx.x / kWarp] = value;
  __syncthreads();
  const int num_warps = blockDim.x / kWarp;
  return WarpTotal(kind, lane < num_warps ? warp_totals[lane] : 0.0);
}

// The total of slots [begin, end), in every lane and in the same order in every warp. They were
// written by other blocks, so they are read past L1.
__device__ inline double SlotTotal(NormKind kind, const double* slots, int begin, int end) {
  double total = 0.0;
#pragma unroll 4
  for (int i = begin + static_cast<int>(threadIdx.x % kWarp); i < end; i += kWarp) {
    total = Combine(kind, total, __ldcg(slots + i));
  }
  return WarpTotal(kind, total);
}

}  // namespace fusedclip::cuda

#endif  // FUSEDCLIP_CUDA_REDUCE_CUH_
