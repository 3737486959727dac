// The CUDA backend: plans a launch and makes it. One launch a call, no allocation, no host sync.

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>

#include "cuda/clip_cuda.h"
#include "cuda/kernels.cuh"
#include "cuda/launch_shape.h"

namespace fusedclip::cuda {
namespace {

// Throws with the name of the call and the device. The error is taken from the runtime, so that
// the next call does not meet it again (an error of the device itself stays there for good).
void Check(cudaError_t error, const char* call, int device) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  std::string message = std::string(call) + " on cuda:" + std::to_string(device) +
                        " failed: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) +
                        ")";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion ||
      error == cudaErrorInvalidDeviceFunction) {
    message +=
        "; this build of fusedclip has no code for that GPU: reinstall with "
        "FUSEDCLIP_CUDA_ARCHS naming its architecture";
  }
  throw std::runtime_error(message);
}

// Makes a device current while it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    Check(cudaGetDevice(&previous_), "cudaGetDevice", device);
    if (previous_ != device) Check(cudaSetDevice(device), "cudaSetDevice", device);
  }
  ~OnDevice() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int device_;
  int previous_ = 0;
};

constexpr int kMaxDevices = 64;

// Asked once for each device.
const Device& Properties(int device) {
  static Device devices[kMaxDevices];
  static std::once_flag asked[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) {
    throw std::runtime_error("cuda:" + std::to_string(device) + " is beyond the " +
                             std::to_string(kMaxDevices) + " devices that fusedclip knows");
  }
  std::call_once(asked[device], [device] {
    int major, minor, multiprocessors;
    Check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
          "cudaDeviceGetAttribute", device);
    Check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
          "cudaDeviceGetAttribute", device);
    Check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute", device);
    devices[device] = {10 * major + minor, multiprocessors};
  });
  return devices[device];
}

int64_t NumChunks(const GradSpan& span, int64_t chunk_bytes) {
  if (span.numel == 0) return 0;
  const int64_t head = reinterpret_cast<uintptr_t>(span.data) % 16;
  return (head + span.numel * ItemSize(span.dtype) + chunk_bytes - 1) / chunk_bytes;
}

Entry ToEntry(const GradSpan& span, int64_t first_chunk) {
  return {reinterpret_cast<uintptr_t>(span.data), span.numel, static_cast<int32_t>(first_chunk),
          span.segment * 8 + static_cast<int32_t>(span.dtype)};
}

void FillEntries(const Plan& plan, const GradSpan* spans, Entry* entries) {
  int64_t chunk = 0;
  for (int64_t i = 0; i < plan.num_entries; ++i) {
    const GradSpan& span = spans[plan.order.empty() ? i : plan.order[i]];
    entries[i] = ToEntry(span, chunk);
    chunk += NumChunks(span, plan.chunk_bytes);
  }
}

// More shared memory than 48 KiB has to be asked for, once for each kernel and device.
template <typename... Parameters>
void AllowSharedMemory(void (*kernel)(Parameters...), int device) {
  static std::once_flag asked[kMaxDevices];
  std::call_once(asked[device], [&] {
    int most;
    Check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "cudaDeviceGetAttribute", device);
    Check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, most),
          "cudaFuncSetAttribute", device);
  });
}

template <typename Table>
void LaunchClip(const Plan& plan, const Place& place, const Table& table,
                const Arguments& arguments) {
  const auto kernel = plan.norm_kind == NormKind::kInf ? &ClipKernel<NormKind::kInf, Table>
                                                       : &ClipKernel<NormKind::kL2, Table>;
  AllowSharedMemory(&ClipKernel<NormKind::kInf, Table>, place.device);
  AllowSharedMemory(&ClipKernel<NormKind::kL2, Table>, place.device);
  void* parameters[] = {const_cast<Table*>(&table), const_cast<Arguments*>(&arguments)};
  Check(cudaLaunchCooperativeKernel(kernel, dim3(plan.num_blocks), dim3(plan.threads), parameters,
                                    plan.shared_bytes, static_cast<cudaStream_t>(place.stream)),
        "cudaLaunchCooperativeKernel", place.device);
}

template <typename Table>
void LaunchScale(const Plan& plan, const Place& place, const Table& table,
                 const ScaleArguments& arguments) {
  void* parameters[] = {const_cast<Table*>(&table), const_cast<ScaleArguments*>(&arguments)};
  Check(cudaLaunchKernel(&ScaleKernel<Table>, dim3(plan.num_blocks), dim3(plan.threads), parameters,
                         0, static_cast<cudaStream_t>(place.stream)),
        "cudaLaunchKernel", place.device);
}

// Calls launch with the table: in the parameters where it fits, else the copy on the device.
template <typename Launch>
void WithTable(const Plan& plan, const Place& place, const GradSpan* spans, Launch launch) {
  if (plan.table_bytes == 0) {
    ParameterTable table;
    FillEntries(plan, spans, table.entries);
    launch(table);
  } else if (place.table == nullptr) {
    throw std::logic_error("this list needs a table on the device");
  } else {
    launch(DeviceTable{static_cast<const Entry*>(place.table)});
  }
}

}  // namespace

