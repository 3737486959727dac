// Where things are: the memory of a chunk, the gradient of a chunk, the chunks of a segment.

#ifndef FUSEDCLIP_CUDA_CHUNKS_CUH_
#define FUSEDCLIP_CUDA_CHUNKS_CUH_

#include "cuda/arguments.h"

namespace fusedclip::cuda {

// A chunk in memory: elements before the first 16-byte border, whole vectors, elements after them.
struct Chunk {
  char* head;
  char* vectors;
  char* tail;
  int num_head;
  int num_vectors;
  int num_tail;
};

__device__ inline Chunk LocateChunk(const Entry& entry, int chunk, int chunk_bytes) {
  // Chunks are cut at multiples of chunk_bytes from the border at or before the first element.
  const int item = static_cast<int>(ItemSize(entry.dtype()));
  const uint64_t base = entry.address & ~uint64_t{15};
  const uint64_t data_end = entry.address + static_cast<uint64_t>(entry.numel) * item;
  const uint64_t cut = base + static_cast<uint64_t>(chunk - entry.first_chunk) * chunk_bytes;
  const uint64_t begin = cut < entry.address ? entry.address : cut;
  const uint64_t end = cut + chunk_bytes < data_end ? cut + chunk_bytes : data_end;
  const uint64_t up = (begin + 15) & ~uint64_t{15};
  const uint64_t vectors = up < end ? up : end;
  const uint64_t down = end & ~uint64_t{15};
  const uint64_t tail = down > vectors ? down : vectors;
  return {reinterpret_cast<char*>(begin),        reinterpret_cast<char*>(vectors),
          reinterpret_cast<char*>(tail),         static_cast<int>(vectors - begin) / item,
          static_cast<int>(tail - vectors) / 16, static_cast<int>(end - tail) / item};
}

// The entry of a chunk: the last in [low, high) that begins at or before it, given that low does.
template <typename Table>
__device__ inline int FindEntry(const Table& table, int low, int high, int chunk) {
  if (low + 1 == high || chunk < table[low + 1].first_chunk) return low;
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
__device__ inline int FirstChunk(const Table& table, const Arguments& args, int segment) {
  int low = 0;
  int high = args.num_entries;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (table[middle].segment() < segment) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low == args.num_entries ? args.num_chunks : table[low].first_chunk;
}

// The elements of a chunk that are in no whole vector: at most 7 before and 7 after them.
template <typename T>
__device__ inline typename T::Storage* EdgeElement(const Chunk& chunk) {
  using Storage = typename T::Storage;
  const int i = threadIdx.x;
  if (i >= chunk.num_head + chunk.num_tail) return nullptr;
  return i < chunk.num_head ? reinterpret_cast<Storage*>(chunk.head) + i
                            : reinterpret_cast<Storage*>(chunk.tail) + (i - chunk.num_head);
}

}  // namespace fusedclip::cuda

#endif  // FUSEDCLIP_CUDA_CHUNKS_CUH_
