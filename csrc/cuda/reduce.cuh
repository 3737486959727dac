// How one number comes out of a block: shared memory, and totals over it.

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
  uint4 resident[1];  // [resident_chunks · chunk_bytes / 16]
};

__device__ inline SharedMemory& Shared() {
  extern __shared__ uint4 shared_memory[];
  return *reinterpret_cast<SharedMemory*>(shared_memory);
}

template <NormKind kKind, typename Value>
__device__ inline Value Combine(Value a, Value b) {
  return kKind == NormKind::kInf ? MaxWithNan(a, b) : a + b;
}

template <NormKind kKind>
__device__ inline double WarpTotal(double value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value = Combine<kKind>(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  }
  return value;
}

// The total over the block's threads, the same bits in all of them. Every thread takes part.
template <NormKind kKind>
__device__ inline double BlockTotal(double value) {
  double* warp_totals = Shared().warp_totals;
  const int lane = threadIdx.x % kWarp;
  value = WarpTotal<kKind>(value);
  __syncthreads();  // the readers of the last call are done
  if (lane == 0) warp_totals[threadIdx.x / kWarp] = value;
  __syncthreads();
  const int num_warps = blockDim.x / kWarp;
  return WarpTotal<kKind>(lane < num_warps ? warp_totals[lane] : 0.0);
}

}  // namespace fusedclip::cuda

#endif  // FUSEDCLIP_CUDA_REDUCE_CUH_
