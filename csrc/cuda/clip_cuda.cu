// The CUDA backend: plans a launch and makes it. No allocation, no host sync.

#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda/check.h"
#include "cuda/clip_cuda.h"
#include "cuda/launch.h"
#include "cuda/launch_shape.h"
#include "semantics.h"

namespace fusedclip::cuda {

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

namespace {

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

// The most entries that travel in a launch's parameters: the toolkit has to know large ones, and
// the driver, which may be older than the toolkit that fusedclip was built with.
int64_t ParameterCapacity() {
  static const int driver = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
  }();
  const bool large = CUDART_VERSION >= kLargeParametersVersion && driver >= kLargeParametersVersion;
  return large ? kMostEntries : kFewEntries;
}

int64_t NumChunks(const GradSpan& span, int64_t chunk_bytes) {
  if (span.numel == 0) return 0;
  const int64_t head = reinterpret_cast<uintptr_t>(span.data) % 16;
  return (head + span.numel * ItemSize(span.dtype) + chunk_bytes - 1) / chunk_bytes;
}

// num_entries + 1 of them: see Entry.
void FillEntries(const Plan& plan, const GradSpan* spans, Entry* entries) {
  int64_t chunk = 0;
  for (int64_t i = 0; i < plan.num_entries; ++i) {
    const GradSpan& span = spans[plan.listed_as_given ? i : plan.listed[i]];
    entries[i] = {reinterpret_cast<uintptr_t>(span.data), span.numel * ItemSize(span.dtype),
                  static_cast<int32_t>(chunk), span.segment * 8 + static_cast<int32_t>(span.dtype)};
    chunk += NumChunks(span, plan.chunk_bytes);
  }
  entries[plan.num_entries] = {0, 0, static_cast<int32_t>(chunk), 0};
}

// The spans that the table lists: what has elements and counts, by segment. Norms of each gradient
// are wanted of the empty ones too.
void List(const ClipRequest& request, Plan* plan) {
  const auto is_listed = [&](const GradSpan& span) {
    return plan->entry_norms || (span.numel > 0 && span.segment != kNotCounted);
  };
  int32_t highest = 0;
  for (int64_t i = 0; i < request.num_spans; ++i) {
    const GradSpan& span = request.spans[i];
    plan->listed_as_given &= is_listed(span) && span.segment >= highest;
    highest = span.segment;
  }
  plan->num_entries = request.num_spans;
  if (plan->listed_as_given) return;
  for (int64_t i = 0; i < request.num_spans; ++i) {
    if (is_listed(request.spans[i])) plan->listed.push_back(i);
  }
  std::stable_sort(plan->listed.begin(), plan->listed.end(), [&](int64_t a, int64_t b) {
    return request.spans[a].segment < request.spans[b].segment;
  });
  plan->num_entries = static_cast<int64_t>(plan->listed.size());
}

// Calls launch with the table: in the parameters where it fits, else the copy on the device.
template <typename Launch>
void WithTable(const Plan& plan, const Place& place, const GradSpan* spans, Launch launch) {
  const auto in_parameters = [&](auto table) {
    FillEntries(plan, spans, table.entries);
    launch(table);
  };
  if (plan.table_bytes > 0) {
    if (place.table == nullptr) throw std::logic_error("this list needs a table on the device");
    return launch(DeviceTable{static_cast<const Entry*>(place.table)});
  }
  if (plan.num_entries <= kFewEntries) return in_parameters(ParameterTable<kFewEntries>());
  if constexpr (CUDART_VERSION >= kLargeParametersVersion) {
    if (plan.num_entries <= kMoreEntries) return in_parameters(ParameterTable<kMoreEntries>());
    return in_parameters(ParameterTable<kMostEntries>());
  }
}

// Writes a table in parts of a launch's parameters.
template <typename Part>
void WriteParts(const Entry* entries, int64_t count, Entry* to, int device, void* stream) {
  Part part;
  for (int64_t first = 0; first < count; first += Part::kCapacity) {
    const int num = static_cast<int>(std::min<int64_t>(Part::kCapacity, count - first));
    std::copy_n(entries + first, num, part.entries);
    LaunchWrite(part, num, to + first, device, stream);
  }
}

// Whether no norm can lead to a change: an infinite threshold is how a norm is asked for.
bool NeverWrites(const ClipRequest& request) {
  return request.max_norms == nullptr && request.max_norm == kInfinity &&
         request.inv_scale == nullptr && request.policy != Nonfinite::kZero;
}

Arguments ArgumentsOf(const Plan& plan) {
  const int64_t warps = int64_t{plan.num_blocks} * (plan.threads / kWarp);
  Arguments args = {};
  args.num_entries = static_cast<int32_t>(plan.num_entries);
  args.num_segments = plan.num_segments;
  args.num_chunks = static_cast<int32_t>(plan.num_chunks);
  args.rounds = static_cast<int32_t>((plan.num_chunks + warps - 1) / warps);
  args.chunk_bytes = static_cast<int32_t>(plan.chunk_bytes);
  args.norm_kind = plan.norm_kind;
  args.any_float64 = plan.any_float64;
  return args;
}

}  // namespace

