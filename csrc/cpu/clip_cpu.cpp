// The CPU backend: measure chunks, add up, decide, scale chunks.
//
// Each chunk has its own partial sum, and these are added in the order of the list: the result has
// the same bits for any number of threads.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "clip.h"
#include "cpu/arithmetic.h"
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "cpu/plan.h"
#include "cpu/team.h"
#include "semantics.h"

namespace fusedclip::cpu {
namespace {

Plan MakePlan(const ClipRequest& request) {
  return Plan(request.spans, request.num_spans, request.num_threads);
}

const DTypeKernels& KernelsFor(const KernelTable& table, DType dtype) {
  return table.by_dtype[static_cast<int>(dtype)];
}

char* Address(const GradSpan& span, int64_t offset) {
  return static_cast<char*>(span.data) + offset * ItemSize(span.dtype);
}

// The second passes find the chunk in the cache.
double SumSquares(const DTypeKernels& kernels, DType dtype, const void* data, int64_t n,
                  float inv_scale) {
  const double sum = kernels.sum_squares(data, n, inv_scale);
  if (dtype == DType::kFloat64 || !NeedsWideSum(sum)) return sum;
  if (sum == 0.0 && kernels.max_abs(data, n, 1.0f) == 0.0) return sum;
  return kernels.sum_squares_wide(data, n, inv_scale);
}

// With `span_sums` [num_spans] also the sum of each span; `out` has the same bits with and without.
void MeasureWithPlan(const ClipRequest& request, const Plan& plan, double* out,
                     double* span_sums = nullptr) {
  const KernelTable& table = *CurrentIsa().kernels;
  const bool infinity = request.norm_kind == NormKind::kInf;
  const float inv_scale = request.inv_scale == nullptr ? 1.0f : *request.inv_scale;
  std::vector<double> partial(plan.num_chunks());
  RunShares(plan.Dealt(Order::kForward), [&](int share) noexcept {
    plan.Forward(share, [&](const GradSpan& span, int64_t offset, int64_t n, int64_t chunk) {
      if (span.segment == kNotCounted) return;
      const DTypeKernels& kernels = KernelsFor(table, span.dtype);
      const void* data = Address(span, offset);
      partial[chunk] = infinity ? kernels.max_abs(data, n, inv_scale)
                                : SumSquares(kernels, span.dtype, data, n, inv_scale);
    });
  });

  std::fill(out, out + request.num_segments, 0.0);
  const double* next = partial.data();
  for (int64_t i = 0; i < request.num_spans; ++i) {
    const int32_t segment = request.spans[i].segment;
    double uncounted = 0.0;
    double& total = segment == kNotCounted ? uncounted : out[segment];
    double own = 0.0;
    for (int64_t k = Plan::NumChunks(request.spans[i]); k > 0; --k, ++next) {
      total = infinity ? MaxWithNan(total, *next) : total + *next;
      own = infinity ? MaxWithNan(own, *next) : own + *next;
    }
    if (span_sums != nullptr) span_sums[i] = own;
  }
}

void Apply(const DTypeKernels& kernels, Action action, double factor, DType dtype, void* data,
           int64_t n) {
  if (action == Action::kZero) {
    std::memset(data, 0, n * ItemSize(dtype));
  } else {
    kernels.scale(data, n, factor);
  }
}

Action ActionOf(const Decision* decisions, const GradSpan& span) {
  if (span.segment == kNotCounted) return Action::kNone;
  return ActionFor(decisions[span.segment], span.dtype);
}

// Backwards: each thread begins with the chunks that it read last, which are still in its cache.
bool ScaleWithPlan(const ClipRequest& request, const Plan& plan, const Decision* decisions) {
  const KernelTable& table = *CurrentIsa().kernels;
  bool written = false;
  for (int64_t i = 0; i < request.num_spans && !written; ++i) {
    const GradSpan& span = request.spans[i];
    written = span.numel > 0 && ActionOf(decisions, span) != Action::kNone;
  }
  if (!written) return false;
  RunShares(plan.Dealt(Order::kBackward), [&](int share) noexcept {
    plan.Backward(share, [&](const GradSpan& span, int64_t offset, int64_t n) {
      const Action action = ActionOf(decisions, span);
      if (action == Action::kNone) return;
      Apply(KernelsFor(table, span.dtype), action, decisions[span.segment].factor, span.dtype,
            Address(span, offset), n);
    });
  });
  return true;
}

bool AnyFloat64(const ClipRequest& request) {
  return std::any_of(request.spans, request.spans + request.num_spans,
                     [](const GradSpan& span) { return span.dtype == DType::kFloat64; });
}

}  // namespace

void CopyBytes(void* to, const void* from, int64_t n) { std::memcpy(to, from, n); }

bool PaysThreads(const ClipRequest& request) {
  return Plan::UsefulThreads(request.spans, request.num_spans) > 1;
}

void Measure(const ClipRequest& request, double* out) {
  const IeeeArithmetic ieee;
  MeasureWithPlan(request, MakePlan(request), out);
}

bool Scale(const ClipRequest& request, const double* coefficient, bool zero_fill) {
  const IeeeArithmetic ieee;
  std::vector<Decision> decisions(request.num_segments);
  for (int32_t i = 0; i < request.num_segments; ++i) {
    const bool zero = zero_fill && coefficient[i] == 0.0;
    decisions[i] = {coefficient[i], zero ? Action::kZero : Action::kMultiply};
  }
  return ScaleWithPlan(request, MakePlan(request), decisions.data());
}

bool Clamp(const ClipRequest& request, double limit) {
  const IeeeArithmetic ieee;
  const Plan plan = MakePlan(request);
  const KernelTable& table = *CurrentIsa().kernels;
  std::atomic<bool> changed{false};
  RunShares(plan.Dealt(Order::kForward), [&](int share) noexcept {
    bool mine = false;
    plan.Forward(share, [&](const GradSpan& span, int64_t offset, int64_t n, int64_t) {
      mine |= KernelsFor(table, span.dtype).clamp(Address(span, offset), n, limit);
    });
    if (mine) changed.store(true);
  });
  return changed.load();
}

void Clip(const ClipRequest& request, ClipOutcome* outcome) {
  const IeeeArithmetic ieee;
  const Plan plan = MakePlan(request);
  MeasureWithPlan(request, plan, outcome->norm, outcome->span_norms);

  const bool any_float64 = AnyFloat64(request);
  if (outcome->span_norms != nullptr) {
    for (int64_t i = 0; i < request.num_spans; ++i) {
      outcome->span_norms[i] = NormOf(outcome->span_norms[i], request.norm_kind, any_float64);
    }
  }
  const float inv_scale = request.inv_scale == nullptr ? 1.0f : *request.inv_scale;
  std::vector<Decision> decisions(request.num_segments);
  outcome->nonfinite = false;
  for (int32_t i = 0; i < request.num_segments; ++i) {
    const double norm = NormOf(outcome->norm[i], request.norm_kind, any_float64);
    outcome->norm[i] = norm;
    const double max_norm = request.max_norms == nullptr ? request.max_norm : request.max_norms[i];
    outcome->nonfinite |= !IsFinite(norm);
    decisions[i] = Decide(norm, max_norm, request.policy, inv_scale);
  }
  const bool refused = outcome->nonfinite && request.policy == Nonfinite::kError;
  outcome->written = !refused && ScaleWithPlan(request, plan, decisions.data());
}

}  // namespace fusedclip::cpu
