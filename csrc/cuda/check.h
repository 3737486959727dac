// Errors of the CUDA runtime as exceptions.

#ifndef FUSEDCLIP_CUDA_CHECK_H_
#define FUSEDCLIP_CUDA_CHECK_H_

#include <cuda_runtime.h>

namespace fusedclip::cuda {

// Devices that the static tables of this folder have places for.
inline constexpr int kMaxDevices = 64;

// Throws std::runtime_error with the name of the call and the device. The error is taken from the
// runtime, so that the next call does not meet it again (an error of the device itself stays there
// for good).
void Check(cudaError_t error, const char* call, int device);

}  // namespace fusedclip::cuda

#endif  // FUSEDCLIP_CUDA_CHECK_H_
