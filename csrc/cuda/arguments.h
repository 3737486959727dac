// What a launch carries to the device: the table of gradients and the arguments. Plain data.

#ifndef FUSEDCLIP_CUDA_ARGUMENTS_H_
#define FUSEDCLIP_CUDA_ARGUMENTS_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "clip.h"
#include "semantics.h"

namespace fusedclip::cuda {

// One gradient. Entries are ordered by segment, and chunks are counted through the whole table.
struct Entry {
  uint64_t address;
  int64_t numel;
  int32_t first_chunk;
  int32_t tag;  // segment · 8 + dtype

  static_assert(kNumDTypes <= 8, "three bits of the tag hold the type");
  FUSEDCLIP_HD DType dtype() const { return static_cast<DType>(tag & 7); }
  FUSEDCLIP_HD int32_t segment() const { return tag >> 3; }  // kNotCounted stays -1
};
inline constexpr int32_t kMaxSegments = 1 << 28;

// Kernel parameters hold 32,764 bytes from CUDA 12.1 on, 4 KiB before.
inline constexpr int kParameterEntries = CUDART_VERSION >= 12010 ? 1344 : 160;

// A table that travels with the launch: no copy to the device, and a captured graph keeps it.
struct ParameterTable {
  Entry entries[kParameterEntries];
  FUSEDCLIP_HD const Entry& operator[](int i) const { return entries[i]; }
};

// A longer table, in device memory.
struct DeviceTable {
  const Entry* entries;
  FUSEDCLIP_HD const Entry& operator[](int i) const { return entries[i]; }
};

struct Arguments {
  int32_t num_entries;
  int32_t num_segments;
  int32_t num_chunks;
  int32_t chunk_bytes;      // a multiple of 16
  int32_t resident_chunks;  // of each block, kept in shared memory between measuring and scaling
  bool slot_per_chunk;      // partial sums by chunk; else, with one segment, by block
  bool any_float64;
  Nonfinite policy;
  double* slots;            // [num_chunks or grid size], scratch
  const float* inv_scale;   // null: 1
  const double* max_norms;  // [num_segments]; null: max_norm for all
  double max_norm;

  // What is written; null for results that are not wanted.
  double* totals;     // [num_segments], Σ|g|² or max|g|
  void* norms;        // [num_segments], fp64 where any_float64, else fp32
  void* entry_norms;  // [num_entries] likewise; needs slot_per_chunk
  float* found_inf;   // set to 1 when a norm is not finite, as torch's GradScaler has it
  bool scale;         // false: measure only
};

struct ScaleArguments {
  int32_t num_entries;
  int32_t num_segments;
  int32_t num_chunks;
  int32_t chunk_bytes;
  const double* coefficients;  // [num_segments], on the device
  bool zero_fill;              // a coefficient of 0 writes +0 over everything
};

}  // namespace fusedclip::cuda

#endif  // FUSEDCLIP_CUDA_ARGUMENTS_H_
