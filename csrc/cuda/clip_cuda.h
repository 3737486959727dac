// The CUDA backend's host side. Pointers called "device" are read and written by the kernels in the
// order of the stream; nothing here waits for them.

#ifndef FUSEDCLIP_CUDA_CLIP_CUDA_H_
#define FUSEDCLIP_CUDA_CLIP_CUDA_H_

#include <cstdint>
#include <vector>

#include "clip.h"

namespace fusedclip::cuda {

// What a launch over a list will need. Depends on sizes, dtypes, segments and alignments, and on
// the device.
struct Plan {
  int64_t num_entries = 0;  // of the spans, those that are listed
  int32_t num_segments = 1;
  NormKind norm_kind = NormKind::kL2;
  bool listed_as_given = true;
  std::vector<int64_t> listed;  // else: the spans that the table lists, by segment
  int64_t num_chunks = 0;
  int64_t chunk_bytes = 0;
  int threads = 0;
  int num_blocks = 0;
  int resident_vectors = 0;  // of 16 bytes that each warp keeps in shared memory
  bool cooperative = true;   // else one launch for each phase
  bool entry_norms = false;
  bool any_float64 = false;
  int64_t scratch_bytes = 0;  // device memory that the call is handed
  int64_t table_bytes = 0;    // 0: the table travels in the kernel's parameters
};

// Where a launch happens, and the memory that it is handed.
struct Place {
  int device;
  void* stream;       // cudaStream_t
  void* scratch;      // device, scratch_bytes; no other launch of its time uses it
  const void* table;  // device, what WriteTable wrote; null when table_bytes is 0
};

// Device pointers; null for results that are not wanted.
struct DeviceOutcome {
  double* totals = nullptr;     // [num_segments], Σ|g|² or max|g|
  void* norms = nullptr;        // [num_segments], fp64 when any gradient is, else fp32
  void* entry_norms = nullptr;  // [num_spans] likewise; ask MakePlan for it
  float* found_inf = nullptr;   // set to 1 when a norm is not finite, else left alone
};

// With `entry_norms` all gradients are of segment 0. Throws std::runtime_error when a call of CUDA
// fails, as all functions here do.
Plan MakePlan(const ClipRequest& request, int device, bool entry_norms);

// Writes table_bytes to host memory: the same bytes for the same gradients, for WriteTable.
void FillTable(const Plan& plan, const ClipRequest& request, void* table);

// Writes what FillTable made to table_bytes on the device.
void WriteTable(const Plan& plan, const void* table, int device, void* stream, void* to);

// Measures; with `scale` also decides and scales. One cooperative launch; one for each phase where
// the plan says so or the device refuses the grid: measure, the totals of several segments, finish.
// In the request, inv_scale and max_norms are device pointers.
void Clip(const Plan& plan, const ClipRequest& request, const Place& place,
          const DeviceOutcome& outcome, bool scale);

// Multiplies by coefficients [num_segments] on the device; see cpu::Scale.
void Scale(const Plan& plan, const ClipRequest& request, const Place& place,
           const double* coefficients, bool zero_fill);

}  // namespace fusedclip::cuda

#endif  // FUSEDCLIP_CUDA_CLIP_CUDA_H_
