// The contract of every native backend: what it is given and what it answers.
//
// A backend offers Measure, Scale and Clip (the fused form). Python objects never come this far.

#ifndef FUSEDCLIP_CLIP_H_
#define FUSEDCLIP_CLIP_H_

#include <cstdint>

// For functions that device code calls too.
#ifdef __CUDACC__
#define FUSEDCLIP_HD __host__ __device__
#else
#define FUSEDCLIP_HD
#endif

namespace fusedclip {

// The element types, and below what is known of each.
enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };
inline constexpr int kNumDTypes = 4;

FUSEDCLIP_HD constexpr int64_t ItemSize(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// The code that DLPack has for a type of ItemSize bytes: its DLDataTypeCode.
constexpr int DLPackCode(DType dtype) {
  constexpr int kFloat = 2, kBfloat = 4;
  return dtype == DType::kBFloat16 ? kBfloat : kFloat;
}

enum class NormKind : int32_t { kL2, kInf };

// What a NaN or infinite norm does to the gradients: semantics.h has the list.
enum class Nonfinite : int32_t;

// One gradient: `numel` consecutive elements in memory, at any alignment.
struct GradSpan {
  void* data;
  int64_t numel;
  DType dtype;
  int32_t segment;  // which norm it counts towards, in [0, num_segments), or kNotCounted
};

// The segment of a gradient that counts towards no norm and is scaled by none.
inline constexpr int32_t kNotCounted = -1;

struct ClipRequest {
  const GradSpan* spans = nullptr;  // [num_spans], disjoint in memory
  int64_t num_spans = 0;
  int32_t num_segments = 1;
  NormKind norm_kind = NormKind::kL2;
  // Read by Clip. The pointers are to memory of the backend's own device.
  const double* max_norms = nullptr;  // [num_segments]; null means max_norm for all
  double max_norm = 0.0;
  const float* inv_scale = nullptr;  // factor on each value as it is loaded; null means 1
  Nonfinite policy{};                // the first one, kPropagate
  int num_threads = 1;               // at most; results have the same bits for any number
};

struct ClipOutcome {
  double* norm;                  // [num_segments], the caller's array: the norms before clipping
  bool nonfinite;                // some norm is NaN or infinite
  bool written;                  // some gradient was written
  double* span_norms = nullptr;  // [num_spans], the caller's array or null: the norm of each span
};

namespace cpu {

// Writes per segment Σg², or max|g|, to `out` [num_segments]. NaN propagates.
void Measure(const ClipRequest& request, double* out);

// Multiplies each gradient by the coefficient [num_segments] of its segment and returns whether any
// was written. A gradient whose coefficient is 1 in its own precision is not touched. With
// `zero_fill` a coefficient of 0 writes +0 over everything, NaN and inf included.
bool Scale(const ClipRequest& request, const double* coefficient, bool zero_fill);

// Limits each element to [-limit, limit] and returns whether any changed. NaN stays; rows that do
// not change are not written. `limit` is rounded to each gradient's type and must be finite in it.
bool Clamp(const ClipRequest& request, double limit);

// Measures, decides and scales. With Nonfinite::kError one bad segment leaves every gradient of the
// list as it was.
void Clip(const ClipRequest& request, ClipOutcome* outcome);

// Whether a second thread could serve the list faster: below that num_threads does not matter.
bool PaysThreads(const ClipRequest& request);

// The instruction set in use: "baseline", "avx2" or "avx512". The environment variable
// FUSEDCLIP_CPU_ISA picks one by name; throws std::invalid_argument when it cannot be had.
const char* InstructionSet();

}  // namespace cpu
}  // namespace fusedclip

#endif  // FUSEDCLIP_CLIP_H_
