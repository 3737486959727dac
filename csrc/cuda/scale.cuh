// scale: gradients are multiplied in place, each by the decision for its segment.

#ifndef FUSEDCLIP_CUDA_SCALE_CUH_
#define FUSEDCLIP_CUDA_SCALE_CUH_

#include "cuda/measure.cuh"

namespace fusedclip::cuda {

template <typename T>
__device__ inline void ScaleTile(uint4 (&raw)[kInFlight], double factor) {
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    typename T::Value values[T::kPerVector];
    T::Unpack(raw[k], values);
#pragma unroll
    for (int i = 0; i < T::kPerVector; ++i) values[i] *= static_cast<typename T::Value>(factor);
    raw[k] = T::Pack(values);
  }
}

// A lane scales the vectors that it measured: what is in shared memory needs no barrier. Zeros are
// written over whatever is there, and nothing is read.
__device__ inline void ScaleChunk(const Chunk& chunk, DType dtype, double factor, Action action,
                                  const Kept& kept, int lane) {
  uint4* vectors = reinterpret_cast<uint4*>(chunk.vectors);
  for (int tile = 0; tile < chunk.num_vectors; tile += kTileVectors) {
    const int num = chunk.num_vectors - tile;
    uint4* at_lane = vectors + tile + lane;
    uint4 raw[kInFlight];
    if (action == Action::kZero) {
      ReadTile(0, lane, raw, [&](int) { return uint4{}; });
    } else {
      if (kept.Holds(tile, min(num, kTileVectors))) {
        ReadTile(num, lane, raw, [&](int at) { return kept.At(tile + lane + at); });
      } else {
        ReadTile(num, lane, raw, [&](int at) { return LoadVector(at_lane + at); });
      }
      WithElement(dtype, [&](auto type) { ScaleTile<decltype(type)>(raw, factor); });
    }
    WriteTile(num, lane, raw, [&](int at, uint4 vector) { StoreVector(at_lane + at, vector); });
  }
  if (chunk.head_bytes + chunk.tail_bytes == 0) return;
  WithElement(dtype, [&](auto type) {
    using T = decltype(type);
    if (auto* edge = EdgeElement<T>(chunk, lane)) {
      const auto by = static_cast<typename T::Value>(factor);
      StoreElement(edge,
                   T::FromValue(action == Action::kZero ? 0 : T::ToValue(LoadElement(edge)) * by));
    }
  });
}

// Scales this warp's chunks, the last first: what was read last is still in shared memory or in L2.
// decision_of(segment) is asked once for each run of chunks of one segment; where the only one
// changes nothing, N bytes were read and none is written.
template <typename Table, typename DecisionOf>
__device__ inline void Scale(const Arguments& args, const Table& table, const Worker& warp,
                             DecisionOf decision_of) {
  int entry = 0, segment = -1;
  Decision decision = {1.0, Action::kNone};
  for (int k = warp.rounds - 1; k >= 0; --k) {
    const int chunk = warp.index + k * warp.count;
    entry = FindEntry(table, args.num_entries, entry, chunk);
    const Entry found = table[entry];
    if (found.segment() != segment) {
      segment = found.segment();
      decision = decision_of(segment);
      if (args.num_segments == 1 && IsNoOp(decision)) return;
    }
    const Action action = ActionFor(decision, found.dtype());
    if (action == Action::kNone) continue;
    const Chunk located = LocateChunk(found, chunk, args.chunk_bytes);
    const Kept kept = KeptOf(args, warp.rounds - 1 - k);
    ScaleChunk(located, found.dtype(), decision.factor, action, kept, warp.lane);
  }
}

}  // namespace fusedclip::cuda

#endif  // FUSEDCLIP_CUDA_SCALE_CUH_
