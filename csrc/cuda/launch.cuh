// The host side of a launch: which kernels, with which permissions. Templates over the table, made
// in small_tables.cu and large_tables.cu.

#ifndef FUSEDCLIP_CUDA_LAUNCH_CUH_
#define FUSEDCLIP_CUDA_LAUNCH_CUH_

#include <mutex>

#include "cuda/check.h"
#include "cuda/kernels.cuh"
#include "cuda/launch.h"

namespace fusedclip::cuda {

// Asks, once for each kernel and device, for more shared memory than 48 KiB and for all that a
// multiprocessor can set aside: unasked it sets aside what one block needs, and a second one, ours
// or another kernel's, has to wait.
template <auto kKernel>
void AllowSharedMemory(int device) {
  static std::once_flag asked[kMaxDevices];
  std::call_once(asked[device], [&] {
    const auto* kernel = reinterpret_cast<const void*>(kKernel);
    int most;
    Check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "cudaDeviceGetAttribute", device);
    Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
          "cudaFuncSetAttribute", device);
    Check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared),
          "cudaFuncSetAttribute", device);
  });
}

// Where a cooperative grid cannot be resident at once: a green context, MPS, a part of a device, or
// a device that has no such grids. An ordinary one runs there.
inline bool IsRefusal(cudaError_t error) {
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported ||
         error == cudaErrorLaunchOutOfResources;
}

template <NormKind kKind, typename Table>
struct ClipLaunch {
  const Plan& plan;
  const Place& place;
  const Table& table;
  Arguments args;

  template <Phase kPhase>
  void Ordinary() {
    // What follows measuring asks args.norm_kind: one kernel for both norms.
    constexpr NormKind kIts = kPhase == Phase::kMeasure ? kKind : NormKind::kL2;
    void* parameters[] = {&args, const_cast<Table*>(&table)};
    Check(cudaLaunchKernel(&ClipKernel<kIts, kPhase, Table>, dim3(plan.num_blocks),
                           dim3(plan.threads), parameters, sizeof(SharedMemory),
                           static_cast<cudaStream_t>(place.stream)),
          "cudaLaunchKernel", place.device);
  }

  // False when the device refuses a grid of that size; nothing was launched then.
  bool Cooperative() {
    constexpr auto kKernel = &ClipKernel<kKind, Phase::kAll, Table>;
    AllowSharedMemory<kKernel>(place.device);
    Arguments with_memory = args;
    with_memory.resident_vectors = args.scale ? plan.resident_vectors : 0;
    const int64_t resident_bytes = int64_t{16} * with_memory.resident_vectors;
    void* parameters[] = {&with_memory, const_cast<Table*>(&table)};
    const cudaError_t error =
        cudaLaunchCooperativeKernel(kKernel, dim3(plan.num_blocks), dim3(plan.threads), parameters,
                                    sizeof(SharedMemory) + plan.threads / kWarp * resident_bytes,
                                    static_cast<cudaStream_t>(place.stream));
    if (IsRefusal(error)) {
      cudaGetLastError();
      return false;
    }
    Check(error, "cudaLaunchCooperativeKernel", place.device);
    return true;
  }

  void All() {
    if (plan.cooperative && Cooperative()) return;
    Ordinary<Phase::kMeasure>();
    const bool one = args.num_segments == 1;
    if (!one) Ordinary<Phase::kTotals>();
    if (one || args.scale) Ordinary<Phase::kFinish>();
  }
};

// Measures and, with args.scale, decides and scales; with args.coefficients it scales alone.
template <typename Table>
void Launch(const Plan& plan, const Place& place, const Table& table, const Arguments& args) {
  if (args.coefficients != nullptr) {
    ClipLaunch<NormKind::kL2, Table>{plan, place, table, args}.template Ordinary<Phase::kFinish>();
  } else if (args.norm_kind == NormKind::kInf) {
    ClipLaunch<NormKind::kInf, Table>{plan, place, table, args}.All();
  } else {
    ClipLaunch<NormKind::kL2, Table>{plan, place, table, args}.All();
  }
}

// Writes table.entries[0, count) to `to`, device memory.
template <typename Table>
void LaunchWrite(const Table& part, int count, Entry* to, int device, void* stream) {
  void* parameters[] = {&to, &count, const_cast<Table*>(&part)};
  const int num_blocks = (count + kMaxThreads - 1) / kMaxThreads;
  Check(cudaLaunchKernel(&WriteTableKernel<Table>, dim3(num_blocks), dim3(kMaxThreads), parameters,
                         0, static_cast<cudaStream_t>(stream)),
        "cudaLaunchKernel", device);
}

}  // namespace fusedclip::cuda

#endif  // FUSEDCLIP_CUDA_LAUNCH_CUH_
