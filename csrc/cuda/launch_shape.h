// How a list is laid out on a device: the tuning values, and the reason for each.

#ifndef FUSEDCLIP_CUDA_LAUNCH_SHAPE_H_
#define FUSEDCLIP_CUDA_LAUNCH_SHAPE_H_

#include <cstdint>

namespace fusedclip::cuda {

inline constexpr int kWarp = 32;

// 256 threads with 8 loads of 16 bytes in flight ask for 32 KiB at a time of each multiprocessor;
// memory that answers 3 TB/s after 700 ns needs 18 KiB from each of 116. The rest of a thread's
// share of registers is for the values: with 512 threads the compiler spills them.
inline constexpr int kMaxThreads = 256;

// A grid with a barrier inside must never wait for a kernel that waits for another rank, which may
// wait for this rank's next kernel. So the grid leaves room for both to be resident at once:
//  - one block a multiprocessor, and none takes more than half of its threads (256 of 1,024 to
//    2,048), registers (256 × 128 of 65,536) or shared memory. A communication kernel that takes no
//    more than the other half fits beside it, and neither has to wait for the other.
//  - for kernels that need a whole multiprocessor, every eighth is left free. Seven eighths can
//    still saturate memory: see above.
struct LaunchShape {
  int compute_capability;  // the lowest that the row is for: 10 · major + minor
  int threads;
  int shared_kib;  // of a multiprocessor

  // Half of it, less what the system and the block's totals take.
  int resident_kib() const { return shared_kib / 2 - 2; }
};

inline constexpr LaunchShape kLaunchShapes[] = {
    {75, 256, 64},    // T4
    {80, 256, 164},   // A100
    {86, 256, 100},   // RTX 30
    {87, 256, 164},   // Orin
    {89, 256, 100},   // L4, L40S, RTX 40
    {90, 256, 228},   // H100, H200
    {100, 256, 228},  // B200
    {120, 256, 100},  // RTX 50
};

inline constexpr int kMultiprocessorsPerSpare = 8;

// Between 8 KiB, two vectors for each of 256 threads, and 256 KiB: a block reduction or a look-up
// in the table costs about 1 µs, a chunk of 256 KiB takes 11 µs at 3 TB/s over 132 multiprocessors.
inline constexpr int64_t kMinChunkBytes = 8 << 10;
inline constexpr int64_t kMaxChunkBytes = 256 << 10;

// Chunks are dealt in turn, so the last round is uneven: with 16 rounds by at most a sixteenth.
inline constexpr int64_t kRounds = 16;

struct Device {
  int compute_capability;
  int multiprocessors;
};

struct Layout {
  int threads;
  int max_blocks;
  int64_t chunk_bytes;
  int resident_chunks;
};

// The layout for a list of `total_bytes`. The environment variable FUSEDCLIP_CUDA_LAYOUT =
// "threads,blocks,chunk_bytes,resident_chunks" sets it by hand, to measure others; throws
// std::invalid_argument when it makes no sense.
Layout LayoutFor(const Device& device, int64_t total_bytes);

}  // namespace fusedclip::cuda

#endif  // FUSEDCLIP_CUDA_LAUNCH_SHAPE_H_
