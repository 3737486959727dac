// Every path of csrc/cuda from plain C++, checked against fp64 on the host: for compute-sanitizer
// on a GPU and for the emulator, where planted bugs must fail it. Prints what differs; exit
// status 1.

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../values.h"
#include "clip.h"
#include "cuda/clip_cuda.h"
#include "semantics.h"

namespace fusedclip {
namespace {

constexpr int kGuardBytes = 48;  // between gradients: whoever writes there is caught

int g_checks = 0;
int g_failures = 0;

void Check(bool good, const std::string& what, double wanted, double got) {
  ++g_checks;
  if (good || ++g_failures > 10) return;
  std::printf("%s: expected %.9g, got %.9g\n", what.c_str(), wanted, got);
}

void CheckNear(const std::string& what, double wanted, double got, double rtol, double atol = 0) {
  const bool both_nan = wanted != wanted && got != got;
  const bool same = both_nan || wanted == got;
  Check(same || std::fabs(wanted - got) <= atol + rtol * std::fabs(wanted), what, wanted, got);
}

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t size) : size_(size) {
    if (cudaMalloc(reinterpret_cast<void**>(&data_), std::max<int64_t>(size, 1) * sizeof(T)) !=
        cudaSuccess) {
      std::printf("cudaMalloc failed\n");
      std::exit(2);
    }
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { Write(values); }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* get() const { return data_; }
  void Write(const std::vector<T>& values) const {
    cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice);
  }
  std::vector<T> Read() const {
    std::vector<T> values(size_);
    const cudaError_t error =
        cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost);
    Check(error == cudaSuccess, "cudaMemcpy", 0, error);
    return values;
  }

 private:
  T* data_ = nullptr;
  int64_t size_;
};

// A list of gradients in one buffer, on the host and on the device.
struct List {
  std::vector<char> host;
  std::vector<GradSpan> spans;  // their data is an offset
  DeviceArray<char> device;

  static List Random(int count, int64_t most, bool mixed, double magnitude, int seed) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal(0.0, magnitude);
    std::vector<char> host(kGuardBytes, 0x55);
    std::vector<GradSpan> spans;
    for (int i = 0; i < count; ++i) {
      const DType dtype = mixed ? static_cast<DType>(random() % kNumDTypes) : DType::kFloat32;
      const int64_t numel = i % 11 == 5 ? 0 : 1 + random() % most;
      const size_t item = ItemSize(dtype);
      // Any alignment of whole elements.
      while (host.size() % 16 != item * (random() % (16 / item))) host.push_back(0x55);
      const size_t offset = host.size();
      host.resize(offset + numel * item);
      for (int64_t k = 0; k < numel; ++k)
        StoreValue(normal(random), &host[offset + k * item], dtype);
      host.insert(host.end(), kGuardBytes, 0x55);
      spans.push_back({reinterpret_cast<void*>(offset), numel, dtype, 0});
    }
    return List(std::move(host), std::move(spans));
  }

  List(std::vector<char> bytes, std::vector<GradSpan> offsets)
      : host(std::move(bytes)), spans(std::move(offsets)), device(host) {}

  double Value(int64_t i, int64_t k) const {
    const size_t item = ItemSize(spans[i].dtype);
    return LoadValue(&host[reinterpret_cast<size_t>(spans[i].data) + k * item], spans[i].dtype);
  }

  // Σ|g·inv_scale|² or the maximum of one gradient.
  double Total(int64_t i, NormKind kind, double inv_scale) const {
    double total = 0.0;
    for (int64_t k = 0; k < spans[i].numel; ++k) {
      const double value = std::fabs(Value(i, k) * inv_scale);
      total = kind == NormKind::kInf ? std::max(total, value) : total + value * value;
    }
    return total;
  }

  // Compares every byte: gradients with what `factor(i)` makes of them, guards with themselves.
  template <typename Factor>
  void CheckScaled(const std::string& what, Factor factor) const {
    std::vector<char> wanted = host;
    const std::vector<char> got = device.Read();
    for (size_t i = 0; i < spans.size(); ++i) {
      const size_t begin = reinterpret_cast<size_t>(spans[i].data);
      const size_t item = ItemSize(spans[i].dtype);
      for (int64_t k = 0; k < spans[i].numel; ++k) {
        const size_t at = begin + k * item;
        const double result = LoadValue(&got[at], spans[i].dtype);
        const double scale = factor(i);
        const Tolerance allowed = scale == 1.0 ? Tolerance{0.0, 0.0} : ToleranceOf(spans[i].dtype);
        CheckNear(what + " grads[" + std::to_string(i) + "][" + std::to_string(k) + "]",
                  Value(i, k) * scale, result, allowed.relative, allowed.absolute);
        std::copy_n(&got[at], item, &wanted[at]);
      }
    }
    Check(wanted == got, what + ": bytes outside the gradients", 0, 1);
  }
};