Plan MakePlan(const ClipRequest& request, int device, bool entry_norms) {
  if (request.num_segments > kMaxSegments) {
    throw std::invalid_argument("segments: expected at most " + std::to_string(kMaxSegments));
  }
  Plan plan;
  plan.num_segments = request.num_segments;
  plan.norm_kind = request.norm_kind;
  plan.entry_norms = entry_norms;
  for (int64_t i = 0; i < request.num_spans; ++i) {
    plan.any_float64 |= request.spans[i].dtype == DType::kFloat64;
  }
  List(request, &plan);
  const auto each_listed = [&](auto visit) {
    for (int64_t i = 0; i < plan.num_entries; ++i) {
      visit(request.spans[plan.listed_as_given ? i : plan.listed[i]]);
    }
  };
  int64_t total_bytes = 0;
  each_listed([&](const GradSpan& span) { total_bytes += span.numel * ItemSize(span.dtype); });
  const Layout layout = LayoutFor(Properties(device), total_bytes);
  plan.chunk_bytes = layout.chunk_bytes;
  each_listed(
      [&](const GradSpan& span) { plan.num_chunks += NumChunks(span, layout.chunk_bytes); });
  plan.threads = layout.threads;
  plan.cooperative = layout.cooperative;
  // At least one, so that a list of empty gradients gets its norm as well.
  plan.num_blocks = static_cast<int>(std::clamp<int64_t>(plan.num_chunks, 1, layout.max_blocks));
  const int64_t warps = plan.threads / kWarp;
  const int64_t rounds =
      (plan.num_chunks + plan.num_blocks * warps - 1) / (plan.num_blocks * warps);
  plan.resident_vectors =
      static_cast<int>(std::min(layout.resident_bytes / warps, rounds * plan.chunk_bytes) / 16);
  const int64_t owner_slots = entry_norms || plan.num_segments != 1 ? plan.num_chunks : 0;
  plan.scratch_bytes = sizeof(double) * (plan.num_blocks + owner_slots + plan.num_segments);
  plan.table_bytes =
      plan.num_entries <= ParameterCapacity() ? 0 : (plan.num_entries + 1) * sizeof(Entry);
  return plan;
}

void FillTable(const Plan& plan, const ClipRequest& request, void* table) {
  FillEntries(plan, request.spans, static_cast<Entry*>(table));
}

void WriteTable(const Plan& plan, const void* table, int device, void* stream, void* to) {
  const OnDevice on_device(device);
  const Entry* from = static_cast<const Entry*>(table);
  const int64_t count = plan.num_entries + 1;
  if constexpr (CUDART_VERSION >= kLargeParametersVersion) {
    if (ParameterCapacity() == kMostEntries) {
      return WriteParts<ParameterTable<kMostEntries>>(from, count, static_cast<Entry*>(to), device,
                                                      stream);
    }
  }
  WriteParts<ParameterTable<kFewEntries>>(from, count, static_cast<Entry*>(to), device, stream);
}

void Clip(const Plan& plan, const ClipRequest& request, const Place& place,
          const DeviceOutcome& outcome, bool scale) {
  const OnDevice on_device(place.device);
  Arguments args = ArgumentsOf(plan);
  args.policy = request.policy;
  args.scale = scale && !NeverWrites(request);
  args.max_norm = request.max_norm;
  args.inv_scale = request.inv_scale;
  args.max_norms = request.max_norms;
  const bool one = plan.num_segments == 1;
  args.block_slots = static_cast<double*>(place.scratch);
  double* rest = args.block_slots + plan.num_blocks;
  args.owner_slots = one && outcome.entry_norms == nullptr ? nullptr : rest;
  args.totals = outcome.totals;
  if (!one && args.totals == nullptr) args.totals = rest + plan.num_chunks;
  args.norms = outcome.norms;
  args.entry_norms = outcome.entry_norms;
  args.found_inf = outcome.found_inf;
  WithTable(plan, place, request.spans,
            [&](const auto& table) { Launch(plan, place, table, args); });
}

void Scale(const Plan& plan, const ClipRequest& request, const Place& place,
           const double* coefficients, bool zero_fill) {
  if (plan.num_chunks == 0) return;
  const OnDevice on_device(place.device);
  Arguments args = ArgumentsOf(plan);
  args.scale = true;
  args.coefficients = coefficients;
  args.zero_fill = zero_fill;
  WithTable(plan, place, request.spans,
            [&](const auto& table) { Launch(plan, place, table, args); });
}

}  // namespace fusedclip::cuda
