// The device code: measure, decide and scale in one cooperative launch; and scaling on its own.
//
// Chunks of the table are dealt to the blocks in turn. Every thread adds up what it reads, a block
// adds up its threads, one number goes to a slot; after a barrier of the whole grid each block adds
// up all slots in the same order, so that all blocks come to the same decision, and no block has to
// send it to the others. Then each walks its chunks backwards: what was read last is still in
// shared memory or in L2.

#ifndef FUSEDCLIP_CUDA_KERNELS_CUH_
#define FUSEDCLIP_CUDA_KERNELS_CUH_

#include <cooperative_groups.h>

#include "cuda/arguments.h"
#include "cuda/chunks.cuh"
#include "cuda/elements.cuh"
#include "cuda/launch_shape.h"
#include "cuda/reduce.cuh"
#include "semantics.h"

namespace fusedclip::cuda {

// Two such blocks fit a multiprocessor, one is launched: see launch_shape.h.
inline constexpr int kRoomForBlocks = 2;

// 16-byte loads that a thread has in flight; when scaling, as many stores follow.
inline constexpr int kReadsInFlight = 8;
inline constexpr int kScalesInFlight = 4;

// Vectors whose squares are added in fp32, at most 32 values, before going on in fp64: GPUs for
// gaming have one fp64 unit for 64 of fp32.
inline constexpr int kVectorsPerSum = 4;

// |v|, the sign bit cleared: NaN stays NaN.
template <typename Value>
__device__ inline Value Magnitude(Value value) {
  return value < 0 ? -value : value;
}

template <typename T>
__device__ inline void Unscale(uint4 raw, float inv_scale,
                               typename T::Value (&values)[T::kPerVector]) {
  T::Unpack(raw, values);
#pragma unroll
  for (int i = 0; i < T::kPerVector; ++i) values[i] *= inv_scale;
}

// Σv² (or max|v|) of a few vectors in registers. Products and their sum are in fp32; where that
// leaves fp32's range they are taken again in fp64, at no second read.
template <typename T, NormKind kKind>
__device__ inline double VectorsTotal(const uint4* raw, float inv_scale) {
  using Value = typename T::Value;
  Value totals[kVectorsPerSum];
#pragma unroll
  for (int k = 0; k < kVectorsPerSum; ++k) {
    Value values[T::kPerVector];
    Unscale<T>(raw[k], inv_scale, values);
    totals[k] = 0;
#pragma unroll
    for (int i = 0; i < T::kPerVector; ++i) {
      totals[k] = kKind == NormKind::kInf ? MaxWithNan(totals[k], Magnitude(values[i]))
                                          : totals[k] + values[i] * values[i];
    }
  }
#pragma unroll
  for (int half = kVectorsPerSum / 2; half > 0; half /= 2) {
#pragma unroll
    for (int k = 0; k < half; ++k) totals[k] = Combine<kKind>(totals[k], totals[k + half]);
  }
  if (kKind == NormKind::kInf || sizeof(Value) == sizeof(double) || !NeedsWideSum(totals[0])) {
    return totals[0];
  }
  double wide = 0.0;
#pragma unroll
  for (int k = 0; k < kVectorsPerSum; ++k) {
    Value values[T::kPerVector];
    Unscale<T>(raw[k], inv_scale, values);
#pragma unroll
    for (int i = 0; i < T::kPerVector; ++i) {
      // Gradients of embeddings are mostly zeros, and many GPUs have few fp64 units.
      if (values[i] != 0) wide += static_cast<double>(values[i]) * values[i];
    }
  }
  return wide;
}

// A thread keeps the vectors that it reads in `resident`, where that is not null.
template <typename T, NormKind kKind>
__device__ inline double MeasureChunk(const Chunk& chunk, float inv_scale, uint4* resident) {
  const uint4* vectors = reinterpret_cast<const uint4*>(chunk.vectors);
  const int stride = blockDim.x;
  double total = 0.0;
  for (int i = threadIdx.x; i < chunk.num_vectors; i += kReadsInFlight * stride) {
    uint4 raw[kReadsInFlight];
#pragma unroll
    for (int k = 0; k < kReadsInFlight; ++k) {
      const int at = i + k * stride;
      raw[k] = at < chunk.num_vectors ? LoadVector(vectors + at) : make_uint4(0, 0, 0, 0);
    }
    if (resident != nullptr) {
#pragma unroll
      for (int k = 0; k < kReadsInFlight; ++k) {
        const int at = i + k * stride;
        if (at < chunk.num_vectors) resident[at] = raw[k];
      }
    }
#pragma unroll
    for (int k = 0; k < kReadsInFlight; k += kVectorsPerSum) {
      total = Combine<kKind>(total, VectorsTotal<T, kKind>(raw + k, inv_scale));
    }
  }
  if (const auto* edge = EdgeElement<T>(chunk)) {
    const auto value = T::ToValue(LoadElement(edge)) * static_cast<typename T::Value>(inv_scale);
    const double wide = value;
    total = Combine<kKind>(total, kKind == NormKind::kInf ? Magnitude(wide) : wide * wide);
  }
  return total;
}

template <typename T>
__device__ inline typename T::Value Scaled(typename T::Value value, typename T::Value factor,
                                           Action action) {
  return action == Action::kZero ? typename T::Value(0) : value * factor;
}

template <typename T>
__device__ inline void ScaleChunk(const Chunk& chunk, double wide_factor, Action action,
                                  const uint4* resident) {
  using Value = typename T::Value;
  const Value factor = static_cast<Value>(wide_factor);
  uint4* vectors = reinterpret_cast<uint4*>(chunk.vectors);
  const int stride = blockDim.x;
  // A thread scales the vectors that it measured: what is in shared memory needs no barrier.
  for (int i = threadIdx.x; i < chunk.num_vectors; i += kScalesInFlight * stride) {
    uint4 raw[kScalesInFlight];
#pragma unroll
    for (int k = 0; k < kScalesInFlight; ++k) {
      const int at = i + k * stride;
      if (at < chunk.num_vectors) raw[k] = resident ? resident[at] : LoadVector(vectors + at);
    }
#pragma unroll
    for (int k = 0; k < kScalesInFlight; ++k) {
      const int at = i + k * stride;
      if (at >= chunk.num_vectors) break;
      Value values[T::kPerVector];
      T::Unpack(raw[k], values);
#pragma unroll
      for (int j = 0; j < T::kPerVector; ++j) values[j] = Scaled<T>(values[j], factor, action);
      StoreVector(vectors + at, T::Pack(values));
    }
  }
  if (auto* edge = EdgeElement<T>(chunk)) {
    StoreElement(edge, T::FromValue(Scaled<T>(T::ToValue(LoadElement(edge)), factor, action)));
  }
}

__device__ inline uint4* Resident(const Arguments& args, int k, int num_mine) {
  const int slot = k - (num_mine - args.resident_chunks);
  return slot < 0 ? nullptr : Shared().resident + slot * (args.chunk_bytes / 16);
}

// Reads every counted gradient once and leaves partial totals in the slots.
template <NormKind kKind, typename Table>
__device__ inline void MeasureMine(const Table& table, const Arguments& args, float inv_scale,
                                   int num_mine) {
  double total = 0.0;
  int entry = 0;
  for (int k = 0; k < num_mine; ++k) {
    const int chunk = blockIdx.x + k * gridDim.x;
    entry = FindEntry(table, entry, args.num_entries, chunk);
    if (table[entry].segment() != kNotCounted) {
      const Chunk located = LocateChunk(table[entry], chunk, args.chunk_bytes);
      uint4* resident = Resident(args, k, num_mine);
      WithElement(table[entry].dtype(), [&](auto type) {
        total = Combine<kKind>(total,
                               MeasureChunk<decltype(type), kKind>(located, inv_scale, resident));
      });
    }
    if (args.slot_per_chunk) {
      total = BlockTotal<kKind>(total);
      if (threadIdx.x == 0) args.slots[chunk] = total;
      total = 0.0;
    }
  }
  if (!args.slot_per_chunk) {
    total = BlockTotal<kKind>(total);
    if (threadIdx.x == 0) args.slots[blockIdx.x] = total;
  }
}

// The total of slots [begin, end), in every thread.
template <NormKind kKind>
__device__ inline double SlotTotal(const double* slots, int begin, int end) {
  double total = 0.0;
  for (int i = begin + threadIdx.x; i < end; i += blockDim.x) {
    total = Combine<kKind>(total, __ldcg(slots + i));
  }
  return BlockTotal<kKind>(total);
}

template <NormKind kKind, typename Table>
__device__ inline double SegmentTotal(const Table& table, const Arguments& args, int segment) {
  if (!args.slot_per_chunk) return SlotTotal<kKind>(args.slots, 0, gridDim.x);
  return SlotTotal<kKind>(args.slots, FirstChunk(table, args, segment),
                          FirstChunk(table, args, segment + 1));
}

__device__ inline void StoreNorm(void* norms, int i, double norm, bool float64) {
  if (float64) {
    static_cast<double*>(norms)[i] = norm;
  } else {
    static_cast<float*>(norms)[i] = static_cast<float>(norm);
  }
}

__device__ inline double MaxNorm(const Arguments& args, int segment) {
  return args.max_norms == nullptr ? args.max_norm : args.max_norms[segment];
}

// Writes the results that were asked for, each by one block.
template <NormKind kKind, typename Table>
__device__ inline void Publish(const Table& table, const Arguments& args) {
  for (int s = blockIdx.x; s < args.num_segments; s += gridDim.x) {
    const double total = SegmentTotal<kKind>(table, args, s);
    if (threadIdx.x != 0) continue;
    const double norm = NormOf(total, kKind, args.any_float64);
    if (args.totals != nullptr) args.totals[s] = total;
    if (args.norms != nullptr) StoreNorm(args.norms, s, norm, args.any_float64);
    if (args.found_inf != nullptr && !IsFinite(norm)) *args.found_inf = 1.0f;
  }
  if (args.entry_norms == nullptr) return;
  for (int i = blockIdx.x; i < args.num_entries; i += gridDim.x) {
    const int end = i + 1 == args.num_entries ? args.num_chunks : table[i + 1].first_chunk;
    const double total = SlotTotal<kKind>(args.slots, table[i].first_chunk, end);
    if (threadIdx.x == 0) {
      StoreNorm(args.entry_norms, i, NormOf(total, kKind, args.any_float64), args.any_float64);
    }
  }
}

// Whether nothing may be touched: kError, and some norm is not finite.
template <NormKind kKind, typename Table>
__device__ inline bool Refused(const Table& table, const Arguments& args) {
  if (args.policy != Nonfinite::kError) return false;
  for (int s = 0; s < args.num_segments; ++s) {
    if (!IsFinite(NormOf(SegmentTotal<kKind>(table, args, s), kKind, args.any_float64)))
      return true;
  }
  return false;
}

template <NormKind kKind, typename Table>
__device__ inline void ScaleMine(const Table& table, const Arguments& args, float inv_scale,
                                 int num_mine) {
  if (Refused<kKind>(table, args)) return;
  int segment = kNotCounted;
  Decision decision = {1.0, Action::kNone};
  int above = args.num_entries;
  for (int k = num_mine - 1; k >= 0; --k) {
    const int chunk = blockIdx.x + k * gridDim.x;
    const int at = FindEntry(table, 0, above, chunk);
    const Entry& entry = table[at];
    above = at + 1;
    if (entry.segment() == kNotCounted) continue;
    if (entry.segment() != segment) {
      segment = entry.segment();
      const double total = SegmentTotal<kKind>(table, args, segment);
      decision = Decide(NormOf(total, kKind, args.any_float64), MaxNorm(args, segment), args.policy,
                        inv_scale);
      if (args.num_segments == 1 && IsNoOp(decision)) return;  // N bytes read, none written
    }
    const Action action = ActionFor(decision, entry.dtype());
    if (action == Action::kNone) continue;
    const Chunk located = LocateChunk(entry, chunk, args.chunk_bytes);
    const uint4* resident = Resident(args, k, num_mine);
    WithElement(entry.dtype(), [&](auto type) {
      ScaleChunk<decltype(type)>(located, decision.factor, action, resident);
    });
  }
}

template <NormKind kKind, typename Table>
__global__ void __launch_bounds__(kMaxThreads, kRoomForBlocks)
    ClipKernel(const __grid_constant__ Table table, const __grid_constant__ Arguments args) {
  const float inv_scale = args.inv_scale == nullptr ? 1.0f : *args.inv_scale;
  const int num_mine =
      (args.num_chunks - 1 - static_cast<int>(blockIdx.x)) / static_cast<int>(gridDim.x) + 1;
  MeasureMine<kKind>(table, args, inv_scale, num_mine);
  cooperative_groups::this_grid().sync();
  Publish<kKind>(table, args);
  if (args.scale) ScaleMine<kKind>(table, args, inv_scale, num_mine);
}

template <typename Table>
__global__ void __launch_bounds__(kMaxThreads, kRoomForBlocks)
    ScaleKernel(const __grid_constant__ Table table, const __grid_constant__ ScaleArguments args) {
  int entry = 0;
  for (int chunk = blockIdx.x; chunk < args.num_chunks; chunk += gridDim.x) {
    entry = FindEntry(table, entry, args.num_entries, chunk);
    if (table[entry].segment() == kNotCounted) continue;
    const double coefficient = args.coefficients[table[entry].segment()];
    const bool zero = args.zero_fill && coefficient == 0.0;
    const Decision decision = {coefficient, zero ? Action::kZero : Action::kMultiply};
    if (args.num_segments == 1 && IsNoOp(decision)) return;
    const Action action = ActionFor(decision, table[entry].dtype());
    if (action == Action::kNone) continue;
    const Chunk located = LocateChunk(table[entry], chunk, args.chunk_bytes);
    WithElement(table[entry].dtype(), [&](auto type) {
      ScaleChunk<decltype(type)>(located, decision.factor, action, nullptr);
    });
  }
}

// Writes a table that is too long for the parameters, a part a launch: asynchronous, with no pinned
// memory to keep alive, and a captured graph keeps it.
__global__ void __launch_bounds__(kMaxThreads)
    WriteTableKernel(const __grid_constant__ ParameterTable part, int count, Entry* to) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) to[i] = part[i];
}

}  // namespace fusedclip::cuda

#endif  // FUSEDCLIP_CUDA_KERNELS_CUH_
