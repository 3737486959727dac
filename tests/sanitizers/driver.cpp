// The CPU kernels under a sanitizer, without Python: several threads call them at once, whose jobs
// the pool's threads help with, on lists whose memory ends where the gradient ends.
//
// Each thread repeats what one thread did alone, and the bits must be the same.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "../values.h"
#include "aliasing.h"
#include "clip.h"
#include "cpu/job.h"

namespace fusedclip {
namespace {

constexpr int kCallers = 3;
constexpr int64_t kSizes[] = {0,   1,    3,     17,    64,    65,
                              255, 1000, 65536, 65537, 400001};  // more than one thread's

// Gradients in allocations of exactly their size, so that one byte too many is seen.
class List {
 public:
  explicit List(uint64_t seed) : state_(seed) {
    for (int dtype = 0; dtype < kNumDTypes; ++dtype) {
      for (const int64_t numel : kSizes) Add(static_cast<DType>(dtype), numel);
    }
  }

  ClipRequest Request(int threads) const {
    ClipRequest request;
    request.spans = spans_.data();
    request.num_spans = static_cast<int64_t>(spans_.size());
    request.num_segments = kSegments;
    request.num_threads = threads;
    return request;
  }

  std::vector<unsigned char> Bytes() const {
    std::vector<unsigned char> all;
    for (const GradSpan& span : spans_) {
      const auto* data = static_cast<const unsigned char*>(span.data);
      all.insert(all.end(), data, data + span.numel * ItemSize(span.dtype));
    }
    return all;
  }

  const std::vector<GradSpan>& spans() const { return spans_; }
  static constexpr int kSegments = 3;

 private:
  void Add(DType dtype, int64_t numel) {
    const int64_t bytes = numel * ItemSize(dtype);
    memory_.push_back(std::make_unique<unsigned char[]>(bytes));
    unsigned char* data = memory_.back().get();
    for (int64_t i = 0; i < numel; ++i) Store(dtype, data + i * ItemSize(dtype));
    spans_.push_back({data, numel, dtype, static_cast<int32_t>(spans_.size() % kSegments)});
    if (spans_.size() % 7 == 0) spans_.back().segment = kNotCounted;
  }

  // A finite value of magnitude 2^-4 … 2^3.
  void Store(DType dtype, unsigned char* to) {
    state_ = state_ * 6364136223846793005ULL + 1442695040888963407ULL;
    const uint64_t random = state_ >> 16;
    const double value = (random % 2 != 0 ? -1 : 1) *
                         std::ldexp(1.0 + random / 2 % 1024 / 1024.0, random / 4096 % 8 - 4);
    StoreValue(value, to, dtype);
  }

  uint64_t state_;
  std::vector<std::unique_ptr<unsigned char[]>> memory_;
  std::vector<GradSpan> spans_;
};

// Everything that the module calls; the numbers and the gradients that come out, as bytes.
std::vector<unsigned char> Everything(uint64_t seed, int threads) {
  const List list(seed);
  std::vector<double> numbers;
  const auto keep = [&numbers](const double* values) {
    numbers.insert(numbers.end(), values, values + List::kSegments);
  };
  double out[List::kSegments];
  const float inv_scale = 0.5f;
  for (const NormKind kind : {NormKind::kL2, NormKind::kInf}) {
    ClipRequest request = list.Request(threads);
    request.norm_kind = kind;
    cpu::Measure(request, out);
    keep(out);
    request.max_norm = 1.0;
    request.inv_scale = &inv_scale;
    ClipOutcome outcome{out, false, false};
    cpu::Clip(request, &outcome);
    keep(out);
  }
  cpu::Clamp(list.Request(threads), 0.01);
  const double factors[List::kSegments] = {1.0, 3.0, 0.0};
  cpu::Scale(list.Request(threads), factors, true);
  if (!FindSharedMemory(list.spans()).duplicates.empty()) numbers.push_back(-1.0);
  std::vector<unsigned char> bytes = list.Bytes();
  const auto* first = reinterpret_cast<const unsigned char*>(numbers.data());
  bytes.insert(bytes.end(), first, first + numbers.size() * sizeof(double));
  return bytes;
}

// The caller alone does all of a job whose other threads never come, and one that comes late finds
// nothing: its context is gone by then.
bool NobodyIsWaitedFor() {
  constexpr int kShares = 37;
  for (const cpu::Order order : {cpu::Order::kForward, cpu::Order::kBackward}) {
    auto runs = std::make_unique<std::vector<int>>(kShares);
    cpu::Job job(
        {kShares, 4, order},
        [](const void* context, int share) noexcept {
          ++(*static_cast<std::vector<int>*>(const_cast<void*>(context)))[share];
        },
        runs.get());
    job.Work(0, [] {});
    job.Wait();
    if (*runs != std::vector<int>(kShares, 1)) return false;
    runs.reset();
    job.Work(2, [] {});
  }
  return true;
}

// What several threads did is there when the caller has waited, each share once.
bool SharesAreHandedOver() {
  constexpr int kRounds = 200, kShares = 64, kThreads = 3;
  for (int round = 0; round < kRounds; ++round) {
    std::vector<int> runs(kShares);
    cpu::Job job(
        {kShares, kThreads, round % 2 == 0 ? cpu::Order::kForward : cpu::Order::kBackward},
        [](const void* context, int share) noexcept {
          ++(*static_cast<std::vector<int>*>(const_cast<void*>(context)))[share];
          std::this_thread::yield();
        },
        &runs);
    std::vector<std::thread> workers;
    for (int part = 1; part < kThreads; ++part) {
      workers.emplace_back([&job, part] { job.Work(part, [] {}); });
    }
    job.Work(0, [] {});
    job.Wait();
    const bool each_once = runs == std::vector<int>(kShares, 1);
    for (std::thread& worker : workers) worker.join();
    if (!each_once) return false;
  }
  return true;
}

}  // namespace
}  // namespace fusedclip

int main() {
  using fusedclip::kCallers;
  if (!fusedclip::SharesAreHandedOver()) {
    std::printf("a share was not run once\n");
    return 1;
  }
  if (!fusedclip::NobodyIsWaitedFor()) {
    std::printf("a job without helpers was not done\n");
    return 1;
  }
  // At once first: what is set up at first use is set up by threads that race for it.
  std::vector<std::vector<unsigned char>> results(kCallers);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&results, caller] {
      results[caller] = fusedclip::Everything(caller % 2 + 1, 2 + caller);
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (int caller = 0; caller < kCallers; ++caller) {
    if (results[caller] != fusedclip::Everything(caller % 2 + 1, 1)) {
      std::printf("caller %d: other bits than one thread alone\n", caller);
      return 1;
    }
  }
  // Alone, so that a core is free for the pool's threads: what they would race for is seen.
  const fusedclip::List list(3);
  for (int round = 0; round < 40; ++round) {
    const double factor = round % 2 == 0 ? 0.5 : 2.0;
    const double factors[fusedclip::List::kSegments] = {factor, factor, factor};
    fusedclip::cpu::Scale(list.Request(4), factors, false);
  }
  std::printf("the same bits\n");
  return 0;
}
