// CUDA's built-ins for an ordinary C++ compiler: enough to run csrc/cuda unchanged on the CPU.
//
// A thread of a kernel is a fiber; all fibers of a grid share one thread of the CPU and switch at
// barriers and shuffles only, in an order drawn from a seed. A missing barrier shows as a wrong
// result for some seed, an incomplete one as an error. See emulator.cpp.

#ifndef FUSEDCLIP_EMULATOR_CUDA_RUNTIME_H_
#define FUSEDCLIP_EMULATOR_CUDA_RUNTIME_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
// Dynamic shared memory is an array that the scheduler fills with that of the running block.
#define __shared__ thread_local

#define CUDART_VERSION 13000

using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x) : x(x) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// Bytes that went through __ldcg and __stcg, of all launches.
extern std::atomic<int64_t> bytes_read, bytes_written;

void SyncBlock();
void SyncGrid();
// Deposits `value` and returns what the lane `lane ^ mask` of the same warp deposited.
uint64_t ShuffleXor(uint64_t value, int mask);

int Launch(const char* call, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
           bool cooperative, size_t parameter_bytes, const std::function<void()>& thread);

template <typename To, typename From>
To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename... Parameters, size_t... kIndices>
void Call(void (*kernel)(Parameters...), void** parameters, std::index_sequence<kIndices...>) {
  kernel(*static_cast<Parameters*>(parameters[kIndices])...);
}

}  // namespace emulator

inline void __syncthreads() { emulator::SyncBlock(); }

inline double __shfl_xor_sync(unsigned, double value, int mask) {
  const uint64_t bits = emulator::BitCast<uint64_t>(value);
  return emulator::BitCast<double>(emulator::ShuffleXor(bits, mask));
}

template <typename T>
T __ldcg(const T* from) {
  emulator::bytes_read += sizeof(T);
  return *from;
}
template <typename T>
void __stcg(T* to, T value) {
  emulator::bytes_written += sizeof(T);
  *to = value;
}

inline float __uint_as_float(uint32_t bits) { return emulator::BitCast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return emulator::BitCast<uint32_t>(value); }
inline double __hiloint2double(int high, int low) {
  const uint64_t bits = static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32;
  return emulator::BitCast<double>(bits | static_cast<uint32_t>(low));
}
inline int __double2hiint(double value) {
  return static_cast<int>(emulator::BitCast<uint64_t>(value) >> 32);
}
inline int __double2loint(double value) {
  return static_cast<int>(emulator::BitCast<uint64_t>(value));
}

// The host's side. One device, of the attributes in emulator.cpp; streams are in order anyway.
enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;  // per cent
using cudaStream_t = void*;

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int* version);
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
cudaError_t cudaMalloc(void** memory, size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);

template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                             void** parameters, size_t shared_bytes, cudaStream_t) {
  return static_cast<cudaError_t>(emulator::Launch(
      "cudaLaunchKernel", reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, false,
      (sizeof(Parameters) + ... + 0),
      [&] { emulator::Call(kernel, parameters, std::index_sequence_for<Parameters...>()); }));
}

template <typename... Parameters>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                                        void** parameters, size_t shared_bytes, cudaStream_t) {
  return static_cast<cudaError_t>(emulator::Launch(
      "cudaLaunchCooperativeKernel", reinterpret_cast<const void*>(kernel), grid, block,
      shared_bytes, true, (sizeof(Parameters) + ... + 0),
      [&] { emulator::Call(kernel, parameters, std::index_sequence_for<Parameters...>()); }));
}

#endif  // FUSEDCLIP_EMULATOR_CUDA_RUNTIME_H_
