// measure: every gradient is read once, and the sum of its squares or its maximum left in slots.

#ifndef FUSEDCLIP_CUDA_MEASURE_CUH_
#define FUSEDCLIP_CUDA_MEASURE_CUH_

#include "cuda/arguments.h"
#include "cuda/chunks.cuh"
#include "cuda/elements.cuh"
#include "cuda/reduce.cuh"
#include "semantics.h"

namespace fusedclip::cuda {

// What a warp keeps of a chunk in shared memory, from measuring to scaling: its first vectors.
struct Kept {
  int first;  // in Shared().resident
  int count;

  __device__ bool Holds(int tile, int num) const { return tile + num <= count; }
  // An index and not an address, so that it is an access to shared memory for the compiler.
  __device__ uint4& At(int vector) const { return Shared().resident[first + vector]; }
};

// Of a warp's chunks the last are kept; `later` of them follow this one.
__device__ inline Kept KeptOf(const Arguments& args, int later) {
  const int64_t before = static_cast<int64_t>(later) * (args.chunk_bytes / 16);
  if (before >= args.resident_vectors) return {0, 0};
  const int own = static_cast<int>(threadIdx.x / kWarp) * args.resident_vectors;
  return {own + static_cast<int>(before), args.resident_vectors - static_cast<int>(before)};
}

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

__device__ inline bool IsZero(const uint4 (&raw)[kInFlight]) {
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) bits |= raw[k].x | raw[k].y | raw[k].z | raw[k].w;
  return bits == 0;
}

// Σv² (or max|v|) of a lane's vectors of a tile. Products and their sum, of at most 64 values, are
// in fp32, since GPUs for gaming have one fp64 unit for 64 of fp32; where that leaves fp32's range
// they are taken again in fp64, at no second read. Gradients of embeddings are mostly zeros, which
// are no reason to.
template <typename T, NormKind kKind>
__device__ inline double TileTotal(const uint4 (&raw)[kInFlight], float inv_scale) {
  using Value = typename T::Value;
  Value totals[kInFlight];
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
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
  for (int half = kInFlight / 2; half > 0; half /= 2) {
#pragma unroll
    for (int k = 0; k < half; ++k) totals[k] = Combine(kKind, totals[k], totals[k + half]);
  }
  if (kKind == NormKind::kInf || sizeof(Value) == sizeof(double) || !NeedsWideSum(totals[0])) {
    return totals[0];
  }
  if (IsZero(raw)) return 0.0;
  double wide = 0.0;
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    Value values[T::kPerVector];
    Unscale<T>(raw[k], inv_scale, values);
#pragma unroll
    for (int i = 0; i < T::kPerVector; ++i) wide += static_cast<double>(values[i]) * values[i];
  }
  return wide;
}

template <NormKind kKind>
__device__ inline double MeasureChunk(const Chunk& chunk, DType dtype, float inv_scale,
                                      const Kept& kept, int lane) {
  const uint4* vectors = reinterpret_cast<const uint4*>(chunk.vectors);
  double total = 0.0;
  for (int tile = 0; tile < chunk.num_vectors; tile += kTileVectors) {
    const int num = chunk.num_vectors - tile;
    const uint4* from = vectors + tile + lane;
    uint4 raw[kInFlight];
    ReadTile(num, lane, raw, [&](int at) { return LoadVector(from + at); });
    if (kept.Holds(tile, min(num, kTileVectors))) {
      WriteTile(num, lane, raw, [&](int at, uint4 vector) { kept.At(tile + lane + at) = vector; });
    }
    WithElement(dtype, [&](auto type) {
      total = Combine(kKind, total, TileTotal<decltype(type), kKind>(raw, inv_scale));
    });
  }
  if (chunk.head_bytes + chunk.tail_bytes == 0) return total;
  WithElement(dtype, [&](auto type) {
    using T = decltype(type);
    if (const auto* edge = EdgeElement<T>(chunk, lane)) {
      const double value =
          T::ToValue(LoadElement(edge)) * static_cast<typename T::Value>(inv_scale);
      total = Combine(kKind, total, kKind == NormKind::kInf ? Magnitude(value) : value * value);
    }
  });
  return total;
}

// Leaves the total of this block in its slot and, where slots have owners, the total of this warp's
// chunks of each owner in the slot of the first of them. An owner's chunks follow one another and
// are dealt in turn, so all that is left of it is in its first slots: as many as it has chunks, at
// most one for each warp of the grid.
template <NormKind kKind, typename Table>
__device__ inline void Measure(const Arguments& args, const Table& table, const Worker& warp,
                               float inv_scale) {
  double all = 0.0, own = 0.0;  // of this lane: all of its chunks, and those of the present owner
  int entry = 0, owner = 0, slot = -1;
  const auto leave = [&] {
    if (slot >= 0) {
      const double total = WarpTotal(kKind, own);
      if (warp.lane == 0) args.owner_slots[slot] = total;
    }
    all = Combine(kKind, all, own);
    own = 0.0;
  };
  for (int k = 0; k < warp.rounds; ++k) {
    const int chunk = warp.index + k * warp.count;
    entry = FindEntry(table, args.num_entries, entry, chunk);
    const Entry found = table[entry];
    if (args.owner_slots != nullptr) {
      const int its = args.entry_norms != nullptr ? entry : found.segment();
      if (slot < 0 || its != owner) {
        leave();
        owner = its;
        slot = chunk;
      }
    }
    const Chunk located = LocateChunk(found, chunk, args.chunk_bytes);
    const Kept kept = KeptOf(args, warp.rounds - 1 - k);
    own = Combine(kKind, own,
                  MeasureChunk<kKind>(located, found.dtype(), inv_scale, kept, warp.lane));
  }
  leave();
  const double total = BlockTotal(kKind, all);
  if (threadIdx.x == 0) args.block_slots[blockIdx.x] = total;
}

}  // namespace fusedclip::cuda

#endif  // FUSEDCLIP_CUDA_MEASURE_CUH_
