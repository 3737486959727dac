// The device code: measure, reduce, decide and scale, in one cooperative launch or in one ordinary
// launch for each phase.
//
// Chunks of the table are dealt to the warps of the grid in turn. Every lane adds up what it reads,
// a block adds up its lanes, one number goes to a slot; then, after a barrier of the whole grid or
// the end of a launch, each warp adds up all slots in the same order, so that all come to the same
// decision, and none has to send it to the others. Several segments have their totals added up
// first, a warp each, which is a phase of its own.

#ifndef FUSEDCLIP_CUDA_KERNELS_CUH_
#define FUSEDCLIP_CUDA_KERNELS_CUH_

#include <cooperative_groups.h>

#include "cuda/arguments.h"
#include "cuda/chunks.cuh"
#include "cuda/measure.cuh"
#include "cuda/reduce.cuh"
#include "cuda/scale.cuh"
#include "semantics.h"

namespace fusedclip::cuda {

// Two such blocks fit a multiprocessor: see launch_shape.h.
inline constexpr int kRoomForBlocks = 2;

enum class Phase { kMeasure, kTotals, kFinish, kAll };

__device__ inline double NormOf(const Arguments& args, double total) {
  return NormOf(total, args.norm_kind, args.any_float64);
}

__device__ inline void StoreNorm(const Arguments& args, void* norms, int i, double norm) {
  if (args.any_float64) {
    static_cast<double*>(norms)[i] = norm;
  } else {
    static_cast<float*>(norms)[i] = static_cast<float>(norm);
  }
}

// Writes the results of a segment that were asked for.
__device__ inline void Publish(const Arguments& args, int segment, double total) {
  const double norm = NormOf(args, total);
  if (args.totals != nullptr) args.totals[segment] = total;
  if (args.norms != nullptr) StoreNorm(args, args.norms, segment, norm);
  if (args.found_inf != nullptr && !IsFinite(norm)) *args.found_inf = 1.0f;
}

// The total of an owner whose chunks are [first, end): see Measure.
__device__ inline double OwnerTotal(const Arguments& args, const Worker& warp, int first, int end) {
  return SlotTotal(args.norm_kind, args.owner_slots, first, min(end, first + warp.count));
}

// Adds up and publishes the totals of several segments.
template <typename Table>
__device__ inline void Totals(const Arguments& args, const Table& table, const Worker& warp) {
  for (int s = warp.index; s < args.num_segments; s += warp.count) {
    const double total = OwnerTotal(args, warp, FirstChunk(table, args.num_entries, s),
                                    FirstChunk(table, args.num_entries, s + 1));
    if (warp.lane == 0) Publish(args, s, total);
  }
}

template <typename Table>
__device__ inline void EntryNorms(const Arguments& args, const Table& table, const Worker& warp) {
  for (int i = warp.index; i < args.num_entries; i += warp.count) {
    const double total = OwnerTotal(args, warp, table[i].first_chunk, table[i + 1].first_chunk);
    if (warp.lane == 0) StoreNorm(args, args.entry_norms, i, NormOf(args, total));
  }
}

__device__ inline Decision DecisionFor(const Arguments& args, int segment, double total,
                                       float inv_scale) {
  if (args.coefficients != nullptr) {
    const double coefficient = args.coefficients[segment];
    const bool zero = args.zero_fill && coefficient == 0.0;
    return {coefficient, zero ? Action::kZero : Action::kMultiply};
  }
  const double max_norm = args.max_norms == nullptr ? args.max_norm : args.max_norms[segment];
  return Decide(NormOf(args, total), max_norm, args.policy, inv_scale);
}

// Whether nothing may be touched: kError, and some norm is not finite.
__device__ inline bool Refused(const Arguments& args, const Worker& warp) {
  if (args.policy != Nonfinite::kError) return false;
  double bad = 0.0;
  for (int s = warp.lane; s < args.num_segments; s += kWarp) {
    if (!IsFinite(NormOf(args, __ldcg(args.totals + s)))) bad = 1.0;
  }
  return WarpTotal(NormKind::kInf, bad) != 0.0;
}

// Decides and scales, where that is wanted; publishes what is left to publish.
template <typename Table>
__device__ inline void Finish(const Arguments& args, const Table& table, const Worker& warp,
                              float inv_scale) {
  const bool one = args.num_segments == 1, given = args.coefficients != nullptr;
  double total = 0.0;  // of the one segment
  if (one && !given) {
    total = SlotTotal(args.norm_kind, args.block_slots, 0, static_cast<int>(gridDim.x));
    if (warp.index == 0 && warp.lane == 0) Publish(args, 0, total);
  }
  if (args.scale && (one || given || !Refused(args, warp))) {
    Scale(args, table, warp, [&](int segment) {
      const double its = one || given ? total : __ldcg(args.totals + segment);
      return DecisionFor(args, segment, its, inv_scale);
    });
  }
  if (args.entry_norms != nullptr) EntryNorms(args, table, warp);
}

template <NormKind kKind, Phase kPhase, typename Table>
__global__ void __launch_bounds__(kMaxThreads, kRoomForBlocks)
    ClipKernel(const __grid_constant__ Arguments args, const __grid_constant__ Table table) {
  const Worker warp = ThisWarp(args);
  const float inv_scale = args.inv_scale == nullptr ? 1.0f : *args.inv_scale;
  if (kPhase == Phase::kMeasure || kPhase == Phase::kAll) {
    Measure<kKind>(args, table, warp, inv_scale);
  }
  if (kPhase == Phase::kAll) cooperative_groups::this_grid().sync();
  if (kPhase == Phase::kTotals) Totals(args, table, warp);
  if (kPhase == Phase::kAll && args.num_segments != 1) {
    Totals(args, table, warp);
    cooperative_groups::this_grid().sync();
  }
  if (kPhase == Phase::kFinish || kPhase == Phase::kAll) Finish(args, table, warp, inv_scale);
}

// Writes a part of a table that is too long for the parameters: asynchronous, with no pinned memory
// to keep alive, and a captured graph keeps it.
template <typename Table>
__global__ void __launch_bounds__(kMaxThreads)
    WriteTableKernel(Entry* to, int count, const __grid_constant__ Table part) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) to[i] = part[i];
}

}  // namespace fusedclip::cuda

#endif  // FUSEDCLIP_CUDA_KERNELS_CUH_