struct Case {
  std::string name;
  int count;
  int64_t most;
  bool mixed;
  NormKind kind = NormKind::kL2;
  int32_t num_segments = 1;
  double magnitude = 1.0;
  double threshold = 0.5;  // of the norm
  bool tensor_norms = false;
  bool unscale = false;
  bool replicas = false;  // every third gradient is not counted, the last too
  bool refused = false;   // a value of the first gradient is infinite: nothing may be touched
};

void Run(const Case& c, int seed) {
  List list = List::Random(c.count, c.most, c.mixed, c.magnitude, seed);
  if (c.refused) {
    StoreValue(std::numeric_limits<double>::infinity(),
               &list.host[reinterpret_cast<size_t>(list.spans[0].data)], list.spans[0].dtype);
    list.device.Write(list.host);
  }
  const double inv_scale = c.unscale ? 1.0 / 1024 : 1.0;
  bool any_float64 = false;
  std::vector<double> totals(c.num_segments, 0.0);
  std::vector<double> tensor_totals;
  std::vector<GradSpan> spans = list.spans;
  for (size_t i = 0; i < spans.size(); ++i) {
    spans[i].data = list.device.get() + reinterpret_cast<size_t>(spans[i].data);
    const bool counted = !(c.replicas && i % 3 == 2);
    spans[i].segment = counted ? static_cast<int32_t>((i * 7) % c.num_segments)  // not in order
                               : kNotCounted;
    any_float64 |= spans[i].dtype == DType::kFloat64;
    const double total = counted ? list.Total(i, c.kind, inv_scale) : 0.0;
    tensor_totals.push_back(total);
    if (!counted) continue;
    double& sum = totals[spans[i].segment];
    sum = c.kind == NormKind::kInf ? std::max(sum, total) : sum + total;
  }
  std::vector<double> norms, limits;
  for (const double total : totals) {
    norms.push_back(NormOf(total, c.kind, any_float64));
    limits.push_back(c.threshold * norms.back());
  }

  const DeviceArray<double> max_norms(limits);
  const DeviceArray<float> inverse(std::vector<float>{static_cast<float>(inv_scale)});
  ClipRequest request;
  request.spans = spans.data();
  request.num_spans = spans.size();
  request.num_segments = c.num_segments;
  request.norm_kind = c.kind;
  request.max_norms = max_norms.get();
  request.inv_scale = c.unscale ? inverse.get() : nullptr;

  const cuda::Plan plan = cuda::MakePlan(request, 0, c.tensor_norms);
  const DeviceArray<char> scratch(plan.scratch_bytes);
  std::vector<char> table_bytes(plan.table_bytes);
  const DeviceArray<char> table(plan.table_bytes);
  if (plan.table_bytes > 0) {
    cuda::FillTable(plan, request, table_bytes.data());
    cuda::WriteTable(plan, table_bytes.data(), 0, nullptr, table.get());
  }
  const cuda::Place place = {0, nullptr, scratch.get(),
                             plan.table_bytes > 0 ? table.get() : nullptr};
  const std::vector<double> unset(std::max<int64_t>(c.num_segments, c.count), -1.0);
  const DeviceArray<double> measured(unset), norm(unset), each(unset);
  const DeviceArray<float> found_inf(std::vector<float>{0.0f});
  cuda::DeviceOutcome outcome;
  outcome.totals = measured.get();
  outcome.norms = norm.get();
  outcome.entry_norms = c.tensor_norms ? each.get() : nullptr;
  outcome.found_inf = found_inf.get();

  // Read a fp32 or fp64 norm out of 8-byte slots.
  const auto norm_at = [&](const std::vector<double>& values, int64_t i) -> double {
    if (any_float64) return values[i];
    float value;
    std::memcpy(&value, reinterpret_cast<const char*>(values.data()) + i * sizeof(float),
                sizeof(value));
    return value;
  };
  const auto check_measured = [&](const std::string& what) {
    const std::vector<double> got_totals = measured.Read();
    const std::vector<double> got_norms = norm.Read();
    for (int32_t s = 0; s < c.num_segments; ++s) {
      CheckNear(what + " total " + std::to_string(s), totals[s], got_totals[s], 1e-6);
      CheckNear(what + " norm " + std::to_string(s), norms[s], norm_at(got_norms, s), 5e-7);
    }
    if (c.tensor_norms) {
      const std::vector<double> got = each.Read();
      for (int i = 0; i < c.count; ++i) {
        CheckNear(what + " norm of grads[" + std::to_string(i) + "]",
                  NormOf(tensor_totals[i], c.kind, any_float64), norm_at(got, i), 5e-7);
      }
    }
    Check(found_inf.Read()[0] == 0.0f, what + " found_inf", 0, 1);
  };

  if (c.refused) {
    request.policy = Nonfinite::kError;
    cuda::Clip(plan, request, place, outcome, /*scale=*/true);
    Check(found_inf.Read()[0] == 1.0f, c.name + " found_inf", 1, 0);
    list.CheckScaled(c.name + ":", [](int64_t) { return 1.0; });
    return;
  }
  cuda::Clip(plan, request, place, outcome, /*scale=*/false);
  check_measured(c.name + ", measured:");
  list.CheckScaled(c.name + ", measured:", [](int64_t) { return 1.0; });

  for (const auto* results : {&measured, &norm, &each}) results->Write(unset);
  cuda::Clip(plan, request, place, outcome, /*scale=*/true);
  check_measured(c.name + ", clipped:");
  const auto factor = [&](int64_t i) {
    const int32_t s = spans[i].segment;
    if (s == kNotCounted) return 1.0;
    return inv_scale * Coefficient(norms[s], limits[s]);
  };
  list.CheckScaled(c.name + ", clipped:", factor);

  list.host = list.device.Read();
  const DeviceArray<double> halves(std::vector<double>(c.num_segments, 0.5));
  cuda::Scale(plan, request, place, halves.get(), /*zero_fill=*/false);
  list.CheckScaled(c.name + ", scaled:",
                   [&](int64_t i) { return spans[i].segment == kNotCounted ? 1.0 : 0.5; });
}

