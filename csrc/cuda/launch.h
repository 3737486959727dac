// What clip_cuda.cu calls of launch.cuh, without the device code.

#ifndef FUSEDCLIP_CUDA_LAUNCH_H_
#define FUSEDCLIP_CUDA_LAUNCH_H_

#include "cuda/arguments.h"
#include "cuda/clip_cuda.h"

namespace fusedclip::cuda {

template <typename Table>
void Launch(const Plan& plan, const Place& place, const Table& table, const Arguments& args);

template <typename Table>
void LaunchWrite(const Table& part, int count, Entry* to, int device, void* stream);

}  // namespace fusedclip::cuda

#endif  // FUSEDCLIP_CUDA_LAUNCH_H_
