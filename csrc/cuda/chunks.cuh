// Where things are: the chunks of a warp, the gradient of a chunk, the memory of a chunk.

#ifndef FUSEDCLIP_CUDA_CHUNKS_CUH_
#define FUSEDCLIP_CUDA_CHUNKS_CUH_

#include "cuda/arguments.h"
#include "cuda/launch_shape.h"

namespace fusedclip::cuda {

// A warp of the grid. Chunks are dealt to all warps in turn, neighbours to different blocks: warp
// `index` has the chunks index, index + count, …, `rounds` of them.
struct Worker {
  int index;
  int count;
  int lane;
  int rounds;
};

__device__ inline Worker ThisWarp(const Arguments& args) {
  const int blocks = static_cast<int>(gridDim.x);
  const int index = static_cast<int>(threadIdx.x / kWarp * gridDim.x + blockIdx.x);
  const int count = static_cast<int>(blockDim.x / kWarp) * blocks;
  const bool one_less = index + (args.rounds - 1) * count >= args.num_chunks;
  return {index, count, static_cast<int>(threadIdx.x % kWarp), args.rounds - one_less};
}

// The entry of a chunk. Tried first are `from`, where the warp was, and what it would be if every
// gradient from there on, or back to there, were one chunk; else it is searched between the two.
template <typename Table>
__device__ inline int FindEntry(const Table& table, int num_entries, int from, int chunk) {
  int low = 0, high = num_entries;  // the entry is in [low, high)
  const int ahead = from + (chunk - table[from].first_chunk);
  const int guess = ahead < 0 ? 0 : ahead >= num_entries ? num_entries - 1 : ahead;
  const int candidates[] = {from, guess};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int candidate = candidates[i];
    const bool begun = table[candidate].first_chunk <= chunk;
    if (begun && chunk < table[candidate + 1].first_chunk) return candidate;
    if (begun && candidate >= low) low = candidate + 1;
    if (!begun && candidate < high) high = candidate;
  }
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (table[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The chunks of a segment: entries are ordered by segment.
template <typename Table>
__device__ inline int FirstChunk(const Table& table, int num_entries, int segment) {
  int low = 0, high = num_entries;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (table[middle].segment() < segment) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return table[low].first_chunk;
}

// A chunk in memory: bytes before the first 16-byte border, whole vectors, bytes after them.
struct Chunk {
  char* vectors;
  int head_bytes;
  int num_vectors;
  int tail_bytes;

  __device__ char* head() const { return vectors - head_bytes; }
  __device__ char* tail() const { return vectors + int64_t{16} * num_vectors; }
};

__device__ inline Chunk LocateChunk(const Entry& entry, int chunk, int chunk_bytes) {
  // Chunks are cut at multiples of chunk_bytes from the border at or before the first element.
  const uint64_t base = entry.address & ~uint64_t{15};
  const uint64_t data_end = entry.address + static_cast<uint64_t>(entry.bytes);
  const uint64_t cut = base + static_cast<uint64_t>(chunk - entry.first_chunk) * chunk_bytes;
  const uint64_t begin = cut < entry.address ? entry.address : cut;
  const uint64_t end = cut + chunk_bytes < data_end ? cut + chunk_bytes : data_end;
  const uint64_t up = (begin + 15) & ~uint64_t{15};
  const uint64_t vectors = up < end ? up : end;
  const int num_vectors = static_cast<int>(end - vectors) / 16;
  return {reinterpret_cast<char*>(vectors), static_cast<int>(vectors - begin), num_vectors,
          static_cast<int>(end - vectors) % 16};
}

// The elements of a chunk that are in no whole vector: at most 7 before and 7 after them, one for a
// lane.
template <typename T>
__device__ inline typename T::Storage* EdgeElement(const Chunk& chunk, int lane) {
  using Storage = typename T::Storage;
  const int num_head = chunk.head_bytes / static_cast<int>(sizeof(Storage));
  const int num_tail = chunk.tail_bytes / static_cast<int>(sizeof(Storage));
  if (lane >= num_head + num_tail) return nullptr;
  return lane < num_head ? reinterpret_cast<Storage*>(chunk.head()) + lane
                         : reinterpret_cast<Storage*>(chunk.tail()) + (lane - num_head);
}

// A tile is what a warp has in flight: the vectors k · 32 + lane of it are one lane's. Of `num`
// vectors that are left of a chunk read(k · 32) gives those, counted from the lane's first; past
// the end are zeros. A whole tile is read with no condition, at fixed distances from one address.
template <typename Read>
__device__ inline void ReadTile(int num, int lane, uint4 (&tile)[kInFlight], Read read) {
  if (num >= kTileVectors) {
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) tile[k] = read(k * kWarp);
  } else {
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      tile[k] = k * kWarp + lane < num ? read(k * kWarp) : make_uint4(0, 0, 0, 0);
    }
  }
}

// write(k · 32, vector) for each of them.
template <typename Write>
__device__ inline void WriteTile(int num, int lane, const uint4 (&tile)[kInFlight], Write write) {
  if (num >= kTileVectors) {
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) write(k * kWarp, tile[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (k * kWarp + lane < num) write(k * kWarp, tile[k]);
    }
  }
}

}  // namespace fusedclip::cuda

#endif  // FUSEDCLIP_CUDA_CHUNKS_CUH_