Plan MakePlan(const ClipRequest& request, int device, bool entry_norms) {
  Plan plan;
  plan.num_entries = request.num_spans;
  plan.num_segments = request.num_segments;
  plan.norm_kind = request.norm_kind;
  int64_t total_bytes = 0;
  bool ordered = true;
  int32_t highest = kNotCounted;
  for (int64_t i = 0; i < request.num_spans; ++i) {
    const GradSpan& span = request.spans[i];
    total_bytes += span.numel * ItemSize(span.dtype);
    plan.any_float64 |= span.dtype == DType::kFloat64;
    ordered &= span.segment >= highest;
    highest = span.segment;
  }
  if (!ordered) {
    plan.order.resize(request.num_spans);
    std::iota(plan.order.begin(), plan.order.end(), 0);
    std::stable_sort(plan.order.begin(), plan.order.end(), [&](int64_t a, int64_t b) {
      return request.spans[a].segment < request.spans[b].segment;
    });
  }
  if (request.num_segments > kMaxSegments) {
    throw std::invalid_argument("segments: expected at most " + std::to_string(kMaxSegments));
  }
  const Layout layout = LayoutFor(Properties(device), total_bytes);
  plan.chunk_bytes = layout.chunk_bytes;
  for (int64_t i = 0; i < request.num_spans; ++i) {
    plan.num_chunks += NumChunks(request.spans[i], layout.chunk_bytes);
  }
  plan.threads = layout.threads;
  // At least one, so that a list of empty gradients gets its norm as well.
  plan.num_blocks = static_cast<int>(std::clamp<int64_t>(plan.num_chunks, 1, layout.max_blocks));
  const int64_t rounds = (plan.num_chunks + plan.num_blocks - 1) / plan.num_blocks;
  plan.resident_chunks = static_cast<int>(std::min<int64_t>(layout.resident_chunks, rounds));
  plan.shared_bytes = sizeof(SharedMemory) + plan.resident_chunks * plan.chunk_bytes;
  plan.slot_per_chunk = entry_norms || request.num_segments > 1;
  plan.scratch_bytes = sizeof(double) * (plan.slot_per_chunk ? plan.num_chunks : plan.num_blocks);
  plan.table_bytes = request.num_spans <= kParameterEntries ? 0 : request.num_spans * sizeof(Entry);
  return plan;
}

void FillTable(const Plan& plan, const ClipRequest& request, void* table) {
  FillEntries(plan, request.spans, static_cast<Entry*>(table));
}

void WriteTable(const Plan& plan, const void* table, int device, void* stream, void* to) {
  const OnDevice on_device(device);
  const Entry* entries = static_cast<const Entry*>(table);
  ParameterTable part;
  for (int64_t first = 0; first < plan.num_entries; first += kParameterEntries) {
    int count = static_cast<int>(std::min<int64_t>(kParameterEntries, plan.num_entries - first));
    std::copy_n(entries + first, count, part.entries);
    Entry* at = static_cast<Entry*>(to) + first;
    void* parameters[] = {&part, &count, &at};
    const int num_blocks = (count + kMaxThreads - 1) / kMaxThreads;
    Check(cudaLaunchKernel(&WriteTableKernel, dim3(num_blocks), dim3(kMaxThreads), parameters, 0,
                           static_cast<cudaStream_t>(stream)),
          "cudaLaunchKernel", device);
  }
}

void Clip(const Plan& plan, const ClipRequest& request, const Place& place,
          const DeviceOutcome& outcome, bool scale) {
  const OnDevice on_device(place.device);
  Arguments arguments = {};
  arguments.num_entries = static_cast<int32_t>(plan.num_entries);
  arguments.num_segments = plan.num_segments;
  arguments.num_chunks = static_cast<int32_t>(plan.num_chunks);
  arguments.chunk_bytes = static_cast<int32_t>(plan.chunk_bytes);
  arguments.resident_chunks = scale ? plan.resident_chunks : 0;
  arguments.slot_per_chunk = plan.slot_per_chunk;
  arguments.any_float64 = plan.any_float64;
  arguments.policy = request.policy;
  arguments.slots = static_cast<double*>(place.scratch);
  arguments.inv_scale = request.inv_scale;
  arguments.max_norms = request.max_norms;
  arguments.max_norm = request.max_norm;
  arguments.totals = outcome.totals;
  arguments.norms = outcome.norms;
  arguments.entry_norms = outcome.entry_norms;
  arguments.found_inf = outcome.found_inf;
  arguments.scale = scale;
  WithTable(plan, place, request.spans,
            [&](const auto& table) { LaunchClip(plan, place, table, arguments); });
}

void Scale(const Plan& plan, const ClipRequest& request, const Place& place,
           const double* coefficients, bool zero_fill) {
  if (plan.num_chunks == 0) return;
  const OnDevice on_device(place.device);
  ScaleArguments arguments = {};
  arguments.num_entries = static_cast<int32_t>(plan.num_entries);
  arguments.num_segments = plan.num_segments;
  arguments.num_chunks = static_cast<int32_t>(plan.num_chunks);
  arguments.chunk_bytes = static_cast<int32_t>(plan.chunk_bytes);
  arguments.coefficients = coefficients;
  arguments.zero_fill = zero_fill;
  WithTable(plan, place, request.spans,
            [&](const auto& table) { LaunchScale(plan, place, table, arguments); });
}

}  // namespace fusedclip::cuda
