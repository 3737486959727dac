// The rules that every native backend shares, for host and device: how a sum becomes a norm, a norm
// a coefficient, and when a sum of squares in fp32 cannot be trusted.

#ifndef FUSEDCLIP_SEMANTICS_H_
#define FUSEDCLIP_SEMANTICS_H_

#include <cmath>
#include <limits>

#include "clip.h"

namespace fusedclip {

// Added to the norm before dividing: torch.nn.utils.clip_grad_norm_'s constant.
inline constexpr double kNormEpsilon = 1e-6;

// A fp32 sum of squares is exact enough while squares that fall below fp32's normal range cannot
// matter: each loses at most 2^-150, so a chunk of 2^16 elements loses 2^-134, a 2^-34th of 2^-100.
inline constexpr double kSmallestTrustedSum = 0x1p-100;

// What a NaN or infinite norm does to the gradients.
enum class Nonfinite : int32_t {
  kPropagate,  // multiply by the coefficient as computed: 0 or NaN
  kZero,       // set every gradient of the segment to +0
  kError,      // touch nothing; the caller raises
  kUnclipped,  // multiply by inv_scale alone
};
inline constexpr const char* kNonfiniteNames[] = {"propagate", "zero", "error", "unclipped"};
inline constexpr int kNumNonfinite = sizeof(kNonfiniteNames) / sizeof(kNonfiniteNames[0]);

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

FUSEDCLIP_HD inline bool IsFinite(double value) { return value - value == 0.0; }

// The larger of two non-negative numbers; NaN wins (fmax would drop it).
template <typename Value>
FUSEDCLIP_HD inline Value MaxWithNan(Value a, Value b) {
  return b > a || b != b ? b : a;
}

// Whether a sum of squares, taken in fp32 over at most a chunk, must be taken again with fp64
// products. They hold the square of every fp32 value, so that finite gradients always have a finite
// norm. A sum below the threshold is also that of a chunk of zeros: look before paying for the
// second pass. NaN is final: no finite value, squared and added up, leads to it.
template <typename Value>
FUSEDCLIP_HD inline bool NeedsWideSum(Value sum) {
  return sum < static_cast<Value>(kSmallestTrustedSum) || sum == static_cast<Value>(kInfinity);
}

// Σ|g|² or max|g| → the norm that the user is given: fp64 when any gradient is, else fp32.
FUSEDCLIP_HD inline double NormOf(double total, NormKind kind, bool any_float64) {
  const double norm = kind == NormKind::kInf ? total : std::sqrt(total);
  return any_float64 ? norm : static_cast<double>(static_cast<float>(norm));
}

// min(1, max_norm / (norm + 1e-6)). NaN stays NaN, an infinite max_norm never clips, and a negative
// one gives a negative coefficient: torch's function allows it.
FUSEDCLIP_HD inline double Coefficient(double norm, double max_norm) {
  if (max_norm == kInfinity) return 1.0;
  const double coefficient = max_norm / (norm + kNormEpsilon);
  return coefficient > 1.0 ? 1.0 : coefficient;
}

enum class Action : int32_t { kNone, kMultiply, kZero };

struct Decision {
  double factor;  // inv_scale · coefficient; used as it is for fp64 gradients, else as fp32
  Action action;
};

// `norm` is the norm as the user is given it, so that a coefficient can be checked by hand.
FUSEDCLIP_HD inline Decision Decide(double norm, double max_norm, Nonfinite policy,
                                    float inv_scale) {
  if (!IsFinite(norm) && policy == Nonfinite::kError) return {1.0, Action::kNone};
  if (!IsFinite(norm) && policy == Nonfinite::kZero) return {0.0, Action::kZero};
  if (!IsFinite(norm) && policy == Nonfinite::kUnclipped) return {inv_scale, Action::kMultiply};
  return {inv_scale * Coefficient(norm, max_norm), Action::kMultiply};
}

// The decision for one gradient: a factor that is 1 in its precision does nothing, and in fp32 one
// just below 1 may be.
FUSEDCLIP_HD inline Action ActionFor(Decision decision, DType dtype) {
  const double factor =
      dtype == DType::kFloat64 ? decision.factor : static_cast<float>(decision.factor);
  return decision.action == Action::kMultiply && factor == 1.0 ? Action::kNone : decision.action;
}

// Whether a decision changes no gradient of any type.
FUSEDCLIP_HD inline bool IsNoOp(Decision decision) {
  return decision.action == Action::kNone ||
         (decision.action == Action::kMultiply && decision.factor == 1.0);
}

}  // namespace fusedclip

#endif  // FUSEDCLIP_SEMANTICS_H_
