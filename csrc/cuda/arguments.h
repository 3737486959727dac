// What a launch carries to the device: the arguments and the table of gradients. Plain data.

#ifndef FUSEDCLIP_CUDA_ARGUMENTS_H_
#define FUSEDCLIP_CUDA_ARGUMENTS_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "clip.h"
#include "semantics.h"

namespace fusedclip::cuda {

// One gradient that is counted. Entries are ordered by segment, and chunks are counted through the
// whole table; after the last entry stands one whose first chunk is the number of all.
struct Entry {
  uint64_t address;
  int64_t bytes;
  int32_t first_chunk;
  int32_t tag;  // segment · 8 + dtype

  static_assert(kNumDTypes <= 8, "three bits of the tag hold the type");
  FUSEDCLIP_HD DType dtype() const { return static_cast<DType>(tag & 7); }
  FUSEDCLIP_HD int32_t segment() const { return tag >> 3; }
};
inline constexpr int32_t kMaxSegments = 1 << 28;

// A table that travels with the launch: no copy to the device, and a captured graph keeps it.
template <int kEntries>
struct ParameterTable {
  static constexpr int kCapacity = kEntries;
  Entry entries[kEntries + 1];
  FUSEDCLIP_HD const Entry& operator[](int i) const { return entries[i]; }
};

// A longer table, in device memory.
struct DeviceTable {
  const Entry* entries;
  FUSEDCLIP_HD const Entry& operator[](int i) const { return entries[i]; }
};

// All parameters of a launch are copied, of few gradients as of many: so there are three sizes.
// Drivers before R530, and toolkits before 12.1, take 4 KiB of parameters; later ones 32,764 bytes.
inline constexpr int kFewEntries = 160;
inline constexpr int kMoreEntries = 448;
inline constexpr int kMostEntries = 1344;
inline constexpr int kLargeParametersVersion = 12010;  // of the driver and of the toolkit

// Before the table: its entries are looked up, these are read by all.
struct Arguments {
  int32_t num_entries;
  int32_t num_segments;
  int32_t num_chunks;
  int32_t rounds;            // chunks of the warp that has most of them
  int32_t chunk_bytes;       // a multiple of 16
  int32_t resident_vectors;  // of 16 bytes that each warp keeps from measuring to scaling
  NormKind norm_kind;
  Nonfinite policy;
  bool any_float64;
  bool scale;      // false: measure only
  bool zero_fill;  // a coefficient of 0 writes +0 over everything
  double max_norm;
  const float* inv_scale;      // null: 1
  const double* max_norms;     // [num_segments]; null: max_norm for all
  const double* coefficients;  // [num_segments], on the device; null: from the norms

  // Scratch. A slot's owner is its gradient where entry_norms is given, else its segment.
  double* block_slots;  // [grid size], the total of each block
  double* owner_slots;  // [num_chunks]: see Measure; null with one segment and no entry_norms

  // What is written; null for results that are not wanted, but totals with several segments.
  double* totals;     // [num_segments], Σ|g|² or max|g|
  void* norms;        // [num_segments], fp64 where any_float64, else fp32
  void* entry_norms;  // [num_entries] likewise, of a list of one segment
  float* found_inf;   // set to 1 when a norm is not finite, as torch's GradScaler has it
};

static_assert(sizeof(Arguments) + sizeof(ParameterTable<kFewEntries>) <= 4096, "see above");
static_assert(sizeof(Arguments) + sizeof(ParameterTable<kMostEntries>) <= 32764, "see above");

}  // namespace fusedclip::cuda

#endif  // FUSEDCLIP_CUDA_ARGUMENTS_H_