// Begins no case once there are `enough` failures.
int RunAll(int seeds, int enough) {
  constexpr NormKind kInf = NormKind::kInf;
  std::vector<Case> cases = {
      {"one small", 1, 100, false},
      {"few", 7, 3000, true},
      {"one of several chunks", 1, 60000, false},
      {"infinity", 9, 3000, true, kInf},
      {"below the threshold", 9, 3000, true, NormKind::kL2, 1, 1.0, 2.0},
      {"groups", 12, 2000, true, NormKind::kL2, 3},
      {"groups, infinity", 12, 2000, true, kInf, 3},
      {"squares that overflow", 5, 500, false, NormKind::kL2, 1, 1e25},
      {"squares that vanish", 5, 500, false, NormKind::kL2, 1, 1e-30},
      {"a table on the device", 1500, 30, true},
  };
  cases.push_back({"tensor norms", 12, 2000, true});
  cases.back().tensor_norms = true;
  // More chunks of one gradient than warps in the grid, and many of one chunk or two.
  cases.push_back({"norms of long tensors", 4, 60000, false});
  cases.back().tensor_norms = true;
  cases.push_back({"a chunk a gradient", 150, 250, true});
  cases.push_back({"a segment a gradient", 60, 1500, true, NormKind::kL2, 60});
  cases.push_back({"a long segment", 6, 60000, false, NormKind::kL2, 2});
  for (const int32_t segments : {1, 3}) {
    cases.push_back({"refused", 6, 3000, false, NormKind::kL2, segments});
    cases.back().refused = true;
  }
  cases.push_back({"unscaled", 6, 3000, false});
  cases.back().unscale = true;
  cases.push_back({"replicas", 9, 3000, true});
  cases.back().replicas = true;
  for (int seed = 0; seed < seeds; ++seed) {
    for (const Case& c : cases) {
      if (g_failures < enough) Run(c, seed);
    }
  }
  std::printf("%d checks, %d failures\n", g_checks, g_failures);
  return g_failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace fusedclip

// driver [SEEDS [ENOUGH]]
int main(int argc, char** argv) {
  return fusedclip::RunAll(argc > 1 ? std::atoi(argv[1]) : 1,
                           argc > 2 ? std::atoi(argv[2]) : std::numeric_limits<int>::max());
}
